# SPDX-License-Identifier: Apache-2.0
"""What `pip install .` puts into an environment imports, trains and predicts without the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.images import make_image_folder
from tests.models import make_model, save_checkpoint


PROJECT = Path(__file__).parents[2]
# What no build needs, or what an earlier one left.
LEFT_OUT = shutil.ignore_patterns(".*", "*.egg-info", "build", "outputs", "output", "tests", "docs", "__pycache__")

IMPORT_ALL = """
import importlib, pkgutil, sys

for name in ("modeling_karat_vit", "image_classification"):
    package = importlib.import_module(name)
    assert package.__file__.startswith(sys.prefix), package.__file__
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            assert error.name is None or error.name.startswith("triton"), error
        print(module.name)
"""
TRAIN = "import sys; from image_classification.main import main; sys.exit(main(sys.argv[1:]))"
PREDICT = """
import sys

import modeling_karat_vit
from transformers import pipeline

classify = pipeline("image-classification", model=sys.argv[1], device="cpu")
assert type(classify.model) is modeling_karat_vit.KArAtViTForImageClassification
print(classify(sys.argv[2])[0]["label"])
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment with the wheel, and with the packages of this one but nothing editable."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    shutil.copytree(PROJECT, folder / "source", ignore=LEFT_OUT)
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, folder / "source"], check=True)
    shutil.rmtree(folder / "source")
    venv.create(folder / "environment")
    python = folder / "environment" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", python, "install", *offline, wheel], check=True)
    (site,) = folder.glob("environment/lib/python*/site-packages")
    # The `.pth` files in that folder are not read, and what is installed editable is in one of them.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


def run(python: Path, folder: Path, *words) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    process = subprocess.run([python, "-c", *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-3000:]
    return process.stdout


def test_every_module_is_there(python, tmp_path):
    imported = set(run(python, tmp_path, IMPORT_ALL).split())
    files = [
        path.relative_to(PROJECT)
        for name in ("modeling_karat_vit", "image_classification")
        for path in (PROJECT / name).rglob("*.py")
    ]
    expected = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files}
    assert imported == expected - {"modeling_karat_vit", "image_classification"}


def test_it_trains_and_predicts(python, tmp_path):
    images = make_image_folder(tmp_path / "images")
    start = save_checkpoint(make_model(labels=["blue", "green", "red"]), tmp_path / "start")
    flags = f"--model {start} --data_path {images} --output_dir run --num_train_epochs 1 --use_cpu --disable_tqdm"
    run(python, tmp_path, TRAIN, *flags.split(), "--dataloader_num_workers", "0", "--warmup_epochs", "0")
    photo = next(images.rglob("validation/red/*.jpg"))
    assert run(python, tmp_path, PREDICT, tmp_path / "run", photo).strip() in ("blue", "green", "red")
