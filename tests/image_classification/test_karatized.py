# SPDX-License-Identifier: Apache-2.0
"""Whole commands on pre-trained models of other families: with KArAt heads (`--karatize`), and as they are."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BertConfig,
    BitImageProcessor,
    DeiTImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
    pipeline,
)

import predict
from image_classification.data.images import decode
from image_classification.data.sources import load_data
from image_classification.data.streaming import StreamedSplit
from image_classification.data.transforms import EvalTransform
from image_classification.main import main
from image_classification.models.families import block_names
from image_classification.models.loading import load_image_processor
from image_classification.pipeline import calibration_images
from image_classification.settings.arguments import DataArguments
from image_classification.training.optimization import layer_scale
from tests.backbones import make, save_as_timm
from tests.images import COLOURS, colour_image, make_image_folder


OPERATOR = ["--grid_size", "1", "--karat_rank", "3"]
# Windows; prefix tokens, and an encoder without a head; an odd preparation, and two heads; a text tower left out; ViT.
PRETRAINED = {
    "swin": ("swin_classifier", ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.4] * 3)),
    "registers": (
        "registers",
        BitImageProcessor(size={"shortest_edge": 14}, crop_size={"height": 12, "width": 12}, resample=2),
    ),
    "deit": (
        "deit_distilled",
        DeiTImageProcessor(size={"height": 10, "width": 10}, crop_size={"height": 8, "width": 8}),
    ),
    "siglip": ("siglip_classifier", SiglipImageProcessor(size={"height": 8, "width": 8})),
    "vit": ("vit_classifier", ViTImageProcessor(size={"height": 8, "width": 8})),
    # timm's says in its configuration how images are prepared.
    "convit": ("convit_classifier", None),
}
KARATIZED = {
    "swin": ["--karatize"],
    "registers": ["--karatize", "replace", "--karat_layers", "-1", "--calibration_images", "3"],
    "deit": ["--karatize", "residual", "--karat_layers", "0", "--layer_decay", "0.5"],
    "siglip": ["--karatize", "--num_karat_heads", "1", "--model_ema", "--basis_type", "rational"],
    "vit": ["--karatize", "--drop_path_rate", "0.5"],
    "convit": ["--karatize", "--model_ema", "--drop_path_rate", "0.5"],
}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder of pre-trained models, with their image processors, by the names of `PRETRAINED`."""
    root = tmp_path_factory.mktemp("pretrained")
    for name, (kind, processor) in PRETRAINED.items():
        if processor is None:
            save_as_timm(make(kind), root / name)
            continue
        make(kind).save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("data") / "images", (("train", 3), ("validation", 2)))


def words(images, folder, *more) -> list[str]:
    flags = f"--data_path {images} --output_dir {folder} --num_train_epochs 1 --per_device_train_batch_size 5 "
    flags += "--warmup_epochs 0 --use_cpu --cpu_threads 1 --disable_tqdm --dataloader_num_workers 0"
    return [*flags.split(), *map(str, more)]


def evaluate(images, folder, target) -> dict:
    flags = f"--eval --resume {folder} --data_path {images} --output_dir {target} --use_cpu --cpu_threads 1"
    assert main([*flags.split(), "--disable_tqdm", "--dataloader_num_workers", "0"]) == 0
    return json.loads((target / "eval_results.json").read_text())


@pytest.fixture(scope="module")
def runs(pretrained, images, tmp_path_factory):
    """A function `runs(name)` with the folder of a run that trains KArAt parameters alone, made once."""
    root = tmp_path_factory.mktemp("runs")

    def run(name: str) -> Path:
        if not (root / name).exists():
            rates = "--learning_rate 0 --attn_lr 0.01 --weight_decay 0 --hidden_dropout_prob 0".split()
            rates = rates[:-2] if name == "siglip" else rates
            argv = words(images, root / name, "--model", pretrained / name, *KARATIZED[name], *OPERATOR, *rates)
            assert main(argv) == 0
        return root / name

    return run


