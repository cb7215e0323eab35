# SPDX-License-Identifier: Apache-2.0
"""An exponential moving average of the weights, which survives with the checkpoints."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..errors import InputError
from ..runs.checkpoints import check_weights, read_tensors
from .sharding import divided, local, united, whole


FILE = "ema.safetensors"


class WeightAverage:
    """
    After each optimiser step, `average = decay * average + (1 - decay) * weights`, from the weights it was made with.

    Trainable parameters are averaged; what is frozen, and buffers, are the model's own. Unlike timm's `ModelEmaV3` and
    PyTorch's `AveragedModel` this is no copy of the module: the average lies beside it and is put into the model while
    that is evaluated, so that compiled, DDP and FSDP2 models keep their wrappers, and frozen weights take no memory.
    Under FSDP2 each process averages its own shards; the file holds whole tensors, whatever the layout. The model comes
    without wrappers of DDP or `torch.compile`, and already sharded; the average is by default where the parameters are.
    """

    def __init__(self, model: nn.Module, decay: float, device: str | torch.device | None = None):
        self.decay = decay
        self.tensors: dict[str, torch.Tensor] = {}
        self._owners = _owners(model)
        for name, parameter in _averaged(model):
            # Steps of 1 - decay vanish in the rounding of half precision.
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            self.tensors[name] = local(parameter).to(device=device, dtype=dtype, copy=True)

    def is_beside_the_weights(self) -> bool:
        """Whether `update` needs neither another device nor another precision."""
        return all(
            not isinstance(getattr(owner, name), DTensor)
            and (getattr(owner, name).dtype, getattr(owner, name).device) == (average.dtype, average.device)
            for (owner, name), average in zip(self._owners, self.tensors.values(), strict=True)
        )

    @torch.no_grad()
    def update(self, skipped: torch.Tensor | None = None) -> None:
        """Take in the weights after a step of the optimiser; where that was `skipped` (1, else 0), nothing changes."""
        averages = list(self.tensors.values())
        weights = [getattr(owner, name) for owner, name in self._owners]
        if not self.is_beside_the_weights():
            weights = [local(weight).to(average) for weight, average in zip(weights, averages, strict=True)]
        if skipped is None:
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        else:
            steps = torch._foreach_sub(weights, averages)
            torch._foreach_mul_(steps, (1 - self.decay) * (1 - skipped))
            torch._foreach_add_(averages, steps)

    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's weights with the average."""
        _overwrite(model, self.tensors)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model has the average for its weights within, and its own again after, bit for bit."""
        _reshard(model)
        own = {name: local(parameter).clone() for name, parameter in _averaged(model)}
        self.copy_to(model)
        try:
            yield
        finally:
            _overwrite(model, own)

    def whole(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Whole tensors by the parameters' names, on the CPU. All processes call it, and get them."""
        _reshard(model)
        return {name: whole(united(self.tensors[name], parameter)).contiguous() for name, parameter in _averaged(model)}

    def load(self, path: Path, model: nn.Module) -> None:
        """Go on with that in a file, as `whole` gave it. Raises `InputError`: there is none, or of another model."""
        if not path.is_file():
            raise InputError(
                f"{path.parent} has no average of the weights ({path.name}): it was written without `model_ema`. Leave "
                "`model_ema` out, or start a new run from those weights with --finetune."
            )
        saved = read_tensors(path)
        check_weights({name: parameter.shape for name, parameter in _averaged(model)}, saved, path)
        _reshard(model)
        for name, parameter in _averaged(model):
            self.tensors[name].copy_(local(divided(saved[name], parameter)))


def better(metrics: dict[str, float]) -> tuple[str | None, dict[str, float]]:
    """
    Which weights of an evaluation are the better, by accuracy, then by loss: `ema` (whose metrics are `eval_ema_*`) or
    `model`, or `None` where there is no average; and the metrics, the better ones' as `eval_*`, and each one's as
    `eval_ema_*` and `eval_model_*`.
    """
    names = [key.removeprefix("eval_ema_") for key in metrics if key.startswith("eval_ema_")]
    if not names:
        return None, metrics
    metrics = metrics | {f"eval_model_{name}": metrics[f"eval_{name}"] for name in names}
    quality = {kind: (metrics[f"eval_{kind}_accuracy"], -metrics[f"eval_{kind}_loss"]) for kind in ("model", "ema")}
    if quality["ema"] <= quality["model"]:
        return "model", metrics
    return "ema", metrics | {f"eval_{name}": metrics[f"eval_ema_{name}"] for name in names}


def _averaged(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    named = model.named_parameters()
    return [(name, weight) for name, weight in named if weight.requires_grad and weight.is_floating_point()]


def _owners(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """
    The module of each averaged parameter and its name there. Looking through all modules for them at each step would
    take longer than averaging, and FSDP2 puts other tensors into their places.
    """
    places = (name.rpartition(".") for name, _ in _averaged(model))
    return [(model.get_submodule(path), name) for path, _, name in places]


@torch.no_grad()
def _overwrite(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    _reshard(model)
    for name, parameter in _averaged(model):
        local(parameter).copy_(tensors[name])


def _reshard(model: nn.Module) -> None:
    """An evaluation leaves FSDP2's root gathered: a copy that would hide what is written to the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
