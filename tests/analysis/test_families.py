# SPDX-License-Identifier: Apache-2.0
"""Analyses of models of other families, with KArAt heads in them and without."""

import csv
import json

import numpy as np
import pytest
import torch
from transformers import ViTImageProcessor

from analysis import attention, functions, weights
from analysis.demo.viewer import VIEWS, Viewer
from analysis.models import load_checkpoint
from analysis.recording import record
from image_classification.errors import InputError
from modeling_karat_vit import karatize
from tests.backbones import attentions_of, make
from tests.images import COLOURS, make_image_folder


OPERATOR = {"grid_size": 1, "karat_rank": 3, "layers": [-1], "heads": 1}
# Special tokens of both blocks: [CLS] and 4 registers, [CLS] and the distillation token, none, one; and windows.
PREFIX = {"registers_classifier": (5, 5), "deit_classifier": (2, 2), "siglip_classifier": (0, 0)}
PREFIX |= {"clip_classifier": (1, 1), "beit_bias": (1, 1), "convit_classifier": (0, 1)}
WINDOWS = "swin_classifier"


def karatized(name: str):
    torch.manual_seed(2)
    model = karatize(make(name), **OPERATOR)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "gamma", None) is not None:
                module.gamma.fill_(0.7)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of karatized models, and of the softmax ones they are from, by name."""
    root = tmp_path_factory.mktemp("families")
    for name in (*PREFIX, WINDOWS):
        side = 16 if name == WINDOWS else 8
        for kind, model in (("karat", karatized(name)), ("softmax", make(name))):
            model.config.id2label, model.config.label2id = (
                dict(enumerate(COLOURS)),
                {c: i for i, c in enumerate(COLOURS)},
            )
            model.save_pretrained(root / kind / name)
            ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(root / kind / name)
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("data") / "photos", (("all", 1),)) / "all"


@pytest.mark.parametrize("kind", ["karat", "softmax"])
@pytest.mark.parametrize("name", PREFIX)
def test_maps_are_those_of_the_model(kind, name, folders):
    checkpoint = load_checkpoint(str(folders / kind / name))
    special = PREFIX[name]
    assert (checkpoint.grid, checkpoint.tokens) == ((2, 2), 4 + special[-1])
    assert (checkpoint.prefix(0), checkpoint.prefix(1)) == special
    assert checkpoint.head_kinds(1) == [kind, "softmax"] and checkpoint.head_kinds(0) == ["softmax"] * 2
    pixels = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        expected = attentions_of(checkpoint.model, pixels)
        logits = checkpoint.model(pixel_values=pixels).logits
    maps = attention.compute_all(checkpoint, pixels, batch_size=2)
    for block, (each, prefix) in enumerate(zip(maps, special, strict=True)):
        theirs = expected[block].numpy()
        rows = theirs[:, :, 0] if prefix else theirs.mean(2)
        np.testing.assert_allclose(each.after[..., 1:], rows[..., prefix:], rtol=1e-5, atol=1e-6)
        assert np.allclose(each.after[..., 0], rows[..., 0] if prefix else 0)
        patch = attention.compute(checkpoint, pixels, block, query=3)
        np.testing.assert_allclose(patch.after[..., 1:], theirs[:, :, 2 + prefix, prefix:], rtol=1e-5, atol=1e-6)
    # Softmax heads are the softmax of the scores that are handed on, relative positions and all; not ConViT's gated.
    recorded = record(checkpoint, pixels, [0, 1])[int(name == "convit_classifier")]
    torch.testing.assert_close(recorded.scores.softmax(-1)[:, 1:], recorded.maps[:, 1:])
    with torch.no_grad():  # And the model is as it was.
        assert torch.equal(checkpoint.model(pixel_values=pixels).logits, logits)
        assert all(torch.equal(*each) for each in zip(attentions_of(checkpoint.model, pixels), expected))


@pytest.mark.system
@pytest.mark.parametrize("name", ["registers_classifier", "siglip_classifier", "convit_classifier"])
def test_every_analysis_runs(name, folders, photos, analyse):
    karat, softmax = (str(folders / kind / name) for kind in ("karat", "softmax"))
    both, images = ["--model", karat, "--compare", softmax], ["--images", photos, "--num-images", 2]
    out = analyse("attention", *both, *images)
    analyse("spectrum", *both, *images)
    analyse("functions", "--model", karat, *images)
    analyse("faithfulness", *both, *images, "--steps", 2, "--resamples", 10)
    analyse("compare", "--model", karat, softmax, "--names", "ours", "theirs", "--no-measure")
    analyse("landscape", "--model", karat, *images, "--grid", 3, "--workers", 1, "--hessian-iterations", 2)
    with (out / "compare.csv").open(newline="") as file:
        ours, theirs = csv.DictReader(file)
    assert "in the first 1 heads of blocks [1]" in ours["attention"] and theirs["attention"] == "softmax"
    assert int(ours["karat_parameters"]) == sum(
        parameter.numel() for key, parameter in karatized(name).named_parameters() if ".karat." in key
    )
    assert np.load(out / "attention.npz")["model_after"].shape == (2, 2, 5)
    spectrum = np.load(out / "spectrum_block1.npz")
    assert spectrum["model_before"].shape == (2, 2, 4 + PREFIX[name][1])
    assert np.isfinite(json.loads((out / "landscape.json").read_text())["model"]["hessian"]["value"])


def test_windows(folders, photos, analyse, refusal):
    """Functions, weights, cost and landscape of a model with windows; what needs a map of the image says why not."""
    folder = str(folders / "karat" / WINDOWS)
    images = ["--images", photos, "--num-images", 2]
    for command in ("attention", "spectrum", "faithfulness"):
        message = refusal(command, "--model", folder, *images)
        assert "windows" in message and message.count("\n") == 1
    with pytest.raises(InputError, match="windows"):
        Viewer(load_checkpoint(folder), "swin")
    out = analyse("functions", "--model", folder, *images)
    analyse("compare", "--model", folder, "--no-measure")
    analyse("landscape", "--model", folder, *images, "--grid", 3, "--workers", 1, "--no-hessian")
    assert (out / "functions_block2.csv").exists() and (out / "landscape.json").exists()
    # Pairs that a shifted window hides are no scores of -100.
    plain = load_checkpoint(str(folders / "softmax" / WINDOWS))
    recorded = record(plain, torch.randn(2, 3, 16, 16), [1])[1]
    assert recorded.scores.shape == (8, 2, 16, 16) and recorded.scores.min() > -50
    assert recorded.maps.min() < 1e-20


def test_functions_and_weights_are_those_of_the_operator(folders):
    checkpoint = load_checkpoint(str(folders / "karat" / "deit_classifier"))
    operator = checkpoint.operator(1)
    pixels = torch.randn(2, 3, 8, 8)
    (found,) = functions.compute(checkpoint, pixels, 1, [0])
    x = torch.as_tensor(found.x)
    for (p, q), curve in zip(found.edges, found.curves, strict=True):
        np.testing.assert_allclose(curve, functions.evaluate(operator, 0, x[:, None])[:, p, q].numpy())
    with pytest.raises(InputError, match=r"Block 0 .* blocks with KArAt heads are 1"):
        checkpoint.operator(0)
    groups = weights.groups(checkpoint)
    assert groups["projector $W$"].size == operator.projector.numel()
    with pytest.raises(InputError, match="softmax"):
        load_checkpoint(str(folders / "softmax" / "deit_classifier")).operator(1)


@pytest.mark.parametrize("name", ["registers_classifier", "siglip_classifier", "convit_classifier"])
def test_the_page_shows_them(name, folders, photos):
    viewer = Viewer(load_checkpoint(str(folders / "karat" / name)), name)
    path = str(next(photos.rglob("*.jpg")))
    assert len(viewer.see(path).guesses) == 3
    for view in VIEWS:
        picture, _ = viewer.draw_attention(path, 1, 0, view)
        assert picture is not None
    assert "learned functions" in viewer.draw_functions(path, 1, 0)[1]
    assert viewer.draw_functions(path, 1, 1)[0] is None
