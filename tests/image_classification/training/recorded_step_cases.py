# SPDX-License-Identifier: Apache-2.0
"""
The recorded step on a GPU: `pytest tests/image_classification/training/recorded_step_cases.py`. Not collected by
itself, since machines without a GPU have nothing to record; test_recorded_step.py has the same function uncaptured.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification

from image_classification.errors import InputError
from image_classification.models.building import add_drop_path
from image_classification.models.softmax_attention import UNMASKED
from image_classification.runs.signals import Stopped
from image_classification.settings.arguments import RunArguments
from image_classification.training import trainer as trainer_module
from image_classification.training.trainer import ImageClassificationTrainer
from modeling_karat_vit import KArAtViTConfig, KArAtViTForImageClassification
from tests.image_classification.training.test_recorded_step import Poison


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROOT = Path(__file__).resolve().parents[3]
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 64,
    "patch_size": 8,
    "num_labels": 10,
}
KINDS = {
    "softmax": None,
    "blockwise": {},
    "universal": {"sharing": "universal"},
    "hybrid": {"grid_size": 1, "num_karat_heads": 1, "karat_layers": [-2, -1]},
    "spline": {"basis_type": "spline"},
    "mexican hat": {"basis_type": "wavelet"},
    "rational": {"basis_type": "rational"},
}


def make_model(kind, unused=False, **options):
    model = _make_model(kind, **options)
    if unused:
        model.unused = torch.nn.Parameter(torch.ones(3, 3))
    return model


def _make_model(kind, drop_path_rate=0.0, dropout=0.0):
    torch.manual_seed(0)
    if KINDS[kind] is None:
        model = ViTForImageClassification(ViTConfig(**SIZES, hidden_dropout_prob=dropout))
        model.set_attn_implementation(UNMASKED)
        if drop_path_rate:
            add_drop_path(model, drop_path_rate)
        return model
    config = KArAtViTConfig(**SIZES, **KINDS[kind], drop_path_rate=drop_path_rate, hidden_dropout_prob=dropout)
    return KArAtViTForImageClassification(config)


def train(
    folder,
    record,
    kind="blockwise",
    steps=40,
    resume=None,
    compiled=True,
    callback=None,
    times=1,
    **settings,
):
    """A Trainer that was trained, with 200 images in batches of 16: the last of an epoch has 8."""
    images, generator = 200, torch.Generator().manual_seed(1)
    labels = torch.randint(10, (images,), generator=generator)
    # Images that tell their class, so that the loss falls.
    pixels = 0.3 * torch.randn(images, 3, 64, 64, generator=generator) + (labels[:, None, None, None] - 4.5) / 5
    targets = torch.nn.functional.one_hot(labels, 10).float() * 0.9 + 0.01
    rows = [{"pixel_values": p, "labels": t} for p, t in zip(pixels, targets, strict=True)]
    defaults = {"disable_tqdm": True, "eval_strategy": "epoch", "dataloader_num_workers": 0, "save_strategy": "no"}
    defaults |= {"learning_rate": 2**-10, "sched": "constant", "warmup_epochs": 0.0, "logging_steps": 1}
    defaults |= {"per_device_train_batch_size": 16, "logging_strategy": "steps", "max_steps": steps}
    defaults |= {"record_step": record, "metric_for_best_model": None, "save_total_limit": None}
    model = {key: settings.pop(key) for key in ("drop_path_rate", "dropout", "unused") if key in settings}
    arguments = RunArguments(**{**defaults, "output_dir": str(folder), **settings})
    arguments._n_gpu = min(1, arguments.n_gpu)  # One process, one GPU, whatever is there.
    trainer = ImageClassificationTrainer(
        model=make_model(kind, **model),
        args=arguments,
        train_dataset=rows,
        eval_dataset=[{"pixel_values": p, "labels": label} for p, label in zip(pixels[:40], labels[:40])],
        callbacks=[callback] if callback is not None else [],
    )
    before = trainer_module.parts_to_compile
    trainer_module.parts_to_compile = before if compiled else lambda model: []
    try:
        for _ in range(times):
            trainer.train(resume_from_checkpoint=resume)
    finally:
        trainer_module.parts_to_compile = before
    return trainer


def losses(trainer):
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def same(first, second):
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name
    if first.average is not None:
        for name, tensor in first.average.tensors.items():
            assert torch.equal(second.average.tensors[name], tensor), name
    assert torch.equal(losses(first), losses(second))
    evaluations = [
        [entry["eval_loss"] for entry in t.state.log_history if "eval_loss" in entry] for t in (first, second)
    ]
    assert evaluations[0] == evaluations[1]


EXACT = {
    "softmax": {"kind": "softmax"},
    "blockwise": {"kind": "blockwise", "bf16": True, "model_ema": True, "model_ema_decay": 0.9},
    "accumulated": {"kind": "hybrid", "bf16": True, "gradient_accumulation_steps": 3, "model_ema": True},
    "fp16": {"kind": "universal", "fp16": True, "model_ema": True, "model_ema_decay": 0.9},
    "sgd": {"kind": "softmax", "optim": "sgd"},
    "dropout": {"kind": "blockwise", "drop_path_rate": 0.3, "dropout": 0.1, "bf16": True},
    "layer decay": {"kind": "softmax", "layer_decay": 0.5, "bf16": True},
    "unused": {"kind": "softmax", "unused": True, "weight_decay": 0.5},
    "unused, accumulated": {"kind": "softmax", "unused": True, "weight_decay": 0.5, "gradient_accumulation_steps": 3},
    "evaluated first": {"kind": "blockwise", "bf16": True, "eval_on_start": True, "steps": 30},
    "best at the end": {
        "kind": "blockwise", "bf16": True, "model_ema": True, "save_strategy": "epoch", "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    },
    "rarely logged": {"kind": "blockwise", "bf16": True, "logging_steps": 7},
    "trained twice": {"kind": "softmax", "bf16": True, "gradient_accumulation_steps": 3, "times": 2},
}  # fmt: skip


@pytest.mark.parametrize("way", EXACT)
def test_the_same_kernels_give_the_same_bits(way, tmp_path):
    """Uncompiled, recorded and unrecorded steps are equal: weights, average, losses; with evaluations between."""
    options = EXACT[way]
    plain = train(tmp_path / "plain", False, **options)
    recorded = train(tmp_path / "recorded", True, compiled=False, **options)
    if way == "fp16":  # Unscaling and clipping multiply in another order.
        torch.testing.assert_close(losses(recorded), losses(plain), rtol=2e-3, atol=2e-3)
        return
    same(plain, recorded)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_losses_over_200_steps(kind, precision, tmp_path):
    """Compiled and recorded, within the rounding of half precision; and twice the same."""
    options = {"kind": kind, "steps": 200, precision: True, "eval_strategy": "no"}
    plain, recorded = (losses(train(tmp_path / str(record), record, **options)) for record in (False, True))
    assert plain[-20:].mean() < 0.8 * plain[:5].mean()
    torch.testing.assert_close(recorded[:20], plain[:20], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(recorded[-20:].mean(), plain[-20:].mean(), rtol=0.1, atol=0.05)


def test_two_runs_are_equal_and_resuming_is_exact(tmp_path):
    options = {"bf16": True, "drop_path_rate": 0.3, "dropout": 0.1, "model_ema": True, "model_ema_decay": 0.9}
    options |= {"save_strategy": "steps", "save_steps": 10, "steps": 30}
    whole = train(tmp_path / "whole", True, **options)
    same(whole, train(tmp_path / "twice", True, **options))
    for step in (10, 20):
        again = train(tmp_path / f"again{step}", True, resume=str(tmp_path / f"whole/checkpoint-{step}"), **options)
        same(whole, again)


@pytest.mark.parametrize("kind", ["softmax", "blockwise"])
def test_equal_blocks_are_compiled_once(kind, tmp_path):
    """With stochastic depth, whose rate each block has its own of: two compilations at most, for 4 blocks; and one of
    the embeddings."""
    torch._dynamo.reset()
    counters.clear()
    train(tmp_path, True, kind, steps=4, drop_path_rate=0.3, bf16=True, eval_strategy="no")
    assert 2 <= counters["stats"]["unique_graphs"] <= 3


def test_divergence_is_found(tmp_path):
    with pytest.raises(InputError, match="step 6") as caught:
        train(tmp_path, True, callback=Poison(5), eval_strategy="no")
    assert "the first gradient of the backward pass that is not finite" in str(caught.value)


class Stop(TrainerCallback):
    """Asks the run to stop within an epoch, between two logs."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 17:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_was_stopped_goes_on_exactly(tmp_path):
    options = {"bf16": True, "drop_path_rate": 0.3, "model_ema": True, "logging_steps": 5, "steps": 30}
    whole = train(tmp_path / "whole", True, **options)
    with pytest.raises(Stopped) as stopped:
        train(tmp_path / "run", True, callback=Stop(), **options)
    same(whole, train(tmp_path / "run", True, resume=str(stopped.value.checkpoint), **options))


