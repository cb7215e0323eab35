# SPDX-License-Identifier: Apache-2.0
"""
The classifiers that the scripts know: KArAt-ViT, Transformers' ViT, and the families of `karatize`, as they are and
with KArAt heads (docs/karatize.md).
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ViTForImageClassification

from modeling_karat_vit import KARATIZED_MODELS, KArAtViTForImageClassification
from modeling_karat_vit.configuration_karat_vit import height_and_width
from modeling_karat_vit.karat_backbones import attention_modules, parent
from modeling_karat_vit.karat_heads import KArAtHeads

from ..data.images import made_size
from ..errors import reason_of
from . import convit


# KArAt-ViT and its softmax baseline.
OWN = ("karat_vit", "vit")
_CLASSES: dict[str, list[Any]] = {"karat_vit": [KArAtViTForImageClassification], "vit": [ViTForImageClassification]}
for _model in KARATIZED_MODELS:
    _theirs = parent(_model.config_class).model_type
    if _model.auto_name == "AutoModelForImageClassification":
        _CLASSES.setdefault(_model.config_class.model_type, []).append(_model)
        if _theirs not in OWN:
            _CLASSES.setdefault(_theirs, []).append(parent(_model))
# Pre-trained models that can be trained as they are, and be karatized.
BACKBONES = tuple(name for name in _CLASSES if not name.startswith("karat_"))
# Those that take images of any size without being asked to.
_ANY_SIZE = ("beit", "dinov2", "dinov2_with_registers")
KNOWN = f"expected one of {', '.join(_CLASSES)}"


def is_known(config: PreTrainedConfig) -> bool:
    """Whether there is a classifier of this type."""
    return config.model_type in _CLASSES


def why_not(config: PreTrainedConfig) -> str | None:
    """Why a model of a known type cannot be trained, looked at or karatized, in words: of timm's, most."""
    try:
        if config.model_type != "karat_vit":
            _family(class_of(config)).check(config)
        vision(config)
    except Exception as error:  # Whatever timm says of arguments.
        return reason_of(error)
    return None


def class_of(config: PreTrainedConfig) -> Any:
    """The class of the classifier of a known type: what its configuration names, or the first of its family."""
    classes = _CLASSES[config.model_type]
    return next((cls for cls in classes if cls.__name__ in (config.architectures or ())), classes[0])


def is_karatized(config: PreTrainedConfig) -> bool:
    """Whether it is of another model with KArAt heads in it."""
    return bool(getattr(config, "karat", None))


def vision(config: PreTrainedConfig) -> PreTrainedConfig:
    """What says of blocks, heads and images: the configuration (of the vision tower), or for timm's its model."""
    return convit.described(config) if is_timm(config) else getattr(config, "vision_config", config)


def is_timm(config: PreTrainedConfig) -> bool:
    """Whether timm makes the model, whose configuration is of timm's words."""
    return config.model_type in convit.TYPES


def name_of(config: PreTrainedConfig) -> str:
    """What a model's family is called."""
    return "convit" if is_timm(config) else config.model_type.removeprefix("karat_").removeprefix("plain_")


def fixed_image_size(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Height and width of a model's images; `None` where it takes those of any size."""
    if is_karatized(config):
        return height_and_width(config.karat["image_size"])
    return None if config.model_type in _ANY_SIZE else height_and_width(vision(config).image_size)


def image_size(config: PreTrainedConfig, processor=None) -> tuple[int, int]:
    """Height and width of a model's images, or where it takes any those that its image processor makes."""
    if (fixed := fixed_image_size(config)) is not None:
        return fixed
    made = None if processor is None else made_size(processor)
    return made or height_and_width(vision(config).image_size)


def attention_of_blocks(model: PreTrainedModel) -> list[Any]:
    """The attention modules of a model of another family than ViT, block by block."""
    return attention_modules(model, _family(type(model)))


def prefix_tokens(model: PreTrainedModel, block: int) -> int:
    """How many special tokens come before the patches in a block: [CLS], and what else the family has, or none."""
    return 1 if model.config.model_type in OWN else _family(type(model)).prefix_tokens(model, block)


def replaced_attention(model: PreTrainedModel) -> Mapping[str, type]:
    """What attention modules of another family become, by their names, where they do not call the interface."""
    return _family(type(model)).modules


def hidden_below(model: PreTrainedModel) -> float:
    """What is added to the scores of pairs that a model of another family hides from each other, or less."""
    return _family(type(model)).lowest


def has_windows(config: PreTrainedConfig) -> bool:
    """Whether a token sees those of its window alone."""
    return config.model_type.endswith("swin")


def _family(kind: type) -> Any:
    return next(cls.family for cls in KARATIZED_MODELS if kind in (cls, parent(cls)))


def karat_heads(model: Any) -> list[tuple[int, KArAtHeads]]:
    """The KArAt heads of a karatized model, each with the number of its block."""
    found = [module for module in model.modules() if isinstance(module, KArAtHeads)]
    return list(zip(model.config.karat["layers"], found, strict=True))


def block_names(model: nn.Module) -> list[str]:
    """Names of the transformer blocks, first to last; of stages, those in them."""
    found = [name for name, _ in model.named_modules() if re.search(r"(^|\.)(layers?|blocks)\.\d+$", name)]
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
