# SPDX-License-Identifier: Apache-2.0
"""Inputs that are wrong, one test for each kind: every command says so in one line, and gives no answer."""

import dataclasses
import html
import io
import json
import math
import os
import shutil
import sys
import tempfile
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import DeiTConfig, DeiTForImageClassification

import analysis.__main__ as analyses
import analysis.compare
import analysis.curves
import analysis.spectrum
import image_classification.main as script
import predict
from analysis.models import load_checkpoint
from image_classification.data.images import LONGEST, check_image, read_image
from image_classification.data.sources import ImageData
from image_classification.errors import InputError, one_line, run_command
from image_classification.models.building import build_model
from image_classification.models.loading import device_of, load_image_processor, load_model
from image_classification.reports.card import RunCard
from image_classification.reports.curves import draw_curves
from image_classification.settings.arguments import ModelArguments
from image_classification.settings.parser import parse_settings
from modeling_karat_vit import KArAtViTConfig
from tests.backbones import make, save_as_timm
from tests.images import colour_image, own_library_settings  # noqa: F401
from tests.models import SIZES, make_model, save_checkpoint


pytestmark = pytest.mark.usefixtures("own_library_settings")

LABELS = [str(index) for index in range(10)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoint folders of both kinds, of ten classes."""
    return {
        kind: save_checkpoint(make_model(kind, LABELS), tmp_path_factory.mktemp(kind)) for kind in ("karat", "softmax")
    }


@pytest.fixture
def checkpoint(trained, tmp_path):
    return Path(shutil.copytree(trained["karat"], tmp_path / "checkpoint"))


@pytest.fixture
def image(tmp_path):
    colour_image("red", 0).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


@pytest.fixture
def refused(checkpoint, trained, image, tmp_path, capsys):
    """What each command says, in one line, that must refuse the checkpoint."""
    training = ["--data_set", "digits", "--use_cpu", "--output_dir", str(tmp_path / "out")]
    student = ["--model", trained["softmax"], "--image_size", "8"]
    spectrum = ["spectrum", "--images", image, "--output", str(tmp_path / "a")]
    commands = {
        "predict": lambda name: predict.main([image, "--model", name]),
        "evaluation": lambda name: script.main(["--eval", "--resume", name, *training]),
        "fine-tuning": lambda name: script.main(["--finetune", name, *training]),
        "teacher": lambda name: script.main([*student, *training, "--teacher_attention", name]),
        "figure": lambda name: analyses.main([*spectrum, "--model", name]),
        "page": lambda name: analyses.main(["demo", "--model", name]),
    }

    def call(*without):
        for name in commands.keys() - set(without):
            assert commands[name](str(checkpoint)) == 2, name
            (line,) = capsys.readouterr().err.splitlines()
            yield line

    return call


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(path: Path, **values) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **values}))


# A failure that nobody foresaw


@pytest.fixture
def logs(tmp_path, monkeypatch):
    folder = tmp_path / "logs"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def break_down(file):
    """What nobody foresaw, in a frame of the project that is at work on a file."""
    source = exec_in_project("def work(path):\n    raise ZeroDivisionError('not\\nforeseen')")
    source["work"](str(file))


def exec_in_project(code: str) -> dict:
    namespace = {"__name__": "image_classification.part"}
    exec(code, namespace)
    return namespace


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("command", ["predict", "training", "analysis"])
def test_what_nobody_foresaw(command, debug, image, logs, monkeypatch, capsys):
    flags = ["--debug"] if debug else []
    if command == "predict":
        monkeypatch.setattr(predict, "load_classifier", lambda *_: break_down(image))
        status = predict.main([image, "--model", "anything", *flags])
    elif command == "training":
        monkeypatch.setattr(script, "run", lambda *_: break_down(image))
        status = script.main(flags)
    else:
        monkeypatch.setattr(analysis.spectrum, "run", lambda _: break_down(image))
        status = analyses.main(["spectrum", "--model", "anything", *flags])
    *before, line = capsys.readouterr().err.strip().splitlines()
    assert status == 1
    assert "ZeroDivisionError: not" in line and image in line
    (log,) = logs.iterdir()
    assert str(log) in line
    assert log.read_text().splitlines()[0] == "Traceback (most recent call last):"
    assert bool(before) == debug and ("Traceback (most recent call last):" in before) == debug


@pytest.mark.parametrize("cause, status", [(InputError("`x` is 1"), 2), (KeyboardInterrupt(), 130), (MemoryError(), 1)])
def test_no_failure_ends_in_success(cause, status, logs, capsys):
    def fail():
        raise cause

    assert run_command("command", fail) == status
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert run_command("command", lambda: None) == 0


@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_reader_that_has_gone(lines, logs, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(os.fdopen(writer, "wb"), write_through=lines > 1) as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert run_command("command", lambda: print("line\n" * lines)) == 1
        monkeypatch.undo()
    assert not capsys.readouterr().err and not list(logs.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_is_full(logs, monkeypatch, capsys):
    with open("/dev/full", "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert run_command("command", lambda: print("line")) != 0
        monkeypatch.undo()
    assert "No space" in capsys.readouterr().err


def test_the_error_of_the_system_names_its_file(tmp_path, logs, capsys):
    assert run_command("command", (tmp_path / "gone").read_text) == 1
    assert str(tmp_path / "gone") in capsys.readouterr().err


# Weights


def shard(folder: Path, **index) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def set_all(value, dtype=torch.float32):
    return lambda weights: weights.update({"vit.layernorm.weight": torch.full((8,), value, dtype=dtype)})


def without(prefix):
    def change(weights):
        for name in [name for name in weights if name.startswith(prefix)]:
            del weights[name]

    return change


BAD_WEIGHTS = {
    "no block": (without("vit.layers.1."), "vit.layers.1."),
    "no head": (without("classifier."), "classifier."),
    "no operator": (without("vit.layers.0.attention.operator"), "operator"),
    "too many": (lambda weights: weights.update({"vit.layers.7.x": torch.zeros(3)}), "vit.layers.7.x"),
    "another shape": (lambda weights: weights.update({"vit.layernorm.weight": torch.ones(7)}), "vit.layernorm.weight"),
    "NaN": (set_all(math.nan), "vit.layernorm.weight"),
    "infinite": (set_all(math.inf), "vit.layernorm.weight"),
    "whole numbers": (set_all(1, torch.int64), "vit.layernorm.weight"),
}
BAD_FILES = {
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"garbage " * 100),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}
NORM = {"vit.layernorm.weight": "model-1.safetensors"}
BAD_INDICES = {
    "not all weights": {"metadata": {}, "weight_map": NORM},
    "no weights": {"metadata": {}, "weight_map": {}},
    "no metadata": {"weight_map": NORM},
    "garbage": None,
    "no list": {"metadata": {}},
    "wrong types": {"weight_map": {"vit.layernorm.weight": 5}},
    "gone": {"weight_map": {"vit.layernorm.weight": "model-9.safetensors"}},
    "elsewhere": {"weight_map": {"vit.layernorm.weight": "../model.safetensors"}},
}


@pytest.mark.parametrize("fault", BAD_WEIGHTS)
def test_weights_that_are_not_the_models(checkpoint, fault):
    change, named = BAD_WEIGHTS[fault]
    change_weights(checkpoint, change)
    with pytest.raises(InputError, match="`--flag`") as refused:
        load_model(str(checkpoint), "--flag", encoder_suffices=True)
    assert named in str(refused.value) and str(checkpoint) in str(refused.value)


@pytest.mark.parametrize("fault", BAD_FILES)
def test_weight_files_that_are_damaged(checkpoint, fault):
    BAD_FILES[fault](checkpoint / "model.safetensors")
    with pytest.raises(InputError, match=r"`--flag` .*model\.safetensors"):
        load_model(str(checkpoint), "--flag")


@pytest.mark.parametrize("fault", BAD_INDICES)
def test_lists_of_weight_files_that_are_damaged(checkpoint, fault):
    shard(checkpoint, **(BAD_INDICES[fault] or {}))
    if BAD_INDICES[fault] is None:
        (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": {')
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
        load_model(str(checkpoint), "--flag")


def test_weights_in_two_of_the_files(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    names = dict.fromkeys(weights, "model-1.safetensors")
    shard(checkpoint, metadata={}, weight_map={**names, "vit.layernorm.weight": "model-2.safetensors"})
    save_file({"vit.layernorm.weight": torch.zeros(8)}, checkpoint / "model-2.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"`--flag` .*model\.safetensors\.index\.json"):
        load_model(str(checkpoint), "--flag")


class Program:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("A checkpoint's code was run.",)


BAD_PICKLES = {
    "garbage": None,
    "whole numbers": lambda weights: {**weights, "vit.layernorm.weight": torch.ones(8, dtype=torch.int64)},
    "NaN": lambda weights: {**weights, "vit.layernorm.weight": torch.full((8,), math.nan)},
    "not all weights": lambda weights: {"vit.layernorm.weight": torch.ones(8)},
    "a list": lambda weights: list(weights.values()),
    "no tensor": lambda weights: {**weights, "vit.layernorm.weight": None},
    "no names": lambda weights: {**weights, 5: torch.ones(8)},
    "a program": lambda weights: {**weights, "vit.layernorm.weight": Program()},
}


@pytest.mark.parametrize("fault", BAD_PICKLES)
def test_weights_that_pytorch_pickled_and_are_damaged(checkpoint, fault):
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    if BAD_PICKLES[fault] is None:
        (checkpoint / "pytorch_model.bin").write_bytes(b"garbage")
    else:
        torch.save(BAD_PICKLES[fault](weights), checkpoint / "pytorch_model.bin")
    with pytest.raises(InputError, match=f"`--flag` {checkpoint}") as refused:
        load_model(str(checkpoint), "--flag")
    assert "pytorch_model.bin" in str(refused.value) or "weights" in str(refused.value)


def test_weights_that_pytorch_pickled(checkpoint, trained):
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    model, _ = load_model(str(checkpoint), "--flag")
    expected, _ = load_model(str(trained["karat"]), "--flag")
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


@pytest.mark.system
def test_every_command_refuses_a_checkpoint_without_its_head(checkpoint, refused):
    change_weights(checkpoint, BAD_WEIGHTS["no head"][0])
    for message in refused("fine-tuning"):  # which makes a new one
        assert "classifier." in message and str(checkpoint) in message


def test_an_encoder_alone_will_do_where_no_head_is_needed(trained, tmp_path):
    load_model(str(trained["karat"]), "--model")[0].vit.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), "--model", encoder_suffices=True)[1] == {"classifier.weight", "classifier.bias"}
    with pytest.raises(InputError, match=r"classifier\."):
        load_model(str(tmp_path), "--model")


FINETUNED = {"image_size": [8], "patch_size": [4]}
# Of each kind: what another model may lack, or have too many, and what it may not.
FINE = ["no head", "another head", "mask token", "pooler"]


@pytest.mark.parametrize("kind", ["karat", "softmax"])
@pytest.mark.parametrize("fault", [*FINE, *BAD_WEIGHTS])
def test_what_finetuning_may_lack_and_drop(checkpoint, trained, kind, fault):
    if kind == "softmax":
        if fault == "no operator":
            pytest.skip("It has none.")
        shutil.copytree(trained["softmax"], checkpoint, dirs_exist_ok=True)
    changes = {
        "another head": lambda weights: weights.update({"classifier.weight": torch.zeros(3, 8)}),
        "mask token": lambda weights: weights.update({"vit.embeddings.mask_token": torch.zeros(1, 1, 8)}),
        "pooler": lambda weights: weights.update({"vit.pooler.dense.weight": torch.zeros(8, 8)}),
    }
    change_weights(checkpoint, changes.get(fault) or BAD_WEIGHTS[fault][0])
    args = ModelArguments(finetune=str(checkpoint), **(FINETUNED if kind == "karat" else {}))
    if fault in FINE:
        kept = load_file(checkpoint / "model.safetensors")["vit.layernorm.weight"]
        assert torch.equal(build_model(args, ["cat", "dog"]).vit.layernorm.weight, kept)
    else:
        with pytest.raises(InputError, match="`finetune`"):
            build_model(args, ["cat", "dog"])


def test_a_foreign_backbone_has_no_operator_and_need_not(trained, tmp_path):
    KArAtViTConfig(**SIZES).save_pretrained(tmp_path)
    model = build_model(ModelArguments(model=str(tmp_path), finetune=trained["softmax"]), ["cat", "dog"])
    assert model.karat_parameter_names()


def test_a_distilled_backbone_that_lacks_weights(tmp_path):
    DeiTForImageClassification(DeiTConfig(**SIZES)).save_pretrained(tmp_path / "deit", save_original_format=False)
    KArAtViTConfig(**SIZES).save_pretrained(tmp_path / "karat")
    args = ModelArguments(model=str(tmp_path / "karat"), finetune=str(tmp_path / "deit"), drop_distillation_token=True)
    build_model(args, ["cat", "dog"])
    change_weights(tmp_path / "deit", without("deit.layers.1."))
    with pytest.raises(InputError, match="`finetune`"):
        build_model(args, ["cat", "dog"])


# Configurations and image processors


BAD_CONFIGS = {
    "no object": [],
    "null": None,
    "empty": {},
    "bytes": b"\xff\xfe",
    "too deep": "[" * 100_000,
    "no type": {"model_type": None},
    "an unknown type": {"model_type": "foo"},
    "type of a number": {"hidden_size": "eight"},
    "negative": {"hidden_size": -8},
    "no heads": {"num_attention_heads": 0},
    "unknown function": {"hidden_act": "foo"},
    "not finite": {"layer_norm_eps": math.nan},
    "a class is missing": {"id2label": {"0": "cat", "2": "dog"}},
    "classes that are no names": {"id2label": {"0": 1, "1": None}},
    "classes in a list": {"id2label": ["cat", "dog"]},
    "classes by their names": {"id2label": {"cat": 0}},
    "another number of classes": {"num_labels": 3},
    "no class": {"num_labels": 0, "id2label": None},
    "classes beyond all time": {"num_labels": 10**12},
    "no classifier": {"problem_type": "regression"},
    "a type": {"dtype": "foo"},
    "beyond all memory": {"hidden_size": 10**7, "intermediate_size": 10**9},
    "beyond all time": {"num_hidden_layers": 10**9},
}
BAD_PROCESSORS = {
    "cut short": "{",
    "no object": [],
    "empty": {},
    "two numbers": {"image_mean": [0.5, 0.5]},
    "text": {"image_std": ["a", "b", "c"]},
    "division by zero": {"image_std": [0.5, 0.0, 0.5]},
    "not finite": {"image_mean": [0.5, math.nan, 0.5]},
    "no truth value": {"do_normalize": "no"},
    "neither true nor false": {"do_rescale": None},
    "not divided": {"do_rescale": False},
    "divided twice": {"image_std": [127.5, 127.5, 127.5]},
    "nearly divided by zero": {"image_std": [1e-30, 0.5, 0.5]},
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "of another size": {"size": {"height": 9, "width": 8}},
    "beyond all memory": {"size": {"height": 10**6, "width": 10**6}},
    "negative": {"size": {"height": -8, "width": 8}},
    "of any shape": {"size": {"shortest_edge": 8}},
    "unknown": {"image_processor_type": "FooImageProcessor"},
}


def spoil(path: Path, content) -> None:
    if isinstance(content, dict) and content:
        change_json(path, **content)
    elif callable(content):
        path.unlink()
        content(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("fault", BAD_CONFIGS)
def test_configurations_that_are_damaged(checkpoint, fault):
    spoil(checkpoint / "config.json", BAD_CONFIGS[fault])
    with pytest.raises(InputError, match=r"`--flag` (is )?" + str(checkpoint)) as refused:
        load_model(str(checkpoint), "--flag")
    # A configuration that is right in itself is of another model than the weights.
    assert "config.json" in str(refused.value) or "weights" in str(refused.value)


BAD_TIMM = {
    "another model": {"architecture": "resnet18"},
    "of the future": {"architecture": "convit_huge"},
    "arguments in a list": {"model_args": [1]},
    "an unknown argument": {"model_args": {"heads": 3}},
    "features only": {"model_args": {"features_only": True}},
    "beyond all time": {"model_args": {"depth": 10**9}},
    "classes beyond all time": {"num_classes": 10**12},
    "a name for all classes": {"label_names": "ant"},
    "classes that are no names": {"label_names": [1, 2, 3]},
    "preparation in a list": {"pretrained_cfg": ["bicubic"]},
}
BAD_PREPARATION = {
    "text": {"mean": ["a", "b", "c"]},
    "two numbers": {"std": [0.5, 0.5]},
    "division by zero": {"std": [0.5, 0.0, 0.5]},
    "of another size": {"input_size": [3, 9, 9]},
    "beyond all memory": {"crop_pct": 1e-9},
    "drawn": {"interpolation": "random"},
    "a frame": {"crop_mode": "border"},
}


@pytest.mark.parametrize("fault", BAD_TIMM)
def test_configurations_of_timm_that_are_damaged(tmp_path, fault):
    save_as_timm(make("convit_classifier"), tmp_path / "timm", **BAD_TIMM[fault])
    with pytest.raises(InputError, match=r"`--flag` (is )?" + str(tmp_path / "timm")):
        load_model(str(tmp_path / "timm"), "--flag")


@pytest.mark.parametrize("fault", BAD_PREPARATION)
def test_preparations_of_timm_that_are_damaged(tmp_path, fault):
    save_as_timm(make("convit_classifier"), tmp_path / "timm")
    path = tmp_path / "timm" / "config.json"
    change_json(path, pretrained_cfg=json.loads(path.read_text())["pretrained_cfg"] | BAD_PREPARATION[fault])
    with pytest.raises(InputError, match=r"`--flag` .*config\.json"):
        load_image_processor(str(tmp_path / "timm"), "--flag", 8)


def test_what_a_configuration_says_of_results_is_no_matter(checkpoint, image, capsys):
    change_json(checkpoint / "config.json", return_dict=False)
    assert predict.main([image, "--model", str(checkpoint), "--device", "cpu"]) == 0


@pytest.mark.parametrize("fault", BAD_PROCESSORS)
def test_image_processors_that_are_damaged(checkpoint, fault):
    spoil(checkpoint / "preprocessor_config.json", BAD_PROCESSORS[fault])
    with pytest.raises(InputError, match=r"`--flag` .*preprocessor_config\.json"):
        load_image_processor(str(checkpoint), "--flag", 8)


def test_every_command_refuses_a_damaged_image_processor(checkpoint, refused, tmp_path):
    (checkpoint / "preprocessor_config.json").write_text("{")
    for message in refused("teacher"):
        assert str(checkpoint / "preprocessor_config.json") in message
    assert not (tmp_path / "out").exists()


# Images


def deep(dtype) -> Image.Image:
    return Image.fromarray(np.full((9, 7), 300, dtype=dtype))


def write_half(path: Path, source: Image.Image, kind: str) -> None:
    source.save(path, format=kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD_IMAGES = {
    "16 bits": lambda path: deep(np.uint16).save(path, format="PNG"),
    "16 bits, big-endian": lambda path: deep(">u2").save(path, format="TIFF"),
    "32 bits": lambda path: deep(np.int32).save(path, format="TIFF"),
    "floats": lambda path: deep(np.float32).save(path, format="TIFF"),
    "half a JPEG": lambda path: write_half(path, colour_image("red", 0, (200, 300)), "JPEG"),
    "half a PNG": lambda path: write_half(path, colour_image("red", 0, (200, 300)), "PNG"),
    "half a GIF": lambda path: write_half(path, colour_image("red", 0, (200, 300)), "GIF"),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no image"),
    "a folder": lambda path: path.mkdir(),
    "nothing": lambda path: None,
    "a long strip": lambda path: Image.new("RGB", (LONGEST + 1, 1)).save(path, format="PNG"),
}


@pytest.mark.parametrize("fault", BAD_IMAGES)
def test_images_that_are_refused(fault, tmp_path):
    path = tmp_path / "image"
    BAD_IMAGES[fault](path)
    for read in (read_image, check_image):
        with pytest.raises(InputError, match=f"The image {path}"):
            read(path)


def test_images_of_more_pixels_than_fit(tmp_path, monkeypatch):
    Image.new("L", (20, 10)).save(tmp_path / "image.png")
    for limit in (199, 99):  # Pillow itself warns of the one, and refuses the other.
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for read in (read_image, check_image):
            with pytest.raises(InputError, match="megapixels"):
                read(tmp_path / "image.png")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_all_kinds_of_images_of_eight_bits_are_read(mode, tmp_path):
    path = tmp_path / "image"
    Image.new("RGB", (9, 7), (255, 255, 255)).convert(mode).save(path, format="TIFF" if mode == "CMYK" else "PNG")
    image = read_image(path)
    assert (image.mode, image.size, image.getpixel((3, 3))) == ("RGB", (9, 7), (255, 255, 255))
    check_image(path)


def test_damaged_exif_data_are_none(tmp_path, checkpoint, capsys):
    colour_image("red", 0).save(tmp_path / "image.jpg", exif=b"Exif\0\0junkjunkjunk")
    assert predict.main([str(tmp_path / "image.jpg"), "--model", str(checkpoint), "--device", "cpu"]) == 0


# predict.py


@pytest.mark.parametrize("device", ["", "foo", "meta", "hpu", "vulkan", "privateuseone", "cuda:99"])
def test_devices_that_are_none(device):
    with pytest.raises(InputError, match=f"`--device` {device}") as refused:
        device_of(device)
    assert len(str(refused.value)) < 300


def test_names_that_are_no_text(checkpoint, tmp_path, monkeypatch, capsys):
    change_json(checkpoint / "config.json", id2label={index: f"a\n\x1b[31m\udcff{index}" for index in range(10)})
    name = os.fsencode(tmp_path) + b"/\xff.png"
    colour_image("red", 0).save(tmp_path / "image.png")
    os.rename(tmp_path / "image.png", name)
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    assert predict.main([os.fsdecode(name), "--model", str(checkpoint), "--device", "cpu"]) == 0
    out.flush()
    lines = out.buffer.getvalue().decode().splitlines()
    assert len(lines) == 6 and "\x1b" not in "".join(lines)


@pytest.mark.parametrize("flags", [["--seed", "-1"], ["--batch-size", "0"], ["--output", "{image}/below"]])
def test_flags_of_figures(flags, checkpoint, image, capsys):
    flags = [flag.format(image=image) for flag in flags]
    try:
        status = analyses.main(["spectrum", "--model", str(checkpoint), "--images", image, "--device", "cpu", *flags])
    except SystemExit as left:
        status = left.code
    assert status == 2 and flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "eval", "analysis"])
def test_names_that_no_file_has(command, image, tmp_path, logs, capsys):
    name = "x" * 300
    status = {
        "predict": lambda: predict.main([image, "--model", name]),
        "eval": lambda: script.main(["--eval", "--resume", name, "--data_set", "digits", "--use_cpu"]),
        "analysis": lambda: analyses.main(["spectrum", "--model", name, "--images", image]),
    }[command]()
    message = capsys.readouterr().err
    assert status == 2 and name in message and not list(logs.iterdir())


def test_prediction_of_scores_that_are_no_numbers(checkpoint, image, capsys):
    # Finite weights, whose product is not.
    change_weights(checkpoint, lambda weights: weights.update({"classifier.weight": torch.full((10, 8), 3e38)}))
    change_weights(checkpoint, lambda weights: weights.update({"vit.layernorm.weight": torch.full((8,), 1e30)}))
    assert predict.main([image, "--model", str(checkpoint), "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert "NaN" in captured.err and not captured.out


def test_a_broken_image_is_found_before_others_are_classified(checkpoint, tmp_path, image, capsys):
    BAD_IMAGES["half a JPEG"](tmp_path / "last.jpg")
    assert predict.main([image] * 3 + [str(tmp_path / "last.jpg"), "--model", str(checkpoint)]) == 2
    captured = capsys.readouterr()
    assert "last.jpg" in captured.err and not captured.out


def test_one_image_at_a_time_is_in_memory(checkpoint, image, monkeypatch, capsys):
    alive, most = set(), []
    read = predict.read_image

    def tracked(path):
        picture = read(path)
        alive.add(id(picture))
        weakref.finalize(picture, alive.discard, id(picture))
        most.append(len(alive))
        return picture

    monkeypatch.setattr(predict, "read_image", tracked)
    assert predict.main([image] * 12 + ["--model", str(checkpoint), "--device", "cpu"]) == 0
    assert len(most) == 12 and max(most) <= 2  # The last one is let go while the next is read.
    captured = capsys.readouterr()
    assert captured.out.count(image) == 12
    assert "12/12" in captured.err or "Classifying" in captured.err  # The progress.


# Names on the model card

BAD_NAMES = {
    "HTML": "<img src=x onerror=alert(1)>",
    "a link": "[click](javascript:alert(1))",
    "an address": "<javascript:alert(1)> https://example.org www.example.org",
    "line breaks": "cat\n\n# Results\r\n---\u2028| a | b |",
    "front matter": "---\nlicense: mit\n---",
    "markup": "*cat* _dog_ `ls` ~~owl~~ $x$ a|b",
    "not UTF-8": "cat\udcff",
    "right to left": "cat\u202egod",
}


@pytest.mark.parametrize("fault", BAD_NAMES)
def test_names_on_the_model_card(fault, trained, tmp_path):
    name = BAD_NAMES[fault]
    settings = parse_settings(["--data_path", str(tmp_path), "--model", "x", "--output_dir", str(tmp_path / name)])
    model, _ = load_model(str(trained["karat"]), "--model")
    data = ImageData(name, [0], [0], [name, "dog"], None, [f"a note on {name}"])
    metrics = {"eval_accuracy": 0.5, "eval_loss": 1.0}

    def card(data):
        text = RunCard(tmp_path / name, settings.record, "0.1", {}, model, data).text(metrics, None)
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        return text

    found, plain = card(data), card(dataclasses.replace(data, name="n", labels=["n", "dog"], notes=["n"]))
    assert found.count("\n") == plain.count("\n") and found.isprintable() == plain.isprintable()
    # Outside of the code and of the metadata, whose quoting is YAML's.
    metadata, _, text = found.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(metadata)["model-index"][0]["results"][0]["dataset"]["name"] == one_line(name)
    prose = "\n".join(text.split("```")[::2])
    for markup in ("<", "](", "javascript:a", "://e", "www.e", "*cat*", "_dog_", "`ls`", "~~", "$x", "a|b"):
        assert markup not in prose.replace("](https://arxiv", "").replace("](training_curves.png", "")
    assert f"Classes: {one_line(name)}, dog." in html.unescape(prose)


def test_a_formula_in_the_name_of_a_data_set_is_none(tmp_path):
    draw_curves([{"epoch": 1, "step": 1, "eval_loss": 1.0}], tmp_path / "curves.png", "data: $x_{$ \n\udcff")
    assert (tmp_path / "curves.png").stat().st_size > 1000


# Checkpoints to go on from

DAMAGED = {
    "cut short": ("trainer_state.json", b"{"),
    "no object": ("trainer_state.json", b"[]"),
    "empty": ("trainer_state.json", b"{}"),
    "another type": ("trainer_state.json", b'{"global_step": "1", "epoch": 1.0, "log_history": []}'),
    "no progress": ("progress.json", b"{}"),
    "random numbers": ("rng_state.pth", b"garbage"),
    "weights": ("model.safetensors", b"garbage"),
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of two epochs, stopped before its end."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert script.main([*RUN, "--output_dir", str(folder)]) == 0
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "finished": None}))
    return folder


RUN = (
    "configuration/digits.yaml --hidden_size 8 --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 8 "
    "--num_train_epochs 2 --max_train_samples 32 --max_eval_samples 16 --save_total_limit 0 --use_cpu --disable_tqdm "
    "--dataloader_num_workers 0"
).split()


@pytest.mark.parametrize("fault", DAMAGED)
def test_going_on_from_a_damaged_checkpoint(run_folder, fault, tmp_path, capsys):
    """Without the sums of its files, by which it would be left out."""
    name, content = DAMAGED[fault]
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    (folder / "checkpoint-2" / name).write_bytes(content)
    (folder / "checkpoint-2" / "SHA256SUMS").unlink()
    assert script.main([*RUN, "--output_dir", str(folder)]) == 2
    err = capsys.readouterr().err
    assert str(folder / "checkpoint-2" / name) in err and len(err.splitlines()) == 1


def test_a_checkpoint_without_its_state_is_left_out_and_that_is_said(run_folder, tmp_path, capsys):
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    (folder / "checkpoint-2" / "trainer_state.json").unlink()
    assert script.main([*RUN, "--output_dir", str(folder)]) == 0
    assert "left out: checkpoint-2 (trainer_state.json is missing)" in capsys.readouterr().out
    assert (folder / "checkpoint-2.damaged").is_dir()


# What runs left, as figures read it

DAMAGED_RECORDS = {
    (analysis.curves.read, "history.json"): (
        "[{",
        "5",
        '["a"]',
        '[{"eval_loss": 1.0}]',
        '[{"epoch": 1, "eval_loss": "low"}]',
        '[{"epoch": 1, "eval_loss": NaN}]',
        '[{"epoch": 1, "eval_loss": 1.0, "eval_accuracy": [1]}]',
    ),
    (load_checkpoint, "run.json"): ("{", '{"settings": 5}', '{"settings": {}}', '{"settings": {"seed": "a"}}'),
    (analysis.compare.accuracy, "all_results.json"): ("{", "5", '{"eval_accuracy": "high"}', '{"eval_accuracy": NaN}'),
}


@pytest.mark.parametrize(
    "read, name, content",
    [(read, name, content) for (read, name), contents in DAMAGED_RECORDS.items() for content in contents],
)
def test_what_runs_left_is_checked_as_it_is_read(checkpoint, read, name, content):
    (checkpoint / "run.json").write_text('{"settings": {"seed": 3}}')
    assert load_checkpoint(str(checkpoint)).run["settings"] == {"seed": 3}
    (checkpoint / name).write_text(content)
    with pytest.raises(InputError, match=name):
        read(str(checkpoint))
