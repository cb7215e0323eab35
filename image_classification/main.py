# SPDX-License-Identifier: Apache-2.0
"""A run from the command line to the summary."""

import contextlib
import functools
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import AutoImageProcessor, PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from modeling_karat_vit.configuration_karat_vit import height_and_width

from .data.sources import ImageData, as_classes_of, load_data
from .data.transforms import build_image_processor
from .errors import InputError, run_command
from .hub import find_token
from .models import transfer
from .models.building import (
    build_config,
    build_model,
    check_labels,
    check_same_model,
    describe_model,
    load_trained,
    sum_of_weights,
)
from .models.loading import find_file, load_config, load_image_processor
from .pipeline import build_pipeline
from .publishing.destination import Destination, prepare
from .publishing.publisher import PUSHED, Publisher
from .reports import trackers
from .reports.card import CARD, model_card
from .reports.console import EpochLines, describe, set_up_logging
from .reports.curves import CURVES, HISTORY, draw_curves, history, write_json
from .reports.recipe import RECIPE, recipe
from .reports.summary import RESULTS, SAMPLE, describe_choice, describe_reported, save_sample, summary
from .runs import checkpoints, run_folder
from .runs.signals import Stopped, same_command, without_token
from .settings.arguments import RunArguments, Settings, cores_to_use
from .settings.parser import parse_settings
from .training import ema
from .training.metrics import ComputeMetrics, check_best, preprocess
from .training.parallel import on_main_process
from .training.trainer import ImageClassificationTrainer


logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """
    Run the script.

    Args:
        argv: the words after the script's name; default the process's.

    Returns:
        The exit status: 0, or 2 where the input cannot be used or the disk is full, 1 after a failure that nobody
        foresaw, 130 after Ctrl-C and 143 after SIGTERM.
    """
    words = sys.argv[1:] if argv is None else argv
    return run_command("run_image_classification.py", lambda: _main(argv), debug="--debug" in words)


