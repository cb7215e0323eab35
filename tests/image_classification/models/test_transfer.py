# SPDX-License-Identifier: Apache-2.0
"""Attention transfer: a softmax ViT that attends with a teacher's maps."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, ViTImageProcessorPil

import predict
from analysis.models import load_checkpoint
from image_classification import main as script
from image_classification.errors import InputError
from image_classification.models import transfer
from image_classification.models.building import build_model
from image_classification.runs import checkpoints
from image_classification.settings.parser import parse_settings
from tests.models import make_model, save_checkpoint, with_scores


SIZES = {"hidden_size": 24, "intermediate_size": 16, "num_labels": 10}


def softmax(seed=0, **fields):
    return with_scores(make_model("softmax", seed=seed, **{**SIZES, **fields}).eval())


def karat(seed=1, **fields):
    return with_scores(make_model("karat", seed=seed, **{**SIZES, **fields}).eval())


def save(model, folder, mean=0.5, deviation=0.5):
    return save_checkpoint(model, folder, image_mean=[mean] * 3, image_std=[deviation] * 3)


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def test_a_twin_as_teacher_changes_nothing(pixels):
    """The maps of the same weights are the student's own."""
    student = softmax()
    expected = student(pixels).logits
    transfer.feed(student, transfer.AttentionTeacher(softmax()), "twin")
    torch.testing.assert_close(student(pixels).logits, expected)
    # Its own queries and keys have no part any more, nor has the place of the pixels among the arguments.
    torch.nn.init.normal_(student.vit.layers[0].attention.q_proj.weight)
    torch.testing.assert_close(student(pixel_values=pixels).logits, expected)


def test_every_block_attends_with_the_teachers_signed_maps(pixels):
    teacher, student = karat(), softmax(hidden_size=16)
    inputs, outputs = {}, {}

    def keep(module, args, output):
        inputs[module], outputs[module] = args[0], output[0]

    for layer in student.vit.layers:
        layer.attention.register_forward_hook(keep)
    transfer.feed(student, transfer.AttentionTeacher(teacher), "teacher")
    student(pixels)
    maps = karat()(pixels, output_attentions=True).attentions
    for index, layer in enumerate(student.vit.layers):
        attention = layer.attention
        assert (maps[index] < 0).any()
        values = attention.v_proj(inputs[attention]).unflatten(-1, (2, 8)).transpose(1, 2)
        expected = attention.o_proj((maps[index] @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(outputs[attention], expected)


def test_queries_keys_and_teacher_are_frozen_and_the_rest_learns(pixels):
    teacher, student = karat(), softmax()
    names = set(student.state_dict())
    transfer.feed(student.train(), transfer.AttentionTeacher(teacher), "teacher")
    student(pixels, labels=torch.tensor([1, 2, 3])).loss.backward()
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in names if "q_proj" in name or "k_proj" in name} and len(frozen) == 8
    for name, parameter in student.named_parameters():
        assert (parameter.grad is None) if name in frozen else (parameter.grad.abs().max() > 0), name
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert set(student.state_dict()) == names


def test_gradient_checkpointing_sees_the_same_maps(pixels):
    gradients = []
    for checkpointing in (False, True):
        student = softmax().train()
        transfer.feed(student, transfer.AttentionTeacher(karat()), "teacher")
        if checkpointing:
            student.gradient_checkpointing_enable()
        student(pixels, labels=torch.tensor([1, 2, 3])).loss.backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*gradients)


def test_the_teacher_sees_its_own_normalisation(pixels, tmp_path):
    folder = save(karat(), tmp_path / "teacher", mean=0.3, deviation=0.2)
    own = ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.25] * 3)
    teacher = transfer.load_teacher(folder, softmax().config, own)
    expected = karat()((pixels * 0.25 + 0.5 - 0.3) / 0.2, output_attentions=True).attentions
    for maps, wanted in zip(teacher.maps(pixels), expected, strict=True):
        torch.testing.assert_close(maps, wanted, atol=1e-5, rtol=1e-4)
    same = ViTImageProcessorPil(image_mean=[0.3] * 3, image_std=[0.2] * 3)
    assert transfer.load_teacher(folder, softmax().config, same).scale is None
    half = transfer.load_teacher(folder, softmax().config, own, torch.bfloat16)
    torch.testing.assert_close(half.maps(pixels)[1].float(), teacher.maps(pixels)[1], atol=0.05, rtol=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 3}, "it has blocks 3, not 2"),
        ({"num_attention_heads": 4}, "it has heads 4, not 2"),
        ({"patch_size": 2}, "it has patch size 2 x 2, not 4 x 4"),
        ({"image_size": 16}, "it has image size 16 x 16, not 8 x 8"),
    ],
)
def test_maps_that_do_not_fit(fields, message):
    with pytest.raises(InputError, match=message):
        transfer.check_teacher("teacher", karat(**fields).config, softmax().config)


def test_teachers_and_students_that_are_none(tmp_path):
    with pytest.raises(InputError, match="to a softmax ViT"):
        transfer.check_teacher("teacher", karat().config, karat().config)
    with pytest.raises(InputError, match="of type 'bert'"):
        transfer.check_teacher("teacher", AutoConfig.for_model("bert"), softmax().config)
    fed = softmax()
    transfer.feed(fed, transfer.AttentionTeacher(karat()), "first")
    with pytest.raises(InputError, match=r"a teacher of its own \(first\)"):
        transfer.check_teacher("fed", fed.config, softmax().config)
    folder = save(karat(), tmp_path / "teacher")
    weights = Path(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"`teacher_attention` .*teacher cannot be loaded"):
        transfer.load_teacher(folder, softmax().config, ViTImageProcessorPil())


