# SPDX-License-Identifier: Apache-2.0
"""The page of `python -m analysis demo` as a Space of the Hugging Face Hub: its files, and how they get there."""

import configparser
import importlib.metadata
import json
import sys
from pathlib import Path

from huggingface_hub import SpaceCardData
from packaging.requirements import Requirement
from packaging.version import Version

from image_classification.errors import InputError, more
from image_classification.hub import understood
from image_classification.models.loading import base_of_adapter
from image_classification.paths import PROJECT
from image_classification.publishing.repository import Repository
from image_classification.reports.card import code_span

from .viewer import Viewer


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

APP = '''\
# SPDX-License-Identifier: Apache-2.0
"""The page of this Space. Made by `python -m analysis demo --push-to-space`."""

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

Made by `python -m analysis demo --push-to-space` of KArAt-ViT, which also updates it.
"""


def files(viewers: list[Viewer], examples: list[str]) -> dict[str, Path | bytes]:
    """
    Gather the files of the Space: paths in it, and for each a file here or its content. Models from folders go into it,
    those from the Hub are loaded from there.
    """
    result: dict[str, Path | bytes] = {"LICENSE": PROJECT / "LICENSE"}
    sources = (path for package in CODE for path in sorted((PROJECT / package).rglob("*.py")))
    result |= {path.relative_to(PROJECT).as_posix(): path for path in sources}
    words, on_hub, names = ["demo"], [], []
    for flag, viewer in zip(("--model", "--compare"), viewers):
        source = viewer.checkpoint.source
        if (base := base_of_adapter(source)) is not None:
            raise InputError(f"`{flag}` {source} is an adapter of {base}; a Space holds whole models: merge it first.")
        if Path(source).is_dir():
            name = f"models/{viewer.name.replace('/', '-')}"
            found = {path.name: path for pattern in MODEL_FILES for path in sorted(Path(source).glob(pattern))}
            result |= {f"{name}/{file}": path for file, path in found.items()}
            words += [flag, name]
        else:
            on_hub.append(source)
            words += [flag, source]
        names.append(code_span(viewer.name))
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
    """Pin what the page needs, by setup.cfg, to the versions that are installed here. Gradio comes with the Space."""
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
        if name.count("/") != 1:
            raise InputError(f"`--push-to-space` is {name}, expected USER/NAME.")
        self._space = Repository(name, RECORD, kind="space")
        with understood("--push-to-space", name):
            self._space.api.whoami()
            self._content = self._space.look()
        if self._content and self._content.blobs and self._content.record is None and not overwrite:
            there = sorted(self._content.blobs)
            raise InputError(
                f"The Space {name} is there already, and this command did not make it: it holds "
                f"{', '.join(there[:3])}{more(there, 3)}. Choose another name, or replace files of it with --overwrite "
                "(the Space's history keeps them)."
            )

    def push(self, viewers: list[Viewer], examples: list[str]) -> None:
        """
        Make or update the Space, in one commit. Files that somebody added stay; those of an earlier push that are not
        needed any more go.

        Raises:
            InputError: the Hub refuses it.
        """
        new = files(viewers, examples)
        ours = self._content.ours if self._content else []
        with understood("--push-to-space", self.name):
            if self._content is None:
                private = self.private or None
                self._space.api.create_repo(self.name, repo_type="space", space_sdk="gradio", private=private)
            # Nothing that somebody else pushed in the meantime is overwritten.
            parent = self._content.head if self._content else None
            self._space.commit(new, [path for path in ours if path not in new], "Show what the model looks at", parent)
        print(self._space.url)
