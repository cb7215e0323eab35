# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from analysis import options
from analysis.images import find_images
from analysis.landscape import command, planes
from analysis.landscape.objective import labelled
from analysis.models import load_checkpoint, load_start
from image_classification.errors import InputError
from tests.analysis.conftest import SIZES, karat_model, save

from .conftest import CPU


FILES = [f"landscape{end}" for end in (".json", ".npz", ".png", ".points.sqlite", ".svg", "_3d.png", "_3d.svg")]


def test_processes_are_spread_over_devices(monkeypatch):
    assert command.devices_of("cpu", 3) == [CPU] * 3
    assert len(command.devices_of("cpu", None)) == min(torch.get_num_threads(), 8)
    gpus = [torch.device("cuda", index) for index in range(2)]
    monkeypatch.setattr(options, "device_of", lambda name: torch.device(name or "cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert command.devices_of(None, None) == gpus
    assert command.devices_of(None, 3) == [*gpus, gpus[0]]
    assert command.devices_of("cuda:1", None) == gpus[1:]


@pytest.fixture
def classes(photos, tmp_path) -> str:
    """The photos in folders of their classes."""
    for number in range(6):
        folder = tmp_path / "classes" / ("cat", "dog", "newt")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(f"{photos}/{number}.png", folder)
    return str(tmp_path / "classes")


@pytest.fixture(scope="module")
def moving_run(run_folder, tmp_path_factory) -> str:
    """The run on digits as if it had moved, a checkpoint longer: each is a way off the start, the model is the last."""
    folder = tmp_path_factory.mktemp("moving") / "digits"
    shutil.copytree(run_folder, folder)
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-3")
    state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
    (folder / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(state | {"global_step": 3, "epoch": 3.0}))
    for step in (1, 2, 3):
        weights = load_file(folder / f"checkpoint-{step}" / "model.safetensors")
        for number, tensor in enumerate(weights.values()):
            torch.manual_seed(number)
            there, aside = torch.randn(2, *tensor.shape)
            tensor += 0.02 * (step * there + (step % 2) * aside)
        save_file(weights, folder / f"checkpoint-{step}" / "model.safetensors", {"format": "pt"})
    shutil.copy(folder / "checkpoint-3" / "model.safetensors", folder)
    return str(folder)


def test_the_path_of_a_run_read_from_its_checkpoints(moving_run):
    checkpoint = load_checkpoint(moving_run)
    found = command.moments_until(moving_run)
    assert [moment.step for moment in found] == [0, 1, 2, 3]
    plane = command.plane_of_run(checkpoint, found)
    models = [load_start(moving_run), *(load_checkpoint(str(moment.folder)) for moment in found[1:])]
    moved = torch.stack([planes.flatten(each.model) for each in models]) - planes.flatten(checkpoint.model)
    np.testing.assert_allclose(plane.path, moved @ plane.directions.mT, atol=1e-4)
    np.testing.assert_allclose(plane.distances, moved.norm(dim=1), rtol=1e-5)
    assert plane.distances[-1] == 0
    # Start, checkpoints and trained weights lie in one plane here.
    assert plane.explained.sum() == pytest.approx(1, abs=1e-5)
    half = command.moments_until(f"{moving_run}/checkpoint-2")
    assert [moment.step for moment in half] == [0, 1, 2]
    with pytest.raises(InputError, match=r"classifier\.extra cannot be read"):
        planes.file_reader(found[1].folder)("classifier.extra", slice(0, 1))


@pytest.mark.system
def test_a_run_by_the_command_in_one_process_and_in_two(moving_run, analyse):
    words = ["landscape", "--model", moving_run, "--device", "cpu", "--grid", 4, "--num-images", 12, "--log"]
    out = analyse(*words, "--workers", 1)
    assert sorted(path.name for path in out.iterdir()) == FILES
    alone = dict(np.load(out / "landscape.npz"))
    assert alone["model_loss"].shape == alone["model_accuracy"].shape == (4, 4)
    assert alone["model_path"].shape == (4, 2)
    assert alone["model_epochs"].tolist() == [0, 1, 2, 3]
    checkpoint = load_checkpoint(moving_run)
    objective = labelled(checkpoint, find_images([checkpoint], None, 12))
    with torch.no_grad():
        logits = checkpoint.model(objective.pixels).logits
    numbers = json.loads((out / "landscape.json").read_text())
    expected = nn.functional.cross_entropy(logits, objective.labels).item()
    assert numbers["model"]["loss"] == pytest.approx(expected, rel=1e-5)
    assert numbers["model"]["accuracy"] == pytest.approx((logits.argmax(-1) == objective.labels).float().mean().item())
    assert numbers["model"]["hessian"]["converged"]
    assert numbers["model"]["epsilon"] == 1
    # Drawn anew, nothing is computed anew: the file of points stays as it is.
    points = (out / "landscape.points.sqlite").read_bytes()
    analyse(*words[:-1], "--workers", 1, "--overwrite")
    assert (out / "landscape.points.sqlite").read_bytes() == points
    shutil.rmtree(out)
    analyse(*words, "--workers", 2)
    together = dict(np.load(out / "landscape.npz"))
    assert alone.keys() == together.keys()
    for name in alone:
        assert np.array_equal(alone[name], together[name]), name


@pytest.mark.system
def test_karat_beside_softmax_by_the_command(karat, softmax, classes, analyse):
    words = ["--images", classes, "--device", "cpu", "--workers", 1, "--grid", 3, "--hessian-iterations", 3]
    out = analyse("landscape", "--model", karat, "--compare", softmax, *words)
    assert sorted(path.name for path in out.iterdir()) == FILES
    arrays = np.load(out / "landscape.npz")
    numbers = json.loads((out / "landscape.json").read_text())
    for prefix, source in (("model", karat), ("compare", softmax)):
        checkpoint = load_checkpoint(source)
        objective = labelled(checkpoint, find_images([checkpoint], [classes], 6))
        assert len(objective.labels) == 6
        assert arrays[f"{prefix}_x"].tolist() == [-1, 0, 1]
        # The middle of the grid is the trained model; the corner the one moved by both directions.
        assert arrays[f"{prefix}_loss"][1, 1] == numbers[prefix]["loss"]
        directions = planes.random_plane(checkpoint.model).directions
        torch.nn.utils.vector_to_parameters(
            planes.flatten(checkpoint.model) + directions.sum(0), planes.trainable(checkpoint.model).values()
        )
        with torch.no_grad():
            logits = checkpoint.model(objective.pixels).logits
        expected = nn.functional.cross_entropy(logits, objective.labels).item()
        assert arrays[f"{prefix}_loss"][2, 2] == pytest.approx(expected, rel=1e-4)
        assert numbers[prefix]["hessian"]["iterations"] <= 6
        assert numbers[prefix]["epsilon"] == 0.1


def test_the_papers_rescaled_directions_by_the_command(moving_run, analyse):
    words = ["--normalise", "tensor", "--no-hessian", "--grid", 3, "--num-images", 4, "--workers", 1, "--no-start"]
    out = analyse("landscape", "--model", moving_run, "--device", "cpu", *words)
    numbers = json.loads((out / "landscape.json").read_text())
    assert numbers["settings"]["normalise"] == "tensor"
    assert (numbers["model"]["hessian"], numbers["model"]["epsilon"]) == (None, 0.01)
    arrays = np.load(out / "landscape.npz")
    assert arrays["model_epochs"].tolist() == [1, 2, 3]
    # It reaches around the path and the trained weights, which are its last moment.
    np.testing.assert_allclose(arrays["model_path"][-1], 0, atol=1e-6)
    assert arrays["model_x"][0] < arrays["model_path"][:, 0].min()
    assert arrays["model_x"][-1] > arrays["model_path"][:, 0].max()


def test_the_images_of_a_data_set(tmp_path):
    names = {number: str(number) for number in range(10)}
    model = karat_model(id2label=names, label2id={name: number for number, name in names.items()})
    checkpoint = load_checkpoint(save(model, tmp_path / "ten"))
    found = find_images([checkpoint], None, 5, data_set="digits")
    assert labelled(checkpoint, found).labels.tolist() == [int(label) for _, _, label in found]
    for split in ("train", "validation"):
        for label in ("0", "1"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(tmp_path / "data" / split / label / "x.png")
    found = find_images([checkpoint], None, 5, data_set=str(tmp_path / "data"))
    assert [label for _, _, label in found] == ["0", "1"]


def test_what_cannot_be_drawn_is_refused_before_anything_is_computed(
    karat, photos, classes, run_folder, tmp_path, refusal
):
    def refused(*words, model=karat):
        return refusal("landscape", "--model", model, "--workers", 1, "--device", "cpu", *words)

    assert "class of 0.png is not known" in refused("--images", photos)
    assert "is of no run" in refused()
    assert "both say which" in refused("--images", classes, "--data-set", "digits")
    assert "there are 0. Or choose random" in refused("--images", classes, "--directions", "pca")
    assert "and it is none" in refused("--images", classes, "--normalise", "none")
    assert "argument --grid: 2 is not 3 or more" in refused("--images", classes, "--grid", 2)
    assert "did not move in two dimensions" in refused("--directions", "pca", model=run_folder)
    assert "there are 2" in refused("--directions", "pca", "--no-start", model=run_folder)
    assert "Unknown data set 'digit'" in refused("--data-set", "digit")
    (tmp_path / "other").mkdir()
    other = save(karat_model(**{**SIZES, "id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}), tmp_path / "o")
    assert "is of the class 'cat'; " in refused("--images", classes, "--compare", other)
    encoder = save(karat_model().vit, tmp_path / "encoder")
    assert "has no classifier" in refused("--images", classes, model=encoder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "landscape.npz").write_text("mine")
    assert "holds landscape.npz already" in refused("--images", classes)