@pytest.mark.system
@pytest.mark.parametrize("name", PRETRAINED)
def test_a_pretrained_model_gets_karat_heads_and_is_trained(name, pretrained, runs, images, tmp_path, capsys):
    folder, source = runs(name), pretrained / name
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"].startswith("karat_") and config["auto_map"]["AutoModelForImageClassification"]
    assert config["karat"]["start"] == ("replace" if name == "registers" else "residual")
    assert config["karat"]["operator"]["karat_rank"] == 3
    # Its weights stay, its KArAt parameters are trained.
    model, before = AutoModelForImageClassification.from_pretrained(folder), make(PRETRAINED[name][0]).state_dict()
    assert list(model.config.id2label.values()) == list(COLOURS)
    karat, after = model.karat_parameter_names(), model.state_dict()
    inside = "dinov2_with_registers." if name == "registers" else ""  # It was saved as an encoder.
    kept = {f"{inside}{key}": value for key, value in before.items() if "classifier" not in key}
    assert {key for key in after if "classifier" not in key} == kept.keys() | karat
    assert all(torch.equal(after[key], value) for key, value in kept.items())
    assert all(after[key].abs().max() > 0 for key in karat if key.endswith("gamma"))
    # Images are prepared as they were for it.
    photo = colour_image("red", 5, (31, 23))
    processors = (AutoImageProcessor.from_pretrained(path) for path in (folder, source))
    ours, theirs = (processor(photo, return_tensors="pt")["pixel_values"] for processor in processors)
    # timm resizes by Pillow, which rounds otherwise than torchvision.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1.5 / 255 / 0.4 if name == "convit" else 0)
    card = ModelCard.load(folder / "README.md")
    family = config["model_type"].removeprefix("karat_").removeprefix("plain_")
    assert {"karat-vit", family} <= set(card.data.tags) and "trust_remote_code=True" in card.text
    assert "pre-trained" in card.text and source.name in card.text
    assert ("pip install timm" in card.text) == (name == "convit")
    # It is evaluated, predicts, and can be fine-tuned.
    logged = json.loads((folder / "all_results.json").read_text())
    found = evaluate(images, folder, tmp_path / "eval")
    assert found["eval_loss"] == pytest.approx(logged["eval_loss"], abs=1e-6)
    capsys.readouterr()
    assert predict.main([str(folder / "sample.png"), "--model", str(folder), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("%") == 3
    again = tmp_path / "again"
    assert main(words(images, again, "--finetune", folder, "--learning_rate", "0", "--max_train_samples", "4")) == 0
    last = load_file(again / "model.safetensors")
    assert all(torch.equal(last[key], value) for key, value in load_file(folder / "model.safetensors").items())


@pytest.mark.system
@pytest.mark.parametrize(("name", "kind"), [("deit", "deit"), ("convit", "timm_wrapper")])
def test_karat_heads_begin_as_softmax(name, kind, pretrained, images, tmp_path):
    """At the start both ways evaluate alike: residual adds nothing, replace was fitted to training images."""
    losses = {}
    for start in ("residual", "replace", None):
        flags = ["--karatize", start, "--karat_layers", "-1", "--calibration_images", "9", "--attn_lr", "0"]
        flags = flags if start else []
        target = tmp_path / str(start)
        argv = words(images, target, "--finetune", pretrained / name, "--learning_rate", "0", *flags)
        assert main(argv) == 0
        losses[start] = json.loads((target / "all_results.json").read_text())["eval_loss"]
    assert losses["residual"] == losses[None] and losses["replace"] != losses[None]
    assert losses["replace"] == pytest.approx(losses[None], rel=0.2)
    untouched = tmp_path / "None"
    assert json.loads((untouched / "config.json").read_text())["model_type"] == kind
    card = (untouched / "README.md").read_text()
    assert "softmax attention" in card and "trust_remote_code" not in card
    # Whoever has Transformers sees what the evaluation saw.
    classify = pipeline("image-classification", model=str(untouched))
    assert {guess["label"] for guess in classify(str(untouched / "sample.png"))} == set(COLOURS)
    processors = AutoImageProcessor.from_pretrained(untouched), load_image_processor(str(untouched), "--model")
    photo = colour_image("red", 5, (31, 23))
    assert torch.equal(*(made(photo, return_tensors="pt")["pixel_values"] for made in processors))


@pytest.mark.system
@pytest.mark.parametrize("name", ["registers", "convit"])
def test_a_stopped_run_goes_on(name, pretrained, images, tmp_path):
    """Bit for bit, with the calibration of its start, which is not made again."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = ["--model", pretrained / name, *KARATIZED[name], *OPERATOR]
    flags += ["--num_train_epochs", "2", "--learning_rate", "0.01"]
    assert main(words(images, whole, *flags)) == 0
    shutil.copytree(whole, stopped)
    record = json.loads((stopped / "run.json").read_text())
    (stopped / "run.json").write_text(json.dumps(record | {"finished": None}))
    shutil.rmtree(stopped / "checkpoint-4")
    for path in stopped.glob("model*"):
        path.unlink()
    assert main(words(images, stopped, *flags)) == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.system
def test_a_recipe_karatizes(pretrained, images, tmp_path, runs):
    """The recipe that a run leaves repeats it, and one by hand reads as the flags do."""
    recipe = (runs("swin") / "recipe.yaml").read_text()
    assert "karatize: residual" in recipe
    (tmp_path / "recipe.yaml").write_text(recipe.replace("calibration_images: 64\n", ""))
    argv = [tmp_path / "recipe.yaml", "--model", pretrained / "swin", "--data_path", images]
    argv += "--use_cpu --cpu_threads 1 --disable_tqdm --dataloader_num_workers 0 --output_dir".split()
    assert main([*map(str, argv), str(tmp_path / "again")]) == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (runs("swin"), tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "swin", "--karatize", "--karat_layers", "0", "3"], ["`karat_layers`", "3", "0 to 2"]),
        (["--model", "swin", "--karatize", "--num_karat_heads", "3"], ["`num_karat_heads` is 3", "2 heads"]),
        (["--model", "swin", "--karatize", "--num_karat_heads", "0"], ["--num_karat_heads"]),
        (["--model", "swin", "--karatize", "--sharing", "universal"], ["`sharing`", "universal"]),
        (["--model", "swin", "--karatize", "--basis_type", "furier"], ["basis_type", "furier"]),
        (["--model", "siglip", "--karatize", "--image_size", "12"], ["`image_size`", "12 x 12", "8 x 8"]),
        (["--finetune", "deit", "--image_size", "16"], ["`image_size`", "16 x 16"]),
        (["--finetune", "deit", "--grid_size", "3"], ["`grid_size`", "--karatize"]),
        (["--finetune", "deit", "--num_attention_heads", "4"], ["`num_attention_heads` is 4", "2"]),
        (["--finetune", "deit", "--attn_lr", "0.1"], ["`attn_lr`"]),
        (["--model", "swin", "--finetune", "deit"], ["`model`", "--model"]),
        (["--model", "swin", "--finetune", "deit", "--karatize"], ["`karatize`", "--finetune"]),
        (["--model", "karat_digits", "--karatize"], ["`karatize`", "no weights", "train the preset karat_digits from"]),
        (["--model", "vit_tiny_patch16_224", "--karatize"], ["train the preset vit_tiny_patch16_224_karat from"]),
        (["--model", "bert", "--karatize"], ["`karatize`", "'bert'", "swin"]),
        (["--finetune", "bert"], ["`finetune`", "'bert'", "swin"]),
        (["--model", "./nowhere", "--karatize"], ["`model`", "nowhere"]),
        (["--model", "done", "--karatize"], ["`karatize`", "KArAt heads already"]),
        (["--model", "convit", "--karatize", "--image_size", "12"], ["`image_size`", "12 x 12", "8 x 8"]),
        (["--finetune", "convit", "--num_attention_heads", "4"], ["`num_attention_heads` is 4", "2"]),
        (["--finetune", "convit", "--initializer_range", "0.1"], ["`initializer_range`"]),
        (["--finetune", "convit", "--gradient_checkpointing"], ["`gradient_checkpointing`", "TimmWrapper"]),
        (["--model", "resnet", "--karatize"], ["`karatize`", "resnet18", "convit_tiny"]),
        (["--finetune", "resnet"], ["`finetune`", "resnet18", "convit_tiny"]),
        (["--finetune", "timm_vit"], ["vit_tiny_patch16_224", "convert_timm_state_dict"]),
        (["--finetune", "done", "--karat_rank", "2"], ["`karat_rank`"]),
    ],
)
def test_what_cannot_be_is_said_before_data_are_read(flags, named, pretrained, runs, tmp_path, capsys):
    BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1).save_pretrained(tmp_path / "bert")
    places = {"bert": tmp_path / "bert", "done": runs("swin") if "done" in flags else None}
    places |= {name: pretrained / name for name in PRETRAINED}
    for name, architecture in (("resnet", "resnet18"), ("timm_vit", "vit_tiny_patch16_224")):
        places[name] = tmp_path / name
        save_as_timm(make("convit_classifier"), places[name], architecture=architecture)
    argv = words(tmp_path / "no-such-data", tmp_path / "out", *(places.get(word, word) for word in flags))
    if {"--attn_lr", "--gradient_checkpointing"} & set(flags):  # Of the Trainer.
        argv[1] = str(make_image_folder(tmp_path / "data"))
    capsys.readouterr()
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert message.startswith("run_image_classification.py: error: ") and message.count("\n") == 1
    assert all(word in message for word in named), message
    assert not list((tmp_path / "out").glob("checkpoint-*"))


LAYERS = {
    "swin_classifier": {
        "swin.embeddings.norm.weight": 4,
        "swin.encoder.layers.0.blocks.0.layernorm_before.weight": 3,
        "swin.encoder.layers.0.blocks.1.layernorm_before.weight": 2,
        "swin.encoder.layers.0.downsample.norm.weight": 2,
        "swin.encoder.layers.1.blocks.0.layernorm_before.weight": 1,
        "swin.layernorm.weight": 0,
        "classifier.weight": 0,
    },
    "convit_classifier": {
        **{f"timm_model.{name}": 3 for name in ("cls_token", "pos_embed", "patch_embed.proj.weight")},
        "timm_model.blocks.0.attn.gating_param": 2,
        "timm_model.blocks.1.norm1.weight": 1,
        "timm_model.norm.weight": 0,
        "timm_model.head.weight": 0,
    },
}


@pytest.mark.parametrize(("name", "exponents"), LAYERS.items())
def test_layer_decay_counts_the_blocks_of_all_stages(name, exponents):
    model = make(name)
    blocks = block_names(model)
    assert exponents.keys() <= dict(model.named_parameters()).keys()
    assert {name: layer_scale(name, blocks, 0.5) for name in exponents} == {
        name: 0.5**exponent for name, exponent in exponents.items()
    }


def test_calibration_images_of_either_kind_of_split(images):
    """Drawn by the seed, or the first of a stream, and prepared as for the evaluation."""
    data = load_data(DataArguments(data_path=str(images)), seed=0)
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    drawn = [calibration_images(data, 4, seed, processor) for seed in (0, 0, 1)]
    assert drawn[0].shape == (4, 3, 8, 8)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert len(calibration_images(data, 1000, 0, processor)) == len(data.train)
    first = torch.stack([EvalTransform(processor)(decode(row["image"], "image")) for row in data.train.select([0, 1])])
    stream = StreamedSplit(data.train.to_iterable_dataset(), len(data.train), "images", 3)
    assert torch.equal(calibration_images(dataclasses.replace(data, train=stream), 2, 0, processor), first)


@pytest.mark.parametrize("name", ["swin", "convit"])
def test_a_checkpoint_is_another_model_than_asked_for(name, pretrained, runs, images, capsys):
    flags = f"--eval --resume {runs(name)} --data_path {images} --use_cpu --model {pretrained / name} --karatize"
    assert main([*flags.split(), *OPERATOR, "--disable_tqdm", "--dataloader_num_workers", "0"]) == 0
    assert main([*flags.split(), "--karat_rank", "2"]) == 2
    assert "another model" in capsys.readouterr().err
