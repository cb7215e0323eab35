# SPDX-License-Identifier: Apache-2.0
"""What the rooms' tests have, for those that start processes, compile, or need a browser."""

from tests.analysis.conftest import run_folder  # noqa: F401
from tests.image_classification.conftest import _own_library_settings, image_folder, small  # noqa: F401
from tests.images import own_library_settings  # noqa: F401
from tests.modeling_karat_vit.conftest import make_config, make_model, pixels  # noqa: F401
