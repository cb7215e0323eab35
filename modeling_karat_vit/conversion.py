# SPDX-License-Identifier: Apache-2.0
"""Weights from other Vision Transformers: timm's state dictionaries, and Transformers' distilled DeiT."""

import copy
import re

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    ViTConfig,
    ViTForImageClassification,
)

from .configuration_karat_vit import height_and_width


_TIMM_RENAMINGS = (
    (r"^cls_token$", "vit.embeddings.cls_token"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.norm1\.", r"vit.layers.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"vit.layers.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"vit.layers.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.mlp\.(fc1|fc2)\.", r"vit.layers.\1.mlp.\2."),
    (r"^norm\.", "vit.layernorm."),
    (r"^head\.", "classifier."),
)
_TIMM_QKV = re.compile(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$")


def convert_timm_state_dict(
    state_dict: dict[str, torch.Tensor],
    num_attention_heads: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    layer_norm_eps: float = 1e-6,
    original: nn.Module | None = None,
) -> tuple[ViTConfig, dict[str, torch.Tensor]]:
    """
    Convert a timm `VisionTransformer` (a plain ViT with a [CLS] token, or the DeiT of the official KArAt code without
    KArAt) to Transformers' names, and check that the converted model gives the logits of the original.

    Args:
        state_dict: timm's, with keys like `blocks.0.attn.qkv.weight`.
        num_attention_heads: the state dictionary does not say; default hidden size / 64, as in all standard sizes.
        image_size: pixels, or (height, width); default the square that the position embeddings fit.
        layer_norm_eps: timm's default 1e-6.
        original: the timm model, to take the expected logits from. Only this finds out whether `num_attention_heads`,
            `layer_norm_eps` and the activation, which a state dictionary does not hold, are the original's. Default:
            timm's forward pass written out, with the same `num_attention_heads` and `layer_norm_eps`.

    Returns:
        The `ViTConfig`, and the state dictionary of a `ViTForImageClassification`. Load both with
        `KArAtViTForImageClassification.from_pretrained(None, config=KArAtViTConfig.from_dict(config.to_dict()),
        state_dict=state_dict)`.

    Raises:
        ValueError: a key is missing or of a part that ViT does not have, or the logits differ.
    """
    missing = [
        key
        for key in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "head.weight")
        if key not in state_dict
    ]
    if missing:
        raise ValueError(
            f"This is no state dictionary of a timm VisionTransformer with a classifier: no {', '.join(missing)}."
        )
    converted: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    for key, tensor in state_dict.items():
        if match := _TIMM_QKV.match(key):
            for name, part in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3)):
                converted[f"vit.layers.{match[1]}.attention.{name}.{match[2]}"] = part.clone()
            continue
        new_name = next((re.sub(old, new, key) for old, new in _TIMM_RENAMINGS if re.match(old, key)), None)
        if new_name is None:
            unknown.append(key)
        else:
            converted[new_name] = tensor.clone()
    if unknown:
        raise ValueError(
            f"Transformers' ViT has no place for {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}: only "
            "plain ViTs with a [CLS] token convert (no distillation or register tokens, layer scale, query norms)."
        )
    config = _timm_config(state_dict, num_attention_heads, image_size, layer_norm_eps)
    model = ViTForImageClassification(config)
    model.load_state_dict(converted)
    _check_logits(state_dict, model.double().eval(), config, original)
    return config, converted


