# SPDX-License-Identifier: Apache-2.0
"""A checkpoint evaluated, without any training."""

import contextlib
import logging
import tempfile
from pathlib import Path

from .data.sources import as_classes_of
from .data.transforms import build_image_processor
from .errors import InputError
from .models import transfer
from .models.building import describe_model, load_trained
from .models.families import fixed_image_size, image_size
from .models.loading import find_file, load_config, load_image_processor
from .pipeline import load_images
from .reports.console import describe
from .reports.curves import write_json
from .reports.summary import opening
from .runs import checkpoints
from .settings.arguments import Settings
from .training import ema
from .training.building import build_trainer


logger = logging.getLogger(__name__)


def evaluate(settings: Settings) -> dict[str, float]:
    """Evaluate the checkpoint that the settings name, on their data; keep figures where an `output_dir` is named."""
    args, teacher = settings.training, settings.model.teacher_attention
    if (checkpoint := args.resume_from_checkpoint or settings.model.finetune) is None:
        raise InputError("Evaluating needs a checkpoint: give --resume_from_checkpoint (--resume) with its folder.")
    if Path(checkpoint).is_dir() and not (Path(checkpoint) / "config.json").is_file():
        # A run that was stopped has weights in its checkpoints only.
        checkpoint = str(checkpoints.newest(Path(checkpoint))[0] or checkpoint)
    target = None if settings.record["output_dir"] is None else Path(args.output_dir) / "eval_results.json"
    if target is not None and target.exists():
        raise InputError(f"{target} holds the figures of another evaluation. Choose another --output_dir, or none.")
    config = load_config(checkpoint, "resume_from_checkpoint")
    transfer.check_evaluated(checkpoint, config, teacher)
    names = [config.id2label[index] for index in range(config.num_labels)]
    data = as_classes_of(load_images(settings.data, args, train=False), names)
    model = load_trained(checkpoint, settings.model, data.labels)
    if (processor := load_image_processor(checkpoint, "resume_from_checkpoint", fixed_image_size(config))) is None:
        logger.warning(
            f"{checkpoint} has no image processor (preprocessor_config.json): images are prepared as this command's "
            "settings say, which may not be how the model was trained."
        )
    asked = (settings.data.image_mean, settings.data.image_std, settings.data.eval_crop_ratio)
    if processor is None or any(value is not None for value in asked):
        processor = build_image_processor(settings.data, image_size(model.config, processor), processor)
    with contextlib.ExitStack() as stack:
        if target is None:
            # The Trainer insists on a folder; nothing is to be kept.
            args.output_dir = stack.enter_context(tempfile.TemporaryDirectory())
        trainer = build_trainer(settings.data, args, model, data, processor, teacher)
        logger.info(opening(settings.model, args, data, describe_model(model)))
        if Path(checkpoint).is_dir() and find_file(checkpoint, ema.FILE):
            trainer.make_average(checkpoint)
        metrics = trainer.evaluate()
        if target is not None and args.should_save:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_json(target, {"checkpoint": checkpoint, "data": data.name, **metrics})
    logger.info(f"{checkpoint} on {data.name}, {len(data.validation):,} images:   {describe(metrics)}")
    return metrics