def test_the_scale_of_fp16_is_kept_when_training_again(tmp_path):
    trainer = train(tmp_path, True, fp16=True, steps=20, times=2, eval_strategy="no")
    assert trainer.accelerator.scaler.get_scale() > 1 and torch.isfinite(losses(trainer)).all()


class Gradients(TrainerCallback):
    heard = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.heard += all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("settings", [{}, {"debug": "underflow_overflow"}, {"gradient_checkpointing": True}])
def test_what_looks_into_a_step_is_not_recorded(settings, tmp_path):
    """By default; asked for, it is an error."""
    callback = None if settings else Gradients()
    train(tmp_path / "default", None, steps=3, callback=callback, eval_strategy="no", **settings)
    assert settings or callback.heard == 3
    with pytest.raises(InputError, match="cannot be recorded"):
        train(tmp_path / "asked", True, steps=3, callback=callback, eval_strategy="no", **settings)


def test_memory_does_not_grow(tmp_path):
    """Neither by evaluations between, nor by training again."""
    held = []

    class Held(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated())

    train(tmp_path, True, steps=130, callback=Held(), bf16=True, model_ema=True, times=2)
    assert len(held) == 20 and max(held[2:10]) <= held[2] + 2**20 and max(held[12:]) <= held[2] + 2**24


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(tmp_path):
    """DDP, recorded: the images of a step, also of the last one of an epoch, count as in one process."""
    words = [str(ROOT / "run_image_classification.py"), str(ROOT / "configuration/digits.yaml"), "--record_step"]
    words += ["--num_train_epochs", "3", "--disable_tqdm", "--dataloader_num_workers", "0", "--augment_on", "workers"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    for count in (1, 2):
        run = [*words, "--output_dir", str(tmp_path / str(count)), "--per_device_train_batch_size", str(64 // count)]
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(count)))}
        subprocess.run([sys.executable, *launch, str(count), *run], check=True, cwd=ROOT, env=os.environ | visible)
    one, two = (load_file(tmp_path / str(count) / "model.safetensors") for count in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
