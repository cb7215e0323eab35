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
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.vitdet.modeling_vitdet import VitDetAttention, add_decomposed_relative_positions

from .basis import EdgeFunctions
from .configuration_karat_vit import checked_layers, height_and_width, patches_of
from .karat_heads import KARAT_IMPLEMENTATIONS, STARTS, KArAtHeads, OperatorConfig
from .karat_operator import KArAtOperator
from .modeling_karat_vit import KArAtMixin


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
        mixins: of its models.
    """

    attention: tuple[str, ...]
    prefix_tokens: Callable = lambda model, index: 1
    grid: Callable = _patch_grid
    image_size: Callable = lambda model: _vision(model.config).image_size
    lowest: float = -math.inf
    check: Callable = lambda config: None
    modules: Mapping[str, type] = field(default_factory=dict)
    mixins: tuple[type, ...] = ()


class KArAtBackbone(KArAtMixin):
    """
    Mixin of a pre-trained model class of Transformers: KArAt heads in the blocks that `config.karat` names.

    `config.karat` has `layers` (indices of the blocks), `heads` (the first so many are KArAt, `None`: all), `start`,
    `image_size`, and `operator`, the settings of `OPERATOR_FIELDS`.
    """

    family: Family
    auto_name: str
    karat_modules = KArAtHeads

    def post_init(self):
        self.family.check(self.config)
        self._install()
        super().post_init()

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
        for index in checked_layers("layers", karat["layers"], len(modules)):
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
        return (model, info) if output_loading_info else model


def attention_modules(model, family: Family) -> list[nn.Module]:
    """The attention modules of the encoder that call the attention interface, in order: the innermost of their name."""
    found = [
        module for module in model.modules() if any(kind.__name__ in family.attention for kind in type(module).__mro__)
    ]
    return [module for module in found if not any(child in found for child in module.children())]


def _nothing_hidden(config) -> None:
    if config.mask_ratio != 0:
        raise ValueError(
            f"`mask_ratio` is {config.mask_ratio}: an operator belongs to a fixed set of tokens, and ViT-MAE would "
            "hide other ones of each image. Set `model.config.mask_ratio = 0`."
        )


class _NaturalOrder(KArAtMixin):
    """What ViT-MAE's encoder does not have: every patch in natural order. It shuffles them even at a ratio of 0."""

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


_AUTO_NAMES = {
    "Model": "AutoModel",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForImageClassificationWithTeacher": "AutoModelForImageClassification",
    "Backbone": "AutoBackbone",
}


def _no_prefix(model, index: int) -> int:
    return 0


# By what the names of Transformers' classes begin with: the family, and what those of its models end in.
_CLIP = Family(("CLIPAttention",))
_SIGLIP = Family(("SiglipAttention",), prefix_tokens=_no_prefix)
_BOTH = ("Model", "ForImageClassification")
_FAMILIES = {
    "ViT": (Family(("ViTAttention",)), _BOTH),
    "DeiT": (
        Family(("DeiTAttention",), prefix_tokens=lambda model, index: 2),
        (*_BOTH, "ForImageClassificationWithTeacher"),
    ),
    "Dinov2": (Family(("Dinov2Attention", "Dinov2SelfAttention")), _BOTH),
    "Dinov2WithRegisters": (
        Family(
            ("Dinov2WithRegistersAttention", "Dinov2WithRegistersSelfAttention"),
            prefix_tokens=lambda model, index: 1 + model.config.num_register_tokens,
        ),
        _BOTH,
    ),
    "ViTMAE": (Family(("ViTMAEAttention",), check=_nothing_hidden, mixins=(_NaturalOrder,)), ("Model",)),
    "Beit": (Family(("BeitAttention",)), _BOTH),
    "CLIPVision": (_CLIP, ("Model",)),
    "CLIP": (_CLIP, ("ForImageClassification",)),
    "SiglipVision": (_SIGLIP, ("Model",)),
    "Siglip": (_SIGLIP, ("ForImageClassification",)),
    # Swin adds -100 to the scores of pairs from different windows, together with the bias.
    "Swin": (Family(("SwinAttention",), prefix_tokens=_no_prefix, grid=_swin_window, lowest=-50.0), _BOTH),
    "VitDet": (
        Family(
            ("VitDetAttention",),
            prefix_tokens=_no_prefix,
            grid=_vitdet_window,
            modules={"VitDetAttention": KArAtVitDetAttention},
        ),
        ("Model", "Backbone"),
    ),
}


def _make(name: str, family: Family, kinds: tuple[str, ...]) -> list[type]:
    """Make the configuration and the models of a family, which become names of this module; returns the models."""
    parent_config: Any = getattr(transformers, f"{name}Config")
    # `karat_vit` is KArAt-ViT itself, which has no residual start.
    ours = "PlainViT" if name == "ViT" else name

    @strict
    class Config(parent_config):
        __doc__ = (
            f"`{name}Config`, and `karat`, the settings of its KArAt heads (for a dual encoder, of the vision tower)."
        )
        model_type = "karat_plain_vit" if name == "ViT" else f"karat_{parent_config.model_type}"
        karat: dict | None = None

    Config.__name__ = Config.__qualname__ = f"KArAt{ours}Config"
    same = {"__module__": __name__, "config_class": Config, "family": family}
    models = []
    for kind in kinds:
        bases = (*family.mixins, KArAtBackbone, getattr(transformers, name + kind))
        models.append(type(f"KArAt{ours}{kind}", bases, {**same, "auto_name": _AUTO_NAMES[kind]}))
    globals().update({made.__name__: made for made in (Config, *models)})
    return models


MODELS = register(*(model for name, row in _FAMILIES.items() for model in _make(name, *row)))
