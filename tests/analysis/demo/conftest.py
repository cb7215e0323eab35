# SPDX-License-Identifier: Apache-2.0
"""What visitors bring."""

import pytest


@pytest.fixture
def photo(photos):
    return f"{photos}/0.png"
