# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints of a run that survives: killed at any moment and started again, it ends with the same bits as if never
stopped.

Beside what Transformers saves, a checkpoint holds `progress.json`: the losses since the last log, and what was due
when it was written, so that logs and evaluations are neither lost nor done twice. Its files are the same for one
process, DDP and FSDP2, so a run may go on under another layout. (DeepSpeed writes its own, for its own.)
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from ..errors import InputError
from ..files import part_of
from ..runs import checkpoints
from . import ema, optimizer_states
from .parallel import largest
from .sharding import plain_name, whole


logger = logging.getLogger(__name__)

ACTIONS = ("log", "evaluate", "save")


class Checkpointer:
    """Writes checkpoints whole or not at all, in all processes alike, and goes on from one exactly."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.identity: str | None = None  # Which run they are of.
        self.when_loaded: Callable[[], None] = lambda: None  # Is called where nothing can be refused any more.
        self.resumed_from: Path | None = None  # The one that this part of the run goes on from.
        self.began_with: list[dict] | None = None  # Settings of the optimiser's groups, before the first step.
        # Norm of the gradient and learning rate, as the log has them.
        self.last_step: tuple[Any, float | None] = (None, None)
        self.epoch_ended = False
        self._part_began, self._seconds_before = time.time(), 0.0

    @property
    def seconds(self) -> float:
        """How long the run has trained, with what was before it was stopped."""
        return self._seconds_before + time.time() - self._part_began

    # Going on

    def open(self, checkpoint: str | None) -> None:
        """Go on from this checkpoint, if any: what is wrong with it is said as soon as it can be."""
        self.resumed_from = None if checkpoint is None else Path(checkpoint)
        self.last_step, self.epoch_ended = (None, None), False
        if self.resumed_from is None:
            return
        checkpoints.check_progress(self.resumed_from)
        if self.trainer.is_deepspeed_enabled and not list(self.resumed_from.glob("global_step*")):
            raise InputError(
                f"{self.resumed_from} was not saved by DeepSpeed, which can only go on from its own files. Go on "
                "without DeepSpeed, or start anew from its weights with --finetune."
            )

    def load_weights(self, folder: Path, model: torch.nn.Module) -> None:
        """Load every weight of a model. Raises `InputError` where the checkpoint has not exactly these."""
        weights: dict[str, Any] = checkpoints.read_weights(folder)
        shapes = {plain_name(name): tensor.shape for name, tensor in model.state_dict().items()}
        checkpoints.check_weights(shapes, weights, folder)
        if self.trainer.is_fsdp_enabled:
            set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
        else:
            model.load_state_dict(weights)

    def load_optimizer(self, folder: Path) -> None:
        """Load the states of the optimiser and of the schedule, whatever layout has saved them."""
        optimizer, path = self.trainer.optimizer, folder / checkpoints.OPTIMIZER
        if not path.is_file():
            raise InputError(
                f"{folder} has no {checkpoints.OPTIMIZER}: it was saved by DeepSpeed, or without the optimiser. Go on "
                "with what saved it, or start anew from its weights with --finetune."
            )
        optimizer.load_state_dict(optimizer_states.fitted(checkpoints.read_state(path), optimizer, folder))
        saved = checkpoints.read_state(folder / checkpoints.SCHEDULER)
        optimizer_states.load_schedule(saved, self.trainer.lr_scheduler, folder)

    def load_rest(self, folder: Path) -> None:
        """Load what else there is to a run, when the optimiser is there."""
        trainer, state = self.trainer, self.trainer.state
        # Transformers loads these two again; what is wrong with a file has to be said with its name.
        with checkpoints.reading(folder / "scaler.pt"):
            trainer._load_scaler(str(folder))
        random = "rng_state.pth" if trainer.args.world_size == 1 else f"rng_state_{trainer.args.process_index}.pth"
        with checkpoints.reading(folder / random):
            trainer._load_rng_state(str(folder))
        if state.global_step > state.max_steps:
            raise InputError(
                f"{folder} is of step {state.global_step}, and this run ends at step {state.max_steps}: nothing is "
                "left to train. Train longer (--num_train_epochs, --max_steps)."
            )
        if trainer.args.load_best_model_at_end:  # Transformers takes it for where it was written.
            state.best_model_checkpoint = self._find_best(folder)
        self.when_loaded()

    def _find_best(self, folder: Path) -> str | None:
        """The folder of the best checkpoint so far, whose name the one that the run goes on from has."""
        state = checkpoints.read_json(folder / checkpoints.STATE)
        if not (best := state["best_model_checkpoint"]):
            return None
        name = Path(best).name
        places = [Path(self.trainer.args.output_dir) / name, folder.with_name(name)]
        if name == checkpoints.checkpoint_folder("", self.trainer.state.global_step).name:
            places.append(folder)  # Under the name that it has on the Hub.
        for place in places:
            if place.is_dir():
                return str(place)
        logger.warning(
            f"`load_best_model_at_end`: {name}, the best so far (`{self.trainer.args.metric_for_best_model}` "
            f"{state['best_metric']:.4g}), is not here. The run ends with a later checkpoint if that is better, else "
            "with its last weights."
        )
        return None

    def catch_up(self) -> None:
        """When training begins, go back to where the checkpoint was saved, and do what was due there."""
        self._part_began, self._seconds_before = time.time(), 0.0
        trainer, state = self.trainer, self.trainer.state
        if self.resumed_from is None or not (self.resumed_from / checkpoints.PROGRESS).is_file():
            return  # Of another Trainer's, nothing is known to be due.
        trainer._initial_global_step = 0  # The mean loss at the end is the whole run's.
        progress = checkpoints.read_json(self.resumed_from / checkpoints.PROGRESS)
        trainer._load_rng_state(str(self.resumed_from))
        losses = progress["losses"]
        same = len(losses) == trainer.args.world_size
        trainer._tr_loss.fill_(losses[trainer.args.process_index] if same else sum(losses) / len(losses))
        trainer._total_loss_scalar = progress["logged_loss"]
        trainer._globalstep_last_logged = progress["last_logged_step"]
        self._seconds_before = progress["seconds"]
        self.last_step = (progress["grad_norm"], progress["learning_rate"])
        self.epoch_ended = progress["epoch_ended"]
        for action in progress["due"]:
            setattr(trainer.control, f"should_{action}", True)
        self._log_save_evaluate()
        at_end = state.epoch == int(state.epoch) or state.global_step >= state.max_steps
        if at_end and not self.epoch_ended:
            trainer.control = trainer.callback_handler.on_epoch_end(trainer.args, state, trainer.control)
            self._log_save_evaluate()

    def _log_save_evaluate(self) -> None:
        trainer, (norm, rate), epoch = self.trainer, self.last_step, self.trainer.state.epoch
        told = trainer.model_wrapped, None, epoch, None, time.time()
        trainer._maybe_log_save_evaluate(trainer._tr_loss, norm, *told, learning_rate=rate)

    # Saving

    def save(self, due: list[str]) -> None:
        """
        Write the checkpoint of this step, at which of `ACTIONS` some are `due`, and delete those that
        `save_total_limit` has no place for. Raises `NotWritten` where it could not be written, and is not there.
        """
        trainer, state = self.trainer, self.trainer.state
        args, run = trainer.args, Path(trainer.args.output_dir)
        folder = checkpoints.checkpoint_folder(run, state.global_step)
        trainer.store_flos()
        if args.load_best_model_at_end and state.best_global_step:
            best = checkpoints.checkpoint_folder(run, state.best_global_step)
            if best == folder or best.is_dir():
                state.best_model_checkpoint = str(best)
        # Whatever the processes have to say to each other comes before anything is written, so that none waits for one
        # that has failed.
        collected = self.collect(due)
        try:
            self._in_all(folder, checkpoints.begin if args.should_save else None)
            self._in_all(folder, lambda _: self.write(part_of(folder), *collected))
            self._in_all(folder, checkpoints.publish if args.should_save else None)
        except BaseException:
            if args.should_save:
                checkpoints.abandon(folder)
            raise
        if args.should_save:
            kept = None
            if metric := args.metric_for_best_model:
                metric = metric if metric.startswith("eval_") else f"eval_{metric}"
                kept = checkpoints.best(run, state.log_history, metric, args.greater_is_better)
            checkpoints.rotate(run, args.save_total_limit, folder, kept)

    def collect(self, due: list[str]) -> tuple[dict | None, dict | None, dict | None, dict]:
        """Weights (if sharded), the optimiser's state, the average, the progress: all that needs all processes."""
        trainer, optimizer = self.trainer, None
        if not trainer.is_deepspeed_enabled and not trainer.args.save_only_model:
            optimizer = trainer.optimizer.state_dict()
            optimizer |= {"kind": optimizer_states.kind_of(trainer.optimizer), "began_with": self.began_with}
            if trainer.is_fsdp_enabled:
                optimizer["state"] = recursively_apply(whole, optimizer["state"])
        average = None if trainer.average is None else trainer.average.whole(trainer.bare_model)
        norm, rate = self.last_step
        progress = {
            "losses": trainer.accelerator.gather(trainer._tr_loss.reshape(1)).tolist(),
            "logged_loss": trainer._total_loss_scalar,
            "last_logged_step": trainer._globalstep_last_logged,
            "grad_norm": None if norm is None or not math.isfinite(norm) else float(norm),
            "learning_rate": rate,
            "epoch_ended": self.epoch_ended,
            "due": due,
            "seconds": self.seconds,
            "run": self.identity,
        }
        return self.whole_weights(), optimizer, average, progress

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """The weights of a sharded model, by their names; `None` for one that every process has."""
        if not self.trainer.is_fsdp_enabled:
            return None
        # Accelerate's `get_state_dict` returns before gloo has gathered them.
        return {plain_name(name): whole(tensor) for name, tensor in self.trainer.model.state_dict().items()}

    def write(self, part: Path, weights: dict | None, optimizer: dict | None, average: dict | None, progress: dict):
        """Write every file of a checkpoint; what there is one of for all processes, by the main process."""
        trainer, args = self.trainer, self.trainer.args
        if trainer.is_deepspeed_enabled:
            trainer.save_model(str(part), _internal_call=True)
            if not args.save_only_model:
                trainer._save_optimizer_and_scheduler(str(part))
        else:
            trainer._save(str(part), state_dict=weights)
            if optimizer is not None and args.should_save:
                torch.save(optimizer, part / checkpoints.OPTIMIZER)
                torch.save(trainer.lr_scheduler.state_dict(), part / checkpoints.SCHEDULER)
        if not args.save_only_model:
            trainer._save_scaler(str(part))
            trainer._save_rng_state(str(part))
        if not args.should_save:
            return
        if average is not None:
            save_file(average, part / ema.FILE, metadata={"format": "pt"})
        (part / checkpoints.PROGRESS).write_text(json.dumps(progress, indent=2) + "\n", encoding="utf-8")
        for callback in [*trainer.callback_handler.callbacks, trainer.control]:
            if isinstance(callback, ExportableState):
                trainer.state.stateful_callbacks[type(callback).__name__] = callback.state()
        state = dataclasses.replace(trainer.state)
        if state.best_model_checkpoint is not None:
            # No folder of this machine: it may be moved, or pushed to the Hub.
            state.best_model_checkpoint = Path(state.best_model_checkpoint).name
        state.save_to_json(str(part / checkpoints.STATE))

    def _in_all(self, folder: Path, action: Callable[[Path], None] | None) -> None:
        """Do what there is for this process to do with a folder, and fail in all if it fails in one."""
        failure = None
        try:
            with checkpoints.writing(f"{folder.name}", folder.parent, self._advice(folder)):
                if action is not None:
                    action(folder)
        except checkpoints.NotWritten as error:
            failure = error
        if largest(failure is not None):
            if failure is None:
                failure = checkpoints.NotWritten(f"Another process could not write {folder.name}; it says why.")
                failure.said = True
            raise failure

    def _advice(self, folder: Path) -> str:
        steps = [step for step in checkpoints.checkpoints(folder.parent) if step != self.trainer.state.global_step]
        kept = f"goes on from checkpoint-{steps[-1]}, which is whole" if steps else "starts again: it is the first one"
        return f"{checkpoints.MEND}: the run {kept}."
