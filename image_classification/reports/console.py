# SPDX-License-Identifier: Apache-2.0
"""What a run says on the console: a progress bar, one line an epoch, and log messages that do not tear the bar."""

import logging
import sys
import time

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import has_length


logger = logging.getLogger(__name__)


class BarHandler(logging.Handler):
    """Messages above the progress bar; warnings say so."""

    def emit(self, record):
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + self.format(record), file=sys.stdout)
        sys.stdout.flush()


def set_up_logging(main_process: bool) -> None:
    """Show messages of this package, from the main process only."""
    package = logging.getLogger(__package__.partition(".")[0])
    package.handlers = [BarHandler()]
    package.propagate = False
    package.setLevel(logging.INFO if main_process else logging.ERROR)


class EpochLines(TrainerCallback):
    """The progress bar over all steps, and after each evaluation one line of what was reached."""

    def __init__(self):
        self.bar = self.evaluation_bar = self.loss = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.time()
        # Of a run that goes on with the evaluation of what it had logged.
        self.loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
        if state.is_world_process_zero and not args.disable_tqdm:
            # In a log file every refresh is a line of its own.
            every = 0.5 if sys.stderr.isatty() else 15
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="Training", unit="step", mininterval=every
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not state.is_world_process_zero or args.disable_tqdm or not has_length(eval_dataloader):
            return
        if self.evaluation_bar is None:
            self.evaluation_bar = tqdm(
                total=len(eval_dataloader), desc="Evaluating", unit="batch", leave=False, delay=2
            )
        self.evaluation_bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.loss = (logs or {}).get("loss", self.loss)
        if self.bar is not None and self.loss is not None:
            self.bar.set_postfix_str(f"loss {self.loss:.4f}", refresh=False)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.evaluation_bar is not None:
            self.evaluation_bar.close()
            self.evaluation_bar = None
        # Outside the training loop the caller has its own words.
        if not state.is_world_process_zero or (self.bar is None and not args.disable_tqdm) or not state.max_steps:
            return
        if getattr(self, "began", None) is None:
            return
        total = max(1, round(state.num_train_epochs))
        train = f"   train loss {self.loss:.4f}" if self.loss is not None else ""
        seconds = time.time() - self.began
        epoch = f"{state.epoch:.4g}"
        logger.info(f"epoch {epoch:>{len(str(total))}}/{total}{train}   {describe(metrics)}   {seconds:.0f} s")

    def on_train_end(self, args, state, control, **kwargs):
        self.began = None
        if self.bar is not None:
            self.bar.close()
            self.bar = None


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
