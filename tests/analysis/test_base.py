# SPDX-License-Identifier: Apache-2.0
"""What the analyses share: the command, files, checkpoints, images, recorded attention."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from analysis import options, style
from analysis.__main__ import COMMANDS, main
from analysis.images import load_images
from analysis.models import load_checkpoint, load_moment, load_start, moments
from analysis.output import Output, figure_names
from analysis.recording import record
from image_classification.errors import InputError

from .conftest import karat_model, save


def test_help_lists_every_command(capsys):
    assert main([]) == main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in printed
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        module = sys.modules.get(f"analysis.{name}.command") or sys.modules[f"analysis.{name}"]
        assert module.__doc__.strip().splitlines()[0] in shown
        assert ("--output" in shown) == (name != "demo")  # which writes no files


def test_an_unknown_command_is_named(capsys):
    assert main(["function"]) == 2
    assert "did you mean `functions`?" in capsys.readouterr().err


def test_files_are_named_before_the_work_and_never_overwritten(tmp_path):
    names = [*figure_names("f"), "f.csv", "f.npz", "f.md"]
    with style.context():
        figure = style.figure()
        figure.subplots().plot([1, 2])
        for attempt in ("one", "two"):
            output = Output(tmp_path / attempt, names)
            output.figure("f", figure)
            output.table("f.csv", [{"a": 1}, {"a": 2, "b": "x,y"}])
            output.arrays("f.npz", x=np.arange(3))
            output.text("f.md", "text")
            output.report()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(names)
    for name in names[:2]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with (tmp_path / "one" / "f.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": ""}, {"a": "2", "b": "x,y"}]
    assert np.load(tmp_path / "one" / "f.npz")["x"].tolist() == [0, 1, 2]
    with pytest.raises(InputError, match=r"holds f.png, f.svg, f.csv and 2 more already.*--overwrite"):
        Output(tmp_path / "one", names)
    Output(tmp_path / "one", names, overwrite=True).text("f.md", "new")
    assert (tmp_path / "one" / "f.md").read_text() == "new"
    with pytest.raises(InputError, match="is a file"):
        Output(tmp_path / "one" / "f.md", names)


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    output = Output(tmp_path, ["f.csv"])
    output.table("f.csv", [{"a": 1}])
    output = Output(tmp_path, ["f.csv"], overwrite=True)
    with pytest.raises(ValueError, match="dict contains fields"):
        output.table("f.csv", BrokenRows([{"a": 1}]))
    assert (tmp_path / "f.csv").read_text().split() == ["a", "1"]
    assert [path.name for path in tmp_path.iterdir()] == ["f.csv"]


class BrokenRows(list):
    """Rows that grow a column after the header is written."""

    def __iter__(self):
        seen = getattr(self, "seen", False)
        self.seen = True
        return iter([{"a": 1}, {"b": 2}] if seen else [{"a": 1}])


def test_zero_is_the_middle_of_signed_colours():
    norm = style.symmetric(np.array([-1.0, 3.0]), np.array([np.nan, -4.0]))
    assert (norm.vmin, norm.vmax) == (-4.0, 4.0)
    assert style.symmetric(np.zeros(3)).vmax > 0


def test_either_kind_of_checkpoint_is_described(karat, softmax):
    ours, theirs = load_checkpoint(karat), load_checkpoint(softmax)
    assert (ours.kind, theirs.kind) == ("karat", "softmax")
    for checkpoint in (ours, theirs):
        assert (checkpoint.grid, checkpoint.tokens, checkpoint.blocks, checkpoint.heads) == ((3, 3), 10, 2, 2)
        assert checkpoint.labels == ["cat", "dog", "newt"]
        assert checkpoint.has_classifier
        assert not checkpoint.model.training
    assert ours.head_kinds(0) == ["karat", "karat"]
    assert theirs.head_kinds(0) == ["softmax", "softmax"]
    with pytest.raises(InputError, match="nothing that is learned"):
        theirs.operator(0)


def test_checkpoints_of_one_name_are_told_apart(tmp_path):
    folders = [save(karat_model(), tmp_path / parent / "same") for parent in "ab"]
    assert [each.name for each in options.load_models(*folders, "cpu")] == ["a/same", "b/same"]
    assert [each.name for each in options.load_models(folders[0], None, "cpu")] == ["same"]


def test_heads_blocks_and_sharing(tmp_path):
    mixed = save(karat_model(num_karat_heads=1, karat_layers=[1], sharing="universal"), tmp_path / "mixed")
    checkpoint = load_checkpoint(mixed)
    assert checkpoint.head_kinds(0) == ["softmax", "softmax"]
    assert checkpoint.head_kinds(1) == ["karat", "softmax"]
    assert checkpoint.operator(1) is checkpoint.model.vit.operator
    with pytest.raises(InputError, match="plain softmax: blocks with KArAt heads are 1"):
        checkpoint.operator(0)


def test_an_encoder_alone_will_do(tmp_path):
    folder = save(karat_model().vit, tmp_path / "encoder")
    assert not load_checkpoint(folder).has_classifier


def test_what_is_no_checkpoint_is_refused(karat, tmp_path):
    with pytest.raises(InputError, match=r"`--compare` nowhere cannot be loaded: there is no such folder"):
        load_checkpoint("nowhere", "--compare")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load_checkpoint(str(tmp_path / "empty"))
    weights = Path(karat) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_checkpoint(karat)


def test_the_moments_of_a_run(run_folder, karat):
    found = moments(run_folder)
    assert [(moment.epoch, moment.step) for moment in found] == [(0, 0), (1, 1), (2, 2)]
    # A rate of 0 leaves the weights where they started, so the start that is rebuilt has to be every checkpoint.
    start = load_start(run_folder).model.state_dict()
    for moment in found:
        weights = load_moment(run_folder, moment).model.state_dict()
        assert weights.keys() == start.keys()
        assert all(torch.equal(weights[name], start[name]) for name in start)
    assert moments(str(found[1].folder)) == found
    with pytest.raises(InputError, match=r"no folder of a run"):
        moments(karat)
    with pytest.raises(InputError, match=r"no folder of a run"):
        load_start(karat)


def test_a_run_without_checkpoints_says_how_to_keep_them(run_folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run_folder, bare, ignore=shutil.ignore_patterns("checkpoint-*"))
    with pytest.raises(InputError, match="--save_total_limit 0"):
        moments(str(bare))


def test_a_stopped_run_is_its_last_checkpoint(run_folder, tmp_path):
    stopped = tmp_path / "stopped"
    shutil.copytree(run_folder, stopped)
    (stopped / "config.json").unlink()
    checkpoint = load_checkpoint(str(stopped))
    assert Path(checkpoint.source) == stopped / "checkpoint-2"
    assert checkpoint.run["settings"]["data_set"] == "digits"


def test_pictures_are_what_the_model_sees(karat, photos):
    checkpoint = load_checkpoint(karat)
    images = load_images(checkpoint, [f"{photos}/3.png", f"{photos}/1.png"], 1)
    assert images.names == ["3.png", "1.png"]
    assert images.pixels.shape == (2, 3, 12, 12)
    raw = np.asarray(Image.open(f"{photos}/3.png")) / 255
    np.testing.assert_allclose(images.pictures[0], raw, atol=1e-6)
    np.testing.assert_allclose(images.pixels[0].permute(1, 2, 0), (raw - 0.5) / 0.25, atol=1e-5)


def test_images_of_a_folder_are_drawn_by_the_seed(karat, photos):
    checkpoint = load_checkpoint(karat)
    draws = {tuple(load_images(checkpoint, [photos], 3, seed).names) for seed in range(8)}
    assert len(draws) > 3
    assert load_images(checkpoint, [photos], 3, 5).names == load_images(checkpoint, [photos], 3, 5).names
    assert len(load_images(checkpoint, [photos], 99)) == 6


def test_images_of_a_run_are_its_held_out_ones(run_folder):
    images = load_images(load_checkpoint(run_folder), None, 5)
    assert len(set(images.names)) == 5
    assert set(images.labels) <= set("0123456789")
    assert images.pixels.shape == (5, 3, 8, 8)


def test_images_that_cannot_be_had_are_named(karat, photos, tmp_path):
    checkpoint = load_checkpoint(karat)
    with pytest.raises(InputError, match="is of no run"):
        load_images(checkpoint, None, 3)
    with pytest.raises(InputError, match=r"missing\.png does not exist"):
        load_images(checkpoint, ["missing.png"], 3)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        load_images(checkpoint, [str(tmp_path / "none")], 3)
    broken = Path(photos) / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(InputError, match=r"0\.png cannot be read"):
        load_images(checkpoint, [photos], 6)
    checkpoint.processor = None
    with pytest.raises(InputError, match="has no image processor"):
        load_images(checkpoint, [photos], 3)


@pytest.mark.parametrize(
    "fields", [{}, {"num_karat_heads": 1}, {"karat_layers": [1], "sharing": "universal"}, {"modular_mode": "w1_phi2"}]
)
def test_recorded_attention_is_the_models(fields, tmp_path):
    checkpoint = load_checkpoint(save(karat_model(**fields), tmp_path / "model"))
    pixels = torch.randn(5, 3, 12, 12)
    with torch.no_grad():
        outputs = checkpoint.model(pixels, output_attentions=True, output_attention_scores=True)
    recorded = record(checkpoint, pixels, [1, 0], batch_size=2)
    assert list(recorded) == [1, 0]
    for block, attention in recorded.items():
        torch.testing.assert_close(attention.maps, outputs.attentions[block])
        torch.testing.assert_close(attention.scores, outputs.attention_scores[block])


def test_recorded_attention_of_softmax(softmax):
    checkpoint = load_checkpoint(softmax)
    pixels = torch.randn(3, 3, 12, 12)
    before = {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items()}
    with torch.no_grad():
        expected = checkpoint.model(pixels, output_attentions=True).attentions
    for dtype in (None, torch.float64):
        (attention,) = record(checkpoint, pixels, [1], dtype=dtype).values()
        assert attention.maps.dtype == (dtype or torch.float32)
        assert attention.scores.std() > 0.1
        torch.testing.assert_close(attention.scores.softmax(-1), attention.maps, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(attention.maps.float(), expected[1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in checkpoint.model.state_dict().items())


def test_a_start_that_is_drawn_otherwise_is_refused(run_folder, tmp_path):
    """As by another version of PyTorch: what is shown as the start would never have been any."""
    shutil.copytree(run_folder, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["start"] += 1e-2
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="cannot be rebuilt: its seed gives other weights"):
        load_start(str(tmp_path / "run"))
    # One that was kept needs no rebuilding.
    last = sorted((tmp_path / "run").glob("checkpoint-*"))[-1]
    shutil.copytree(last, tmp_path / "run" / "checkpoint-0")
    first = load_start(str(tmp_path / "run"))
    assert first.name == "start" and first.run["settings"] == record["settings"]
    assert moments(str(tmp_path / "run"))[0].step == 0
    assert None not in [moment.folder for moment in moments(str(tmp_path / "run"))]
