# SPDX-License-Identifier: Apache-2.0
"""
What all tests share: no network, nothing of the user's caches, and no more threads than there are cores.

The environment is set here, and not in a fixture, because the libraries read it when they are imported, and because
the interpreters that tests start inherit it.
"""

import os
import shutil
import tempfile

import hypothesis


_hf_home = tempfile.mkdtemp(prefix="karat-vit-tests-")
os.environ["HF_HOME"] = _hf_home
for _cache in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_TOKEN"):
    os.environ.pop(_cache, None)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"

# Each of pytest-xdist's workers would otherwise take all the cores.
if _workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(_workers))))

# Timings on shared machines vary too much for a deadline, and CI has to give the same answer twice.
hypothesis.settings.register_profile("karat", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("karat")


def pytest_unconfigure() -> None:
    shutil.rmtree(_hf_home, ignore_errors=True)
