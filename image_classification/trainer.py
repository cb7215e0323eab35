# SPDX-License-Identifier: Apache-2.0
"""The Trainer: loss, parameter groups, schedules, and checkpoints that load every weight or say so."""

import math
import os
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer

from .arguments import RunArguments
from .errors import InputError, more


# Position embeddings and tokens are matrices in shape only; ViT does not decay them.
NO_DECAY = ("cls_token", "position_embeddings", "mask_token")


class ImageClassificationTrainer(Trainer):
    """
    Transformers' Trainer with
    * a cross-entropy that is normalised over the whole accumulated batch, so that accumulation gives the gradients of
      one large batch, for class indices and for soft targets, with and without label smoothing;
    * a learning rate of their own for KArAt parameters, and the schedules of `RunArguments`;
    * checkpoints under the parameters' present names, and an error for every weight that a checkpoint lacks or has too
      many: Transformers only warns, and goes on with random weights;
    * an error for a loss that is not finite.
    """

    args: RunArguments

    def __init__(self, *args, **kwargs):
        super().__init__(*args, compute_loss_func=self.cross_entropy, **kwargs)
        # The loss is ours, so the model is not to be handed the number of items.
        self.model_accepts_loss_kwargs = False
        # Part of `cross_entropy`, in training only.
        self.label_smoother = None

    def cross_entropy(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """
        Args:
            outputs: of the model, with `logits` (B, classes).
            labels: class indices (B,), or probabilities (B, classes).
            num_items_in_batch: elements of all labels of this step, over accumulated batches (and devices, which
                Transformers multiplies back); `None` in evaluation, which takes the mean and does not smooth.

        Returns:
            The loss, a scalar in fp32.
        """
        logits = outputs["logits"].float()
        if num_items_in_batch is None:
            return F.cross_entropy(logits, labels)
        smoothing = self.args.label_smoothing_factor
        images = num_items_in_batch / labels[0].numel()
        return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum") / images

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        if not isinstance(kind, type) or {"params", "model", "optimizer_dict"} & options.keys():
            if self.args.attn_lr is not None:
                raise InputError(
                    f"`attn_lr` does not work with `optim: {self.args.optim.value}`, which groups for itself."
                )
            return super().create_optimizer(model)
        if kind is torch.optim.SGD:
            options |= {"momentum": self.args.momentum, "nesterov": self.args.momentum > 0}
        elif kind is torch.optim.RMSprop:
            options |= {"momentum": self.args.momentum}
        self.optimizer = kind(parameter_groups(model, self.args), **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.args.sched is None and self.args.warmup_epochs is not None:
            self.args.warmup_steps = self._warmup_steps(num_training_steps)
        if self.args.sched is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        warmup, per_epoch = self._warmup_steps(num_training_steps), self._steps_per_epoch()
        rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        curves = [schedule(self.args, rate, warmup, num_training_steps, per_epoch) for rate in rates]
        self.lr_scheduler = LambdaLR(optimizer, curves)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        loss = logs.get("loss", 0.0)
        if not math.isfinite(loss):
            raise InputError(
                f"The training loss is {loss} at step {self.state.global_step}: the run has diverged, and stops before "
                f"it saves that. Checkpoints of before are kept in {self.args.output_dir}. Try a lower learning rate."
            )
        super().log(logs, start_time)

    def _steps_per_epoch(self) -> int:
        images = len(self.train_dataset) / self.args.global_batch_size
        return max(1, math.floor(images) if self.args.dataloader_drop_last else math.ceil(images))

    def _warmup_steps(self, num_training_steps: int) -> int:
        if self.args.warmup_epochs is None:
            return self.args.get_warmup_steps(num_training_steps)
        return round(self.args.warmup_epochs * self._steps_per_epoch())

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Model, processor and configuration; no pickle of the arguments, which the run's record has."""
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        if not self.args.should_save:
            return
        os.makedirs(output_dir, exist_ok=True)
        model: PreTrainedModel = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        # Transformers' default writes ViT's old parameter names, which `_load_from_checkpoint` does not know.
        model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)

    def _issue_warnings_after_load(self, load_result) -> None:
        """Called after the weights of a checkpoint were loaded, to resume or as the best of a run."""
        for keys, what in (
            (load_result.missing_keys, "lacks weights that the model has"),
            (load_result.unexpected_keys, "has weights that the model does not have"),
        ):
            if keys:
                shown = ", ".join(sorted(keys)[:4]) + more(keys, 4)
                raise InputError(
                    f"The checkpoint {what}: {shown}. It is damaged or of another model; nothing was trained."
                )


def parameter_groups(model: nn.Module, args: RunArguments) -> list[dict]:
    """
    Groups for the optimiser: with and without weight decay, and KArAt parameters apart where `attn_lr` is given.
    Decayed is what has two dimensions or more and is no bias, no [CLS] token and no position embedding.
    """
    karat = (
        model.karat_parameter_names() if args.attn_lr is not None and hasattr(model, "karat_parameter_names") else set()
    )
    if args.attn_lr is not None and not karat:
        raise InputError("`attn_lr` is the learning rate of KArAt parameters, and this model has none.")
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = parameter.ndim > 1 and not name.endswith((".bias", *NO_DECAY))
            groups.setdefault((name in karat, decay), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": args.attn_lr if of_karat else args.learning_rate,
            "weight_decay": args.weight_decay if decay else 0.0,
        }
        for (of_karat, decay), parameters in sorted(groups.items())
    ]


def schedule(args: RunArguments, rate: float, warmup: int, steps: int, per_epoch: int) -> Callable[[int], float]:
    """
    The factor on `rate` after each step: linear from `warmup_lr` for `warmup` steps, then `args.sched` until `steps`.

    Args:
        args: `sched`, `warmup_lr`, `min_lr`, `decay_epochs`, `decay_rate`. The rate bounds `warmup_lr` and `min_lr`.
        rate: the group's learning rate.
        warmup, steps, per_epoch: numbers of steps.
    """
    low, start = min(args.min_lr, rate), min(args.warmup_lr, rate)

    def at(step: int) -> float:
        if step < warmup:
            return start + (rate - start) * step / warmup
        if args.sched == "constant":
            return rate
        if args.sched == "step":
            return rate * args.decay_rate ** math.floor(step / per_epoch / args.decay_epochs)
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        left = 0.5 * (1 + math.cos(math.pi * done)) if args.sched == "cosine" else 1 - done
        return low + (rate - low) * left

    return lambda step: at(step) / rate if rate > 0 else 1.0