# Whole runs: with everything that a run may have beside it.
LENGTH = (
    "--model vit_tiny_patch16_224 --num_hidden_layers 2 --image_size 8 --patch_size 4 --eval_crop_ratio 1 "
    "--data_set digits --max_train_samples 76 --max_eval_samples 20 --num_train_epochs 2 --seed 3 "
    "--gradient_accumulation_steps 2 --save_strategy steps --save_steps 1 --save_total_limit 0 --learning_rate 1e-2 "
    "--model_ema --model_ema_decay 0.9 --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --bf16"
).split()


@pytest.fixture
def words(small, tmp_path):
    """The words of a run with a teacher."""
    flags = [*small, *LENGTH]
    flags[flags.index("--num_hidden_layers") : flags.index("--num_hidden_layers") + 2] = []
    return [*flags, "--teacher_attention", save(karat(), tmp_path / "teacher")]


@pytest.mark.system
def test_a_run_and_its_resumption(words, tmp_path, capsys):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert script.main([*words, "--output_dir", str(whole)]) == 0
    said = capsys.readouterr().out
    assert f"Teacher {tmp_path / 'teacher'}: its attention maps" in said and "predict.py" not in said
    before = {name: value.clone() for name, value in _start(words).state_dict().items()}
    after = load_file(whole / "model.safetensors")
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]) == ("q_proj" in name or "k_proj" in name), name
    record = json.loads((whole / "run.json").read_text())
    assert record["settings"]["teacher_attention"] == str(tmp_path / "teacher")
    assert json.loads((whole / "config.json").read_text())["teacher_attention"] == "teacher"
    card = (whole / "README.md").read_text()
    assert "* Model: attention of its teacher teacher; 2 blocks" in card
    assert "does not work alone" in card and "pipeline(" not in card and "`teacher`" in card
    # Stopped after its second step, it goes on to the same bits.
    shutil.copytree(whole, folder)
    (folder / "run.json").write_text(json.dumps({**record, "finished": None}).replace(str(whole), str(folder)))
    for step, path in checkpoints.checkpoints(folder).items():
        if step > 2:
            shutil.rmtree(path)
    for name in ("model.safetensors", "README.md", "all_results.json", "history.json"):
        (folder / name).unlink()
    assert script.main([*words, "--output_dir", str(folder)]) == 0
    assert "it goes on from checkpoint-2" in capsys.readouterr().out
    resumed = load_file(folder / "model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in after.items())
    _evaluated(words, whole, capsys)
    _alone(whole, tmp_path, capsys)


def _start(words):
    settings = parse_settings([*words, "--output_dir", "unused"])
    torch.manual_seed(settings.training.seed)
    return build_model(settings.model, [str(digit) for digit in range(10)])


def _evaluated(words, whole, capsys):
    data = "--data_set digits --max_eval_samples 20 --seed 3 --use_cpu --bf16 --do_train false".split()
    teacher = words[-2:]
    results = json.loads((whole / "all_results.json").read_text())
    out = whole.parent / "evaluated"
    assert script.main([*data, *teacher, "--resume_from_checkpoint", str(whole), "--output_dir", str(out)]) == 0
    again = json.loads((out / "eval_results.json").read_text())
    assert again["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-3)
    capsys.readouterr()
    assert script.main([*data, "--resume_from_checkpoint", str(whole)]) == 2
    assert "its teacher, teacher: say where that is with --teacher_attention" in capsys.readouterr().err
    assert script.main([*data, *teacher, "--resume_from_checkpoint", teacher[1]]) == 2
    assert "was trained without a teacher" in capsys.readouterr().err


def _alone(whole, tmp_path, capsys):
    """Where the teacher is not, the model is not used; as a start, it is a softmax ViT like any other."""
    with pytest.raises(InputError, match=r"maps of its teacher, teacher, .*look at the teacher"):
        load_checkpoint(str(whole))
    assert predict.main([str(whole / "sample.png"), "--model", str(whole)]) == 2
    assert "the maps of its teacher, teacher, and predicts nothing alone" in capsys.readouterr().err
    settings = parse_settings(["--finetune", str(whole), "--data_set", "digits", "--output_dir", "unused"])
    model = build_model(settings.model, [str(digit) for digit in range(10)])
    assert transfer.needs(model.config) is None and all(p.requires_grad for p in model.parameters())


def test_what_does_not_go_with_a_teacher_is_said_before_anything_is_written(words, tmp_path, capsys):
    for extra, message in (
        (["--attn_implementation", "sdpa"], "`attn_implementation` says how attention is computed"),
        (["--torch_compile"], "`torch_compile` does not work with `teacher_attention`"),
        (["--num_attention_heads", "4"], "it has heads 2, not 4"),
        (["--teacher_attention", str(tmp_path / "nowhere")], "there is no such folder"),
    ):
        flags = [*words]
        if extra[0] in flags:
            place = flags.index(extra[0])
            del flags[place : place + 2]
        assert script.main([*flags, *extra, "--output_dir", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
