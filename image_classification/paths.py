# SPDX-License-Identifier: Apache-2.0
"""Where the project's own files lie."""

from pathlib import Path


PROJECT = Path(__file__).resolve().parents[1]
CONFIGURATION = PROJECT / "configuration"
