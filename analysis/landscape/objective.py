# SPDX-License-Identifier: Apache-2.0
"""The objective of a landscape: the loss of labelled images, as one model takes them."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from image_classification.errors import InputError, more

from ..images import Found, prepare
from ..models import Checkpoint


@dataclass
class Objective:
    """
    Mean cross-entropy of labelled images.

    Args:
        pixels: (B, 3, height, width), on the CPU.
        labels: class numbers, (B,), on the CPU.
        batch_size: images computed at once.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    batch_size: int = 8

    def parts(self, model: nn.Module) -> Iterator[tuple[torch.Tensor, float]]:
        """Compute the shares of each batch in the loss (differentiable) and in the accuracy: they sum to both."""
        device = next(model.parameters()).device
        for pixels, labels in zip(self.pixels.split(self.batch_size), self.labels.split(self.batch_size)):
            logits, labels = model(pixels.to(device)).logits, labels.to(device)
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum") / len(self.labels)
            yield loss, (logits.argmax(-1) == labels).sum().item() / len(self.labels)


def labelled(checkpoint: Checkpoint, found: list[Found], batch_size: int = 8) -> Objective:
    """
    Prepare images and their classes as one model takes them.

    Raises:
        InputError: a class is not known, or the model does not have it.
    """
    if not checkpoint.has_classifier:
        raise InputError(f"{checkpoint.source} has no classifier, so it has no loss. Give a model that was trained.")
    images = prepare(checkpoint, found)
    numbers = {label: number for number, label in enumerate(checkpoint.labels)}
    known = ", ".join(checkpoint.labels[:5]) + more(checkpoint.labels)
    classes = []
    for name, label in zip(images.names, images.labels):
        if label is None:
            raise InputError(
                f"The class of {name} is not known, and the loss needs it. Expected CLASS/*.jpg in the folder of "
                f"--images, with the classes of {checkpoint.source}: {known}."
            )
        if label not in numbers:
            raise InputError(f"Image {name} is of the class {label!r}; {checkpoint.source} knows {known}.")
        classes.append(numbers[label])
    return Objective(images.pixels, torch.tensor(classes), batch_size)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"The device is out of memory ({str(error).splitlines()[0]}) What was computed is kept: give the same "
            "command again, with a smaller --batch-size."
        ) from error
