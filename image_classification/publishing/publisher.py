# SPDX-License-Identifier: Apache-2.0
"""
Pushing a run to the Hub while it trains and when it is finished; no failure of a push is one of the run.

Each push is a process of its own, for which a thread waits. A push in the thread itself could hang data workers: they
are forked, and huggingface_hub closes its connections in them, whose locks the thread may hold at that moment. What is
pushed is linked into a hidden folder first, so that checkpoints may be deleted meanwhile, and so that training waits
for nothing but that.
"""

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy

from ..hub import LAST_CHECKPOINT
from ..paths import PROJECT
from ..reports.card import CARD, card_on_hub
from ..reports.curves import CURVES, HISTORY, draw_curves, history, write_json
from ..reports.recipe import RECIPE
from ..reports.summary import RESULTS
from ..runs import checkpoints
from ..settings.arguments import RunArguments
from ..training import ema
from .destination import WAITS, Destination, describe


logger = logging.getLogger(__name__)

# What the folder of a run or a checkpoint holds of the model itself.
CODE = tuple(sorted(path.name for path in (PROJECT / "modeling_karat_vit").glob("[a-z]*.py")))
MODEL_FILES = ("config.json", *CODE, "preprocessor_config.json", "model*.safetensors", checkpoints.WEIGHTS_INDEX)
# What a finished run's folder holds beside it, and what goes with it.
REPORTS = (CARD, RECIPE, RESULTS, HISTORY, CURVES)
# What is pushed by each strategy, for the log.
PUSHED = {
    HubStrategy.END: "at the end",
    HubStrategy.EVERY_SAVE: "at every save",
    HubStrategy.CHECKPOINT: "at every save, with the last checkpoint",
    HubStrategy.ALL_CHECKPOINTS: "at every save, with all checkpoints",
}


@dataclass
class Push:
    """One commit to be made."""

    message: str
    what: str  # What it is, for the log.
    folder: Path  # Hidden, with all that is to be pushed; it is deleted afterwards.
    complete: Callable[[], None] = lambda: None  # Writes the rest of the files, in the background.
    outcome: Future[dict[str, Any]] = field(default_factory=Future)  # As `push_with_patience` says it.


