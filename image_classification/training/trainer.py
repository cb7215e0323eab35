# SPDX-License-Identifier: Apache-2.0
"""The Trainer: loss, parameter groups, schedules, and checkpoints that load every weight or say so."""

import contextlib
import copy
import functools
import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import skip_first_batches
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput

from ..data.dataset import source_of
from ..errors import InputError, reason_of
from ..runs import checkpoints
from ..settings.arguments import RunArguments
from . import ema, optimizer_states
from .divergence import SKIPPED_STEPS, Diverged, DivergenceGuard
from .recorded_step import RecordedStep, obstacle, parts_to_compile, table_of_rates
from .resumable import ResumableTrainer, plain_name
from .throughput import Throughput, peak_memory


logger = logging.getLogger(__name__)

# Recorded steps between two looks at whether they have diverged; each waits for the device.
STEPS_UNSEEN = 50
# Position embeddings and tokens are matrices in shape only; ViT does not decay them.
NO_DECAY = ("cls_token", "position_embeddings", "mask_token")


class ImageClassificationTrainer(ResumableTrainer):
    """
    A Trainer whose runs survive (`ResumableTrainer`), with
    * a cross-entropy that is normalised over the whole accumulated batch, so that accumulation gives the gradients of
      one large batch, for class indices and for soft targets, with and without label smoothing;
    * a learning rate and a weight decay of their own for KArAt parameters, layer-wise decay, timm's optimisers, and the
      schedules of `RunArguments`;
    * an average of the weights (`model_ema`), evaluated beside them, saved in every checkpoint and resumed;
    * checkpoints under the parameters' present names;
    * an error for a loss or gradient that is not finite, which names the step and the parameter;
    * a whole step as one CUDA graph, where that can be (`record_step`, `RecordedStep`);
    * images per second of training alone, without evaluations and checkpoints, and the peak of memory.
    """

    args: RunArguments

    def __init__(self, *args, **kwargs):
        super().__init__(*args, compute_loss_func=self.cross_entropy, **kwargs)
        # The loss is ours, so the model is not to be handed the number of items.
        self.model_accepts_loss_kwargs = False
        # Part of `cross_entropy`, in training only.
        self.label_smoother = None
        if self.args.model_ema and is_deepspeed_zero3_enabled():
            raise InputError(
                "`model_ema` does not work with DeepSpeed ZeRO-3, which keeps no parameter whole. Use FSDP2 or ZeRO-2, "
                "or leave it out."
            )
        self.average: ema.WeightAverage | None = None
        self._guard: DivergenceGuard | None = None
        self.recorded: RecordedStep | None = None
        self._operations: dict[torch.Size, int] = {}
        self.throughput = Throughput(self.args.device)
        self.add_callback(_Hooks(self))

    @property
    def bare_model(self) -> PreTrainedModel:
        """The model without wrappers of DDP or `torch.compile`."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def begin(self) -> None:
        """When the model is wrapped, its weights and the optimiser are loaded, and the first step is next."""
        if self.args.model_ema:
            self.make_average(self.resumed_from)
        where = f"Nothing of it was saved; checkpoints of before are kept in {self.args.output_dir}. Try a lower rate"
        where += ", or bf16 in place of fp16." if self.args.fp16 else ", or more warm-up."
        self._guard = DivergenceGuard(self.bare_model, self.accelerator.scaler is not None, where)
        self.recorded = self._make_recorded_step()
        self.throughput.begin()

    def make_average(self, checkpoint: str | Path | None = None) -> None:
        """Begin an average of the weights, or go on with that of a checkpoint."""
        self.average = ema.WeightAverage(self.bare_model, self.args.model_ema_decay, self.args.model_ema_device)
        if checkpoint is not None:
            self.average.load(Path(checkpoint) / ema.FILE, self.bare_model)

    def _make_recorded_step(self) -> RecordedStep | None:
        """By `record_step`, if nothing stands against it; the log says which way steps are taken, and why."""
        if self.args.record_step is False or self.state.global_step >= self.state.max_steps:
            return None
        if (reason := obstacle(self)) is not None:
            if self.args.record_step:
                raise InputError(f"`record_step`: a step of this run cannot be recorded: {reason}. Leave it out.")
            if self.args.device.type == "cuda":
                logger.info(f"Step    launch by launch: {reason}")
            return None
        parts = parts_to_compile(self.bare_model)
        logger.info(f"Step    recorded as one CUDA graph{', its blocks compiled' if parts else ''}")
        model = self.bare_model if self.args.world_size > 1 else self.model_wrapped
        trainable = {name: weight for name, weight in self.bare_model.named_parameters() if weight.requires_grad}
        return RecordedStep(
            model,
            parts,
            trainable,
            self.cross_entropy,
            self.optimizer.optimizer,
            table_of_rates(self.lr_scheduler, self.state.max_steps),
            self.lr_scheduler.last_epoch,
            self.state.global_step,
            max_norm=self.args.max_grad_norm,
            running_loss=self._tr_loss,
            scaler=self.accelerator.scaler,
            average=self.average,
            accumulated=self.args.gradient_accumulation_steps,
            world=self.args.world_size,
        )

    def _run_epoch(self, *, epoch, train_dataloader, **told):
        """As Transformers', without what it does on the host at each step, where the step is recorded."""
        if self.recorded is None:
            return super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **told)
        self.tell_epoch(epoch, train_dataloader)
        steps_in_epoch, checkpoint, skipped = told["steps_in_epoch"], told["resume_from_checkpoint"], 0
        # As Transformers: what iterating draws comes after the state of an epoch's end, and before that of a step.
        if epoch == told["epochs_trained"] and checkpoint is not None:
            if skipped := told["steps_trained_in_current_epoch"]:
                train_dataloader = skip_first_batches(train_dataloader, skipped)
            else:
                self._load_rng_state(checkpoint)
        if hasattr(train_dataloader, "set_epoch"):
            train_dataloader.set_epoch(epoch)
        batches, handler, state = iter(train_dataloader), self.callback_handler, self.state
        these = {name: told[name] for name in ("model", "trial", "ignore_keys_for_eval", "start_time")}
        log_save_evaluate = functools.partial(self._maybe_log_save_evaluate, self._tr_loss, epoch=epoch, **these)
        done = skipped
        while done < steps_in_epoch:
            some = min(self.args.gradient_accumulation_steps, steps_in_epoch - done)
            some, images = self.take_batches(batches, some)
            if not some:
                break
            if 0 < done == skipped:
                self._load_rng_state(checkpoint)
            self.control = handler.on_step_begin(self.args, state, self.control)
            self._take_recorded_step(some, images)
            done += len(some)
            state.global_step += 1
            state.epoch = epoch + done / steps_in_epoch
            self.control = handler.on_step_end(self.args, state, self.control)
            rate = self._catch_up_with_device() if self.control.should_log else None
            log_save_evaluate(grad_norm=self.recorded.norm, learning_rate=rate)
            if self.control.should_epoch_stop or self.control.should_training_stop:
                break
        self.control = handler.on_epoch_end(self.args, state, self.control)
        log_save_evaluate(grad_norm=self.recorded.norm, learning_rate=self._catch_up_with_device())

    def _take_recorded_step(self, batches: list[dict[str, torch.Tensor]], images: int) -> None:
        step, labels = self.recorded, batches[0]["labels"]
        if step.graphs is None and self.args.device.type == "cuda" and len(labels) == self._train_batch_size:
            with self._apart():
                step.record(batches[0]["pixel_values"], labels, self._guard.listening)
        with contextlib.nullcontext() if self._guard.heard else self._guard.listening():
            step.run(batches, images * labels[0].numel())
        self.throughput.images += images
        for batch in batches:
            self.current_flos += float(self.floating_point_ops(batch))
            self._track_num_input_tokens(batch)
        if self.state.global_step % STEPS_UNSEEN == 0:
            self._flush_guard()

    def _catch_up_with_device(self) -> float:
        """Bring the schedule to where the recorded steps are; returns the first group's rate in the last of them."""
        step, scheduler = self.recorded.position_now(), self.lr_scheduler
        if step != scheduler.last_epoch:
            scheduler.last_epoch, scheduler._step_count = step - 1, step
            scheduler.optimizer._opt_called = True  # It was, in the graph: else PyTorch warns.
            scheduler.step()
        return self.recorded.schedule[max(0, step - 1), 0].item()

    def _flush_guard(self) -> None:
        """
        Raises:
            InputError: training has diverged.
        """
        if self._guard is None:
            return
        self._guard.flush()
        if self.recorded is not None and (found := self.recorded.divergence()) is not None:
            step, (loss, *norms) = found
            self._guard.judge(step, loss, dict(zip(self.recorded.names, norms, strict=True)), SKIPPED_STEPS)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        self.throughput.images += len(inputs["labels"]) * self.args.world_size
        with contextlib.nullcontext() if self._guard.heard else self._guard.listening():
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._guard.watch(self.state.global_step + 1, loss, last=self.accelerator.sync_gradients)
        return loss

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """As Transformers', which counts all parameters anew at each step."""
        shape = inputs["pixel_values"].shape
        if shape not in self._operations:
            self._operations[shape] = super().floating_point_ops(inputs)
        return self._operations[shape]

    def after_step(self) -> None:
        """When the optimiser has stepped."""
        if self.average is not None and not self.accelerator.optimizer_step_was_skipped:
            self.average.update()

    def cross_entropy(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """
        Args:
            outputs: of the model, with `logits` (B, classes).
            labels: class indices (B,), or probabilities (B, classes).
            num_items_in_batch: elements of all labels of this step, over accumulated batches (and devices, which
                Transformers multiplies back). In evaluation it is not used: that takes the mean, and does not smooth.

        Returns:
            The loss, a scalar in fp32.
        """
        logits = outputs["logits"].float()
        if num_items_in_batch is None or not self.model.training:
            return F.cross_entropy(logits, labels)
        smoothing = self.args.label_smoothing_factor
        images = num_items_in_batch / labels[0].numel()
        return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum") / images

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        except Diverged as error:
            if error.weights is not None and (said := self._set_aside(error.weights)):
                raise Diverged(f"{error}{said}") from error
            raise

    def _set_aside(self, step: int) -> str:
        """The checkpoint of a step whose weights give what is not finite is not to be gone on from."""
        folder = checkpoints.checkpoint_folder(self.args.output_dir, step)
        if not self.args.should_save or not folder.is_dir():
            return ""
        return f" {folder.name} has such weights: it is now called {checkpoints.set_aside(folder).name}."

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with self._apart():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        """Of the weights, and of their average beside them as `eval_ema_*`: one log entry, one event."""
        self._evaluated_images = dataloader.dataset
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if description != "Evaluation":
            return output
        self._check_finite(output.metrics)
        if self.average is None:
            return output
        with self.average.applied(self.bare_model):
            second = super().evaluation_loop(
                dataloader, description, *args, metric_key_prefix=f"{metric_key_prefix}_ema", **kwargs
            )
        self._check_finite(second.metrics)
        metrics = {key: value for key, value in second.metrics.items() if not key.endswith("_model_preparation_time")}
        return EvalLoopOutput(
            output.predictions, output.label_ids, output.metrics | metrics, output.num_samples + second.num_samples
        )

    def _check_finite(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            if not math.isfinite(value):
                if self._guard is not None:
                    step = self.state.global_step
                    said = f"The run has diverged: `{name}` is {value:g} after step {step}. {self._guard.where}"
                    raise Diverged(said + self._set_aside(step), weights=step)
                raise InputError(
                    f"`{name}` is {value:g}: what the model computes of these images is not finite. Its weights are of "
                    "a run that has diverged, or they need a precision that has their range (fp32, bf16)."
                )

    def prediction_step(self, model, inputs, prediction_loss_only, *args, **kwargs):
        inputs = source_of(self._evaluated_images).finish(inputs)
        if self.recorded is None or self.args.world_size > 1 or inputs.keys() != {"pixel_values", "labels"}:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        self.stop_if_asked()
        logits, labels = self.recorded.logits(inputs["pixel_values"]), inputs["labels"]
        loss = self.cross_entropy({"logits": logits}, labels)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def keep_better_weights(self, metrics: dict[str, float]) -> tuple[str | None, dict[str, float]]:
        """
        Put the average into the model for good, if it is the better of the two, as `ema.better` judges.

        Args:
            metrics: of `evaluate`.

        Returns:
            What `ema.better` returns; `eval_*` are the metrics of the weights that the model has now.
        """
        if self.average is None:
            return None, metrics
        weights, metrics = ema.better(metrics)
        if weights == "ema":
            self.average.copy_to(self.bare_model)
        return weights, metrics

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            with _setting_up(f"The optimiser (`optim` {self.args.optimizer_name}, `optim_args`)"):
                self._create_optimizer(self.model if model is None else model)
        return self.optimizer

    def _create_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.args.timm_optimizer is not None:
            self.optimizer = self._timm_optimizer(parameter_groups(model, self.args))
            return self.optimizer
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        if self.args.optim_args:
            plain = copy.copy(self.args)
            plain.optim_args = None
            if self.get_optimizer_cls_and_kwargs(plain, model) == (kind, options):
                raise InputError(f"`optim_args` does nothing with `optim: {self.args.optim.value}`. Leave it out.")
        if self.args.optim_target_modules is not None and "optimizer_dict" not in options:
            if not {"params", "model"} & options.keys():
                raise InputError(
                    f"`optim_target_modules` does nothing with `optim: {self.args.optim.value}`. Leave it out."
                )
        if not isinstance(kind, type) or {"params", "model", "optimizer_dict"} & options.keys():
            for name in ("attn_lr", "attn_weight_decay", "layer_decay"):
                if getattr(self.args, name) is not None:
                    raise InputError(
                        f"`{name}` does not work with `optim: {self.args.optim.value}`, which groups for itself."
                    )
            return super().create_optimizer(model)
        if kind is torch.optim.SGD:
            options |= {"momentum": self.args.momentum, "nesterov": self.args.momentum > 0}
            options["fused"] = self.args.device.type == "cuda"
        elif kind is torch.optim.RMSprop:
            options |= {"momentum": self.args.momentum}
        self.optimizer = kind(parameter_groups(model, self.args), **options)
        return self.optimizer

    def _timm_optimizer(self, groups: list[dict]) -> torch.optim.Optimizer:
        from timm.optim import create_optimizer_v2

        args, default = self.args, RunArguments.__dataclass_fields__
        # What is left at AdamW's default is the optimiser's own.
        options = {"eps": args.adam_epsilon} if args.adam_epsilon != default["adam_epsilon"].default else {}
        betas = (args.adam_beta1, args.adam_beta2)
        if betas != (default["adam_beta1"].default, default["adam_beta2"].default):
            options["betas"] = betas
        return create_optimizer_v2(
            groups, opt=args.timm_optimizer, lr=args.learning_rate, momentum=args.momentum, **options
        )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        name = self.args.sched or self.args.lr_scheduler_type.value
        with _setting_up(f"The schedule (`{name}`, `lr_scheduler_kwargs` {self.args.lr_scheduler_kwargs})"):
            schedule = self._create_scheduler(num_training_steps, optimizer)
        self.began_with = optimizer_states.settings_of(self.optimizer)
        return schedule

    def _create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None):
        if self.args.sched is None and self.args.warmup_epochs is not None:
            self.args.warmup_steps = self._warmup_steps(num_training_steps)
        if self.args.sched is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        warmup, per_epoch = self._warmup_steps(num_training_steps), self._steps_per_epoch()
        rates = [group.get("initial_lr", group["lr"]) / group.get("lr_scale", 1.0) for group in optimizer.param_groups]
        curves = [schedule(self.args, rate, warmup, num_training_steps, per_epoch) for rate in rates]
        self.lr_scheduler = LambdaLR(optimizer, curves)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds images per second where the training loss is logged, and the totals at the end of training."""
        self._flush_guard()
        for name in [name for name, value in logs.items() if isinstance(value, float) and not math.isfinite(value)]:
            del logs[name]  # The gradient's norm of a step that fp16 skips: JSON has no infinity.
        if "loss" in logs:
            logs |= self.throughput.since_last_log()
        if "train_runtime" in logs:
            # Transformers' figures count evaluations, and images of before a resume.
            logs.pop("train_samples_per_second", None)
            logs.pop("train_steps_per_second", None)
            logs |= self.throughput.total()
            peak = torch.tensor(peak_memory(self.args.device), device=self.args.device)
            logs["train_peak_memory_gib"] = round(self.accelerator.gather(peak.reshape(1)).max().item(), 3)
        super().log(logs, start_time)

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """What is done within is not counted as training; training must not have diverged before it."""
        self._flush_guard()
        if self._guard is not None:
            self._guard.check_weights(self.state.global_step)
        with self.throughput.excluded():
            yield

    def _steps_per_epoch(self) -> int:
        images = len(self.train_dataset) / self.args.global_batch_size
        return max(1, math.floor(images) if self.args.dataloader_drop_last else math.ceil(images))

    def _warmup_steps(self, num_training_steps: int) -> int:
        if self.args.warmup_epochs is None:
            return self.args.get_warmup_steps(num_training_steps)
        return round(self.args.warmup_epochs * self._steps_per_epoch())

    def _save_checkpoint(self, *args, **kwargs) -> None:
        """Its time is not that of training, whose state a recorded step has on the device."""
        with self._apart():
            if self.recorded is not None:
                rate, (norm, logged) = self._catch_up_with_device(), self._last_step
                self._last_step = (norm, rate if logged is None else logged)
            super()._save_checkpoint(*args, **kwargs)

    def _more_weights(self) -> dict[str, dict[str, torch.Tensor]]:
        return {ema.FILE: self.average.whole(self.bare_model)} if self.average is not None else {}

    def _load_more_weights(self, folder: Path) -> None:
        if self.average is not None:
            self.average.load(folder / ema.FILE, self.bare_model)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Model, processor and configuration; no pickle of the arguments, which the run's record has."""
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        if not self.args.should_save:
            return
        os.makedirs(output_dir, exist_ok=True)
        model, kind = self.bare_model, type(self.bare_model)
        if isinstance(model, FSDPModule):
            # FSDP2 has made the model's class one of torch's, and its code and name would go with the checkpoint.
            model.__class__ = kind.__bases__[1]
        try:
            # Transformers' default writes ViT's old parameter names, which `_load_from_checkpoint` does not know.
            model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)
        finally:
            model.__class__ = kind
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)


