# SPDX-License-Identifier: Apache-2.0
"""What a run says on the console: a progress bar, one line an epoch, and log messages that do not tear the bar."""

import logging
import sys
import time
import warnings
from typing import Any

import datasets
import transformers
from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length

from ..settings.arguments import RunArguments, cores_to_use


logger = logging.getLogger(__name__)


class BarHandler(logging.Handler):
    """Messages above the progress bar; warnings say so."""

    def emit(self, record):
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + self.format(record), file=sys.stdout)
        sys.stdout.flush()


def set_up_logging(args: RunArguments) -> None:
    """Show messages of this package, from the main process only, and of the libraries what is asked for."""
    package = logging.getLogger(__package__.partition(".")[0])
    package.handlers = [BarHandler()]
    package.propagate = False
    package.setLevel(logging.INFO if args.process_index == 0 else logging.ERROR)
    # Our lines say what matters; the libraries' informational ones and bars do not.
    if args.log_level == "passive":
        transformers.logging.set_verbosity_error()
    else:
        transformers.logging.set_verbosity(args.get_process_log_level())
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    if args.process_index != 0:
        datasets.disable_progress_bars()


def warn_of_settings(args: RunArguments, record: dict[str, Any]) -> None:
    """Warn of settings, as they were given, that do nothing or too much."""
    cores, workers = cores_to_use(), args.dataloader_num_workers or 0
    if workers > cores:
        logger.warning(f"{workers} workers (`dataloader_num_workers`) share {cores} CPU cores: fewer may be faster.")
        # PyTorch would say it at every epoch.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    if not args.push_to_hub:
        for name, value in record.items():
            if name.startswith("hub_") and value != getattr(RunArguments, name, None):
                logger.warning(f"`{name}` has no effect without `push_to_hub`.")
    if args.run_name is None:
        for name in ("report_to", "run_id"):
            if record[name] not in (None, ["none"]):
                logger.warning(f"`{name}` has no effect: nothing is reported without a `run_name`.")
    elif not args.report_to:
        logger.warning("`run_name` has no effect: `report_to` is none, or neither wandb nor tensorboard is installed.")
    if args.do_train and args.max_steps < 0 and (warmup := args.warmup_epochs or 0) >= args.num_train_epochs:
        logger.warning(f"--warmup_epochs {warmup:g} do not end in a run of {args.num_train_epochs:g}: set fewer.")


class EpochLines(ProgressCallback):
    """The progress bar over all steps, and after each evaluation in training one line of what was reached."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.current_step = time.time(), state.global_step
        # Of a run that goes on with the evaluation of what it had logged.
        self.loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
        if state.is_world_process_zero:
            # In a log file every refresh is a line of its own.
            how = {"mininterval": 0.5 if sys.stderr.isatty() else 15, "disable": args.disable_tqdm, "unit": "step"}
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, desc="Training", **how)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.prediction_bar is None and has_length(eval_dataloader):
            how = {"leave": False, "delay": 2, "disable": args.disable_tqdm or not state.is_world_process_zero}
            self.prediction_bar = tqdm(total=len(eval_dataloader), desc="Evaluating", unit="batch", **how)
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:
            self.loss = (logs or {}).get("loss", self.loss)
            if self.loss is not None:
                self.training_bar.set_postfix_str(f"loss {self.loss:.4f}", refresh=False)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        if self.training_bar is None:  # Outside the training loop the caller has its own words.
            return
        total = max(1, round(state.num_train_epochs))
        train = f"   train loss {self.loss:.4f}" if self.loss is not None else ""
        seconds = time.time() - self.began
        epoch = f"{state.epoch:.4g}"
        logger.info(f"epoch {epoch:>{len(str(total))}}/{total}{train}   {describe(metrics)}   {seconds:.0f} s")


def describe(metrics: dict[str, float]) -> str:
    """`held-out loss 0.1234   accuracy 96.1 %`, and the top-5 and the averaged weights' accuracy where there is one."""
    parts = [f"held-out loss {metrics['eval_loss']:.4f}"] if "eval_loss" in metrics else []
    for key, name in (
        ("eval_accuracy", "accuracy"),
        ("eval_top5_accuracy", "top-5"),
        ("eval_ema_accuracy", "averaged weights' accuracy"),
    ):
        # At the end of a run that is said in full: see `summary.describe_choice`.
        if key in metrics and not (key == "eval_ema_accuracy" and "eval_model_accuracy" in metrics):
            parts.append(f"{name} {100 * metrics[key]:.2f} %")
    return "   ".join(parts)
