# SPDX-License-Identifier: Apache-2.0
"""A saved folder is all that a stranger needs: `trust_remote_code=True` loads it without this package."""

import json
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
from PIL import Image

from modeling_karat_vit import (
    KArAtViTBackbone,
    KArAtViTForMaskedImageModeling,
    KArAtViTImageProcessor,
    KArAtViTImageProcessorPil,
    KArAtViTModel,
)
from modeling_karat_vit.configuration_karat_vit import BASIS_TYPES, WAVELET_TYPES
from tests.models import make_model, save_checkpoint


OPERATORS = {basis: {"basis_type": basis} for basis in BASIS_TYPES if basis != "wavelet"}
OPERATORS |= {wavelet: {"basis_type": "wavelet", "wavelet_type": wavelet} for wavelet in WAVELET_TYPES}
OPERATORS["everything-else"] = {
    "base_fn": "silu",
    "sharing": "universal",
    "num_karat_heads": 1,
    "karat_layers": [-1],
    "project_l1": True,
}

# Run by the interpreter without the package, once for all the folders: arguments are the folder of them, and an image.
STRANGER = """
import importlib.util, json, sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, pipeline

assert importlib.util.find_spec("modeling_karat_vit") is None, "the package must not be found here"
root, image = Path(sys.argv[1]), sys.argv[2]
trusted = {"trust_remote_code": True}

def check(folder, expected, pixels):
    config = AutoConfig.from_pretrained(folder, **trusted)
    base = AutoModel.from_pretrained(folder, **trusted).eval()
    classifier = AutoModelForImageClassification.from_pretrained(folder, **trusted).eval()
    for thing in (config, base, classifier):
        assert type(thing).__module__.startswith("transformers_modules."), type(thing)
    with torch.no_grad():
        states = base(pixels).last_hidden_state
        outputs = classifier(pixels, output_hidden_states=True)
    assert torch.equal(states, expected["states"]), f"{folder}: AutoModel"
    backbone = classifier.vit.layernorm(outputs.hidden_states[-1])
    assert torch.equal(backbone, expected["states"]), f"{folder}: the classifier's backbone"
    if "logits" in expected:
        assert torch.equal(outputs.logits, expected["logits"]), f"{folder}: AutoModelForImageClassification"
    return classifier

checked = []
for folder in sorted(root.iterdir()):
    expected = torch.load(folder / "expected.pt")
    classifier = check(folder, expected, expected["pixels"])
    if "logits" in expected:
        top = pipeline("image-classification", model=str(folder), **trusted)(image)[0]
        assert top["label"] in ("cat", "dog", "bird"), top
        # What was loaded this way can be passed on.
        again = root.parent / "again" / folder.name
        classifier.save_pretrained(again)
        check(again, expected, expected["pixels"])
    checked.append(folder.name)
print(json.dumps(checked))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each basis, saved by the classifier, and by the model alone."""
    root = tmp_path_factory.mktemp("strangers") / "saved"
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 8, 8)
    for name, operator in OPERATORS.items():
        classifier = make_model(labels=["cat", "dog", "bird"], karat_rank=3, **operator).eval()
        model = KArAtViTModel(classifier.config).eval()
        with torch.no_grad():
            states, logits = classifier.vit(pixels).last_hidden_state, classifier(pixels).logits
            own = {"pixels": pixels, "states": model(pixels).last_hidden_state}
        for kind, saved, expected in (
            ("classifier", classifier, {"pixels": pixels, "states": states, "logits": logits}),
            ("model", model, own),
        ):
            torch.save(expected, Path(save_checkpoint(saved, root / f"{name}-{kind}")) / "expected.pt")
    return root


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (12, 9), (200, 80, 40)).save(path)
    return path


def test_a_stranger_loads_every_basis(folders, image, fresh_interpreter):
    printed = fresh_interpreter(STRANGER, folders, image, hide=["modeling_karat_vit", "image_classification"])
    assert json.loads(printed.splitlines()[-1]) == sorted(folder.name for folder in folders.iterdir())


