# SPDX-License-Identifier: Apache-2.0
"""A whole training step, and inference, of a ViT: softmax by Transformers beside every way to compute KArAt."""

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from image_classification.models.softmax_attention import UNMASKED
from modeling_karat_vit import KArAtViTConfig, KArAtViTForImageClassification

from .attention import BASES
from .common import PeakMemory, Table, measure, measure_in_turn, relative_error
from .naive import naive


SIZES = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
# Relative RMS difference of logits and gradients from `eager`, in fp32 with TF32 off, above which nothing is timed.
LIMIT = 1e-3


@dataclass(frozen=True)
class Case:
    """
    A model and its batch, which are measured for every way to attend.

    Args:
        size: of `SIZES`.
        basis: of `BASES`.
        batch: images of a step.
        image_size: their side in pixels.
    """

    size: str
    basis: str
    batch: int
    image_size: int = 224

    def build(self, provider: str, device: str):
        """Build the model with one way to attend."""
        torch.manual_seed(0)
        shape = {**SIZES[self.size], "image_size": self.image_size, "num_labels": 10}
        if provider == "softmax":
            return ViTForImageClassification(ViTConfig(**shape, attn_implementation=UNMASKED)).to(device)
        model = KArAtViTForImageClassification(KArAtViTConfig(**shape, **BASES[self.basis])).to(device)
        model.set_attn_implementation("karat_portable" if provider == "naive" else provider)
        return model

    def inputs(self, device: str) -> dict[str, torch.Tensor]:
        """Draw the batch."""
        images = torch.randn(self.batch, 3, self.image_size, self.image_size, device=device)
        return {"pixel_values": images, "labels": torch.randint(0, 10, (self.batch,), device=device)}

    def row(self, provider: str, mode: str, device: str) -> dict:
        """Begin a row of the table."""
        return {
            "benchmark": "model",
            "model": self.size,
            "provider": provider,
            "mode": mode,
            "basis": "" if provider == "softmax" else self.basis,
            "batch": self.batch,
            "tokens": (self.image_size // 16) ** 2 + 1,
            "dtype": "bfloat16" if device == "cuda" else "float32",
        }


def error(model, provider: str, inputs: dict[str, torch.Tensor]) -> float:
    """Compute the largest relative RMS difference of logits and gradients to those of `eager`, on two images."""
    if provider in ("softmax", "eager"):
        return 0.0

    def compute():
        output = model(**{name: tensor[:2] for name, tensor in inputs.items()})
        output.loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return [output.logits.detach(), *gradients]

    with naive() if provider == "naive" else nullcontext():
        found = compute()
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    expected = compute()
    model.set_attn_implementation(own)
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def steps_of(model: nn.Module, provider: str, inputs: dict[str, torch.Tensor], compiled: bool = False):
    """Make a training step and inference of one model by name, in bfloat16 on CUDA. They leave its mode alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    function: Callable = torch.compile(model, fullgraph=True) if compiled else model
    device = inputs["labels"].device.type

    def forward(**given):
        with (
            naive() if provider == "naive" else nullcontext(),
            torch.autocast(device, torch.bfloat16, enabled=device == "cuda"),
        ):
            return function(**given)

    def train():
        forward(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def infer():
        forward(pixel_values=inputs["pixel_values"])

    return {"train": train, "infer": infer}


def run(
    device: str,
    table: Table,
    case: Case,
    repeats: int,
    providers: Iterable[str],
    modes: Iterable[str] = ("eager",),
    whats: tuple[str, ...] = ("train", "infer"),
) -> None:
    """Measure ways to attend that agree with `eager`, each in every mode: `"eager"`, or `"compile"`."""
    inputs = case.inputs(device)
    for provider, mode in ((provider, mode) for provider in providers for mode in modes):
        row = case.row(provider, mode, device)
        try:
            run_one(table, row, case.build(provider, device), inputs, repeats, whats)
        except torch.cuda.OutOfMemoryError:
            table.add(**row, what=whats[0], error="out of memory")
        if device == "cuda":
            torch.compiler.reset()
            torch.cuda.empty_cache()


def run_one(table: Table, row: dict, model, inputs: dict[str, torch.Tensor], repeats: int, whats: tuple[str, ...]):
    """Measure one model for `run`. It is gone before the next is built."""
    wrong = error(model, row["provider"], inputs)
    if not wrong < LIMIT:
        table.add(**row, what=whats[0], error=f"wrong by {wrong:.1e}, not timed")
        return
    steps = steps_of(model, row["provider"], inputs, compiled=row["mode"] == "compile")
    for what in whats:
        model.train(what == "train")
        table.add(**row, what=what, error=f"{wrong:.1e}", **measure(steps[what], model.device.type, repeats))


def run_in_turn(table: Table, case: Case, repeats: int, providers: Iterable[str]) -> None:
    """
    Measure rows of eager mode on a CPU: every model's step in turn, in this process, and the peak memory of each in a
    process of its own, libraries included.
    """
    inputs = case.inputs("cpu")
    models = {provider: case.build(provider, "cpu") for provider in providers}
    rows = {provider: case.row(provider, "eager", "cpu") for provider in models}
    errors = {provider: error(model, provider, inputs) for provider, model in models.items()}
    for provider, wrong in errors.items():
        if not wrong < LIMIT:
            table.add(**rows[provider], what="train", error=f"wrong by {wrong:.1e}, not timed")
            del models[provider]
    steps = {provider: steps_of(model, provider, inputs) for provider, model in models.items()}
    for what in ("train", "infer"):
        for model in models.values():
            model.train(what == "train")
        times = measure_in_turn({provider: pair[what] for provider, pair in steps.items()}, repeats)
        for provider, measured in times.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                peak = process.submit(cpu_peak, case, provider, what, torch.get_num_threads()).result()
            table.add(**rows[provider], what=what, error=f"{errors[provider]:.1e}", **measured, peak_gib=peak)


def cpu_peak(case: Case, provider: str, what: str, threads: int) -> float:
    """Measure the peak memory of this process in GiB, over a few steps."""
    torch.set_num_threads(threads)
    model = case.build(provider, "cpu").train(what == "train")
    step = steps_of(model, provider, case.inputs("cpu"))[what]
    with PeakMemory() as memory:
        for _ in range(4):
            step()
    return memory.gib
