# SPDX-License-Identifier: Apache-2.0
"""Stops a run whose loss or gradients are no longer finite, and says where that began."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .sharding import local


# fp16 skips steps while its loss scaling settles: from 2^16 down to 2^-8, the smallest scale with any use.
SKIPPED_STEPS = 25


class Diverged(InputError):
    """A run has diverged. `weights` is the step whose weights gave what is not finite, if they did."""

    def __init__(self, message: str, weights: int | None = None):
        super().__init__(message)
        self.weights = weights


def check_metrics(metrics: dict[str, float], step: int, where: str | None) -> None:
    """Raise an error unless the metrics after a step are finite; `where` is what it says of a run, if it is of one."""
    for name, value in metrics.items():
        if not math.isfinite(value) and where is not None:
            raise Diverged(f"The run has diverged: `{name}` is {value:g} after step {step}. {where}", weights=step)
        if not math.isfinite(value):
            raise InputError(
                f"`{name}` is {value:g}: what the model computes of these images is not finite. Its weights are of "
                "a run that has diverged, or they need a precision that has their range (fp32, bf16)."
            )


class DivergenceGuard:
    """
    Looks at the loss and the norm of every gradient after each backward pass, before clipping spreads a NaN to all of
    them. The device is not waited for: what it computed in one step is read in the next, or by `flush`.

    Args:
        model: without wrappers of DDP or `torch.compile`.
        scaled: gradients are those of fp16's scaled loss, of which some may overflow.
        where: what the error says after the diagnosis.
    """

    recorded: Any = None  # What has watched the steps in the guard's place, if anything, and is asked what it saw.

    def __init__(self, model: nn.Module, scaled: bool, where: str):
        self.scaled, self.where = scaled, where
        self._pending: tuple[int, list[str], torch.Tensor, torch.cuda.Event | None] | None = None
        self._losses: list[torch.Tensor] = []
        self._skipped = 0
        self._trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        # The backward pass has its own order (a block's MLP comes before its attention): it shows in the first step.
        self._order: list[str] = []
        self.heard = False  # Whether that order is known.

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within, a backward pass tells its order."""
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._order.append(name))
            for name, parameter in self._trainable.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.heard = True

    @torch.no_grad()
    def watch(self, step: int, loss: torch.Tensor, last: bool) -> None:
        """Look at a batch whose backward pass is done, the `last` of those accumulated for a step (from 1) or not."""
        self._losses.append(loss.detach())
        if not last:
            return
        self.flush()
        gradients = {name: parameter.grad for name, parameter in self._trainable.items() if parameter.grad is not None}
        norms = list(torch._foreach_norm([local(gradient) for gradient in gradients.values()])) if gradients else []
        loss = torch.stack(self._losses).sum().float()
        values = torch.stack([loss, *(norm.to(loss) for norm in norms)])
        self._losses = []
        event = None
        if values.is_cuda:
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = (step, list(gradients), values, event)
        if event is None:
            self.flush()

    @torch.no_grad()
    def check_weights(self, step: int) -> None:
        """Raise `Diverged` where the last step has made weights that are not finite, which no loss has shown yet."""
        self.flush()
        each = [torch.isfinite(local(weight)).all() for weight in self._trainable.values()]
        finite = torch.stack(each).tolist() if each else []
        if broken := [name for name, fine in zip(self._trainable, finite, strict=True) if not fine]:
            raise Diverged(
                f"The run has diverged: step {step} has made `{broken[0]}` not finite ({len(broken)} of {len(finite)} "
                f"weights are not). {self.where}"
            )

    def flush(self) -> None:
        """Raise `Diverged` where loss or a gradient of the last step that was watched, or recorded, is not finite."""
        if self._pending is not None:
            step, names, values, event = self._pending
            self._pending = None
            if event is not None:
                event.synchronize()
            loss, *norms = values.tolist()
            self.judge(step, loss, dict(zip(names, norms, strict=True)))
        if self.recorded is not None and (found := self.recorded.divergence()) is not None:
            step, (loss, *norms) = found
            self.judge(step, loss, dict(zip(self.recorded.names, norms, strict=True)), SKIPPED_STEPS)

    def judge(self, step: int, loss: float, norms: dict[str, float], skipped: int | None = None) -> None:
        """
        Raise `Diverged` unless the loss of a step (from 1) and the norms of its gradients, by the parameters' names,
        are finite; in fp16, `skipped` steps in a row (counted here unless given) may be.
        """
        broken = {name for name, norm in norms.items() if not math.isfinite(norm)}
        if math.isfinite(loss):
            self._skipped = skipped if skipped is not None else self._skipped + 1 if broken else 0
            if not broken or (self.scaled and self._skipped < SKIPPED_STEPS):
                return
        first = "all gradients are finite" if norms else "gradients are with DeepSpeed, which names none"
        if broken:
            # FSDP2 does not call the hooks: then the order of the forward pass, reversed.
            order = [*self._order, *reversed(self._trainable)]
            name = next(name for name in order if name in broken)
            first = f"the first gradient of the backward pass that is not finite is that of `{name}`"
            first += f" ({len(broken)} of {len(norms)} are not)"
        streak = f" It is the last of {self._skipped} such steps in a row." if self.scaled and self._skipped else ""
        raise Diverged(
            f"The run has diverged: the loss is {loss:g} at step {step}, and {first}.{streak} {self.where}",
            weights=None if math.isfinite(loss) else step - 1,
        )
