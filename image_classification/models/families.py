# SPDX-License-Identifier: Apache-2.0
"""
The classifiers that the scripts know: KArAt-ViT, Transformers' ViT, and the families of `karatize`, as they are and
with KArAt heads (docs/karatize.md).
"""

import re
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ViTForImageClassification

from modeling_karat_vit import KARATIZED_MODELS, KArAtViTForImageClassification
from modeling_karat_vit.configuration_karat_vit import height_and_width
from modeling_karat_vit.karat_backbones import attention_modules, parent
from modeling_karat_vit.karat_heads import KArAtHeads

from ..data.images import made_size


# KArAt-ViT and its softmax baseline.
OWN = ("karat_vit", "vit")
_CLASSES: dict[str, list[Any]] = {"karat_vit": [KArAtViTForImageClassification], "vit": [ViTForImageClassification]}
for _model in KARATIZED_MODELS:
    _theirs = parent(_model.config_class).model_type
    # The configuration of timm's models says nothing of their blocks, heads and images.
    if _model.auto_name == "AutoModelForImageClassification" and _theirs != "timm_wrapper":
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


def class_of(config: PreTrainedConfig) -> Any:
    """The class of the classifier of a known type: what its configuration names, or the first of its family."""
    classes = _CLASSES[config.model_type]
    return next((cls for cls in classes if cls.__name__ in (config.architectures or ())), classes[0])


def is_karatized(config: PreTrainedConfig) -> bool:
    """Whether it is of another model with KArAt heads in it."""
    return bool(getattr(config, "karat", None))


def vision(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the vision tower, where there is another one."""
    return getattr(config, "vision_config", config)


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
    return attention_modules(model, _family(model))


def prefix_tokens(model: PreTrainedModel) -> int:
    """How many special tokens come before the patches: [CLS], and what else the family has, or none."""
    return 1 if model.config.model_type in OWN else _family(model).prefix_tokens(model, 0)


def hidden_below(model: PreTrainedModel) -> float:
    """What is added to the scores of pairs that a model of another family hides from each other, or less."""
    return _family(model).lowest


def has_windows(config: PreTrainedConfig) -> bool:
    """Whether a token sees those of its window alone."""
    return config.model_type.endswith("swin")


def _family(model: PreTrainedModel) -> Any:
    return next(cls.family for cls in KARATIZED_MODELS if type(model) in (cls, parent(cls)))


def karat_heads(model: Any) -> list[tuple[int, KArAtHeads]]:
    """The KArAt heads of a karatized model, each with the number of its block."""
    found = [module for module in model.modules() if isinstance(module, KArAtHeads)]
    return list(zip(model.config.karat["layers"], found, strict=True))


def block_names(model: nn.Module) -> list[str]:
    """Names of the transformer blocks, first to last; of stages, those in them."""
    found = [name for name, _ in model.named_modules() if re.search(r"(^|\.)(layers?|blocks)\.\d+$", name)]
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
