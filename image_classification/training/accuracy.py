# SPDX-License-Identifier: Apache-2.0
"""Top-1 and top-5 accuracy, as an `evaluate` metric that downloads nothing."""

import datasets
import evaluate
import numpy as np

from .metrics import TOP


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
