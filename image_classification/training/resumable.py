# SPDX-License-Identifier: Apache-2.0
"""
A Trainer whose runs survive: killed at any moment and started again, they end with the same bits as if never stopped.

Beside what Transformers saves, a checkpoint holds `progress.json`: the losses since the last log, and what was due
when it was written, so that logs and evaluations are neither lost nor done twice. Its files are the same for one
process, DDP and FSDP2, so a run may go on under another layout. (DeepSpeed writes its own, for its own.)
"""

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import recursively_apply
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..data.dataset import source_of
from ..errors import InputError
from ..runs import checkpoints
from ..runs.signals import Stopped, StopSignals, outlive_signals
from . import optimizer_states
from .parallel import ParallelTrainer


logger = logging.getLogger(__name__)

ACTIONS = ("log", "evaluate", "save")
SCHEDULE = "scheduler.pt"


class ResumableTrainer(ParallelTrainer):
    """
    Transformers' Trainer with
    * checkpoints that are written whole or not at all, and from which a run goes on exactly;
    * SIGTERM and Ctrl-C saving a checkpoint at the end of the step (`Stopped` is raised in all processes);
    * an error for every weight that a checkpoint lacks or has too many: Transformers only warns, and goes on with
      random weights;
    * rotation that never deletes the best checkpoint.

    `resumed_from` is the checkpoint folder of this part of the run, or `None`; `identity`, where it is set, is kept in
    every checkpoint. A subclass with weights of its own
    hands them out in `_more_weights`, and loads them when training begins, and in `_load_more_weights`.
    """

    def __init__(self, *args, **kwargs):
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, TrainingArguments)]
        if any(value.push_to_hub for value in given):
            raise InputError(
                "`push_to_hub` of the Trainer writes the token into a file and stops a run whose push fails. Leave it "
                "out, and add a `publishing.publisher.Publisher` to the callbacks."
            )
        super().__init__(*args, **kwargs)
        self.resumed_from: Path | None = None
        self.identity: str | None = None  # Which run its checkpoints are of.
        self.began_with: list[dict] | None = None  # Settings of the optimiser's groups, before the first step.
        self._may_stop = False  # Where `_Asked` is caught.
        self._training = False
        self._loaders: list[DataLoader] = []  # Whose data workers outlive an epoch.
        self._evaluated = None  # The data set that was evaluated last, if it has no name.

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """
        Train, from the beginning or from a checkpoint folder.

        Raises:
            Stopped: by a signal, after a checkpoint was saved.
            NotWritten: a checkpoint could not be written; the ones before are as they were.
            InputError: the checkpoint has not exactly the weights of the model.
        """
        self.resumed_from = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        if self.resumed_from is not None:
            self.args.eval_on_start = False  # It is done already.
            checkpoints.check_progress(self.resumed_from)
            if self.is_deepspeed_enabled and not list(self.resumed_from.glob("global_step*")):
                raise InputError(
                    f"{self.resumed_from} was not saved by DeepSpeed, which can only go on from its own files. Go on "
                    "without DeepSpeed, or start anew from its weights with --finetune."
                )
        self._epoch_ended = False
        self._last_step = (None, None)  # Norm of the gradient and learning rate, as the log has them.
        hooks = _Hooks(self)
        self.add_callback(hooks)
        self._signals = StopSignals(speak=self.is_world_process_zero())
        self._training = True
        try:
            with self._signals, _own_stream(self.args.device):
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._training = False
            self._end_data_workers()
            self.remove_callback(hooks)

    def evaluate(self, *args, **kwargs):
        # Its data loader draws from PyTorch's generator: training must not depend on how often a run is evaluated.
        with torch.random.fork_rng(devices=[]):
            metrics = super().evaluate(*args, **kwargs)
        if not self._training:
            self._end_data_workers()
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_runtime" in logs:  # The last log, of the whole run: so with the time before it was stopped.
            logs["train_runtime"] = round(self._seconds(), 4)
        super().log(logs, start_time)

    def _get_dataloader(self, dataset, *args, sampler_fn=None, **kwargs):
        """Ask the data set who samples and reads it, and keep random numbers out of when workers start."""
        source, run = source_of(dataset), self.args
        seed = run.seed if run.data_seed is None else run.data_seed
        own = source.sampler(seed, run.process_index, run.world_size)
        sampler_fn = sampler_fn if own is None else lambda _: own
        if not source.needs_workers:
            self.args = copy.copy(run)
            self.args.dataloader_num_workers, self.args.dataloader_persistent_workers = 0, False
            self.args.dataloader_prefetch_factor = self.args.dataloader_multiprocessing_context = None
        try:
            loader = super()._get_dataloader(dataset, *args, sampler_fn=sampler_fn, **kwargs)
        finally:
            self.args = run
        inner = unwrapped(loader)
        if source.collate is not None:
            inner.collate_fn = source.collate
        # It draws when workers start, which is at each epoch or not: training must not depend on it.
        inner.generator = torch.Generator()
        inner.worker_init_fn = functools.partial(_start_worker, inner.worker_init_fn)
        if inner.persistent_workers:
            self._loaders.append(inner)
        return loader

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        # Where its workers persist, Transformers keeps the first loader for whatever data set is evaluated after it.
        asked = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(asked, str) and asked is not self._evaluated:
            if (before := getattr(self, "_eval_dataloaders", {}).pop("eval", None)) is not None:
                before = unwrapped(before)
                self._loaders.remove(before)
                _end_workers(before)
            self._evaluated = asked
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:  # Transformers would not evaluate on the last images either.
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = dropped

    def _end_data_workers(self) -> None:
        """Those that outlive an epoch: at the process's end they would be killed, which PyTorch takes for a failure."""
        for loader in self._loaders:
            _end_workers(loader)

    # Going on

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args):
        """Transformers takes the best checkpoint for where it was written, and may train a step beyond the last."""
        self._epoch_steps = num_update_steps_per_epoch
        position = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        if self.resumed_from is not None and self.args.load_best_model_at_end:
            self.state.best_model_checkpoint = self._find_best()
        if self.state.global_step > max_steps:
            raise InputError(
                f"{self.resumed_from} is of step {self.state.global_step}, and this run ends at step {max_steps}: "
                "nothing is left to train. Train longer (--num_train_epochs, --max_steps)."
            )
        # Transformers would train one step more where `max_steps` ends within an epoch.
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else position

    def _find_best(self) -> str | None:
        """The folder of the best checkpoint so far, whose name the one that the run goes on from has."""
        state = json.loads((self.resumed_from / checkpoints.STATE).read_text(encoding="utf-8"))
        if not (best := state["best_model_checkpoint"]):
            return None
        name = Path(best).name
        places = [Path(self.args.output_dir) / name, self.resumed_from.with_name(name)]
        if name == checkpoints.checkpoint_folder("", self.state.global_step).name:
            places.append(self.resumed_from)  # Under the name that it has on the Hub.
        for place in places:
            if place.is_dir():
                return str(place)
        logger.warning(
            f"`load_best_model_at_end`: {name}, the best so far (`{self.args.metric_for_best_model}` "
            f"{state['best_metric']:.4g}), is not here. The run ends with a later checkpoint if that is better, else "
            "with its last weights."
        )
        return None

    def _catch_up(self) -> None:
        """When training begins: go back to where the checkpoint was saved, and do what was due there."""
        self._part_began, self._seconds_before = time.time(), 0.0
        if self.resumed_from is None:
            return
        path = self.resumed_from / checkpoints.PROGRESS
        if not path.is_file():
            return  # Of another Trainer: nothing is known to be due.
        self._initial_global_step = 0  # The mean loss at the end is the whole run's.
        progress = json.loads(path.read_text(encoding="utf-8"))
        self._load_rng_state(str(self.resumed_from))
        losses = progress["losses"]
        same = len(losses) == self.args.world_size
        self._tr_loss.fill_(losses[self.args.process_index] if same else sum(losses) / len(losses))
        self._total_loss_scalar = progress["logged_loss"]
        self._globalstep_last_logged = progress["last_logged_step"]
        self._seconds_before = progress["seconds"]
        self._last_step = (progress["grad_norm"], progress["learning_rate"])
        self._epoch_ended = progress["epoch_ended"]
        for action in progress["due"]:
            setattr(self.control, f"should_{action}", True)
        self._log_save_evaluate()
        at_end = self.state.global_step % self._epoch_steps == 0 or self.state.global_step >= self.state.max_steps
        if at_end and not self._epoch_ended:
            self._epoch_ended = True
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._log_save_evaluate()

    def _log_save_evaluate(self) -> None:
        norm, rate = self._last_step
        self._maybe_log_save_evaluate(
            self._tr_loss, norm, self.model_wrapped, None, self.state.epoch, None, time.time(), learning_rate=rate
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Transformers only warns of weights that are missing, and knows no layout but its own."""
        model = self.model if model is None else model
        folder = Path(resume_from_checkpoint)
        weights = checkpoints.read_weights(folder)
        shapes = {plain_name(name): tensor.shape for name, tensor in model.state_dict().items()}
        checkpoints.check_weights(shapes, weights, folder)
        if self.is_fsdp_enabled:
            set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
        else:
            model.load_state_dict(weights)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """What is wrong with the file has to be said with its name."""
        name = "rng_state.pth" if self.args.world_size == 1 else f"rng_state_{self.args.process_index}.pth"
        with checkpoints.reading(Path(checkpoint or "") / name):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """As for `_load_rng_state`."""
        with checkpoints.reading(Path(checkpoint or "") / "scaler.pt"):
            super()._load_scaler(checkpoint)

    def _load_best_model(self) -> None:
        """As for `_load_from_checkpoint`; further weights go with them."""
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        self._load_more_weights(Path(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Transformers loads by position, whatever the groups; and not what another layout has saved."""
        if checkpoint is None or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        folder = Path(checkpoint)
        if not (folder / checkpoints.OPTIMIZER).is_file():
            raise InputError(
                f"{folder} has no {checkpoints.OPTIMIZER}: it was saved by DeepSpeed, or without the optimiser. Go on "
                "with what saved it, or start anew from its weights with --finetune."
            )
        state = optimizer_states.fitted(checkpoints.read_state(folder / checkpoints.OPTIMIZER), self.optimizer, folder)
        if self.is_fsdp_enabled:
            state["state"] = _sharded(state["state"], self.optimizer)
        self.optimizer.load_state_dict(state)
        optimizer_states.load_schedule(
            checkpoints.read_state(folder / SCHEDULE), self.lr_scheduler, self.optimizer, folder
        )

    # Stopping and saving

    def _maybe_log_save_evaluate(
        self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None
    ):
        """The one place between two steps where a signal can be answered, and the last step's figures are known."""
        self._last_step = (grad_norm, learning_rate)
        self._may_stop = True
        try:
            self.stop_if_asked()
            super()._maybe_log_save_evaluate(
                tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
            )
        except _Asked as asked:
            # At once: an evaluation can take longer than a scheduler waits. It is noted, and done when the run goes on.
            due = [action for action in ACTIONS if getattr(self.control, f"should_{action}")]
            self._save_checkpoint(model, trial, due)
            folder = checkpoints.checkpoint_folder(self.args.output_dir, self.state.global_step)
            raise Stopped(asked.number, folder, self.state.global_step, self.state.epoch) from None
        finally:
            self._may_stop = False

    def prediction_step(self, *args, **kwargs):
        self.stop_if_asked()
        return super().prediction_step(*args, **kwargs)

    def stop_if_asked(self) -> None:
        """Within an evaluation of training, and at the end of each of its steps."""
        if self._may_stop and (number := self.largest(self._signals.received)):
            raise _Asked(number)

    def _save_checkpoint(self, model, trial, due: list[str] = ()) -> None:
        """Transformers writes in place, so that a run that is killed leaves half a checkpoint."""
        run, step = Path(self.args.output_dir), self.state.global_step
        folder = checkpoints.checkpoint_folder(run, step)
        self.store_flos()
        if self.args.load_best_model_at_end and self.state.best_global_step:
            best = checkpoints.checkpoint_folder(run, self.state.best_global_step)
            if best == folder or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        # Whatever the processes have to say to each other comes before anything is written, so that none waits for one
        # that has failed.
        state = self._collect(list(due))
        try:
            self._in_all(folder, lambda: self.args.should_save and checkpoints.begin(folder))
            self._in_all(folder, lambda: self._write(checkpoints.part_of(folder), *state))
            self._in_all(folder, lambda: self.args.should_save and checkpoints.publish(folder))
        except BaseException:
            if self.args.should_save:
                checkpoints.abandon(folder)
            raise
        if self.args.should_save:
            best = None
            if metric := self.args.metric_for_best_model:
                metric = metric if metric.startswith("eval_") else f"eval_{metric}"
                best = checkpoints.best(run, self.state.log_history, metric, self.args.greater_is_better)
            checkpoints.rotate(run, self.args.save_total_limit, folder, best)

    def _collect(self, due: list[str]) -> tuple[dict | None, dict | None, dict, dict]:
        """Weights (if sharded), the optimiser's state, further weights, the progress: all that needs all processes."""
        weights = self._whole_weights() if self.is_fsdp_enabled else None
        optimizer = None
        if not self.is_deepspeed_enabled and not self.args.save_only_model:
            optimizer = self.optimizer.state_dict()
            optimizer |= {"kind": optimizer_states.kind_of(self.optimizer), "began_with": self.began_with}
            if self.is_fsdp_enabled:
                optimizer["state"] = recursively_apply(_whole, optimizer["state"])
        norm, rate = self._last_step
        progress = {
            "losses": self.accelerator.gather(self._tr_loss.reshape(1)).tolist(),
            "logged_loss": self._total_loss_scalar,
            "last_logged_step": self._globalstep_last_logged,
            "grad_norm": None if norm is None or not math.isfinite(norm) else float(norm),
            "learning_rate": rate,
            "epoch_ended": self._epoch_ended,
            "due": due,
            "seconds": self._seconds(),
            "run": self.identity,
        }
        return weights, optimizer, self._more_weights(), progress

    def _whole_weights(self) -> dict[str, torch.Tensor]:
        # Accelerate's `get_state_dict` returns before gloo has gathered them.
        return {plain_name(name): _whole(tensor) for name, tensor in self.model.state_dict().items()}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call=_internal_call)
        self._save(output_dir, state_dict=self._whole_weights())

    def _write(self, part: Path, weights: dict | None, optimizer: dict | None, more_weights: dict, progress: dict):
        """Every file of a checkpoint; what there is one of for all processes, by the main process."""
        if self.is_deepspeed_enabled:
            self.save_model(str(part), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(part))
        else:
            self._save(str(part), state_dict=weights)
            if optimizer is not None and self.args.should_save:
                torch.save(optimizer, part / checkpoints.OPTIMIZER)
                torch.save(self.lr_scheduler.state_dict(), part / SCHEDULE)
        if not self.args.save_only_model:
            self._save_scaler(str(part))
            self._save_rng_state(str(part))
        if self.args.should_save:
            for name, tensors in more_weights.items():
                save_file(tensors, part / name, metadata={"format": "pt"})
            (part / checkpoints.PROGRESS).write_text(json.dumps(progress, indent=2) + "\n", encoding="utf-8")
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
            state = dataclasses.replace(self.state)
            if state.best_model_checkpoint is not None:
                # No folder of this machine: it may be moved, or pushed to the Hub.
                state.best_model_checkpoint = Path(state.best_model_checkpoint).name
            state.save_to_json(str(part / checkpoints.STATE))

    def _more_weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """Further safetensors files of a checkpoint, by name: a subclass's. All processes call it."""
        return {}

    def _load_more_weights(self, folder: Path) -> None:
        """Load those of a checkpoint: a subclass's."""

    def _in_all(self, folder: Path, action) -> None:
        """Do something in all processes, and fail in all if it fails in one."""
        failure = None
        try:
            with checkpoints.writing(f"{folder.name}", folder.parent, self._advice(folder)):
                action()
        except checkpoints.NotWritten as error:
            failure = error
        if self.largest(failure is not None):
            if failure is None:
                failure = checkpoints.NotWritten(f"Another process could not write {folder.name}; it says why.")
                failure.said = True
            raise failure

    def _advice(self, folder: Path) -> str:
        steps = [step for step in checkpoints.checkpoints(folder.parent) if step != self.state.global_step]
        kept = f"goes on from checkpoint-{steps[-1]}, which is whole" if steps else "starts again: it is the first one"
        return f"{checkpoints.MEND}: the run {kept}."

    def _seconds(self) -> float:
        """How long the run has trained, with what was before it was stopped."""
        return self._seconds_before + time.time() - self._part_began


