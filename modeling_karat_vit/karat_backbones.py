# SPDX-License-Identifier: Apache-2.0
"""
Vision models of Transformers with KArAt heads: a configuration and its models per family, each with a `model_type` of
its own. (Under the family's own, a checkpoint would load as plain softmax and lose its KArAt weights with a warning.)

`karatize` makes them. A class here is its parent's code with `KArAtBackbone`, which puts the heads in once the parent
has made its modules; what a family has of its own is its `Family`.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    BeitConfig,
    CLIPConfig,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    SiglipConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
    VitDetConfig,
    ViTMAEConfig,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.beit.modeling_beit import BeitForImageClassification, BeitModel
from transformers.models.clip.modeling_clip import CLIPForImageClassification, CLIPVisionModel
from transformers.models.deit.modeling_deit import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
)
from transformers.models.dinov2.modeling_dinov2 import Dinov2ForImageClassification, Dinov2Model
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
)
from transformers.models.siglip.modeling_siglip import SiglipForImageClassification, SiglipVisionModel
from transformers.models.swin.modeling_swin import SwinForImageClassification, SwinModel
from transformers.models.vit.modeling_vit import ViTForImageClassification, ViTModel
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEModel
from transformers.models.vitdet.modeling_vitdet import (
    VitDetAttention,
    VitDetBackbone,
    VitDetModel,
    add_decomposed_relative_positions,
)

from .basis import EdgeFunctions
from .configuration_karat_vit import height_and_width, patches_of
from .karat_heads import KARAT_IMPLEMENTATIONS, STARTS, KArAtHeads, OperatorConfig
from .karat_operator import KArAtOperator, freeze_untrained


# What a checkpoint of a karatized model has to bring. A classifier or pooler may be new.
_ENCODER = re.compile(r"(^|\.)(embeddings|layers?|blocks|encoder)\.|^timm_model\.(?!head\.)")


def _vision(config):
    """The configuration of the vision tower."""
    return getattr(config, "vision_config", config)


def _patch_grid(model, image_size, index: int) -> tuple[int, int]:
    """Patches of an image along (height, width); the same in each block."""
    return patches_of(image_size, _vision(model.config).patch_size)


def _swin_window(model, image_size, index: int) -> tuple[int, int]:
    """The window of block `index`, counted through the stages: Swin shrinks it to the smaller side of the stage."""
    config = model.config
    stage = next(stage for stage in range(len(config.depths)) if index < sum(config.depths[: stage + 1]))
    sides = [
        -(-side // patch) for side, patch in zip(height_and_width(image_size), height_and_width(config.patch_size))
    ]
    for _ in range(stage):
        sides = [-(-side // 2) for side in sides]
    window = min(config.window_size, *sides)
    return window, window


def _vitdet_window(model, image_size, index: int) -> tuple[int, int]:
    """The window of a block with windows, and all patches in the others."""
    config = model.config
    if config.window_size > 0 and index in config.window_block_indices:
        return config.window_size, config.window_size
    return _patch_grid(model, image_size, index)


class KArAtVitDetAttention(VitDetAttention):
    """VitDet's attention, which does not go through the attention interface, with KArAt heads."""

    @property
    def head_dim(self) -> int:
        return self.proj.in_features // self.num_heads

    def forward(self, hidden_state, output_attentions: bool = False):
        """
        Args:
            hidden_state: images or windows (B, rows, columns, hidden).
        """
        batch, height, width, _ = hidden_state.shape
        qkv = self.qkv(hidden_state).reshape(batch, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.contiguous().unbind(0)
        self.grid = (height, width)
        # The bias is added to the scores of KArAt heads; softmax heads add it their own way.
        bias = None
        if self.use_relative_position_embeddings:
            bias = self.biased(query, query.new_zeros(*query.shape[:3], height * width))
        way = "eager" if output_attentions else "sdpa"  # The fastest.
        output, maps = self.karat(self, query, key, value, bias, scaling=self.scale, implementation=way)
        output = self.proj(output.reshape(batch, height, width, -1))
        return (output, maps) if output_attentions else (output,)

    def biased(self, query, scores):
        """`scores`, (B, h, N, N), and the relative positions, which depend on the queries."""
        if not self.use_relative_position_embeddings:
            return scores
        size, shape = self.grid, scores.shape
        query, scores = query.flatten(0, 1), scores.flatten(0, 1)
        return add_decomposed_relative_positions(scores, query, self.rel_pos_h, self.rel_pos_w, size, size).view(shape)

    def softmax_heads(self, query, key, value, attention_mask, scaling, **kwargs):
        """Softmax as VitDet computes it: output (B, N, h, d) and maps."""
        heads = query.shape[:2]
        scores = (query.flatten(0, 1) * scaling) @ key.flatten(0, 1).transpose(-2, -1)
        maps = self.biased(query, scores.unflatten(0, heads)).softmax(dim=-1)
        output = maps.flatten(0, 1) @ value.flatten(0, 1)
        return output.unflatten(0, heads).transpose(1, 2), maps


@dataclass(frozen=True)
class Family:
    """
    What `KArAtBackbone` has to know of a family.

    Args:
        attention: names of the modules that call the attention interface (they differ between Transformers' versions).
        prefix_tokens: special tokens, by model and block.
        grid: patches that attend to each other, (rows, columns), by model, image size and block.
        image_size: of a model, pixels or [height, width].
        lowest: scores are masked by adding this or less.
        check: raises a `ValueError` for a configuration that cannot be supported.
        modules: what attention modules become, by their names, where they do not go through the attention interface.
    """

    attention: tuple[str, ...]
    prefix_tokens: Callable = lambda model, index: 1
    grid: Callable = _patch_grid
    image_size: Callable = lambda model: _vision(model.config).image_size
    lowest: float = -math.inf
    check: Callable = lambda config: None
    modules: Mapping[str, type] = field(default_factory=dict)


if TYPE_CHECKING:  # What it is mixed into.
    from transformers import PreTrainedModel as _Mixed
else:
    _Mixed = object


class KArAtBackbone(_Mixed):
    """
    Mixin of a pre-trained model class of Transformers: KArAt heads in the blocks that `config.karat` names.

    `config.karat` has `layers` (indices of the blocks), `heads` (the first so many are KArAt, `None`: all), `start`,
    `image_size`, and `operator`, the settings of `OPERATOR_FIELDS`.
    """

    family: Family
    auto_name: str
    auto_map: dict[str, str]
    # Trainer has to divide the loss by the accumulation steps itself: the losses take no `num_items_in_batch`.
    accepts_loss_kwargs = False

    def post_init(self):
        self.family.check(self.config)
        self._install()
        super().post_init()
        freeze_untrained(self)

    def _install(self) -> None:
        karat = self.config.karat
        if not karat:
            raise ValueError(
                f"A {type(self).__name__} needs `config.karat`, the settings of its KArAt heads: make it with "
                "`karatize(model, ...)`."
            )
        if karat["start"] not in STARTS:
            raise ValueError(f"`start` is {karat['start']!r}, expected one of {', '.join(map(repr, STARTS))}.")
        modules = attention_modules(self, self.family)
        for index in checked_layers(karat["layers"], len(modules)):
            attention: Any = modules[index]
            attention.__class__ = self.family.modules.get(type(attention).__name__, type(attention))
            heads = getattr(attention, "num_attention_heads", None) or attention.num_heads
            count = karat["heads"]
            if count is not None and count > heads:
                raise ValueError(f"`heads` is {count}, and block {index} has {heads} heads.")
            operator = OperatorConfig.of(
                heads,
                count,
                getattr(attention, "head_dim", None) or attention.attention_head_size,
                self.family.prefix_tokens(self, index),
                self.family.grid(self, karat["image_size"], index),
                karat["operator"],
            )
            attention.karat = KArAtHeads(operator, karat["start"], self.family.lowest)
            if self.family.modules:
                attention.karat.model_config = self.config
            else:
                attention.karat.put_into(attention)

    def initialize_weights(self):
        super().initialize_weights()
        # The models inside this one, which are Transformers' own, do not know these modules.
        for module in self.modules():
            if isinstance(module, (KArAtHeads, KArAtOperator, EdgeFunctions)):
                module.reset_parameters()

    def karat_parameter_names(self) -> set[str]:
        """Names of the parameters that KArAt adds to the model."""
        prefixes = tuple(f"{name}." for name, module in self.named_modules() if isinstance(module, KArAtHeads))
        return {name for name, _ in self.named_parameters() if name.startswith(prefixes)}

    def get_correct_attn_implementation(self, requested_attention, is_init_check: bool = False) -> str:
        """Transformers' names say how softmax heads are computed, `karat_*` how KArAt heads are (softmax by SDPA)."""
        if requested_attention in KARAT_IMPLEMENTATIONS:
            return requested_attention
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """
        Load a karatized checkpoint. Arguments are those of `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: a weight of the encoder is not in the checkpoint.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = sorted(name for name in info["missing_keys"] if _ENCODER.search(name))
        if missing:
            raise ValueError(
                f"The checkpoint lacks {len(missing)} weights of {cls.__name__}, the first of them {missing[0]!r}. "
                "`karatize` puts KArAt heads into a model that has none."
            )
        # Transformers makes every float parameter trainable again.
        freeze_untrained(model)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """
        As in Transformers, with two differences: parameters keep their present names, and `auto_map` names all auto
        classes of the family.
        """
        self.config.auto_map = self.auto_map
        return super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)


def attention_modules(model, family: Family) -> list[nn.Module]:
    """The attention modules of the encoder that call the attention interface, in order: the innermost of their name."""
    found = [
        module for module in model.modules() if any(kind.__name__ in family.attention for kind in type(module).__mro__)
    ]
    return [module for module in found if not any(child in found for child in module.children())]


def checked_layers(layers, count: int) -> list[int]:
    """Indices of blocks, negative ones counted from the end, as sorted natural numbers."""
    for layer in layers:
        if not isinstance(layer, int) or isinstance(layer, bool) or not -count <= layer < count:
            raise ValueError(f"`layers` names block {layer!r}, and the model has blocks 0 to {count - 1}.")
    chosen = sorted({layer % count for layer in layers})
    if not chosen or len(chosen) != len(list(layers)):
        raise ValueError(f"`layers` is {list(layers)}, expected blocks, each once.")
    return chosen


@strict
class KArAtPlainViTConfig(ViTConfig):
    """`ViTConfig`, and `karat`. (`karat_vit` is KArAt-ViT itself, which has no residual start.)"""

    model_type = "karat_plain_vit"
    karat: dict | None = None


@strict
class KArAtDeiTConfig(DeiTConfig):
    """`DeiTConfig`, and `karat`."""

    model_type = "karat_deit"
    karat: dict | None = None


@strict
class KArAtDinov2Config(Dinov2Config):
    """`Dinov2Config`, and `karat`."""

    model_type = "karat_dinov2"
    karat: dict | None = None


@strict
class KArAtDinov2WithRegistersConfig(Dinov2WithRegistersConfig):
    """`Dinov2WithRegistersConfig`, and `karat`."""

    model_type = "karat_dinov2_with_registers"
    karat: dict | None = None


@strict
class KArAtViTMAEConfig(ViTMAEConfig):
    """`ViTMAEConfig`, and `karat`."""

    model_type = "karat_vit_mae"
    karat: dict | None = None


@strict
class KArAtBeitConfig(BeitConfig):
    """`BeitConfig`, and `karat`."""

    model_type = "karat_beit"
    karat: dict | None = None


@strict
class KArAtCLIPVisionConfig(CLIPVisionConfig):
    """`CLIPVisionConfig`, and `karat`."""

    model_type = "karat_clip_vision_model"
    karat: dict | None = None


@strict
class KArAtCLIPConfig(CLIPConfig):
    """`CLIPConfig`, and `karat` of its vision tower."""

    model_type = "karat_clip"
    karat: dict | None = None


@strict
class KArAtSiglipVisionConfig(SiglipVisionConfig):
    """`SiglipVisionConfig`, and `karat`."""

    model_type = "karat_siglip_vision_model"
    karat: dict | None = None


@strict
class KArAtSiglipConfig(SiglipConfig):
    """`SiglipConfig`, and `karat` of its vision tower."""

    model_type = "karat_siglip"
    karat: dict | None = None


@strict
class KArAtSwinConfig(SwinConfig):
    """`SwinConfig`, and `karat`."""

    model_type = "karat_swin"
    karat: dict | None = None


@strict
class KArAtVitDetConfig(VitDetConfig):
    """`VitDetConfig`, and `karat`."""

    model_type = "karat_vitdet"
    karat: dict | None = None


def _nothing_hidden(config) -> None:
    if config.mask_ratio != 0:
        raise ValueError(
            f"`mask_ratio` is {config.mask_ratio}: an operator belongs to a fixed set of tokens, and ViT-MAE would "
            "hide other ones of each image. Set `model.config.mask_ratio = 0`."
        )


_VIT = Family(("ViTAttention",))
_DEIT = Family(("DeiTAttention",), prefix_tokens=lambda model, index: 2)
_DINOV2 = Family(("Dinov2Attention", "Dinov2SelfAttention"))
_REGISTERS = Family(
    ("Dinov2WithRegistersAttention", "Dinov2WithRegistersSelfAttention"),
    prefix_tokens=lambda model, index: 1 + model.config.num_register_tokens,
)
_VIT_MAE = Family(("ViTMAEAttention",), check=_nothing_hidden)
_BEIT = Family(("BeitAttention",))
_CLIP = Family(("CLIPAttention",))
_SIGLIP = Family(("SiglipAttention",), prefix_tokens=lambda model, index: 0)
# Swin adds -100 to the scores of pairs from different windows, together with the bias.
_SWIN = Family(("SwinAttention",), prefix_tokens=lambda model, index: 0, grid=_swin_window, lowest=-50.0)

_VITDET = Family(
    ("VitDetAttention",),
    prefix_tokens=lambda model, index: 0,
    grid=_vitdet_window,
    modules={"VitDetAttention": KArAtVitDetAttention},
)


class KArAtPlainViTModel(KArAtBackbone, ViTModel):
    config_class, family, auto_name = KArAtPlainViTConfig, _VIT, "AutoModel"


class KArAtPlainViTForImageClassification(KArAtBackbone, ViTForImageClassification):
    config_class, family, auto_name = KArAtPlainViTConfig, _VIT, "AutoModelForImageClassification"


class KArAtDeiTModel(KArAtBackbone, DeiTModel):
    config_class, family, auto_name = KArAtDeiTConfig, _DEIT, "AutoModel"


class KArAtDeiTForImageClassification(KArAtBackbone, DeiTForImageClassification):
    config_class, family, auto_name = KArAtDeiTConfig, _DEIT, "AutoModelForImageClassification"


class KArAtDeiTForImageClassificationWithTeacher(KArAtBackbone, DeiTForImageClassificationWithTeacher):
    config_class, family, auto_name = KArAtDeiTConfig, _DEIT, "AutoModelForImageClassification"


class KArAtDinov2Model(KArAtBackbone, Dinov2Model):
    config_class, family, auto_name = KArAtDinov2Config, _DINOV2, "AutoModel"


class KArAtDinov2ForImageClassification(KArAtBackbone, Dinov2ForImageClassification):
    config_class, family, auto_name = KArAtDinov2Config, _DINOV2, "AutoModelForImageClassification"


class KArAtDinov2WithRegistersModel(KArAtBackbone, Dinov2WithRegistersModel):
    config_class, family, auto_name = KArAtDinov2WithRegistersConfig, _REGISTERS, "AutoModel"


class KArAtDinov2WithRegistersForImageClassification(KArAtBackbone, Dinov2WithRegistersForImageClassification):
    config_class, family, auto_name = KArAtDinov2WithRegistersConfig, _REGISTERS, "AutoModelForImageClassification"


class KArAtViTMAEModel(KArAtBackbone, ViTMAEModel):
    """ViT-MAE's encoder, with every patch and in natural order: ViT-MAE itself shuffles them even at a ratio of 0."""

    config_class, family, auto_name = KArAtViTMAEConfig, _VIT_MAE, "AutoModel"

    def forward(self, pixel_values=None, noise=None, **kwargs):
        """
        Args:
            pixel_values: images (B, C, H, W).
            noise: order of the patches, (B, patches), ascending; `None`: natural.
        """
        if noise is None:
            patches = math.prod(_patch_grid(self, pixel_values.shape[2:], 0))
            noise = torch.arange(patches, device=pixel_values.device).expand(len(pixel_values), -1)
        elif not (noise.diff(dim=-1) > 0).all():
            raise ValueError(
                "`noise` would shuffle the patches, and KArAt heads know them by their place: leave it out."
            )
        return super().forward(pixel_values, noise=noise, **kwargs)


class KArAtBeitModel(KArAtBackbone, BeitModel):
    config_class, family, auto_name = KArAtBeitConfig, _BEIT, "AutoModel"


class KArAtBeitForImageClassification(KArAtBackbone, BeitForImageClassification):
    config_class, family, auto_name = KArAtBeitConfig, _BEIT, "AutoModelForImageClassification"


class KArAtCLIPVisionModel(KArAtBackbone, CLIPVisionModel):
    config_class, family, auto_name = KArAtCLIPVisionConfig, _CLIP, "AutoModel"


class KArAtCLIPForImageClassification(KArAtBackbone, CLIPForImageClassification):
    config_class, family, auto_name = KArAtCLIPConfig, _CLIP, "AutoModelForImageClassification"


class KArAtSiglipVisionModel(KArAtBackbone, SiglipVisionModel):
    config_class, family, auto_name = KArAtSiglipVisionConfig, _SIGLIP, "AutoModel"


class KArAtSiglipForImageClassification(KArAtBackbone, SiglipForImageClassification):
    config_class, family, auto_name = KArAtSiglipConfig, _SIGLIP, "AutoModelForImageClassification"


class KArAtSwinModel(KArAtBackbone, SwinModel):
    config_class, family, auto_name = KArAtSwinConfig, _SWIN, "AutoModel"


class KArAtSwinForImageClassification(KArAtBackbone, SwinForImageClassification):
    config_class, family, auto_name = KArAtSwinConfig, _SWIN, "AutoModelForImageClassification"


class KArAtVitDetModel(KArAtBackbone, VitDetModel):
    config_class, family, auto_name = KArAtVitDetConfig, _VITDET, "AutoModel"


class KArAtVitDetBackbone(KArAtBackbone, VitDetBackbone):
    config_class, family, auto_name = KArAtVitDetConfig, _VITDET, "AutoBackbone"


def parent(cls) -> Any:
    """Transformers' class of a model or configuration of this module."""
    return cls.__bases__[-1]


def register(*models) -> tuple:
    """
    Register the models of a file, of all families in it, for remote code. Of two models with one configuration and one
    auto class, the first is what the auto class makes, unless the other was saved.
    """
    for model in models:
        config, file = model.config_class, model.__module__.rpartition(".")[2]
        same = [other for other in reversed(models) if other.config_class is config]
        names = {"AutoConfig": config.__name__} | {other.auto_name: other.__name__ for other in (*same, model)}
        model.auto_map = {auto: f"{file}.{name}" for auto, name in names.items()}
        model.register_for_auto_class(model.auto_name)
        config.register_for_auto_class()
        # Renamings of weights are looked up by class or by model type, and do not reach subclasses.
        for ours, theirs in (
            (model.__name__, parent(model).__name__),
            (config.model_type, parent(config).model_type),
        ):
            if (mapping := get_checkpoint_conversion_mapping(theirs)) is not None:
                register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)
    return models


MODELS = register(
    KArAtPlainViTModel,
    KArAtPlainViTForImageClassification,
    KArAtDeiTModel,
    KArAtDeiTForImageClassification,
    KArAtDeiTForImageClassificationWithTeacher,
    KArAtDinov2Model,
    KArAtDinov2ForImageClassification,
    KArAtDinov2WithRegistersModel,
    KArAtDinov2WithRegistersForImageClassification,
    KArAtViTMAEModel,
    KArAtBeitModel,
    KArAtBeitForImageClassification,
    KArAtCLIPVisionModel,
    KArAtCLIPForImageClassification,
    KArAtSiglipVisionModel,
    KArAtSiglipForImageClassification,
    KArAtSwinModel,
    KArAtSwinForImageClassification,
    KArAtVitDetModel,
    KArAtVitDetBackbone,
)
