# SPDX-License-Identifier: Apache-2.0
"""For benchmarks/runs.py, until it imports from `paths`."""

from .paths import CONFIGURATION as CONFIGURATION
