# SPDX-License-Identifier: Apache-2.0
"""
The loader of checkpoints, for every command: a model has exactly the weights of its files, all of them finite, or
there is an error that names what is wrong.

Needs nothing of the training side: torch, transformers, safetensors, einops and Pillow alone.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import cached_file

import modeling_karat_vit  # noqa: F401  (registers the model with Transformers)

from . import checkpoints, hub
from .errors import InputError, more, reason_of


# Parts that may differ between a checkpoint and the classifier that it becomes, by the names of their weights.
HEAD = re.compile(r"classifier\.")
HEAD_OR_OPERATOR = re.compile(r"classifier\.|(.*\.)?operator\.")
# Of no use to a classifier: the pooler, the parts for masked images and for distillation.
UNUSED = re.compile(r"(vit\.)?(pooler\.|embeddings\.mask_token$)|decoder\.|distillation_classifier\.")
# Larger images are no vision transformer's.
LARGEST_SIDE = 2**14


def height_and_width(size) -> tuple[int, int]:
    """A configuration's `image_size` (a number, or a pair) as (height, width)."""
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    return int(sides[0]), int(sides[-1])


def load_config(source: str, setting: str) -> PreTrainedConfig:
    """
    The configuration of a checkpoint folder or Hub repository.

    Args:
        source: folder or Hub name.
        setting: which setting named it, for errors.

    Raises:
        InputError: there is none, or it is damaged.
    """
    folder = Path(source)
    if folder.is_file():
        raise InputError(
            f"`{setting}` is the file {source}: expected a checkpoint folder with config.json and model.safetensors. "
            "(A timm state dictionary of a softmax ViT is converted by modeling_karat_vit.convert_timm_state_dict.)"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"`{setting}` is {source}, which holds no config.json: it is no checkpoint folder.")
    if not folder.is_dir() and not hub.is_name(source):
        raise InputError(f"`{setting}` is {source}: there is no such folder.")
    try:
        # KArAt's code is here; nothing else that a checkpoint brings along is run.
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # Transformers' checks of values and the Hub's client have no common base.
        if folder.is_dir():
            reason = f"`{setting}` is {source}, whose config.json cannot be read: {reason_of(error)}"
        else:
            reason = f"`{setting}` {source} cannot be loaded: no folder here, nor from the Hub: {reason_of(error)}"
        raise InputError(reason) from error
    if wrong := _wrong_in_config(source, config):
        raise InputError(f"`{setting}` is {source}, whose config.json {wrong}.")
    return config


def load_model(
    source: str, setting: str, encoder_suffices: bool = False, **how: Any
) -> tuple[PreTrainedModel, set[str]]:
    """
    A trained classifier, on the CPU.

    Args:
        source: folder or Hub name.
        setting: which setting named it, for errors.
        encoder_suffices: whether it may be saved without its head, as what its configuration calls an encoder.
        how: further arguments of `from_pretrained`.

    Returns:
        The model, and the names of the weights that are newly initialised: none, or those of the head.

    Raises:
        InputError: see `load_config` and `load_weights`; or it is no ViT.
    """
    config = load_config(source, setting)
    if config.model_type not in ("karat_vit", "vit"):
        raise InputError(
            f"`{setting}` {source} is a model of type {config.model_type!r}, expected 'karat_vit' or 'vit' (the "
            "softmax ViT of Transformers)."
        )
    encoder = encoder_suffices and set(config.architectures or ()) & {"KArAtViTModel", "ViTModel"}
    parts = {"may_lack": HEAD, "may_drop": UNUSED} if encoder else {}
    return load_weights(AutoModelForImageClassification, source, setting, config, **parts, **how)


