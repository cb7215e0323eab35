# SPDX-License-Identifier: Apache-2.0
"""A run from the command line to the summary."""

import contextlib
import logging
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoImageProcessor, set_seed

from .data.transforms import build_image_processor, serves
from .errors import InputError, run_command
from .evaluation import evaluate
from .hub import find_token
from .models import transfer
from .models.building import (
    build_config,
    build_model,
    check_labels,
    check_same_model,
    describe_model,
    sum_of_weights,
    training_size,
)
from .models.loading import load_config, load_image_processor
from .pipeline import calibration_images, load_images
from .publishing.destination import Destination, prepare
from .publishing.publisher import PUSHED, Publisher
from .reports import trackers
from .reports.card import RunCard
from .reports.console import set_up_logging, warn_of_settings
from .reports.folder import write_reports
from .reports.recipe import recipe
from .reports.summary import cost, describe_choice, describe_reported, opening, summary
from .runs import checkpoints, run_folder
from .runs.signals import Stopped, same_command, without_token
from .settings.arguments import RunArguments, Settings
from .settings.parser import parse_settings
from .training.building import build_trainer
from .training.metrics import check_best
from .training.parallel import on_main_process
from .training.trainer import ImageClassificationTrainer


# Workers of the data loader are processes of their own; tokenizers is not used, and its warning about forks misleads.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """
    Run the script by the words after its name (default the process's), and return its exit status: 0, or 2 where the
    input cannot be used or the disk is full, 1 after a failure that nobody foresaw, 130 after Ctrl-C and 143 after
    SIGTERM.
    """
    words = sys.argv[1:] if argv is None else argv
    return run_command("run_image_classification.py", lambda: _main(argv), debug="--debug" in words)


def _main(argv: list[str] | None) -> int:
    settings = parse_settings(sys.argv[1:] if argv is None else argv)
    args, folder = settings.training, Path(settings.training.output_dir)
    if argv is None:
        sys.argv = without_token(sys.argv)  # Trackers keep the command line.
    try:
        with run_folder.FolderLock() as lock:
            run(settings, lock)
    except Stopped as stopped:
        if args.process_index == 0:
            command = f":\n  {same_command()}" if argv is None else "."
            print(f"\n{stopped}. The same command goes on from {stopped.checkpoint}{command}", file=sys.stderr)
        _leave()
        return stopped.exit_status
    except KeyboardInterrupt:
        # Outside of the training loop, where there is nothing to save.
        steps = checkpoints.checkpoints(folder) if args.do_train else {}
        hint = f" The same command goes on from {steps[max(steps)]}." if steps else ""
        if steps and settings.record["push_to_hub"] and (run_folder.read_record(folder) or {}).get("finished"):
            hint = " The run is finished; the same command pushes it to the Hub."
        print(f"\nStopped.{hint}", file=sys.stderr)
        return 130
    _leave()
    return 0


def _leave() -> None:
    """Take leave of the other processes, if there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(settings: Settings, lock: run_folder.FolderLock) -> dict[str, float]:
    """
    Train, or only evaluate, what the settings describe, with the lock taken on the output folder in the main process;
    return the metrics of the last evaluation (`eval_loss`, `eval_accuracy`, ...).

    Raises:
        InputError: anything that a user can mend.
        Stopped: by a signal.
    """
    args = settings.training
    set_up_logging(args)
    warn_of_settings(args, settings.record)
    if args.cpu_threads is not None:
        torch.set_num_threads(args.cpu_threads)
    transfer.check_settings(settings.model, args)
    if not args.do_train:
        if args.push_to_hub:
            raise InputError(
                "`push_to_hub` pushes what a run trained, and this one only evaluates. For a finished run, give the "
                "command that trained it with --push_to_hub; for any other folder, `hf upload USER/NAME FOLDER .`."
            )
        return evaluate(settings)
    if args.output_dir == "trainer_output" and settings.record["output_dir"] is None:
        raise InputError("No output folder is named. Give --output_dir.")
    request = run_folder.Request.of(settings.record, args)
    plan = on_main_process(lambda: run_folder.plan(request, lock))
    destination = on_main_process(lambda: _destination(args, plan.identity)) if args.push_to_hub else None
    args.push_to_hub = False  # Transformers' own way is not used.
    if plan.finished is not None:
        logger.info(
            f"{args.output_dir} holds this run already, finished:\n"
            f"{summary(args.output_dir, plan.finished)}\n\n"
            "To train again, choose another --output_dir or move that folder away."
        )
        if destination is not None:
            _leave()  # The others need not wait.
        if destination is not None and args.process_index == 0:
            run_folder.write_record(request, plan.finished, plan.identity)
            with Publisher(destination, args) as publisher:
                publisher.finish()
        return plan.finished["metrics"]
    if settings.recipe:
        paper = describe_reported(settings.reported)
        logger.info(f"Recipe  {os.path.relpath(settings.recipe)}{f'; {paper}' if paper else ''}")
    if plan.message:
        logger.info(plan.message)
    return _train(settings, request, plan, destination)


def _destination(args: RunArguments, identity: str) -> Destination:
    """Where to push; whatever stands against it is said now."""
    destination = Destination(
        name=args.hub_model_id or Path(args.output_dir).resolve().name,
        run=identity,
        token=find_token(args.hub_token),
        revision=args.hub_revision,
        private=args.hub_private_repo,
        overwrite=args.hub_overwrite,
    )
    if warning := prepare(destination):
        logger.warning(warning)
    return destination


def _train(
    settings: Settings, request: run_folder.Request, plan: run_folder.Plan, destination: Destination | None
) -> dict[str, float]:
    args, asked = settings.training, settings.model
    # Cheap, so a misspelt setting does not wait for the data.
    wanted = build_config(asked)
    size = training_size(asked, wanted)
    check_best(args.metric_for_best_model, args.model_ema)
    theirs = load_image_processor(asked.weights, "finetune") if asked.weights else None
    processor = build_image_processor(settings.data, size, theirs, wanted.model_type)
    with tempfile.TemporaryDirectory() as place:
        # Evaluate with what is saved, so that the pipeline sees what the evaluation saw.
        processor.save_pretrained(place)
        processor = AutoImageProcessor.from_pretrained(place)
    with args.main_process_first(desc="reading the data"):
        data = load_images(settings.data, args)
    check_best(args.metric_for_best_model, args.model_ema, len(data.labels))
    assert data.train is not None
    if args.dataloader_drop_last and len(data.train) < args.global_batch_size:
        raise InputError(f"`dataloader_drop_last` leaves nothing of {len(data.train):,} images: fewer than a batch.")
    set_seed(args.seed)
    images = None
    if asked.karatize == "replace" and plan.checkpoint is None:
        images = calibration_images(data, asked.calibration_images, args.seed, processor).to(args.device)
    model = build_model(asked, data.labels, images)
    if plan.checkpoint:  # Before the raw weights are loaded: the same model, the same classes.
        config = load_config(plan.checkpoint, "resume_from_checkpoint")
        check_labels(config, data.labels, plan.checkpoint)
        check_same_model(model.config, config, plan.checkpoint)
        if settings.data.streaming:
            logger.info("What was seen of the epoch is read again, without decoding it, before training goes on.")
    if theirs is not None and not serves(theirs, settings.data, size):
        logger.info(f"Images  prepared by this run's settings, and not in every way as for {asked.weights}")
    start = sum_of_weights(model)

    def begin() -> None:
        """Write what says whose the folder is."""
        if args.should_save:
            run_folder.write_record(request, identity=plan.identity, start=start)
            with checkpoints.writing("The image processor", request.folder, run_folder.ELSEWHERE):
                processor.save_pretrained(request.folder)

    resumed = plan.checkpoint is not None and not plan.anew and run_folder.read_record(request.folder) is not None
    if not resumed:
        begin()
    if args.should_save:
        trackers.choose_run(args, anew=plan.anew)
    trainer = build_trainer(settings.data, args, model, data, processor, asked.teacher_attention)
    trainer.checkpointer.identity = plan.identity
    if resumed:
        # What is recorded of this folder's run stays until the checkpoint is loaded, which may be refused.
        trainer.checkpointer.when_loaded = begin
    pushed = f"{destination.repository.url}, pushed {PUSHED[args.hub_strategy]}" if destination is not None else None
    logger.info(opening(asked, args, data, describe_model(model), pushed))
    rates = args.describe_learning_rate()
    card = RunCard(request.folder, settings.record, rates, settings.reported, model, data)
    again = recipe(settings.record, args, settings.reported)
    with contextlib.ExitStack() as stack:
        publisher = None
        if destination is not None and args.process_index == 0:
            publisher = stack.enter_context(Publisher(destination, args, again, card.text))
            trainer.add_callback(publisher)
        finished = _finish(trainer, request, plan.checkpoint, card, again)
        if destination is not None:
            _leave()  # The others need not wait.
        if publisher is not None:
            publisher.finish()
    return finished


def _finish(
    trainer: ImageClassificationTrainer, request: run_folder.Request, checkpoint: str | None, card: RunCard, again: str
) -> dict[str, float]:
    """Train to the end, evaluate, write the model and the reports, and say what came out; return the metrics."""
    folder = request.folder
    result = trainer.train(resume_from_checkpoint=checkpoint)
    weights, metrics = trainer.keep_better_weights(trainer.evaluate())
    with checkpoints.writing("The trained model", folder, f"{checkpoints.MEND}: it writes it."):
        trainer.save_model()
    if weights is not None:
        logger.info(describe_choice(weights, metrics))
    if trainer.args.should_save:
        figures = {name: value for name, value in (result.metrics | metrics).items() if name != "total_flos"}
        with checkpoints.writing("The reports", folder, f"{checkpoints.MEND}: it writes them."):
            text = card.text(figures, weights)
            write_reports(folder, card.data, trainer.state.log_history, figures, text, again)
            finished = {"metrics": metrics, "eval_images": len(card.data.validation), "weights": weights}
            if teacher := request.settings["teacher_attention"]:
                finished["teacher"] = teacher
            run_folder.write_record(request, finished)
        logger.info(f"\n{cost(result.metrics)}\n{summary(folder, finished)}")
    return metrics