def _timm_config(state_dict, num_attention_heads, image_size, layer_norm_eps) -> ViTConfig:
    hidden_size, num_channels, *patch_size = state_dict["patch_embed.proj.weight"].shape
    if num_attention_heads is None:
        if hidden_size % 64:
            raise ValueError(f"The hidden size {hidden_size} is no multiple of 64: give `num_attention_heads`.")
        num_attention_heads = hidden_size // 64
    if num_attention_heads < 1 or hidden_size % num_attention_heads:
        raise ValueError(
            f"The hidden size {hidden_size} is no multiple of `num_attention_heads={num_attention_heads}`."
        )
    patches = state_dict["pos_embed"].shape[1] - 1
    if image_size is None:
        side = round(patches**0.5)
        if side * side != patches:
            raise ValueError(f"The positions are {patches} patches, which is no square: give `image_size`.")
        image_size = (side * patch_size[0], side * patch_size[1])
    height, width = height_and_width(image_size)
    if (height // patch_size[0]) * (width // patch_size[1]) != patches:
        raise ValueError(
            f"`image_size` {height}x{width} has not the {patches} patches of {patch_size[0]}x{patch_size[1]} pixels "
            "that the position embeddings are for."
        )
    blocks = {int(match[1]) for key in state_dict if (match := _TIMM_QKV.match(key))}
    return ViTConfig(
        hidden_size=hidden_size,
        num_hidden_layers=len(blocks),
        num_attention_heads=num_attention_heads,
        intermediate_size=state_dict["blocks.0.mlp.fc1.weight"].shape[0],
        image_size=height if height == width else [height, width],
        patch_size=patch_size[0] if patch_size[0] == patch_size[1] else list(patch_size),
        num_channels=num_channels,
        qkv_bias="blocks.0.attn.qkv.bias" in state_dict,
        layer_norm_eps=layer_norm_eps,
        num_labels=state_dict["head.weight"].shape[0],
    )


@torch.no_grad()
def _check_logits(state_dict, model: ViTForImageClassification, config: ViTConfig, original: nn.Module | None) -> None:
    height, width = model.vit.embeddings.image_size
    pixels = torch.randn(1, config.num_channels, height, width, dtype=torch.float64)
    if original is None:
        expected = _timm_logits({key: value.double() for key, value in state_dict.items()}, pixels, config)
    else:
        expected = copy.deepcopy(original).cpu().double().eval()(pixels)
    actual = model(pixels).logits
    if not torch.allclose(actual, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item()):
        raise ValueError(
            "The converted model does not give the logits of the original (largest difference "
            f"{(actual - expected).abs().max().item():.3g}): the original is of another architecture, or "
            f"`num_attention_heads={config.num_attention_heads}` or `layer_norm_eps={config.layer_norm_eps}` is not "
            "the original's."
        )


def _timm_logits(weights: dict[str, torch.Tensor], pixels: torch.Tensor, config: ViTConfig) -> torch.Tensor:
    """timm's `VisionTransformer.forward` written out, so that the check needs no timm."""

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], config.layer_norm_eps)

    patch = weights["patch_embed.proj.weight"]
    x = F.conv2d(pixels, patch, weights.get("patch_embed.proj.bias"), stride=patch.shape[2:])
    x = torch.cat([weights["cls_token"], rearrange(x, "b c y x -> b (y x) c")], dim=1) + weights["pos_embed"]
    for index in range(config.num_hidden_layers):
        block = f"blocks.{index}"
        query, key, value = rearrange(
            linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv"),
            "b n (three h d) -> three b h n d",
            three=3,
            h=config.num_attention_heads,
        )
        maps = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        x = x + linear(rearrange(maps @ value, "b h n d -> b n (h d)"), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


def load_deit_state_dict(name_or_path, **hub_kwargs) -> dict[str, torch.Tensor]:
    """
    Load the weights of a distilled DeiT of Transformers without its distillation token, named as in a ViT classifier.

    `cls_classifier`, the head of the [CLS] token, becomes `classifier`; the head of the distillation token is dropped.

    Raises:
        ValueError: weights are missing.
    """
    config = AutoConfig.from_pretrained(name_or_path, **hub_kwargs)
    kinds = DeiTModel, DeiTForImageClassification, DeiTForImageClassificationWithTeacher
    classes = {kind.__name__: kind for kind in kinds}
    # The class that saved it reads either layout of the names and any sharding.
    architecture = (config.architectures or ["DeiTModel"])[0]
    model, info = classes.get(architecture, DeiTModel).from_pretrained(
        name_or_path, output_loading_info=True, **hub_kwargs
    )
    # What is new would be random; neither the pooler nor a head for distillation is taken over.
    absent = sorted(key for key in info["missing_keys"] if "pooler." not in key and "distillation" not in key)
    if absent:
        raise ValueError(f"{name_or_path} lacks weights of its DeiT: {', '.join(absent[:4])}.")
    converted = {}
    for key, tensor in model.state_dict().items():
        if "distillation" in key:
            continue
        if key.endswith("embeddings.position_embeddings"):
            tensor = torch.cat([tensor[:, :1], tensor[:, 2:]], dim=1)
        key = re.sub(r"^deit\.", "vit.", key)
        key = re.sub(r"^cls_classifier\.", "classifier.", key)
        if architecture == "DeiTModel":
            key = f"vit.{key}"
        converted[key] = tensor
    return converted
