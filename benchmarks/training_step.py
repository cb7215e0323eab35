# SPDX-License-Identifier: Apache-2.0
"""A whole training step, and inference, of a ViT: softmax by Transformers beside every way to compute KArAt."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext

import torch
from transformers import ViTConfig, ViTForImageClassification

from image_classification.models.softmax_attention import UNMASKED
from modeling_karat_vit import KArAtViTConfig, KArAtViTForImageClassification

from .common import PeakMemory, Table, measure, measure_in_turn, relative_error
from .naive import naive


SIZES = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
# Relative RMS difference of logits and gradients from `eager`, in fp32 with TF32 off, above which nothing is timed.
LIMIT = 1e-3


def build(provider: str, size: str, options: dict, device: str, image_size: int):
    torch.manual_seed(0)
    shape = {**SIZES[size], "image_size": image_size, "num_labels": 10}
    if provider == "softmax":
        return ViTForImageClassification(ViTConfig(**shape, attn_implementation=UNMASKED)).to(device)
    model = KArAtViTForImageClassification(KArAtViTConfig(**shape, **options)).to(device)
    model.set_attn_implementation("karat_portable" if provider == "naive" else provider)
    return model


def error(model, provider: str, images, labels) -> float:
    """Compute the largest relative RMS difference of logits and gradients to those of `eager`."""
    if provider in ("softmax", "eager"):
        return 0.0

    def compute():
        output = model(images[:2], labels=labels[:2])
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


def run(
    device: str,
    table: Table,
    size: str,
    basis: str,
    options: dict,
    batch: int,
    repeats: int,
    providers,
    modes=("eager",),
    image_size: int = 224,
    whats=("train", "infer"),
) -> None:
    images = torch.randn(batch, 3, image_size, image_size, device=device)
    labels = torch.randint(0, 10, (batch,), device=device)
    half = device == "cuda"
    row = {
        "benchmark": "model",
        "model": size,
        "batch": batch,
        "tokens": (image_size // 16) ** 2 + 1,
        "dtype": "bfloat16" if half else "float32",
    }
    for provider in providers:
        for mode in modes:
            name = {"provider": provider, "mode": mode, "basis": "" if provider == "softmax" else basis}
            try:
                time_one(
                    device,
                    table,
                    row | name,
                    build(provider, size, options, device, image_size),
                    images,
                    labels,
                    repeats,
                    whats,
                )
            except torch.cuda.OutOfMemoryError:
                table.add(**row, **name, what=whats[0], error="out of memory")
            if device == "cuda":
                torch.compiler.reset()
                torch.cuda.empty_cache()


def run_in_turn(table: Table, size: str, basis: str, options: dict, batch: int, repeats: int, providers) -> None:
    """
    Measure rows of eager mode on a CPU: every model's step in turn, in this process, and the peak memory of each in a
    process of its own, libraries included.
    """
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 10, (batch,))
    row = {"benchmark": "model", "model": size, "batch": batch, "tokens": 197, "dtype": "float32", "mode": "eager"}
    models = {provider: build(provider, size, options, "cpu", 224) for provider in providers}
    errors = {provider: error(model, provider, images, labels) for provider, model in models.items()}
    for provider, wrong in errors.items():
        if not wrong < LIMIT:
            table.add(**row, provider=provider, basis=basis, what="train", error=f"wrong by {wrong:.1e}, not timed")
            del models[provider]
    steps = {provider: cpu_steps(model, provider, images, labels) for provider, model in models.items()}
    for what in ("train", "infer"):
        times = measure_in_turn({provider: pair[what] for provider, pair in steps.items()}, repeats)
        for provider, measured in times.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                peak = process.submit(cpu_peak, provider, size, options, batch, what, torch.get_num_threads()).result()
            name = {"provider": provider, "basis": "" if provider == "softmax" else basis}
            table.add(**row, **name, what=what, error=f"{errors[provider]:.1e}", **measured, peak_gib=peak)


def cpu_steps(model, provider: str, images, labels) -> dict:
    """Make a training step and inference of one model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def train():
        model.train()
        with naive() if provider == "naive" else nullcontext():
            model(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def infer():
        model.eval()
        with naive() if provider == "naive" else nullcontext(), torch.no_grad():
            model(pixel_values=images)

    return {"train": train, "infer": infer}


def cpu_peak(provider: str, size: str, options: dict, batch: int, what: str, threads: int) -> float:
    """Measure the peak memory of this process in GiB, over a few steps."""
    torch.set_num_threads(threads)
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 10, (batch,))
    step = cpu_steps(build(provider, size, options, "cpu", 224), provider, images, labels)[what]
    with PeakMemory() as memory:
        for _ in range(4):
            step()
    return memory.gib


def time_one(device: str, table: Table, row: dict, model, images, labels, repeats: int, whats) -> None:
    """Measure training and inference of one model, `eager` or by `torch.compile`, if it agrees with `eager`."""
    provider, half = row["provider"], device == "cuda"
    wrong = error(model, provider, images, labels)
    if not wrong < LIMIT:
        table.add(**row, what=whats[0], error=f"wrong by {wrong:.1e}, not timed")
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    function = torch.compile(model, fullgraph=True) if row["mode"] == "compile" else model

    def precision():
        return torch.autocast(device, torch.bfloat16) if half else nullcontext()

    def train():
        with precision():
            loss = function(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def infer():
        with torch.no_grad(), precision():
            function(pixel_values=images)

    with naive() if provider == "naive" else nullcontext():
        for what in whats:
            model.train(what == "train")
            step = {"train": train, "infer": infer}[what]
            table.add(**row, what=what, error=f"{wrong:.1e}", **measure(step, device, repeats))