def test_no_file_is_taken_for_another_module_by_a_python_started_in_the_folder(folders):
    """`operator.py` would stop it at `import json`, and `kernels.py` at `import transformers` beside that package."""
    others = {*sys.stdlib_module_names, *packages_distributions(), "kernels"} - {"modeling_karat_vit"}
    for folder in folders.iterdir():
        assert not {path.stem for path in folder.glob("*.py")} & others


# Run by the interpreter without the package: arguments are a file with the expected tensors, and two repositories.
STRANGER_OF_OTHERS = """
import sys
import torch
from transformers import AutoBackbone, AutoModelForMaskedImageModeling

expected = torch.load(sys.argv[1])
backbone = AutoBackbone.from_pretrained(sys.argv[2], trust_remote_code=True, out_features=["stem", "stage2"]).eval()
painter = AutoModelForMaskedImageModeling.from_pretrained(sys.argv[3], trust_remote_code=True).eval()
with torch.no_grad():
    maps = backbone(expected["pixels"]).feature_maps
    painted = painter(expected["pixels"]).reconstruction
assert len(maps) == 2 and torch.equal(maps[1], expected["map"])
assert torch.equal(painted, expected["painted"])
"""


@torch.no_grad()
def test_a_stranger_loads_backbone_and_masked_image_modelling(hub, tmp_path, fresh_interpreter):
    """From the Hub: `AutoBackbone.from_pretrained` takes no folder, in Transformers itself."""
    config = make_model(encoder_stride=4).config
    expected = {"pixels": torch.randn(2, 3, 8, 8)}
    for cls in (KArAtViTBackbone, KArAtViTForMaskedImageModeling):
        torch.manual_seed(0)
        model = cls(config).eval()
        output = model(expected["pixels"])
        if cls is KArAtViTBackbone:
            expected["map"] = output.feature_maps[-1]
        else:
            expected["painted"] = output.reconstruction
        model.save_pretrained(tmp_path / cls.__name__)
        hub.add(f"me/{cls.__name__}", {path.name: path.read_bytes() for path in (tmp_path / cls.__name__).iterdir()})
    torch.save(expected, tmp_path / "expected.pt")
    repositories = [f"me/{cls.__name__}" for cls in (KArAtViTBackbone, KArAtViTForMaskedImageModeling)]
    hide = ["modeling_karat_vit", "image_classification"]
    fresh_interpreter(STRANGER_OF_OTHERS, tmp_path / "expected.pt", *repositories, hide=hide)


# Run by the interpreter without the package: arguments are a folder with a processor, an image and its expected pixels,
# and a repository with the same.
STRANGER_WITH_IMAGES = """
import sys
import torch
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

folder, repository, again = sys.argv[1:]
for place in (folder, repository, again):
    processor = AutoImageProcessor.from_pretrained(place, trust_remote_code=True)
    assert type(processor).__module__.startswith("transformers_modules."), type(processor)
    pixels = processor(Image.open(f"{folder}/image.png"), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, torch.load(f"{folder}/pixels.pt")), place
    processor.save_pretrained(again)
"""


@pytest.mark.parametrize("kind", [KArAtViTImageProcessor, KArAtViTImageProcessorPil])
def test_a_stranger_prepares_images(kind, hub, tmp_path, fresh_interpreter):
    """With and without torchvision, whichever class was saved: a partly transparent image gives the same pixels."""
    folder = tmp_path / "saved"
    other = KArAtViTImageProcessor if kind is KArAtViTImageProcessorPil else KArAtViTImageProcessorPil
    other(size={"height": 8, "width": 8}).save_pretrained(folder)
    hub.add("me/model", {path.name: path.read_bytes() for path in folder.iterdir()})
    image = Image.new("RGBA", (12, 9), (200, 80, 40, 100))
    image.save(folder / "image.png")
    pixels = kind(size={"height": 8, "width": 8})(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    torch.save(pixels, folder / "pixels.pt")
    hide = ["modeling_karat_vit", "image_classification"]
    hide += ["torchvision"] if kind is KArAtViTImageProcessorPil else []
    fresh_interpreter(STRANGER_WITH_IMAGES, folder, "me/model", tmp_path / "again", hide=hide)
