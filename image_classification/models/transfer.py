# SPDX-License-Identifier: Apache-2.0
"""
Attention transfer: a softmax ViT that attends with the maps of a trained teacher, a KArAt-ViT say.

In every block and head the teacher's map of the same pixels takes the place of the student's own (attention copy, Li et
al. 2024, arXiv 2411.09702). The student's queries and keys are then of no use and are frozen; all else is trained. The
maps are computed as they are needed: augmentation makes every image a new one in each epoch, and mixup and CutMix in
each batch, so maps of before would be those of other pixels. What is trained works with its teacher only, which stays
outside of it: its configuration names the teacher, and whoever loads it in this project is told.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from modeling_karat_vit.configuration_karat_vit import height_and_width

from ..errors import InputError
from ..settings.arguments import ModelArguments, RunArguments
from .building import build_config
from .loading import load_config, load_image_processor, load_model


logger = logging.getLogger(__name__)

# The name under which Transformers knows `attend`, and the configuration's field that names the teacher.
TEACHER_MAPS, FIELD = "teacher_maps", "teacher_attention"


class AttentionTeacher:
    """
    A `ViTForImageClassification` or `KArAtViTForImageClassification` whose attention is copied. It is frozen, and in no
    state dictionary. Its normalisation from the student's is `x * scale + shift`, (3, 1, 1) each, or `None` where they
    are the same; its autocast that of the student, of a `dtype` or none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ):
        model.set_attn_implementation("eager")  # the one that has maps
        self.model = model.eval().requires_grad_(False)
        self.scale, self.shift, self.dtype = scale, shift, dtype

    @torch.no_grad()
    def maps(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The activated maps of each block, (B, heads, N, N), of pixels (B, 3, height, width) as the student's."""
        if self.model.device != pixels.device:
            self.model.to(pixels.device)
            self.scale, self.shift = (x if x is None else x.to(pixels.device) for x in (self.scale, self.shift))
        pixels = pixels.to(self.model.dtype)
        if self.scale is not None and self.shift is not None:
            pixels = pixels * self.scale.to(pixels.dtype) + self.shift.to(pixels.dtype)
        with torch.autocast(pixels.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            return self.model.vit(pixels, output_attentions=True).attentions


def check_settings(args: ModelArguments, run: RunArguments) -> None:
    """
    Say what can be said before anything is loaded but configurations: raise an `InputError` where there is no such
    teacher, it does not fit (`check_teacher`), or a setting does not go with one.
    """
    if (source := args.teacher_attention) is None:
        return
    if args.attn_implementation is not None:
        raise InputError(
            "`attn_implementation` says how attention is computed, and with `teacher_attention` the model computes "
            "none: its teacher does, by eager. Leave it out."
        )
    if run.torch_compile:
        raise InputError("`torch_compile` does not work with `teacher_attention`. Leave it out.")
    if args.model is not None or args.finetune is not None:
        check_teacher(source, load_config(source, FIELD), build_config(args))


def check_teacher(source: str, teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """Raise an `InputError` unless the maps of one model fit the other."""
    if teacher.model_type not in ("vit", "karat_vit"):
        raise InputError(f"`{FIELD}` {source} is of type {teacher.model_type!r}, expected 'karat_vit' or 'vit'.")
    if getattr(teacher, FIELD, None):
        raise InputError(f"`{FIELD}` {source} has a teacher of its own ({getattr(teacher, FIELD)}): name that one.")
    if student.model_type != "vit":
        raise InputError(
            "`teacher_attention` gives its maps to a softmax ViT (--model vit_tiny_patch16_224, ...), and this model "
            "has KArAt heads, whose functions would have no part in it."
        )
    facts = {
        "blocks": lambda config: config.num_hidden_layers,
        "heads": lambda config: config.num_attention_heads,
        "image size": lambda config: "{} x {}".format(*height_and_width(config.image_size)),
        "patch size": lambda config: "{} x {}".format(*height_and_width(config.patch_size)),
    }
    different = [f"{name} {of(teacher)}, not {of(student)}" for name, of in facts.items() if of(teacher) != of(student)]
    if different:
        raise InputError(
            f"The maps of `{FIELD}` {source} do not fit the model: it has {', '.join(different)}. Each block and head "
            "takes the map of its counterpart, of the same patches of the same pixels."
        )


def load_teacher(
    source: str, student: PreTrainedConfig, processor: BaseImageProcessor, dtype: torch.dtype | None = None
) -> AttentionTeacher:
    """
    The teacher in a checkpoint folder or of a Hub name, for a student with its image processor and the `dtype` of its
    autocast. Raises `InputError` as `check_teacher` and `load_model` do.
    """
    config = load_config(source, FIELD)
    check_teacher(source, config, student)
    model, _ = load_model(source, FIELD, encoder_suffices=True, attn_implementation="eager")
    if (theirs := load_image_processor(source, FIELD, config.image_size)) is None:
        logger.warning(f"{source}, the teacher, has no image processor: its images are normalised as the student's.")
        return AttentionTeacher(model, dtype=dtype)
    (mean, deviation), (own_mean, own_deviation) = _normalisation(theirs), _normalisation(processor)
    if torch.equal(mean, own_mean) and torch.equal(deviation, own_deviation):
        return AttentionTeacher(model, dtype=dtype)
    return AttentionTeacher(model, own_deviation / deviation, (own_mean - mean) / deviation, dtype)


def feed(student: PreTrainedModel, teacher: AttentionTeacher, name: str) -> None:
    """
    Let a `ViTForImageClassification` attend with its teacher's maps from now on, freeze its queries and keys, and have
    its configuration name the teacher.
    """
    attentions = [layer.attention for layer in student.vit.layers]
    for attention in attentions:
        attention.q_proj.requires_grad_(False)
        attention.k_proj.requires_grad_(False)

    def before(_, args, kwargs):
        pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        for attention, maps in zip(attentions, teacher.maps(pixels), strict=True):
            # Until the next batch: gradient checkpointing reads them again in the backward pass.
            attention.teacher_maps = maps

    student.register_forward_pre_hook(before, with_kwargs=True)
    student.set_attn_implementation(TEACHER_MAPS)
    setattr(student.config, FIELD, name)


def attend(module: Any, query, key, value, attention_mask, dropout: float = 0.0, **kwargs):
    """Transformers' attention function of a model that is fed: the teacher's maps times the values, (B, N, h, d)."""
    if attention_mask is not None:
        raise ValueError("A model that attends with its teacher's maps takes no mask: the teacher's maps have none.")
    maps = nn.functional.dropout(module.teacher_maps.to(value.dtype), p=dropout, training=module.training)
    return (maps @ value).transpose(1, 2).contiguous(), maps


def check_evaluated(checkpoint: str, config: PreTrainedConfig, source: str | None) -> None:
    """Raise an `InputError` where a checkpoint is to be evaluated without its teacher, or with one and has none."""
    needed = needs(config)
    if needed is not None and source is None:
        raise InputError(f"{checkpoint} needs its teacher, {needed}: say where that is with --teacher_attention.")
    if needed is None and source is not None:
        raise InputError(f"{checkpoint} was trained without a teacher: leave out `{FIELD}`.")
    if needed is not None and source is not None and short_name(source) != needed:
        logger.warning(f"{checkpoint} was trained with the maps of {needed}, and is evaluated with those of {source}.")


def short_name(source: str) -> str:
    """What a checkpoint calls its teacher: a Hub name, or a folder's own name without the way to it."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def needs(config: PreTrainedConfig) -> str | None:
    """The teacher without which a model's own attention is not what it was trained with; `None` if there is none."""
    return getattr(config, FIELD, None)


def _normalisation(processor: BaseImageProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation, (3, 1, 1) each."""
    both = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    mean, deviation = torch.tensor(both, dtype=torch.float32).view(2, 3, 1, 1)
    return mean, deviation


AttentionInterface.register(TEACHER_MAPS, attend)