def load_weights(
    kind: type,
    source: str,
    setting: str,
    config: PreTrainedConfig,
    may_lack: re.Pattern | None = None,
    may_drop: re.Pattern | None = None,
    **how: Any,
) -> tuple[PreTrainedModel, set[str]]:
    """
    A model with the weights of a checkpoint.

    Args:
        kind: class of the model, or of Transformers' auto classes.
        source: folder or Hub name.
        setting: which setting named it, for errors.
        config: of the model.
        may_lack: names (by their beginnings) of weights that may be missing or of another shape: they are new then.
        may_drop: names (by their beginnings) of weights that the model need not have.
        how: further arguments of `from_pretrained`.

    Returns:
        The model, and the names of the weights that are newly initialised.

    Raises:
        InputError: a file cannot be read; or weights are missing, too many, of another shape or type, or not finite.
    """

    def refuse(what: str, cause: Exception | None = None) -> None:
        raise InputError(f"`{setting}` {source} cannot be loaded: {what}.") from cause

    try:
        found = {name: kind for path in weight_files(source) for name, kind in checkpoints.read_header(path).items()}
    except InputError as error:
        raise InputError(f"`{setting}` {source} cannot be loaded: {error}") from error
    if whole := sorted(name for name, (dtype, _) in found.items() if not dtype.startswith(("F", "BF"))):
        refuse(f"it has weights that are no floating-point numbers: {_some(whole)}")
    if found:
        # Before it takes any memory.
        _check_size(config, may_lack, sum(math.prod(shape) for _, shape in found.values()), len(found), refuse)
    try:
        model, info = kind.from_pretrained(
            source,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
            **how,
        )
    except Exception as error:  # Of Torch, safetensors, the Hub's client, Transformers, or the file system.
        refuse(reason_of(error).rstrip("."), error)
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    new = mismatched | set(info["missing_keys"])
    for names, allowed, what in (
        (set(info["missing_keys"]), may_lack, "lacks weights of its model"),
        (mismatched, may_lack, "has weights of another shape than its model's"),
        (set(info["unexpected_keys"]), may_drop, "has weights that its model does not have"),
    ):
        if wrong := sorted(name for name in names if allowed is None or not allowed.match(name)):
            refuse(f"it {what}: {_some(wrong)}. It is damaged or of another model")
    if info["error_msgs"]:
        refuse(reason_of(ValueError(info["error_msgs"][0])))
    if wrong := checkpoints.not_finite(model.state_dict()):
        refuse(f"it has weights that are NaN or infinite: {_some(wrong)}")
    return model, new


def _check_size(
    config: PreTrainedConfig, may_lack: re.Pattern | None, numbers: int, tensors: int, refuse: Callable[..., None]
) -> None:
    """Refuse a configuration of which no model can be made, or a far larger one than its weights are of."""
    if config.num_hidden_layers > tensors:
        refuse(f"config.json names {config.num_hidden_layers:,} blocks, and there are weights for fewer")
    try:
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(config)
    except Exception as error:  # Whatever a layer says of sizes that it cannot have.
        refuse(f"no model can be made of its config.json ({type(error).__name__}: {reason_of(error)})", error)
    needed = sum(
        parameter.numel() for name, parameter in model.named_parameters() if not (may_lack and may_lack.match(name))
    )
    if needed > 2 * numbers:
        refuse(f"its weights do not fit the model: they are {numbers:,} numbers, and the model has {needed:,}")


def weight_files(source: str) -> Iterator[Path]:
    """
    The safetensors files of a checkpoint folder or Hub repository; none where it has others.

    Raises:
        InputError: the list of the files is damaged, or one is missing.
    """
    if Path(source).is_dir():
        if any((Path(source) / name).exists() for name in (checkpoints.WEIGHTS, checkpoints.WEIGHTS_INDEX)):
            yield from checkpoints.weight_files(Path(source))
    elif (path := _find(source, checkpoints.WEIGHTS)) is not None:
        yield path


