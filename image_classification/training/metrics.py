# SPDX-License-Identifier: Apache-2.0
"""Top-1 and top-5 accuracy, as an `evaluate` metric that downloads nothing."""

import datasets
import evaluate
import numpy as np
import torch

from ..errors import InputError, did_you_mean


TOP = 5


class TopKAccuracy(evaluate.Metric):
    """
    Share of the images whose class is the first (`accuracy`) or among the first five (`top5_accuracy`) predicted.

    `compute(predictions=..., references=...)` takes the best classes of each image, best first, and the right class.
    `top5_accuracy` is left out where no more than five classes are predicted from, that is, below five columns, or with
    `classes` at most 5.
    """

    def __init__(self, classes: int, **kwargs):
        self.classes = classes
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self):
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions: class indices, best first; references: class indices",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        ranked, right = np.asarray(predictions), np.asarray(references)[:, None]
        scores = {"accuracy": float((ranked[:, :1] == right).any(axis=1).mean())}
        if self.classes > TOP:
            scores["top5_accuracy"] = float((ranked[:, :TOP] == right).any(axis=1).mean())
        return scores


def check_best(metric: str | None, average: bool, classes: int | None = None) -> None:
    """
    Raise an `InputError` unless an evaluation will have the metric by which the best checkpoint is chosen.

    Args:
        metric: `metric_for_best_model`, with `eval_` or without.
        average: whether an average of the weights is evaluated too.
        classes: how many there are, if that is known.
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
    the images that there are.

    Args:
        logits: (B, classes); of a model that returns more, as a distilled DeiT, the first is taken.
        labels: class indices (B,).

    Returns:
        Indices of the best classes (B, up to 5), best first; and losses (B,).
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices, losses


class ComputeMetrics:
    """`compute_metrics` of the Trainer, over `preprocess`: top-1, top-5 and the mean loss over all images (the
    Trainer's own is a mean over batches, of which the last is smaller)."""

    def __init__(self, classes: int):
        self.metric = TopKAccuracy(classes)

    def __call__(self, prediction) -> dict[str, float]:
        ranked, losses = prediction.predictions
        scores = self.metric.compute(predictions=ranked, references=prediction.label_ids)
        return scores | {"loss": float(losses.astype(np.float64).mean())}
