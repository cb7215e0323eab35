# SPDX-License-Identifier: Apache-2.0
"""The Trainer of a run, from its settings."""

import torch
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..data.sources import ImageData
from ..errors import InputError
from ..models import transfer
from ..models.families import image_size
from ..pipeline import build_pipeline
from ..reports import trackers
from ..reports.console import EpochLines
from ..settings.arguments import DataArguments, RunArguments
from .metrics import ComputeMetrics, preprocess
from .trainer import ImageClassificationTrainer


def build_trainer(
    args: DataArguments,
    run: RunArguments,
    model: PreTrainedModel,
    data: ImageData,
    processor: BaseImageProcessor,
    teacher: str | None = None,
    kind: type[ImageClassificationTrainer] = ImageClassificationTrainer,
) -> ImageClassificationTrainer:
    """
    Build the Trainer of a run, of which `kind`; one that only evaluates where there are no training images. The model
    is fed with the maps of `teacher`, if one is named; the processor is the evaluation's, and saved with the model.
    Raises `InputError` where a setting is none of this model's, or as `build_pipeline` does.
    """
    if run.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise InputError(f"`gradient_checkpointing` is nothing that a {type(model).__name__} can do. Leave it out.")
    pipeline = build_pipeline(args, run, image_size(model.config, processor), data, processor)
    if teacher is not None:
        dtype = torch.bfloat16 if run.bf16 else torch.float16 if run.fp16 else None
        loaded = transfer.load_teacher(teacher, model.config, processor, dtype)
        transfer.feed(model, loaded, transfer.short_name(teacher))
    run.label_names = ["labels"]  # Not every family's classifier takes them.
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
