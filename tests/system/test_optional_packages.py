# SPDX-License-Identifier: Apache-2.0
"""Importing, loading and predicting need torch, transformers, safetensors, einops and Pillow alone."""

import configparser
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.models import make_model, save_checkpoint


PROJECT = Path(__file__).parents[2]
# Where the module has another name than its distribution; left out is what Transformers and the Hub's client need too.
MODULES = {"scikit-learn": "sklearn", "pytest-xdist": "xdist", "pyyaml": None, "filelock": None}

USER = """
import sys
from pathlib import Path

import torch

import modeling_karat_vit
from transformers import AutoModelForImageClassification, pipeline

folder, image, *hidden = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(folder)
assert type(model) is modeling_karat_vit.KArAtViTForImageClassification
print(pipeline("image-classification", model=folder)(image)[0]["label"])
assert not set(hidden) & set(sys.modules), set(hidden) & set(sys.modules)

from modeling_karat_vit.karat_convit import KArAtConViTForImageClassification

try:
    KArAtConViTForImageClassification(KArAtConViTForImageClassification.config_class(architecture="convit_tiny"))
except ImportError as error:
    assert "KArAtConViTForImageClassification requires the timm library" in str(error), error
else:
    raise AssertionError("a ConViT without timm")
"""

PREDICT = """
import runpy
import sys

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def optional_modules() -> list[str]:
    """The modules of every package that only the extras of setup.cfg ask for, and Triton."""
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    extras = " ".join(setup["options.extras_require"].values())
    names = sorted(set(re.findall(r"[\w-]+", extras)))
    return [module for name in names if (module := MODULES.get(name, name))] + ["triton", "pandas", "pyarrow"]


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(make_model(labels=["cat", "dog"]), tmp_path / "checkpoint")


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (12, 9), (200, 80, 40)).save(path)
    return path


def test_the_extras_are_what_is_hidden():
    assert {"torchvision", "timm", "datasets", "accelerate", "sklearn", "triton"} <= set(optional_modules())


def test_importing_loading_and_predicting_need_no_optional_package(checkpoint, image, fresh_interpreter):
    hidden = optional_modules()
    printed = fresh_interpreter(f"sys.path.insert(0, {str(PROJECT)!r})" + USER, checkpoint, image, *hidden, hide=hidden)
    assert printed.split()[-1] in ("cat", "dog")


def test_predict_needs_no_optional_package(checkpoint, image, fresh_interpreter):
    code = f"sys.path.insert(0, {str(PROJECT)!r})" + PREDICT
    printed = fresh_interpreter(code, PROJECT / "predict.py", image, "--model", checkpoint, hide=optional_modules())
    assert "cat" in printed
    assert "dog" in printed
