# SPDX-License-Identifier: Apache-2.0
"""The kernels in Triton's interpreter, which has to be chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("triton")
TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("cases", sorted(TESTS.rglob("*kernel_cases.py")), ids=lambda path: path.stem)
def test_kernels_in_the_interpreter(cases):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(cases)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-2000:]
    assert " passed" in process.stdout