class Publisher(TrainerCallback):
    """
    Pushes after each save, in the background, by `hub_strategy`; and a finished run, when `finish` is called. It is a
    context, and leaving it ends what is under way. For the main process only.

    * `end`: only the finished run.
    * `every_save`: the model of each checkpoint, with card, recipe and curves so far.
    * `checkpoint`: and the checkpoint itself, as `last-checkpoint`, from which another machine can go on.
    * `all_checkpoints`: and each checkpoint under its name.

    While a push is under way, only the newest save waits for its turn, unless `hub_always_push` is set or all
    checkpoints are asked for. `card` makes the card of the model as it is now: of the metrics of this step (or none),
    of which weights these are (`ema`, `model`, `None`), and of how far training is.
    """

    def __init__(
        self,
        destination: Destination,
        args: RunArguments,
        recipe: str = "",
        card: Callable[[dict[str, float], str | None, str], str] = lambda *_: "",
    ):
        self.destination, self.recipe, self.card = destination, recipe, card
        self.folder = Path(args.output_dir)
        self.strategy, self.always = HubStrategy(args.hub_strategy), args.hub_always_push
        self._thread = ThreadPoolExecutor(1, "push")
        self._pushes: list[Push] = []  # Of which nothing was told yet.
        self._starting, self._closed = threading.Lock(), False
        self._process: subprocess.Popen | None = None
        self._told: str | None = None

    def __enter__(self) -> "Publisher":
        return self

    def __exit__(self, *_) -> None:
        if not all(push.outcome.done() for push in self._pushes):
            logger.info("A push to the Hub was left off; the same command pushes what is missing.")
        self._drop_waiting()
        with self._starting:
            self._closed = True
            if self._process is not None:
                self._process.kill()
        self._thread.shutdown()

    # While it trains.

    def on_save(self, args, state, control, **kwargs) -> None:
        self._tell()
        if self.strategy == HubStrategy.END:
            return
        checkpoint = checkpoints.checkpoint_folder(args.output_dir, state.global_step)
        step = f"step {state.global_step}, epoch {state.epoch:.4g} of {state.num_train_epochs}"
        log = list(state.log_history)
        metrics: dict[str, float] = next((entry for entry in log[::-1] if "eval_loss" in entry), {})
        weights, metrics = ema.better(metrics) if metrics.get("step") == state.global_step else (None, {})
        push = Push(f"Training in progress: {step}", step, self._new_folder())
        try:
            self._gather(push, checkpoint, MODEL_FILES, [checkpoint])
            if weights == "ema":
                _link(checkpoint / ema.FILE, push.folder / f".{ema.FILE}")
            card = self.card(metrics, weights, step)
        except Exception as error:  # Whatever it is, it is no reason to stop training.
            shutil.rmtree(push.folder, ignore_errors=True)
            self._fail(f"{step}: {error}")
            return
        push.complete = lambda: _complete(push.folder, card, self.recipe, log, self.folder.resolve().name)
        self._add(push)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._tell()

    # When it is finished.

    def finish(self) -> bool:
        """Push the finished run's folder, and return whether it is there; if not, the log says why, and what to do."""
        logger.info("\nPushing to the Hub ...")
        push = Push("Finished training", "the finished run", self._new_folder())
        try:
            there = [*checkpoints.checkpoints(self.folder).values()]
            self._gather(push, self.folder, (*MODEL_FILES, *REPORTS), there)
        except OSError as error:
            shutil.rmtree(push.folder, ignore_errors=True)
            self._fail(str(error), final=True)
            return False
        self._add(push)
        wait([push.outcome for push in self._pushes])
        self._tell(last=True)
        return "error" not in push.outcome.result()

    # How.

    def _new_folder(self) -> Path:
        folders = (self.folder / f".push-{number}" for number in itertools.count())
        return next(folder for folder in folders if not folder.exists())

    def _gather(self, push: Push, source: Path, patterns: Iterable[str], there: list[Path]) -> None:
        """Link what is to be pushed of a folder, and of the checkpoints that are there what the strategy asks for."""
        push.folder.mkdir()
        _link_files(source, patterns, push.folder)
        if self.strategy == HubStrategy.CHECKPOINT and there:
            _link_files(there[-1], ["**/*"], push.folder / LAST_CHECKPOINT)
        elif self.strategy == HubStrategy.ALL_CHECKPOINTS:
            for checkpoint in there:
                _link_files(checkpoint, ["**/*"], push.folder / checkpoint.name)

    def _add(self, push: Push) -> None:
        if not self.always and self.strategy != HubStrategy.ALL_CHECKPOINTS:
            self._drop_waiting()
        push.outcome = self._thread.submit(self._work, push)
        self._pushes.append(push)

    def _drop_waiting(self) -> None:
        for push in [push for push in self._pushes if push.outcome.cancel()]:
            self._pushes.remove(push)
            shutil.rmtree(push.folder, ignore_errors=True)

    def _work(self, push: Push) -> dict[str, Any]:
        try:
            if "/" not in self.destination.name:
                outcome = self._run({}, push.message)
                if "error" in outcome:
                    return outcome
                self.destination.name = outcome["name"]
            push.complete()
            if (card := push.folder / CARD).is_file():
                text = card_on_hub(card.read_text(encoding="utf-8"), self.folder, self.destination.name)
                card.unlink()  # A link to the run's own.
                card.write_text(text, encoding="utf-8")
            files = [path for path in push.folder.rglob("[!.]*") if path.is_file()]
            return self._run({path.relative_to(push.folder).as_posix(): path.resolve() for path in files}, push.message)
        except Exception as error:
            return {"error": str(error) or type(error).__name__}
        finally:
            shutil.rmtree(push.folder, ignore_errors=True)

    def _run(self, files: dict[str, Path], message: str) -> dict[str, Any]:
        """One push, in a process of its own, which Ctrl-C in a terminal does not reach."""
        paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._starting:
            if self._closed:
                return {"error": "the run was stopped"}
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"{__package__}.destination"],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        out, err = self._process.communicate(describe(self.destination, files, message, WAITS))
        if self._process.returncode != 0:
            lines = err.strip().splitlines() or [f"it ended with status {self._process.returncode}"]
            return {"error": f"the process that pushes failed: {lines[-1]}"}
        return json.loads(out)

    def _tell(self, last: bool = False) -> None:
        """Log what became of the pushes: the first that worked, each new reason why one failed, and the last one."""
        while self._pushes and self._pushes[0].outcome.done():
            push = self._pushes.pop(0)
            outcome, final = push.outcome.result(), last and not self._pushes
            if last and not final:
                # What the last push has, or has not, in its place.
                if "error" in outcome and self.strategy == HubStrategy.ALL_CHECKPOINTS:
                    logger.warning(f"Not pushed: {push.what}: {outcome['error'].rstrip('.')}.")
            elif "error" in outcome:
                said = f"{push.what}: {outcome['error'].rstrip('.')}"
                self._fail(said, outcome["error"], final, outcome.get("conflict", False))
            elif final or self._told != "pushed":
                done = "Pushed" if outcome["changed"] else "Up to date:"
                every = "." if final else f" ({push.what}). Every save is pushed from now on."
                logger.info(f"{done} {outcome['url']}{every}")
                self._told = "pushed"

    def _fail(self, said: str, reason: str | None = None, final: bool = False, conflict: bool = False) -> None:
        if final:
            how = f" The same command again pushes it; or, by hand:\n  {self.destination.command(self.folder)}"
            how = "" if conflict else how  # By hand, it would overwrite what the push left alone.
            lost = f"\nNothing is lost: {self.folder} has all of it.{how}"
            logger.warning(f"Not pushed to {self.destination.name}: {said}.{lost}")
        elif reason is None or reason != self._told:
            logger.warning(f"Not pushed: {said}. Training goes on, and the next save is pushed again.")
        self._told = reason


def _complete(folder: Path, card: str, recipe: str, log: list[dict[str, float]], title: str) -> None:
    """The reports of a run in training; and the averaged weights in place of the plain ones, if they are there."""
    (folder / CARD).write_text(card, encoding="utf-8")
    (folder / RECIPE).write_text(recipe, encoding="utf-8")
    rows = history(log)
    write_json(folder / HISTORY, rows)
    draw_curves(rows, folder / CURVES, title)
    average = folder / f".{ema.FILE}"
    if average.is_file():
        weights = checkpoints.read_weights(folder)
        weights |= {name: tensor.to(weights[name].dtype) for name, tensor in load_file(average).items()}
        for path in folder.glob("model*.safetensors*"):
            path.unlink()  # A link to the checkpoint's.
        save_file(weights, folder / checkpoints.WEIGHTS, metadata={"format": "pt"})


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # A file system without hard links.
        shutil.copyfile(source, target)


def _link_files(source: Path, patterns: Iterable[str], target: Path) -> None:
    """Those files of a folder that match, under the same paths."""
    for path in {path for pattern in patterns for path in source.glob(pattern)}:
        if path.is_file():
            _link(path, target / path.relative_to(source))
