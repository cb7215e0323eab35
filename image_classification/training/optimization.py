# SPDX-License-Identifier: Apache-2.0
"""The optimiser and the schedule of its rates, by the settings of a run."""

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer

from ..errors import InputError
from ..models.families import block_names
from ..settings.arguments import RunArguments
from .sharding import plain_name


# Position embeddings and tokens are matrices in shape only; ViT does not decay them.
NO_DECAY = (
    *("cls_token", "distillation_token", "mask_token", "register_tokens", "class_embedding"),
    *("position_embeddings", "position_embedding.weight", "pos_embed", "relative_position_bias_table"),
)


def make_optimizer(model: PreTrainedModel, args: RunArguments) -> torch.optim.Optimizer | None:
    """Make the optimiser over `parameter_groups`; `None` for one that groups for itself, which Transformers makes."""
    if (name := args.timm_optimizer) is not None:
        return _timm_optimizer(name, parameter_groups(model, args), args)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if args.optim_args:
        plain = copy.copy(args)
        plain.optim_args = None
        if Trainer.get_optimizer_cls_and_kwargs(plain, model) == (kind, options):
            raise InputError(f"`optim_args` does nothing with `optim: {args.optimizer_name}`. Leave it out.")
    if args.optim_target_modules is not None and not {"params", "model", "optimizer_dict"} & options.keys():
        raise InputError(f"`optim_target_modules` does nothing with `optim: {args.optimizer_name}`. Leave it out.")
    if not isinstance(kind, type) or {"params", "model", "optimizer_dict"} & options.keys():
        for name in ("attn_lr", "attn_weight_decay", "layer_decay"):
            if getattr(args, name) is not None:
                raise InputError(f"`{name}` does not work with `optim: {args.optimizer_name}`: it groups for itself.")
        return None
    if kind is torch.optim.SGD:
        options |= {"momentum": args.momentum, "nesterov": args.momentum > 0, "fused": args.device.type == "cuda"}
    elif kind is torch.optim.RMSprop:
        options |= {"momentum": args.momentum}
    return kind(parameter_groups(model, args), **options)


def _timm_optimizer(name: str, groups: list[dict], args: RunArguments) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2

    # What is left at AdamW's default is the optimiser's own.
    options: dict[str, Any] = {}
    if args.adam_epsilon != RunArguments.adam_epsilon:
        options["eps"] = args.adam_epsilon
    if (betas := (args.adam_beta1, args.adam_beta2)) != (RunArguments.adam_beta1, RunArguments.adam_beta2):
        options["betas"] = betas
    return create_optimizer_v2(groups, opt=name, lr=args.learning_rate, momentum=args.momentum, **options)


def parameter_groups(model: PreTrainedModel, args: RunArguments) -> list[dict]:
    """
    Groups for the optimiser, by rate and weight decay.

    * Decayed is what has two dimensions or more and is no bias, no [CLS] token and no position embedding; KArAt
      parameters likewise, or all of them at `attn_weight_decay`.
    * `attn_lr` is the rate of KArAt parameters.
    * `layer_decay` multiplies either rate; the factor is the group's `lr_scale`.

    Each group has its parameters' names too, as `param_names`, by which a run under other settings finds their state.
    """
    karat = model.karat_parameter_names() if hasattr(model, "karat_parameter_names") else set()
    for name in ("attn_lr", "attn_weight_decay"):
        if getattr(args, name) is not None and not karat:
            raise InputError(f"`{name}` is of KArAt parameters, and this model has none.")
    assert args.learning_rate is not None  # By `RunArguments`.
    blocks = block_names(model)
    groups: dict[tuple[float, float, float], dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim > 1 and not name.endswith((".bias", *NO_DECAY))
            decay, rate = args.weight_decay if matrix else 0.0, args.learning_rate
            if name in karat:
                rate = args.attn_learning_rate if args.attn_learning_rate is not None else rate
                decay = decay if args.attn_weight_decay is None else args.attn_weight_decay
            scale = layer_scale(name, blocks, args.layer_decay or 1.0)
            groups.setdefault((scale, rate, decay), {})[plain_name(name)] = parameter
    return [
        {
            "params": [*those.values()],
            "param_names": [*those],
            "lr": rate * scale,
            "weight_decay": decay,
            "lr_scale": scale,
        }
        for (scale, rate, decay), those in sorted(groups.items(), key=lambda item: item[0])
    ]


def layer_scale(name: str, blocks: list[str], decay: float) -> float:
    """
    The factor on the rate of the parameter `name`: `decay` to the power of its distance from the head (BEiT's
    counting), of blocks by their names, first to last. What ends a stage goes with the last of its blocks.
    """
    stages = [re.sub(r"(\.\d+)\.blocks\.\d+$", r"\1", block) for block in blocks]
    for prefixes in (blocks, stages):
        if own := [index for index, prefix in enumerate(prefixes) if name.startswith(f"{prefix}.")]:
            return decay ** (len(blocks) - own[-1])
    if re.search(r"embeddings\.|pre_layrnorm\.|(pos|patch)_embed|\.cls_token$", name):
        return decay ** (len(blocks) + 1)
    # Final norm and head; and the universal operator, which works in the last block too.
    return decay if "operator" in name else 1.0


def make_schedule(optimizer: torch.optim.Optimizer, args: RunArguments, steps: int, per_epoch: int) -> LambdaLR:
    """Make the schedule that `args.sched` names, for `steps` steps."""
    warmup = round(args.warmup_epochs * per_epoch) if args.warmup_epochs is not None else args.get_warmup_steps(steps)
    rates = [group.get("initial_lr", group["lr"]) / group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    return LambdaLR(optimizer, [schedule(args, rate, warmup, steps, per_epoch) for rate in rates])


def schedule(args: RunArguments, rate: float, warmup: int, steps: int, per_epoch: int) -> Callable[[int], float]:
    """
    The factor on a group's `rate` (without that of `layer_decay`) after each step: linear from `warmup_lr` for `warmup`
    steps, then `args.sched` until `steps`, in the shapes of timm's schedulers with `warmup_prefix`. The rate bounds
    `warmup_lr` and `min_lr`.
    """
    low, start = min(args.min_lr, rate), min(args.warmup_lr, rate)
    end = steps - round(args.cooldown_epochs * per_epoch)

    def at(step: int) -> float:
        if step < warmup:
            return start + (rate - start) * step / warmup
        if args.sched is None or args.sched == "constant":
            return rate
        if args.sched == "step":
            return rate * args.decay_rate ** math.floor(step / per_epoch / args.decay_epochs)
        if args.sched == "multistep":
            return rate * args.decay_rate ** sum(step / per_epoch >= epoch for epoch in args.decay_milestones)
        if step >= end:
            return low
        done = (step - warmup) / (end - warmup)
        left = {
            "linear": 1 - done,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "poly": (1 - done) ** args.decay_rate,
            "tanh": 0.5 * (1 - math.tanh(-7 * (1 - done) + 3 * done)),
        }[args.sched]
        return low + (rate - low) * left

    return lambda step: at(step) / rate if rate > 0 else 1.0
