# SPDX-License-Identifier: Apache-2.0
"""What `pip install .` puts into an environment imports, trains and predicts without the checkout."""

import json
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

# Arguments are an image, a folder to train into, and the flags to do so.
USER = """
import importlib, json, pkgutil, sys

import modeling_karat_vit
from image_classification.main import main
from transformers import pipeline

image, folder, *flags = sys.argv[1:]
assert main([*flags, "--output_dir", folder]) == 0
classify = pipeline("image-classification", model=folder, device="cpu")
assert type(classify.model) is modeling_karat_vit.KArAtViTForImageClassification
imported = []
for name in ("modeling_karat_vit", "image_classification"):
    package = importlib.import_module(name)
    assert package.__file__.startswith(sys.prefix), package.__file__
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            assert error.name is None or error.name.startswith("triton"), error
        imported.append(module.name)
print(json.dumps([classify(image)[0]["label"], imported]))
"""


@pytest.fixture
def python(tmp_path):
    """The interpreter of an environment with the wheel, and with the packages of this one but nothing editable."""
    folder = tmp_path / "wheel"
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


def test_it_trains_predicts_and_has_every_module(python, tmp_path):
    images = make_image_folder(tmp_path / "images")
    start = save_checkpoint(make_model(labels=["blue", "green", "red"]), tmp_path / "start")
    flags = f"--model {start} --data_path {images} --num_train_epochs 1 --use_cpu --disable_tqdm --warmup_epochs 0"
    words = [next(images.rglob("validation/red/*.jpg")), "run", *flags.split(), "--dataloader_num_workers", "0"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [python, "-c", USER, *words]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-3000:]
    label, imported = json.loads(process.stdout.splitlines()[-1])
    assert label in ("blue", "green", "red")
    packages = {"modeling_karat_vit", "image_classification"}
    files = [path.relative_to(PROJECT) for name in packages for path in (PROJECT / name).rglob("*.py")]
    expected = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files}
    assert set(imported) == expected - packages
