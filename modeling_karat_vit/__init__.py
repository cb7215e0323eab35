# SPDX-License-Identifier: Apache-2.0
"""
Kolmogorov-Arnold Attention (KArAt, arXiv 2503.10632) for Transformers' Vision Transformer.

Importing this package registers the model with Transformers' auto classes.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
)

# Under its top-level name, the lowest supported Transformers demands torchvision of it.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_torchvision_available

from .configuration_karat_vit import KArAtViTConfig
from .conversion import convert_timm_state_dict
from .image_processing_karat_vit import KArAtViTImageProcessor, KArAtViTImageProcessorPil
from .karatize import MODELS as KARATIZED_MODELS
from .karatize import karatize
from .modeling_karat_vit import (
    KArAtViTBackbone,
    KArAtViTForImageClassification,
    KArAtViTForMaskedImageModeling,
    KArAtViTModel,
    KArAtViTPreTrainedModel,
)


AutoConfig.register(KArAtViTConfig.model_type, KArAtViTConfig, exist_ok=True)
AutoModel.register(KArAtViTConfig, KArAtViTModel, exist_ok=True)
AutoModelForImageClassification.register(KArAtViTConfig, KArAtViTForImageClassification, exist_ok=True)
AutoModelForMaskedImageModeling.register(KArAtViTConfig, KArAtViTForMaskedImageModeling, exist_ok=True)
AutoBackbone.register(KArAtViTConfig, KArAtViTBackbone, exist_ok=True)
_processors: dict[str, type] = {"pil": KArAtViTImageProcessorPil}
if is_torchvision_available():
    _processors["torchvision"] = KArAtViTImageProcessor
AutoImageProcessor.register(KArAtViTConfig, image_processor_classes=_processors, exist_ok=True)

_auto_classes = {auto.__name__: auto for auto in (AutoBackbone, AutoModel, AutoModelForImageClassification)}
# Backwards: of two models with one auto class, the first is what it makes.
for _model in reversed(KARATIZED_MODELS):
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    _auto_classes[_model.auto_name].register(_model.config_class, _model, exist_ok=True)

__all__ = [
    "KArAtViTBackbone",
    "KArAtViTConfig",
    "KArAtViTForImageClassification",
    "KArAtViTForMaskedImageModeling",
    "KArAtViTImageProcessor",
    "KArAtViTImageProcessorPil",
    "KArAtViTModel",
    "KArAtViTPreTrainedModel",
    "convert_timm_state_dict",
    "karatize",
]
