# SPDX-License-Identifier: Apache-2.0
"""
What `karatize` does to the outputs of each family before any training, and the memory of attention with biases:

    python -m benchmarks.families

The models are the tests', tiny and with random weights. The rows are those of the tables in docs/karatize.md.
"""

import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.nn import functional as F

from modeling_karat_vit import karatize
from modeling_karat_vit.karat_heads import KArAtHeads, OperatorConfig
from tests.backbones import MAKERS, features, images_for, make

from .common import PeakMemory, Rows


RESULTS = Path(__file__).parent / "results" / "cpu_families.csv"
FITTED, UNSEEN = 32, 64  # Images.
# Swin-Tiny's first stage at 224x224.
WINDOWS, HEADS, SIDE, HEAD_SIZE = 64, 3, 7, 32
IMAGES = (2, 8)
PROVIDERS = ("softmax, biased", "KArAt", "KArAt, biased")


class Families(Rows):
    """Rows of relative errors, and of memory."""

    measured = (
        *("benchmark", "model_type", "model", "fitted_images", "unseen_images", "residual", "replace", "fitted"),
        *("provider", "batch", "peak_gib"),
    )


def starts(name: str) -> dict:
    """
    Measure the outputs of one of `MAKERS` after either start, on images that no fit saw: the norm of their distance
    from the untouched model's, over the norm of these; `replace` before and after the fit.
    """
    source = make(name)
    fitted, unseen = images_for(source, FITTED + UNSEEN).split([FITTED, UNSEEN])
    row: dict = {"fitted_images": FITTED, "unseen_images": UNSEEN}
    ways = {
        "residual": {},
        "replace": {"start": "replace", "images": fitted, "calibration_steps": 0},
        "fitted": {"start": "replace", "images": fitted},
    }
    with torch.no_grad():
        expected = features(source, unseen)
        for way, settings in ways.items():
            torch.manual_seed(0)
            model = karatize(source, **settings)
            row[way] = float((features(model, unseen) - expected).norm() / expected.norm())
    return {"model_type": model.config.model_type, "model": type(source).__name__, **row}


def memory(provider: str, images: int) -> float:
    """Measure the peak memory in GiB, beyond the inputs, of attention in windows, forward and backward, on a CPU."""
    tokens = SIDE**2
    heads = KArAtHeads(OperatorConfig.of(HEADS, None, HEAD_SIZE, 0, (SIDE, SIDE), {}), "replace", -50.0)
    modules: list = [heads.operator, *heads.operator.edges]
    for module in modules:
        module.reset_parameters()

    def step(windows: int) -> float:
        shape = windows, HEADS, tokens
        query, key, value = (torch.randn(*shape, HEAD_SIZE, requires_grad=True) for _ in range(3))
        # Swin's bias and mask in one.
        bias = (torch.randn(*shape, tokens) - 100.0 * (torch.rand(windows, 1, tokens, tokens) < 0.1)).requires_grad_()
        gc.collect()
        with PeakMemory() as before:
            pass
        with PeakMemory() as during:
            if provider == "softmax, biased":
                output = F.scaled_dot_product_attention(query, key, value, bias)
            else:
                mask = bias if provider == "KArAt, biased" else None
                output, _ = heads.attend(query, key, value, mask, HEAD_SIZE**-0.5, "karat_portable")
            output.square().sum().backward()
        return during.gib - before.gib

    step(1)  # What libraries take once.
    return step(WINDOWS * images)


def main() -> None:
    table = Families("cpu")
    for name in MAKERS:
        table.add(benchmark="starts", **starts(name))
    for images in IMAGES:
        for provider in PROVIDERS:
            # What a process has freed, it takes again unseen: each has one of its own.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(memory, provider, images).result()
            table.add(benchmark="memory", provider=provider, batch=images, peak_gib=found)
    RESULTS.unlink(missing_ok=True)
    table.write(RESULTS)


if __name__ == "__main__":
    main()
