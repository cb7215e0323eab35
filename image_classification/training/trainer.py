# SPDX-License-Identifier: Apache-2.0
"""The Trainer: where the parts of a training, each with a subject of its own, come together."""

import contextlib
import functools
import logging
import math
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import skip_first_batches
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput

from ..data.dataset import source_of
from ..errors import InputError, refusing
from ..runs import checkpoints
from ..runs.signals import Stopped, StopSignals
from ..settings.arguments import RunArguments
from . import ema, optimizer_states, parallel
from .checkpointing import ACTIONS, Checkpointer
from .divergence import Diverged, DivergenceGuard, check_metrics
from .loaders import Loaders, tell_epoch
from .optimization import make_optimizer, make_schedule
from .recorded_step import RecordedStep, obstacle, parts_to_compile, table_of_rates
from .throughput import Throughput, peak_memory


logger = logging.getLogger(__name__)

# Recorded steps between two looks at whether they have diverged; each waits for the device.
STEPS_UNSEEN = 50


class ImageClassificationTrainer(Trainer):
    """
    Transformers' Trainer with
    * a cross-entropy that is normalised over the whole accumulated batch, so that accumulation gives the gradients of
      one large batch, for class indices and for soft targets, with and without label smoothing;
    * checkpoints from which a run goes on exactly (`Checkpointer`), also when a signal stops it (`StopSignals`);
    * every image counted once in several processes (`parallel`), and loaders of our own data sets (`Loaders`);
    * rates and weight decay by kind of parameter, timm's optimisers, and more schedules (`optimization`);
    * an average of the weights, evaluated beside them and saved in every checkpoint (`WeightAverage`);
    * an error that says where a run diverges (`DivergenceGuard`), and images per second (`Throughput`);
    * a whole step as one CUDA graph, where that can be (`RecordedStep`).

    Where `augment` is set, it makes training batches of what the data loader has moved to the device.

    Seven of Transformers' private methods are overridden, each of which says why.
    """

    args: RunArguments
    optimizer: Any
    lr_scheduler: Any
    augment: Callable[[dict], dict[str, torch.Tensor]] | None = None

    def __init__(self, *args, **kwargs):
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, TrainingArguments)]
        if any(value.push_to_hub for value in given):
            raise InputError(
                "`push_to_hub` of the Trainer writes the token into a file and stops a run whose push fails. Leave it "
                "out, and add a `publishing.publisher.Publisher` to the callbacks."
            )
        super().__init__(*args, compute_loss_func=self.cross_entropy, **kwargs)
        # The loss is ours, so the model is not to be handed the number of items.
        self.model_accepts_loss_kwargs = False
        # Part of `cross_entropy`, in training only.
        self.label_smoother = None
        if self.args.model_ema and is_deepspeed_zero3_enabled():
            raise InputError("`model_ema` needs whole parameters, which DeepSpeed ZeRO-3 has not: use FSDP2 or ZeRO-2.")
        parallel.set_up(self.accelerator, self.model, self.is_fsdp_enabled)
        self.checkpointer = Checkpointer(self)
        self.loaders = Loaders(self.accelerator, self.args)
        self.throughput = Throughput(self.args.device)
        self.average: ema.WeightAverage | None = None
        self.recorded: RecordedStep | None = None
        self._guard: DivergenceGuard | None = None
        self._signals = StopSignals(speak=False)
        self._may_stop = False  # Where `_Asked` is caught.
        self._operations: dict[torch.Size, int] = {}

    @property
    def bare_model(self) -> PreTrainedModel:
        """The model without wrappers of DDP or `torch.compile`."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    # A run from its beginning to its end

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """
        Train, from the beginning or from a checkpoint folder.

        Raises:
            Stopped: by a signal, after a checkpoint was saved.
            NotWritten: a checkpoint could not be written; the ones before are as they were.
            Diverged: loss or gradients are not finite any more.
            InputError: the checkpoint is not one of this model and optimiser.
        """
        self.checkpointer.open(resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            self.args.eval_on_start = False  # It is done already.
        events = _Events(self)
        self.add_callback(events)  # The last one, so that the others are ready.
        signals = StopSignals(speak=self.is_world_process_zero())
        try:
            with signals as self._signals, _own_stream(self.args.device), self._set_aside():
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.is_in_train = False
            self.loaders.end_workers()
            self.remove_callback(events)

    def begin(self) -> None:
        """Make ready for the first step, when the model is wrapped, and its weights and the optimiser are loaded."""
        if self.args.model_ema and self.checkpointer.resumed_from is None:
            self.make_average()
        where = f"Nothing of it was saved; checkpoints of before are kept in {self.args.output_dir}. Try a lower rate"
        where += ", or bf16 in place of fp16." if self.args.fp16 else ", or more warm-up."
        self._guard = DivergenceGuard(self.bare_model, self.accelerator.scaler is not None, where)
        self.recorded = self._guard.recorded = self._make_recorded_step()
        self.throughput = Throughput(self.args.device)
        self.checkpointer.catch_up()

    def make_average(self, checkpoint: str | Path | None = None) -> None:
        """Begin an average of the weights, or go on with that of a checkpoint."""
        self.average = ema.WeightAverage(self.bare_model, self.args.model_ema_decay, self.args.model_ema_device)
        if checkpoint is not None:
            self.average.load(Path(checkpoint) / ema.FILE, self.bare_model)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, learning_rate=None, **told):
        """The one place between two steps where a signal can be answered, and the last step's figures are known."""
        self.checkpointer.last_step = (grad_norm, learning_rate)
        self._may_stop = True
        try:
            self.stop_if_asked()
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate, **told)
        except _Asked as asked:
            # At once: an evaluation can take longer than a scheduler waits. It is noted, and done when the run goes on.
            due = [action for action in ACTIONS if getattr(self.control, f"should_{action}")]
            self._save_checkpoint(due=due)
            step = self.state.global_step
            folder = checkpoints.checkpoint_folder(self.args.output_dir, step)
            raise Stopped(asked.args[0], folder, step, self.state.epoch) from None
        finally:
            self._may_stop = False

    def stop_if_asked(self) -> None:
        """Within an evaluation of training, and at the end of each of its steps."""
        if self._may_stop and (number := parallel.largest(self._signals.received)):
            raise _Asked(number)

    # Steps

    def get_train_dataloader(self) -> DataLoader:
        loader = self.loaders.make(self.train_dataset, self._train_batch_size, self.data_collator, training=True)
        divided = source_of(self.train_dataset).is_divided
        self._rows_at_end = 0 if divided else parallel.rows_at_end(loader, self.args.world_size)
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = self.take_batches(epoch_iterator, num_batches)
        return batches, self._get_num_items_in_batch(batches, device)

    def take_batches(self, batches: Iterator, count: int) -> tuple[list[dict[str, torch.Tensor]], int]:
        """The next `count` batches of this process, and how many images those of all processes have."""
        some = list(islice(batches, count))
        if self.augment is not None:
            some = list(map(self.augment, some))
        images = sum(len(batch["labels"]) for batch in some) * self.args.world_size
        if some and self._rows_at_end and self.accelerator.gradient_state.end_of_dataloader:
            images += self._rows_at_end - len(some[-1]["labels"]) * self.args.world_size
            some[-1] = parallel.without_repeated(some[-1], self._rows_at_end, self.args.process_index)
        return some, images

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        guard = self._guard
        assert guard is not None  # Since training began.
        self.throughput.images += len(inputs["labels"]) * self.args.world_size
        with contextlib.nullcontext() if guard.heard else guard.listening():
            loss = super().training_step(model, inputs, num_items_in_batch)
        guard.watch(self.state.global_step + 1, loss, last=self.accelerator.sync_gradients)
        return loss

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """As Transformers', which counts all parameters anew at each step."""
        shape = inputs["pixel_values"].shape
        if shape not in self._operations:
            self._operations[shape] = super().floating_point_ops(inputs)
        return self._operations[shape]

    def cross_entropy(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """
        The loss, a scalar in fp32, of `logits` (B, classes) and labels: class indices (B,), or probabilities (B,
        classes). `num_items_in_batch` counts the elements of all labels of this step, over accumulated batches (and
        devices, which Transformers multiplies back). In evaluation it is not used: that takes the mean, and does not
        smooth.
        """
        logits = outputs["logits"].float()
        if num_items_in_batch is None or not self.model.training:
            return F.cross_entropy(logits, labels)
        smoothing = self.args.label_smoothing_factor
        images = num_items_in_batch / labels[0].numel()
        return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum") / images

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
        if self.state.global_step >= self.state.max_steps:  # Which may be within an epoch, that it would go on with.
            self.control.should_training_stop = True
            return None
        tell_epoch(epoch, self.train_dataset, train_dataloader)
        if self.recorded is None:
            return super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **told)
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
        step, guard, labels = self.recorded, self._guard, batches[0]["labels"]
        assert step is not None and guard is not None
        if step.graphs is None and self.args.device.type == "cuda" and len(labels) == self._train_batch_size:
            with self._apart():
                step.record(batches[0]["pixel_values"], labels, guard.listening)
        with contextlib.nullcontext() if guard.heard else guard.listening():
            step.run(batches, images * labels[0].numel())
        self.throughput.images += images
        for batch in batches:
            self.current_flos += float(self.floating_point_ops(batch))
            self._track_num_input_tokens(batch)
        if self.state.global_step % STEPS_UNSEEN == 0:
            guard.flush()

    def _catch_up_with_device(self) -> float:
        """Bring the schedule to where the recorded steps are; returns the first group's rate in the last of them."""
        recorded = self.recorded
        assert recorded is not None
        step = recorded.position_now()
        if step != self.lr_scheduler.last_epoch:
            optimizer_states.move_to(self.lr_scheduler, step)
        return recorded.schedule[max(0, step - 1), 0].item()

    # Evaluation

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        name, dataset = "eval", self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, str):
            name, dataset = eval_dataset, self.eval_dataset[eval_dataset]
        return self.loaders.for_evaluation(name, dataset, self.args.eval_batch_size, self.data_collator)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        # Its data loader draws from PyTorch's generator: training must not depend on how often a run is evaluated.
        with self._apart(), torch.random.fork_rng(devices=[]), self._set_aside():
            metrics = super().evaluate(*args, **kwargs)
        if not self.is_in_train:
            self.loaders.end_workers()
        return metrics

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        """Of the weights, and of their average beside them as `eval_ema_*`: one log entry, one event."""
        self._evaluated_images = dataloader.dataset
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if description != "Evaluation":
            return output
        where = None if self._guard is None else self._guard.where
        check_metrics(output.metrics, self.state.global_step, where)
        if self.average is None:
            return output
        with self.average.applied(self.bare_model):
            of_average = {"metric_key_prefix": f"{metric_key_prefix}_ema", **kwargs}
            second = super().evaluation_loop(dataloader, description, *args, **of_average)
        check_metrics(second.metrics, self.state.global_step, where)
        metrics = {key: value for key, value in second.metrics.items() if not key.endswith("_model_preparation_time")}
        samples = output.num_samples + second.num_samples
        return EvalLoopOutput(output.predictions, output.label_ids, output.metrics | metrics, samples)

    def prediction_step(self, model, inputs, prediction_loss_only, *args, **kwargs):
        self.stop_if_asked()
        inputs = source_of(self._evaluated_images).finish(inputs)
        if self.recorded is None or self.args.world_size > 1 or inputs.keys() != {"pixel_values", "labels"}:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        logits, labels = self.recorded.logits(inputs["pixel_values"]), inputs["labels"]
        loss = self.cross_entropy({"logits": logits}, labels)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def keep_better_weights(self, metrics: dict[str, float]) -> tuple[str | None, dict[str, float]]:
        """Put the average into the model for good, if `ema.better` judges it the better; return what that returns."""
        weights, metrics = ema.better(metrics)
        if weights == "ema" and self.average is not None:
            self.average.copy_to(self.bare_model)
        return weights, metrics

    # Optimiser and schedule

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            with refusing(f"The optimiser (`optim` {self.args.optimizer_name}, `optim_args`) cannot be set up"):
                self.optimizer = make_optimizer(model, self.args) or super().create_optimizer(model)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        args, optimizer = self.args, self.optimizer if optimizer is None else optimizer
        images = len(self.train_dataset) / args.global_batch_size
        per_epoch = max(1, math.floor(images) if args.dataloader_drop_last else math.ceil(images))
        name = args.sched or args.lr_scheduler_type.value
        with refusing(f"The schedule (`{name}`, `lr_scheduler_kwargs` {args.lr_scheduler_kwargs}) cannot be set up"):
            if args.sched is not None and self.lr_scheduler is None:
                self.lr_scheduler = make_schedule(optimizer, args, num_training_steps, per_epoch)
                self._created_lr_scheduler = True
            elif args.sched is None and args.warmup_epochs is not None:
                args.warmup_steps = round(args.warmup_epochs * per_epoch)
            super().create_scheduler(num_training_steps, optimizer)  # Nothing, if there is one.
        self.checkpointer.began_with = optimizer_states.settings_of(self.optimizer)
        return self.lr_scheduler

    # What is said

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds images per second where the training loss is logged, and the totals at the end of training."""
        if self._guard is not None:
            self._guard.flush()
        for name in [name for name, value in logs.items() if isinstance(value, float) and not math.isfinite(value)]:
            del logs[name]  # The gradient's norm of a step that fp16 skips: JSON has no infinity.
        if "loss" in logs:
            logs |= self.throughput.since_last_log()
        if "train_runtime" in logs:  # The last log, of the whole run: so with the time before it was stopped.
            logs["train_runtime"] = round(self.checkpointer.seconds, 4)
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
        if self._guard is not None:
            self._guard.check_weights(self.state.global_step)
        with self.throughput.excluded():
            yield

    @contextlib.contextmanager
    def _set_aside(self) -> Iterator[None]:
        """The checkpoint of a step whose weights give what is not finite is not to be gone on from."""
        try:
            yield
        except Diverged as error:
            if error.weights is None or not self.args.should_save:
                raise
            folder = checkpoints.checkpoint_folder(self.args.output_dir, error.weights)
            if not folder.is_dir():
                raise
            aside = checkpoints.set_aside(folder).name
            raise Diverged(f"{error} {folder.name} has such weights: it is now called {aside}.") from error

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call=_internal_call)
        self._save(output_dir, state_dict=self.checkpointer.whole_weights())

    def _save_checkpoint(self, *_, due: list[str] | None = None) -> None:
        """Transformers writes in place, so that a run that is killed leaves half a checkpoint."""
        with self._apart():
            if self.recorded is not None:  # Whose state is on the device.
                rate, (norm, logged) = self._catch_up_with_device(), self.checkpointer.last_step
                self.checkpointer.last_step = (norm, rate if logged is None else logged)
            self.checkpointer.save(due or [])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Transformers only warns of weights that are missing, and knows no layout but its own."""
        self.checkpointer.load_weights(Path(resume_from_checkpoint), self.model if model is None else model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Transformers loads by position, whatever the groups; and not what another layout has saved."""
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            self.checkpointer.load_optimizer(Path(checkpoint))
        if self.args.model_ema:
            self.make_average(checkpoint)
        self.checkpointer.load_rest(Path(checkpoint))

    def _load_best_model(self) -> None:
        """As for `_load_from_checkpoint`; the average goes with the weights."""
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        if self.average is not None:
            self.average.load(Path(self.state.best_model_checkpoint) / ema.FILE, self.bare_model)

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


class _Events(TrainerCallback):
    """The Trainer's own part in its events."""

    is_recorded = True  # What it does within a step.

    def __init__(self, trainer: ImageClassificationTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.checkpointer.epoch_ended = False

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer.checkpointer.epoch_ended = True

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.average is not None and not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.average.update()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.throughput.note_startup()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.recorded = self.trainer._guard.recorded = None  # And the memory of its graph.


class _Asked(Exception):
    """A signal has asked to stop, whose number is the argument."""


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all trainings of a process: cuBLAS keeps 32 MiB and more for every stream that it has seen."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Where all of training takes place: CUDA does not record its default stream."""
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)