class _Hooks(TrainerCallback):
    """What the Trainer has no method for. It is the last callback, so that the others are ready."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._catch_up()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer._epoch_ended = False

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer._epoch_ended = True


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


class _Asked(Exception):
    """A signal has asked to stop."""

    def __init__(self, number: int):
        self.number = number


def unwrapped(loader: DataLoader) -> DataLoader:
    """PyTorch's own, which accelerate's has within it."""
    return getattr(loader, "base_dataloader", loader)


def _end_workers(loader: DataLoader) -> None:
    if (iterator := loader._iterator) is not None:
        loader._iterator = None
        iterator._shutdown_workers()


def _start_worker(then, worker: int) -> None:
    outlive_signals()
    if then is not None:
        then(worker)


def plain_name(name: str) -> str:
    """A parameter's name without what compiling and activation checkpointing add."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def _sharded(state: dict[int, dict], optimizer: torch.optim.Optimizer) -> dict[int, dict]:
    """A whole optimiser's state, cut as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def like(parameter, value):
        if not isinstance(parameter, DTensor) or not torch.is_tensor(value) or value.shape != parameter.shape:
            return value
        # Every process has read the file, so there is nothing to send.
        layout = (parameter.device_mesh, parameter.placements)
        return distribute_tensor(value.to(parameter.device), *layout, src_data_rank=None)

    return {
        index: {key: like(parameters[index], value) for key, value in entries.items()}
        for index, entries in state.items()
    }