class _Hooks(TrainerCallback):
    """The Trainer's own part in its events."""

    is_recorded = True  # What it does within a step.

    def __init__(self, trainer: ImageClassificationTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.after_step()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.throughput.note_startup()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.recorded = None  # And the memory of its graph.


@contextlib.contextmanager
def _setting_up(what: str) -> Iterator[None]:
    """Whatever a library says of its settings becomes an `InputError` that names them."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} cannot be set up: {reason_of(error, whole=True)}") from error


def parameter_groups(model: nn.Module, args: RunArguments) -> list[dict]:
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
    groups: dict[tuple[float, float, float], dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim > 1 and not name.endswith((".bias", *NO_DECAY))
            decay, rate = args.weight_decay if matrix else 0.0, args.learning_rate
            if name in karat:
                rate = args.learning_rate if args.attn_lr is None else args.attn_learning_rate
                decay = decay if args.attn_weight_decay is None else args.attn_weight_decay
            scale = layer_scale(name, model.config.num_hidden_layers, args.layer_decay or 1.0)
            groups.setdefault((scale, rate, decay), {})[plain_name(name)] = parameter
    return [
        {
            "params": list(parameters.values()),
            "param_names": list(parameters),
            "lr": rate * scale,
            "weight_decay": decay,
            "lr_scale": scale,
        }
        for (scale, rate, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def layer_scale(name: str, blocks: int, decay: float) -> float:
    """The factor on a parameter's rate: `decay` to the power of its distance from the head (BEiT's counting)."""
    block = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    if block:
        return decay ** (blocks - int(block[1]))
    if "embeddings." in name:
        return decay ** (blocks + 1)
    # Final norm and head; and the universal operator, which works in the last block too.
    return decay if "operator" in name else 1.0


def schedule(args: RunArguments, rate: float, warmup: int, steps: int, per_epoch: int) -> Callable[[int], float]:
    """
    The factor on `rate` after each step: linear from `warmup_lr` for `warmup` steps, then `args.sched` until `steps`.

    Args:
        args: `sched`, `warmup_lr`, `min_lr`, `cooldown_epochs`, `decay_epochs`, `decay_milestones`, `decay_rate`; the
            shapes are those of timm's schedulers with `warmup_prefix`. The rate bounds `warmup_lr` and `min_lr`.
        rate: the group's learning rate, without its factor of `layer_decay`.
        warmup, steps, per_epoch: numbers of steps.
    """
    low, start = min(args.min_lr, rate), min(args.warmup_lr, rate)
    end = steps - round(args.cooldown_epochs * per_epoch)

    def at(step: int) -> float:
        if step < warmup:
            return start + (rate - start) * step / warmup
        if args.sched == "constant":
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
