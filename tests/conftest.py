# SPDX-License-Identifier: Apache-2.0
"""
What all tests share: no network, nothing of the user's caches, and no more threads than there are cores.

The environment is set here, and not in a fixture, because the libraries read it when they are imported, and because
the interpreters that tests start inherit it.
"""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest

from tests.hub_server import HubServer


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

# Whoever starts the tests in the background may let them ignore Ctrl-C, and what they start with them.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Timings on shared machines vary too much for a deadline, and CI has to give the same answer twice.
hypothesis.settings.register_profile("karat", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("karat")


# What takes longest begins first, so that nobody waits for it at the end.
FIRST = ("system/test_kernels.py", "system/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [f"tests/{name}" not in item.nodeid for name in FIRST])


def pytest_collection_finish() -> None:
    """
    What is imported stays: later garbage collections need not look at it. accelerate collects after every training,
    which with all modules of all tests loaded took nine tenths of the time of a small one.
    """
    import torch

    gc.collect()
    gc.freeze()
    # Some tests train in forks. They may not where the process's first backward pass follows `torch.compile`, which
    # brings a device of its own: PyTorch then starts threads for it.
    torch.ones((), requires_grad=True).backward()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # Or extension modules take it for a leak.
    shutil.rmtree(_hf_home, ignore_errors=True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine, which the libraries here, and the interpreters that are started, take for the real one."""
    import huggingface_hub
    import transformers.utils.hub

    with HubServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        for name, value in (
            ("ENDPOINT", server.endpoint),
            ("HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", True),
            ("HF_HUB_CACHE", str(tmp_path / "hub-cache")),
        ):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        # Made once, for one address.
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


# Hides modules as if they were not installed: asked for, they are not found, which is what `is_..._available` looks at.
_HIDE = """
import sys

class _Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *args, **kwargs):
        hidden = name.partition(".")[0] in {names!r}
        return None if hidden else self.finder.find_spec(name, *args, **kwargs)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [_Without(finder) for finder in sys.meta_path]
"""


@pytest.fixture
def fresh_interpreter(tmp_path):
    """
    A function `run(code, *arguments, hide=())` that runs Python code in an interpreter of its own, away from the
    project's folder, without the modules named in `hide`; returns what it printed, and fails where it fails.
    """
    project = str(Path(__file__).parents[1])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(code: str, *arguments, hide=()) -> str:
        # What PYTHONPATH lays over the environment stays; the project is found only where it is installed.
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", project)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths))}
        code = _HIDE.format(names=set(hide)) + code
        command = [sys.executable, "-c", code, *map(str, arguments)]
        result = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
        return result.stdout

    return run


@pytest.fixture
def stranger(fresh_interpreter):
    """
    A function `ask(repository, image)`: what an interpreter without this package makes of a repository of the Hub, the
    names of its KArAt parameters and the pipeline's guesses.
    """

    def ask(repository: str, image: Path) -> tuple[list[str], list[dict]]:
        hidden = ["modeling_karat_vit", "image_classification"]
        return json.loads(fresh_interpreter(_STRANGER, repository, image, hide=hidden).splitlines()[-1])

    return ask


_STRANGER = """
import importlib.util, json, sys

assert importlib.util.find_spec("modeling_karat_vit") is None, "the package must not be found here"
from transformers import AutoModelForImageClassification, pipeline

name, image = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
classify = pipeline("image-classification", model=name, trust_remote_code=True)
print(json.dumps([sorted(model.karat_parameter_names()), classify(image, top_k=10)]))
"""