def _main(argv: list[str] | None) -> int:
    settings = None
    try:
        settings = parse_settings(sys.argv[1:] if argv is None else argv)
        if argv is None:
            sys.argv = without_token(sys.argv)  # Trackers keep the command line.
        with run_folder.FolderLock() as lock:
            run(settings, lock)
    except Stopped as stopped:
        if settings.training.process_index == 0:
            command = f":\n  {same_command()}" if argv is None else "."
            print(
                f"\n{stopped}. The same command goes on from {stopped.checkpoint}{command}",
                file=sys.stderr,
            )
        _leave()
        return stopped.exit_status
    except KeyboardInterrupt:
        # Outside of the training loop, where there is nothing to save.
        folder = Path(settings.training.output_dir) if settings and settings.training.do_train else None
        steps = checkpoints.checkpoints(folder) if folder else {}
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
    Train, or only evaluate, what the settings describe.

    Args:
        settings: what to do.
        lock: taken on the output folder, in the main process.

    Returns:
        The metrics of the last evaluation (`eval_loss`, `eval_accuracy`, ...).

    Raises:
        InputError: anything that a user can mend.
        Stopped: by a signal.
    """
    args = settings.training
    _set_up(settings)
    transfer.check_settings(settings.model, args)
    if not args.do_train:
        if args.push_to_hub:
            raise InputError(
                "`push_to_hub` pushes what a run trained, and this one only evaluates. For a finished run, give the "
                "command that trained it with --push_to_hub; for any other folder, `hf upload USER/NAME FOLDER .`."
            )
        return _evaluate_only(settings)
    if args.output_dir == "trainer_output" and settings.record["output_dir"] is None:
        raise InputError("No output folder is named. Give --output_dir.")
    plan = on_main_process(lambda: (lock.take(args.output_dir), run_folder.plan(settings))[1])
    destination = on_main_process(lambda: _destination(settings, plan)) if args.push_to_hub else None
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
            run_folder.write_record(settings, plan.finished, plan.identity)
            with Publisher(destination, args) as publisher:
                publisher.finish()
        return plan.finished["metrics"]
    if settings.recipe:
        paper = describe_reported(settings.reported)
        logger.info(f"Recipe  {os.path.relpath(settings.recipe)}{f'; {paper}' if paper else ''}")
    if plan.message:
        logger.info(plan.message)
    return _train(settings, plan, destination)


def _destination(settings: Settings, plan: run_folder.Plan) -> Destination:
    """Where to push; whatever stands against it is said now."""
    args = settings.training
    destination = Destination(
        name=args.hub_model_id or Path(args.output_dir).resolve().name,
        run=plan.identity,
        token=find_token(args.hub_token),
        revision=args.hub_revision,
        private=args.hub_private_repo,
        overwrite=args.hub_overwrite,
    )
    if warning := prepare(destination):
        logger.warning(warning)
    return destination


def _set_up(settings: Settings) -> None:
    args = settings.training
    set_up_logging(args.process_index == 0)
    # Our lines say what matters; the libraries' informational ones and bars do not.
    if args.log_level == "passive":
        transformers.logging.set_verbosity_error()
    else:
        transformers.logging.set_verbosity(args.get_process_log_level())
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    if args.process_index != 0:
        datasets.disable_progress_bars()
    if args.cpu_threads is not None:
        torch.set_num_threads(args.cpu_threads)
    cores, workers = cores_to_use(), args.dataloader_num_workers
    if workers > cores:
        logger.warning(
            f"{workers} data workers (`dataloader_num_workers`) share {cores} CPU cores: fewer may be faster."
        )
        # PyTorch would say it at every epoch.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    given = settings.record
    if not args.push_to_hub:
        for name in (name for name in given if name.startswith("hub_")):
            if given[name] != getattr(RunArguments, name, None):
                logger.warning(f"`{name}` has no effect without `push_to_hub`.")
    if args.run_name is None:
        for name in ("report_to", "run_id"):
            if given[name] not in (None, ["none"]):
                logger.warning(f"`{name}` has no effect: nothing is reported without a `run_name`.")
    elif not args.report_to:
        logger.warning(
            "`run_name` has no effect: `report_to` is none, or no tracker (wandb, tensorboard) is installed."
        )


def _train(settings: Settings, plan: run_folder.Plan, destination: Destination | None) -> dict[str, float]:
    args, folder = settings.training, Path(settings.training.output_dir)
    # Cheap, so a misspelt setting does not wait for the data.
    build_config(settings.model)
    check_best(args.metric_for_best_model, args.model_ema)
    finetuned = load_image_processor(settings.model.finetune, "finetune") if settings.model.finetune else None
    with args.main_process_first(desc="reading the data"):
        data = _load_data(settings)
    check_best(args.metric_for_best_model, args.model_ema, len(data.labels))
    if args.dataloader_drop_last and len(data.train) < args.global_batch_size:
        raise InputError(
            f"`dataloader_drop_last` leaves nothing to train on: {len(data.train):,} images are less than a batch of "
            f"{args.global_batch_size:,}."
        )
    set_seed(args.seed)
    model = build_model(settings.model, data.labels)
    if plan.checkpoint:
        _check_resumed(model, plan.checkpoint, data)
        if settings.data.streaming:
            logger.info("What was seen of the epoch is read again, without decoding it, before training goes on.")
    processor = build_image_processor(settings.data, model.config.image_size, finetuned, model.config.model_type)
    with tempfile.TemporaryDirectory() as place:
        # Evaluate with what is saved, so that the pipeline sees what the evaluation saw.
        processor.save_pretrained(place)
        processor = AutoImageProcessor.from_pretrained(place)
    begin = functools.partial(_begin, settings, plan, processor, sum_of_weights(model))
    resumed = plan.checkpoint is not None and not plan.anew and run_folder.read_record(folder) is not None
    if not resumed:
        begin()
    if args.should_save:
        trackers.choose_run(args, anew=plan.anew)
    trainer = build_trainer(settings, model, data, processor)
    trainer.checkpointer.identity = plan.identity
    if resumed:
        # What is recorded of this folder's run stays until the checkpoint is loaded, which may be refused.
        trainer.add_callback(_AtBeginning(begin))
    _describe(settings, model, data, trainer, destination)
    with contextlib.ExitStack() as stack:
        publisher = None
        if destination is not None and args.process_index == 0:
            card = functools.partial(model_card, settings, model, data)
            publisher = stack.enter_context(Publisher(destination, args, recipe(settings), card))
            trainer.add_callback(publisher)
        metrics = _train_and_report(settings, plan, data, trainer)
        if destination is not None:
            _leave()  # The others need not wait.
        if publisher is not None:
            publisher.finish()
    return metrics


def _begin(settings: Settings, plan: run_folder.Plan, processor, start: float) -> None:
    """Write what says whose the folder is."""
    args = settings.training
    if args.should_save:
        run_folder.write_record(settings, identity=plan.identity, start=start)
        with checkpoints.writing("The image processor", Path(args.output_dir), run_folder.ELSEWHERE):
            processor.save_pretrained(args.output_dir)


class _AtBeginning(TrainerCallback):
    """Do something when training begins, and its checkpoint is loaded."""

    def __init__(self, action: Callable[[], None]):
        self.action = action

    def on_train_begin(self, args, state, control, **kwargs):
        self.action()


def _train_and_report(
    settings: Settings, plan: run_folder.Plan, data: ImageData, trainer: ImageClassificationTrainer
) -> dict[str, float]:
    args, folder = settings.training, Path(settings.training.output_dir)
    result = trainer.train(resume_from_checkpoint=plan.checkpoint)
    weights, metrics = trainer.keep_better_weights(trainer.evaluate())
    with checkpoints.writing("The trained model", folder, f"{checkpoints.MEND}: it writes it."):
        trainer.save_model()
    if weights is not None:
        logger.info(describe_choice(weights, metrics))
    if args.should_save:
        with checkpoints.writing("The reports", folder, f"{checkpoints.MEND}: it writes them."):
            finished = _write_reports(settings, trainer, data, result.metrics, metrics, weights)
            run_folder.write_record(settings, finished)
        logger.info(f"\n{_cost(result.metrics)}.\n{summary(folder, finished)}")
    return metrics


def _cost(metrics: dict[str, float]) -> str:
    """Time, rate and memory of training, as one sentence."""
    words = [f"Trained in {_duration(metrics['train_runtime'])}"]
    if rate := metrics.get("train_images_per_second"):
        words.append(f"{rate:,.0f} images/s")
    if peak := metrics.get("train_peak_memory_gib"):
        words.append(f"at most {peak:.2f} GiB of memory")
    return ", ".join(words)


def _evaluate_only(settings: Settings) -> dict[str, float]:
    args = settings.training
    checkpoint = args.resume_from_checkpoint or settings.model.finetune
    if checkpoint is None:
        raise InputError(
            "Only evaluating needs a checkpoint: give --resume_from_checkpoint (--resume) with its folder."
        )
    if Path(checkpoint).is_dir() and not (Path(checkpoint) / "config.json").is_file():
        # A run that was stopped has weights in its checkpoints only.
        checkpoint = str(checkpoints.newest(Path(checkpoint))[0] or checkpoint)
    target = None if settings.record["output_dir"] is None else Path(args.output_dir) / "eval_results.json"
    if target is not None and target.exists():
        raise InputError(f"{target} holds the figures of another evaluation. Choose another --output_dir, or none.")
    config = load_config(checkpoint, "resume_from_checkpoint")
    transfer.check_evaluated(checkpoint, config, settings.model.teacher_attention)
    data = as_classes_of(_load_data(settings, train=False), config.label2id)
    model = load_trained(checkpoint, settings.model, data.labels)
    saved = load_image_processor(checkpoint, "resume_from_checkpoint", config.image_size)
    changed = [
        name for name in ("image_mean", "image_std", "eval_crop_ratio") if getattr(settings.data, name) is not None
    ]
    processor = saved
    if saved is None:
        logger.warning(
            f"{checkpoint} has no image processor (preprocessor_config.json): images are prepared as this command's "
            "settings say, which may not be how the model was trained."
        )
    if saved is None or changed:
        processor = build_image_processor(settings.data, model.config.image_size, saved)
    with contextlib.ExitStack() as stack:
        if target is None:
            # The Trainer insists on a folder; nothing is to be kept.
            args.output_dir = stack.enter_context(tempfile.TemporaryDirectory())
        trainer = build_trainer(settings, model, data, processor)
        _describe(settings, model, data, trainer)
        if Path(checkpoint).is_dir() and find_file(checkpoint, ema.FILE):
            trainer.make_average(checkpoint)
        metrics = trainer.evaluate()
        if target is not None and args.should_save:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_json(target, {"checkpoint": checkpoint, "data": data.name, **metrics})
    logger.info(f"{checkpoint} on {data.name}, {len(data.validation):,} images:   {describe(metrics)}")
    return metrics


def _load_data(settings: Settings, train: bool = True) -> ImageData:
    run = settings.training
    images = run.max_steps * run.global_batch_size if run.max_steps > 0 else None
    return load_data(settings.data, run.seed, train, images, run.world_size)


def build_trainer(
    settings: Settings, model: PreTrainedModel, data: ImageData, processor, kind=ImageClassificationTrainer
) -> ImageClassificationTrainer:
    """The Trainer of a run, of the class `kind`; one that only evaluates where there are no training images."""
    run, teacher = settings.training, settings.model.teacher_attention
    pipeline = build_pipeline(settings.data, run, height_and_width(model.config.image_size), data, processor)
    if teacher is not None:
        dtype = torch.bfloat16 if run.bf16 else torch.float16 if run.fp16 else None
        loaded = transfer.load_teacher(teacher, model.config, processor, dtype)
        transfer.feed(model, loaded, transfer.short_name(teacher))
    trainer = kind(
        model=model,
        args=run,
        train_dataset=pipeline.train,
        eval_dataset=pipeline.held_out,
        processing_class=processor,
        compute_metrics=ComputeMetrics(len(data.labels)),
        preprocess_logits_for_metrics=preprocess,
    )
    trainer.augment = pipeline.augment
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    trackers.name_tensorboard_folder(trainer)
    trainer.add_callback(EpochLines())
    return trainer


def _check_resumed(model: PreTrainedModel, checkpoint: str, data: ImageData) -> None:
    """Before the raw weights are loaded: the same model, the same classes."""
    config = load_config(checkpoint, "resume_from_checkpoint")
    check_labels(config, data.labels, checkpoint)
    check_same_model(model.config, config, checkpoint)


def _describe(
    settings: Settings,
    model: PreTrainedModel,
    data: ImageData,
    trainer: ImageClassificationTrainer,
    destination: Destination | None = None,
) -> None:
    args = settings.training
    train = f"{len(data.train):,} training and " if data.train is not None else ""
    logger.info(f"Data    {data.name}: {train}{len(data.validation):,} held-out images, {len(data.labels)} classes")
    for note in data.notes:
        logger.info(f"        {note}")
    logger.info(f"Model   {settings.model.model or settings.model.finetune or 'checkpoint'}: {describe_model(model)}")
    teacher = settings.model.teacher_attention
    if teacher is not None:
        logger.info(f"Teacher {teacher}: its attention maps take the place of the model's; queries and keys are frozen")
    logger.info(f"Device  {args.device.type}, {args.world_size} process{'es' if args.world_size > 1 else ''}")
    if data.train is None:
        return
    logger.info(
        f"Rate    {args.describe_learning_rate()}; {args.optimizer_name}, batch {args.global_batch_size}, "
        f"{_epochs(args)}, weight decay {args.weight_decay:g}"
    )
    warmup = args.warmup_epochs or 0
    if args.max_steps < 0 and warmup >= args.num_train_epochs:
        logger.warning(
            f"The warm-up of {warmup:g} epochs does not end in a run of {args.num_train_epochs:g}: set --warmup_epochs."
        )
    logger.info(f"Output  {args.output_dir}")
    if destination is not None:
        logger.info(f"Hub     {destination.repository.url}, pushed {PUSHED[args.hub_strategy]}")
    logger.info("")


def _epochs(args) -> str:
    return f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"


def _write_reports(settings, trainer, data, train_metrics, metrics, weights) -> dict[str, Any]:
    folder = Path(settings.training.output_dir)
    kept = {key: value for key, value in (train_metrics | metrics).items() if not key.startswith("total_flos")}
    rows = history(trainer.state.log_history)
    write_json(folder / RESULTS, kept)
    write_json(folder / HISTORY, rows)
    draw_curves(rows, folder / CURVES, f"{folder.resolve().name}: {data.name}")
    save_sample(data.validation, folder / SAMPLE)
    model = trainer.accelerator.unwrap_model(trainer.model)
    (folder / CARD).write_text(model_card(settings, model, data, kept, weights), encoding="utf-8")
    (folder / RECIPE).write_text(recipe(settings), encoding="utf-8")
    finished = {"metrics": metrics, "eval_images": len(data.validation), "weights": weights}
    return finished | ({"teacher": settings.model.teacher_attention} if settings.model.teacher_attention else {})


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.floor(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


# Workers of the data loader are processes of their own; tokenizers is not used, and its warning about forks misleads.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
