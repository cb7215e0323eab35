# SPDX-License-Identifier: Apache-2.0
"""The page of `python -m analysis demo` as a Space of the Hugging Face Hub: its files, and how they get there."""

import configparser
import contextlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCardData
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from packaging.requirements import Requirement
from packaging.version import Version

from image_classification.errors import InputError, more

from .demo import Viewer


PROJECT = Path(__file__).parents[1]
# What the page is made of; it is run from a copy.
CODE = ("analysis", "image_classification", "modeling_karat_vit")
# What a checkpoint folder holds beside much that is not needed to load it.
MODEL_FILES = (
    "config.json",
    "preprocessor_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
)
# Says that a Space is ours, and which files are.
RECORD = ".karat_vit_demo.json"
# What the Hub itself puts into a new Space.
OF_THE_HUB = {".gitattributes"}

APP = '''\
# SPDX-License-Identifier: Apache-2.0
"""The page of this Space. Made by `python -m analysis demo --push_to_space`."""

import os
import sys
from pathlib import Path

from analysis.__main__ import main


os.chdir(Path(__file__).parent)
sys.exit(main({words!r}))
'''

README = """\
---
{metadata}
---

# What the model looks at

Drop in an image, and see the five best guesses, where each head of each block looks, and the functions that KArAt
(Kolmogorov-Arnold attention, [arXiv 2503.10632](https://arxiv.org/abs/2503.10632)) learned. Models: {models}.

Made by `python -m analysis demo --push_to_space` of KArAt-ViT, which also updates it.
"""


def files(viewers: list[Viewer], examples: list[str]) -> dict[str, Path | bytes]:
    """
    The files of the Space: paths in it, and for each a file here or its content.

    Args:
        viewers: the models: those from folders go into the Space, those from the Hub are loaded from there.
        examples: image files to offer.
    """
    result: dict[str, Path | bytes] = {"LICENSE": PROJECT / "LICENSE"}
    for package in CODE:
        result |= {f"{package}/{path.name}": path for path in sorted((PROJECT / package).glob("*.py"))}
    words, on_hub, names = ["demo"], [], []
    for flag, viewer in zip(("--model", "--compare"), viewers):
        source = viewer.checkpoint.source
        if Path(source).is_dir():
            name = f"models/{viewer.name.replace('/', '-')}"
            found = {path.name: path for pattern in MODEL_FILES for path in sorted(Path(source).glob(pattern))}
            result |= {f"{name}/{file}": path for file, path in found.items()}
            words += [flag, name]
        else:
            on_hub.append(source)
            words += [flag, source]
        names.append(f"`{viewer.name}`")
    if examples:
        result |= {f"examples/{Path(example).name}": Path(example) for example in examples}
        words += ["--examples", "examples"]
    metadata = SpaceCardData(
        title="KArAt-ViT: what the model looks at",
        emoji="🔍",
        colorFrom="blue",
        colorTo="red",
        sdk="gradio",
        sdk_version=importlib.metadata.version("gradio"),
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        license="apache-2.0",
        tags=["karat-vit", "interpretability", "image-classification"],
        models=on_hub or None,
    )
    result["app.py"] = APP.format(words=words).encode()
    result["requirements.txt"] = requirements().encode()
    result["README.md"] = README.format(metadata=metadata.to_yaml(), models=", ".join(names)).encode()
    result[RECORD] = json.dumps({"files": sorted(result)}, indent=1).encode()
    return result


def requirements() -> str:
    """What the page needs, by setup.cfg, in the versions that are installed here. Gradio comes with the Space."""
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    asked = f"{setup['options']['install_requires']}\n{setup['options.extras_require']['demo']}"
    names = {Requirement(line).name for line in asked.splitlines() if line.strip()} - {"gradio"}
    # Without the local part of a version, such as +cpu, which is not on the index.
    return "".join(f"{name}=={Version(importlib.metadata.version(name)).public}\n" for name in sorted(names))


class Target:
    """
    The Space to write to. Made before the models are loaded, so that what cannot be pushed is refused at once.

    Args:
        name: `USER/NAME`.
        overwrite: whether it may be one that `push` did not make.
        private: for a Space that does not exist: whether only its owner sees it.

    Raises:
        InputError: nobody is logged in, the name is no Space's, the Hub cannot be reached, or there is a Space of that
            name that holds other things.
    """

    def __init__(self, name: str, overwrite: bool = False, private: bool = False):
        self.name, self.private = name, private
        self._api = HfApi()
        self._revision, self._ours = None, []
        if name.count("/") != 1:
            raise InputError(f"`--push_to_space` is {name}, expected USER/NAME.")
        with self._understood():
            self._api.whoami()
            try:
                info = self._api.space_info(name)
            except RepositoryNotFoundError:
                return
            self._revision = info.sha
            there = {file.rfilename for file in info.siblings or []} - OF_THE_HUB
            if RECORD in there:
                record = Path(self._api.hf_hub_download(name, RECORD, repo_type="space", revision=info.sha))
                self._ours = [file for file in json.loads(record.read_text())["files"] if file in there]
            elif there and not overwrite:
                raise InputError(
                    f"The Space {name} is there already, and this command did not make it: it holds "
                    f"{', '.join(sorted(there)[:3])}{more(sorted(there), 3)}. Choose another name, or replace files of "
                    "it with --overwrite (the Space's history keeps them)."
                )

    def push(self, viewers: list[Viewer], examples: list[str]) -> None:
        """
        Make or update the Space, in one commit. Files that somebody added stay; those of an earlier push that are not
        needed any more go.

        Raises:
            InputError: the Hub refuses it.
        """
        new = files(viewers, examples)
        operations = [CommitOperationAdd(path, content) for path, content in new.items()]
        operations += [CommitOperationDelete(path) for path in self._ours if path not in new]
        with self._understood():
            if self._revision is None:
                self._api.create_repo(self.name, repo_type="space", space_sdk="gradio", private=self.private or None)
            self._api.create_commit(
                self.name,
                operations,
                repo_type="space",
                commit_message="Show what the model looks at",
                # Nothing that somebody else pushed in the meantime is overwritten.
                parent_commit=self._revision,
            )
        print(f"{self._api.endpoint}/spaces/{self.name}")

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        """Errors of the Hub, as messages."""
        try:
            yield
        except LocalTokenNotFoundError as error:
            raise InputError("`--push_to_space` needs an account of the Hub: log in with `hf auth login`.") from error
        except HFValidationError as error:
            raise InputError(f"`--push_to_space` is {self.name}, which is no name of a Space: {error}") from error
        except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled) as error:
            response = getattr(error, "response", None)
            if response is not None and response.status_code == 401:
                hint = "the Hub does not know your token. Log in with `hf auth login`."
            elif response is not None and response.status_code == 403:
                hint = f"your token may not write there: {_first_line(error)}"
            else:
                hint = f"the Hub cannot be reached, or refuses: {_first_line(error)}"
            raise InputError(f"`--push_to_space` {self.name}: {hint}") from error


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