def load_image_processor(
    source: str, setting: str, image_size: int | tuple[int, int] | None = None
) -> BaseImageProcessor | None:
    """
    The image processor beside a checkpoint; `None` where there is none.

    Args:
        source: folder or Hub name.
        setting: which setting named it, for errors.
        image_size: of the model, which must be what the processor makes of any image; `None`: of no matter.

    Raises:
        InputError: its file is damaged, or it does not make such images.
    """
    path = _find(source, "preprocessor_config.json")
    if path is None:
        return None

    def refuse(what: str, cause: Exception | None = None) -> None:
        raise InputError(f"`{setting}` {source} cannot be loaded: {path} {what}.") from cause

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            refuse("is no JSON object")
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:
        refuse(f"cannot be read: {reason_of(error).rstrip('.')}", error)
    if wrong := _wrong_in_processor(content):
        refuse(wrong)
    if image_size is None:
        return processor
    height, width = height_and_width(image_size)
    try:
        # Neither of the model's size nor of its shape.
        pixels = processor(Image.new("RGB", (2 * width + 1, height + 1)), return_tensors="pt")["pixel_values"]
    except Exception as error:
        refuse(f"does not prepare images: {reason_of(error).rstrip('.')}", error)
    if pixels.shape != (1, 3, height, width) or not pixels.isfinite().all():
        made = " x ".join(map(str, pixels.shape[-2:]))
        refuse(f"makes images of {made} pixels, and the model takes finite ones of {height} x {width}")
    return processor


def _find(source: str, name: str) -> Path | None:
    """A file of a folder or Hub repository, if there is one."""
    if Path(source).is_dir():
        return Path(source) / name if (Path(source) / name).exists() else None
    try:
        return Path(cached_file(source, name))
    except OSError:
        return None


def _wrong_in_config(source: str, config: PreTrainedConfig) -> str | None:
    """What of a configuration Transformers does not check, in words."""
    labels = config.id2label
    if set(labels) != set(range(len(labels))) or not all(isinstance(name, str) for name in labels.values()):
        return f"gives the classes {_some(list(labels.items()))} as `id2label`, expected names by 0, 1, 2, ..."
    if (path := _find(source, "config.json")) is not None:
        written = json.loads(path.read_text(encoding="utf-8")).get("id2label")
        if written is not None and len(written) != config.num_labels:
            return f"names {len(written)} classes in `id2label`, and `num_labels` is {config.num_labels}"
    for name, value in config.to_dict().items():
        if isinstance(value, float) and not math.isfinite(value):
            return f"sets `{name}` to {value}, expected a finite number"
    return None


def _wrong_in_processor(content: dict[str, Any]) -> str | None:
    """What of an image processor's file Transformers takes although it is wrong, in words."""
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if content.get(name) not in (None, True, False):
            return f"sets `{name}` to {content[name]!r}, expected true or false"
    if content.get("do_normalize") is not False:
        for name in ("image_mean", "image_std"):
            values = content.get(name)
            if not isinstance(values, list) or len(values) != 3 or not all(map(_is_number, values)):
                return f"sets `{name}` to {values!r}, expected three numbers: red, green, blue"
        if min(content["image_std"]) <= 0:
            return f"sets `image_std` to {content['image_std']}, expected numbers above 0"
    factor = content.get("rescale_factor", 1)
    if not _is_number(factor) or factor <= 0:
        return f"sets `rescale_factor` to {factor!r}, expected a number above 0"
    if content.get("do_resize") is not False and "size" not in content:
        return "does not say to what `size` images are resized"
    for name in ("size", "crop_size"):
        sides = content.get(name)
        sides = sides.values() if isinstance(sides, dict) else [sides]
        if not all(side is None or (type(side) is int and 0 < side <= LARGEST_SIDE) for side in sides):
            return f"sets `{name}` to {content[name]!r}, expected pixels, from 1 to {LARGEST_SIDE}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _some(items: list) -> str:
    return ", ".join(map(str, items[:4])) + more(items, 4)
