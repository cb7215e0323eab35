# SPDX-License-Identifier: Apache-2.0
"""Importing, loading and predicting need torch, transformers, safetensors, einops and Pillow alone."""

import configparser
import re
from pathlib import Path

from PIL import Image

from tests.models import make_model, save_checkpoint


PROJECT = Path(__file__).parents[2]
# Where the module has another name than its distribution; left out is what Transformers and the Hub's client need too.
MODULES = {"scikit-learn": "sklearn", "pytest-xdist": "xdist", "pyyaml": None, "filelock": None}

# Arguments are the script, an image, a folder, and the modules that are hidden.
USER = """
import runpy
import sys

import modeling_karat_vit
from transformers import AutoModelForImageClassification, pipeline

script, image, folder, *hidden = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(folder)
assert type(model) is modeling_karat_vit.KArAtViTForImageClassification
print(pipeline("image-classification", model=folder)(image)[0]["label"])
sys.argv = [script, image, "--model", folder]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as ended:
    assert not ended.code
assert not set(hidden) & set(sys.modules), set(hidden) & set(sys.modules)

from modeling_karat_vit.karat_convit import KArAtConViTForImageClassification

try:
    KArAtConViTForImageClassification(KArAtConViTForImageClassification.config_class(architecture="convit_tiny"))
except ImportError as error:
    assert "KArAtConViTForImageClassification requires the timm library" in str(error), error
else:
    raise AssertionError("a ConViT without timm")
"""


def optional_modules() -> list[str]:
    """The modules of every package that only the extras of setup.cfg ask for, and Triton."""
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    extras = " ".join(setup["options.extras_require"].values())
    names = sorted(set(re.findall(r"[\w-]+", extras)))
    return [module for name in names if (module := MODULES.get(name, name))] + ["triton", "pandas", "pyarrow"]


def test_the_extras_are_what_is_hidden():
    assert {"torchvision", "timm", "datasets", "accelerate", "sklearn", "triton"} <= set(optional_modules())


def test_importing_loading_and_predicting_need_no_optional_package(tmp_path, fresh_interpreter):
    checkpoint = save_checkpoint(make_model(labels=["cat", "dog"]), tmp_path / "checkpoint")
    image, hidden = tmp_path / "image.png", optional_modules()
    Image.new("RGB", (12, 9), (200, 80, 40)).save(image)
    code = f"sys.path.insert(0, {str(PROJECT)!r})" + USER
    label, *table = fresh_interpreter(code, PROJECT / "predict.py", image, checkpoint, *hidden, hide=hidden).split()
    assert label in ("cat", "dog") and {"cat", "dog"} <= set(table)
