# SPDX-License-Identifier: Apache-2.0
"""The metrics of an evaluation: loss, top-1 and top-5 accuracy."""

import functools
import importlib.util
from typing import Any

import numpy as np
import torch

from ..errors import InputError, did_you_mean


TOP = 5


def check_best(metric: str | None, average: bool, classes: int | None = None) -> None:
    """
    Raise an `InputError` unless an evaluation will have `metric_for_best_model`, with `eval_` or without, of so many
    classes (if that is known), and where an `average` of the weights is evaluated too.
    """
    names = ["loss", "accuracy"] + ["top5_accuracy"] * (classes is None or classes > TOP)
    names += [f"ema_{name}" for name in names] * average
    if metric is not None and metric.removeprefix("eval_") not in names:
        hint = did_you_mean(metric.removeprefix("eval_"), names)
        raise InputError(f"`metric_for_best_model` is {metric!r}{hint}, expected one of {', '.join(names)}.")


def preprocess(
    logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    All that the metrics need of a batch, image by image, so that what is gathered of several processes can be cut to
    the images that there are: of logits (B, classes), or the first of several as a distilled DeiT has them, and class
    indices (B,), the indices of the best classes (B, up to 5), best first, and losses (B,).
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices, losses


class ComputeMetrics:
    """`compute_metrics` of the Trainer, over `preprocess`: top-1, top-5 and the mean loss over all images (the
    Trainer's own is a mean over batches, of which the last is smaller)."""

    def __init__(self, classes: int):
        if importlib.util.find_spec("evaluate") is None:
            raise InputError("Evaluations need the package evaluate, which is not installed: pip install evaluate.")
        self.classes = classes

    @functools.cached_property
    def metric(self) -> Any:
        # Only now: `evaluate` takes much of SciPy along, for which the first step of training need not wait.
        from .accuracy import TopKAccuracy

        return TopKAccuracy(self.classes)

    def __call__(self, prediction) -> dict[str, float]:
        ranked, losses = prediction.predictions
        scores = self.metric.compute(predictions=ranked, references=prediction.label_ids)
        return scores | {"loss": float(losses.astype(np.float64).mean())}
