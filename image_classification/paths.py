# SPDX-License-Identifier: Apache-2.0
"""Where the project's own files lie."""

from pathlib import Path


PROJECT = Path(__file__).resolve().parents[1]
CONFIGURATION = PROJECT / "configuration"
# A trained model with images, which `python -m results.example` makes; it may be missing.
EXAMPLE = Path(__file__).parent / "example"
