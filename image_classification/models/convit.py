# SPDX-License-Identifier: Apache-2.0
"""timm's ConViT in Transformers' words: what timm's configurations leave to its code, or say of images."""

import functools
import json
import math
from typing import Any

import torch
from transformers import PreTrainedConfig, TimmWrapperConfig, TimmWrapperModel


# Of timm's models as Transformers wraps them, and of ConViT with KArAt heads.
TYPES = ("timm_wrapper", "karat_convit")
# timm's names of settings. They change no weights.
ARGUMENTS = {
    "hidden_dropout_prob": "proj_drop_rate",
    "attention_probs_dropout_prob": "attn_drop_rate",
    "drop_path_rate": "drop_path_rate",
}
MOST_BLOCKS = 1000
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # PIL's numbers


def described(config: PreTrainedConfig) -> PreTrainedConfig:
    """Blocks, heads, width, patches, images and rates of a ConViT, under the names of Transformers' ViT."""
    return _described(config.architecture, json.dumps(config.model_args or {}, sort_keys=True))


@functools.cache
def _described(architecture: str, arguments: str) -> PreTrainedConfig:
    own = json.loads(arguments)
    with torch.device("meta"):
        model: Any = TimmWrapperModel(TimmWrapperConfig(architecture=architecture, model_args=own)).timm_model
    patches = model.patch_embed
    return PreTrainedConfig(
        num_hidden_layers=len(model.blocks),
        num_attention_heads=model.blocks[0].attn.num_heads,
        hidden_size=model.embed_dim,
        image_size=patches.img_size[0],  # Its positions are those of a square.
        patch_size=patches.patch_size[0],
        num_channels=patches.proj.in_channels,
        local_up_to_layer=model.local_up_to_layer,
        **{name: own.get(argument, 0.0) for name, argument in ARGUMENTS.items()},
    )


def wrong_in_config(written: dict[str, Any]) -> str | None:
    """What of a configuration's file would be found by nobody, or after hours, in words."""
    names, arguments, images = (written.get(name) for name in ("label_names", "model_args", "pretrained_cfg"))
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return "has `label_names` that are no list of names"
    for name, value in (("model_args", arguments), ("pretrained_cfg", images)):
        if not isinstance(value, dict | None):
            return f"sets `{name}` to {value!r}, expected an object"
    depth = (arguments or {}).get("depth", 1)
    if type(depth) is not int or not 0 < depth <= MOST_BLOCKS:
        return f"sets `depth` to {depth!r}, expected 1 to {MOST_BLOCKS:,}"
    return None


def preparation(pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    """
    What timm does to images for the evaluation, as the fields of a `ViTImageProcessor`.

    Args:
        pretrained_cfg: of a checkpoint's configuration.

    Raises:
        ValueError: it is none of a `ViTImageProcessor`'s.
    """
    from timm.data import resolve_data_config

    found = resolve_data_config(pretrained_cfg, verbose=False)
    height, width = found["input_size"][1:]
    rows, columns = (math.floor(side / found["crop_pct"]) for side in (height, width))
    mode, interpolation = found["crop_mode"], found["interpolation"]
    if mode not in ("center", "squash") or (mode == "center" and rows != columns) or interpolation not in _RESAMPLE:
        raise ValueError(
            f"images of {height} x {width} by `crop_mode` {mode!r} and `interpolation` {interpolation!r}, expected "
            f"square ones by 'center', or 'squash', and one of {', '.join(_RESAMPLE)}"
        )
    return {
        "size": {"shortest_edge": rows} if mode == "center" else {"height": rows, "width": columns},
        "crop_size": {"height": height, "width": width},
        "do_center_crop": True,
        "resample": _RESAMPLE[interpolation],
        "image_mean": list(found["mean"]),
        "image_std": list(found["std"]),
    }
