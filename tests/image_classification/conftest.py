# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the training tests."""

import pytest

from tests.images import make_image_folder, own_library_settings  # noqa: F401


@pytest.fixture(autouse=True)
def _own_library_settings(own_library_settings):  # noqa: F811
    pass


@pytest.fixture
def image_folder(tmp_path):
    return make_image_folder(tmp_path / "images")


# A model and a schedule that train in a second.
SMALL = (
    "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 16 "
    "--per_device_train_batch_size 16 --warmup_epochs 0 --use_cpu --cpu_threads 1 --disable_tqdm "
    "--dataloader_num_workers 0"
).split()


@pytest.fixture
def small():
    """Flags of a model and a schedule that train in a second."""
    return list(SMALL)
