# SPDX-License-Identifier: Apache-2.0
"""
The loader of checkpoints, for every command: a model has exactly the weights of its files, all of them finite, or
there is an error that names what is wrong.

Needs nothing of the training side: torch, transformers, safetensors, einops and Pillow alone.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel, ViTImageProcessor
from transformers.image_processing_utils import BaseImageProcessor

# Transformers 5.17 has it under the short name only where torchvision is installed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_peft_available

import modeling_karat_vit  # noqa: F401  (registers the model with Transformers)
from modeling_karat_vit.configuration_karat_vit import height_and_width

from .. import hub
from ..errors import InputError, more, reason_of, refusing
from ..runs import checkpoints
from . import convit
from .families import KNOWN, class_of, is_known, is_timm, vision, why_not


# Parts that may differ between a checkpoint and the classifier that it becomes, by the names of their weights.
HEAD = re.compile(r"(cls_|distillation_)?classifier\.|beit\.pooler\.|timm_model\.head\.")
HEAD_OR_OPERATOR = re.compile(rf"{HEAD.pattern}|(.*\.)?operator\.")
# Numbers of positions, which models make themselves; older versions of Transformers saved them.
_INDICES = r"(.*\.)?(position_ids|relative_position_index)$"
# Of no use to a classifier: the pooler, the parts for masked images, for distillation and for text.
UNUSED = re.compile(
    r"(\w+\.)?(pooler\.|layernorm\.|embeddings\.mask_token$)|decoder\.|lm_head\.|distillation_classifier\."
    rf"|text_model\.|(text|visual)_projection\.|logit_(scale|bias)$|{_INDICES}"
)
# An adapter of PEFT: what it is, the field that says of which model, its weights, and how their names begin.
ADAPTER, BASE = "adapter_config.json", "base_model_name_or_path"
ADAPTER_WEIGHTS, ADAPTED = "adapter_model.safetensors", "base_model.model."
# Larger images are no vision transformer's.
LARGEST_SIDE = 2**14
# Nor are more classes a data set's: Transformers makes a name for each of those that have none.
MOST_CLASSES = 1_000_000


def device_of(name: str | None) -> torch.device:
    """The device of `--device`, or the best one here. Raises `InputError` where there is none of that name."""
    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # Of `meta` there is nothing to be had.
    except Exception as error:  # As the device has it: its package may be missing, say.
        raise InputError(f"`--device` {name} cannot be used here: {_short(reason_of(error))}") from error
    return device


def _names_its_setting(load: Callable[..., Any]) -> Callable[..., Any]:
    """Have what `load` refuses of a source name the setting that named the source."""

    @functools.wraps(load)
    def loading(source: str, setting: str, *args, **how):
        try:
            return load(source, setting, *args, **how)
        except InputError as error:
            raise InputError(f"`{setting}` {source} cannot be loaded: {error}") from error

    return loading


@_names_its_setting
def load_config(source: str, setting: str) -> PreTrainedConfig:
    """
    The configuration of a checkpoint folder or Hub repository, which a `setting` named; of an adapter of PEFT without
    one, its base model's. Raises `InputError` where there is none, or it is damaged.
    """
    if not source.strip():
        raise InputError("it is empty, expected a checkpoint folder, or its name on the Hub.")
    folder = Path(source)
    if folder.is_file():
        raise InputError(
            "it is the file of that name, expected a checkpoint folder with config.json and model.safetensors. (A timm "
            "state dictionary of a softmax ViT is converted by modeling_karat_vit.convert_timm_state_dict.)"
        )
    if not folder.is_dir() and not hub.is_name(source):
        raise InputError("there is no such folder.")
    if (path := find_file(source, "config.json")) is None and (base := base_of_adapter(source)) is not None:
        config = load_config(base, BASE)
        head = _adapter_header(source).get(f"{ADAPTED}classifier.weight")
        if head is not None and head[1][0] != config.num_labels:
            config.num_labels = head[1][0]
        return config
    if path is None and not folder.is_dir():
        reason = "HF_HUB_OFFLINE is set" if hub.constants.HF_HUB_OFFLINE else "there is no config.json"
        raise InputError(f"no folder here, nor from the Hub: {reason}.")
    if path is None:
        raise InputError("it holds no config.json: it is no checkpoint folder.")
    if wrong := _wrong_in_config(checkpoints.read_json(path)):
        raise InputError(f"its config.json {wrong}.")
    with refusing("its config.json cannot be read", ".", whole=False):
        # KArAt's code is here; nothing else that a checkpoint brings along is run.
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    config.return_dict = True  # How results are handed over is no matter of a checkpoint.
    if is_timm(config):
        # timm writes arguments that Transformers gives by itself.
        config.model_args = {name: value for name, value in (config.model_args or {}).items() if name != "num_classes"}
    return config


def load_model(
    source: str, setting: str, encoder_suffices: bool = False, **how: Any
) -> tuple[PreTrainedModel, set[str]]:
    """
    A trained classifier, on the CPU, of a folder or Hub name which a `setting` named; and the names of the weights that
    are newly initialised: none, or with `encoder_suffices` those of the head of what its configuration calls an
    encoder. `how` goes to `from_pretrained`. Raises `InputError` as `load_config` and `load_weights`, or where it is no
    ViT.
    """
    config = load_config(source, setting)
    check_type(config, source, setting)
    encoder = encoder_suffices and any(name.endswith("Model") for name in config.architectures or ())
    parts = {"may_lack": HEAD, "may_drop": UNUSED} if encoder else {}
    return load_weights(source, setting, config, **parts, **how)


def check_type(config: PreTrainedConfig, source: str, setting: str) -> None:
    """Raise an `InputError` for a model that is no classifier of a known family."""
    if not is_known(config):
        raise InputError(f"`{setting}` {source} is a model of type {config.model_type!r}, {KNOWN}.")
    if (reason := why_not(config)) is not None:
        raise InputError(f"`{setting}` {source} cannot be used: {reason.rstrip('.')}.")


@_names_its_setting
def load_weights(
    source: str,
    setting: str,
    config: PreTrainedConfig,
    may_lack: re.Pattern | None = None,
    may_drop: re.Pattern | None = None,
    **how: Any,
) -> tuple[PreTrainedModel, set[str]]:
    """
    A model with the weights of a checkpoint (a folder or Hub name, which a `setting` named), or of an adapter of PEFT
    merged into its base model, in fp32; and the names of those that are newly initialised.

    Args:
        may_lack: names (by their beginnings) of weights that may be missing or of another shape: they are new then.
        may_drop: names (by their beginnings) of weights that the model need not have.
        how: further arguments of `from_pretrained`.

    Raises:
        InputError: a file cannot be read; or weights are missing, too many, of another shape or type, or not finite.
    """
    state = None
    if (base := base_of_adapter(source)) is not None:
        state = _merged(source, base, setting)
        found = {name: ("F", list(tensor.shape)) for name, tensor in state.items()}
    else:
        files = weight_files(source)
        found = {name: kind for path in files for name, kind in checkpoints.read_header(path).items()}
    indices = {name for name in found if re.match(_INDICES, name)}
    kinds = {name: kind for name, (kind, _) in found.items() if name not in indices}
    if whole := sorted(name for name, kind in kinds.items() if not kind.startswith(("F", "BF"))):
        raise InputError(f"it has weights that are no floating-point numbers: {_some(whole)}.")
    if found:
        # Before it takes any memory or time.
        _check_size(config, may_lack, sum(math.prod(shape) for _, shape in found.values()), len(found))
    # By Torch, safetensors, the Hub's client, Transformers, or the file system.
    with refusing("its weights are refused", ".", whole=False):
        model, info = class_of(config).from_pretrained(
            source if state is None else None,
            state_dict=state,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
            **how,
        )
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    new = mismatched | set(info["missing_keys"])
    for names, allowed, what in (
        (set(info["missing_keys"]), may_lack, "lacks weights of its model"),
        (mismatched, may_lack, "has weights of another shape than its model's"),
        (set(info["unexpected_keys"]) - indices, may_drop, "has weights that its model does not have"),
    ):
        if wrong := sorted(name for name in names if allowed is None or not allowed.match(name)):
            raise InputError(f"it {what}: {_some(wrong)}. It is damaged or of another model.")
    if info["error_msgs"]:
        raise InputError(reason_of(ValueError(info["error_msgs"][0])))
    if wrong := checkpoints.not_finite(model.state_dict()):
        raise InputError(f"it has weights that are NaN or infinite: {_some(wrong)}.")
    return model, new


def base_of_adapter(source: str) -> str | None:
    """
    The model of an adapter of PEFT, by folder or Hub name (else an `InputError`); `None` where there is no adapter.
    """
    if find_file(source, checkpoints.WEIGHTS) is not None or (path := find_file(source, ADAPTER)) is None:
        return None
    content = checkpoints.read_json(path)
    base = content.get(BASE) if isinstance(content, dict) else None
    if not isinstance(base, str) or not base.strip() or base == source:
        raise InputError(f"{path} names no other `{BASE}`, the model that the adapter belongs to.")
    return base


def _adapter_header(source: str) -> dict[str, tuple[str, list[int]]]:
    if (path := find_file(source, ADAPTER_WEIGHTS)) is None:
        raise InputError(f"the adapter has no {ADAPTER_WEIGHTS}")
    return checkpoints.read_header(path)


def _merged(source: str, base: str, setting: str) -> dict[str, torch.Tensor]:
    """The weights of an adapter's base model with the adapter in them."""
    if not is_peft_available():
        raise InputError("it is an adapter of PEFT, which is not installed: pip install peft")
    from peft import PeftModel, get_peft_model_state_dict

    header = _adapter_header(source)
    config = load_config(source, setting)
    check_type(config, source, setting)
    model, new = load_weights(base, BASE, config, may_lack=HEAD, may_drop=UNUSED)
    if missing := sorted(name for name in new if ADAPTED + name not in header):
        raise InputError(f"neither the adapter nor its base model {base} has the weights {_some(missing)}")
    with refusing(f"the adapter does not go with its base model {base}", whole=False):
        described: Any = find_file(source, ADAPTER)  # Of the Hub, in its cache.
        adapted = PeftModel.from_pretrained(model, described.parent)
        expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        merged = adapted.merge_and_unload()
    if wrong := sorted(expected ^ set(header)):
        raise InputError(f"the adapter's weights are not those that its {ADAPTER} describes: {_some(wrong)}")
    return merged.state_dict()


def _check_size(config: PreTrainedConfig, may_lack: re.Pattern | None, numbers: int, tensors: int) -> None:
    """Refuse a configuration of which no model can be made, or a far larger one than its weights are of."""
    if (blocks := vision(config).num_hidden_layers) > tensors:
        raise InputError(f"config.json names {blocks:,} blocks, and there are weights for fewer.")
    with refusing("no model can be made of its config.json", ".", whole=False), torch.device("meta"):
        model = class_of(config)._from_config(config)
    named = model.named_parameters()
    needed = sum(weight.numel() for name, weight in named if not (may_lack and may_lack.match(name)))
    if needed > 2 * numbers:
        raise InputError(f"its weights do not fit: they are {numbers:,} numbers, and the model has {needed:,}.")


def weight_files(source: str) -> Iterator[Path]:
    """The files of the weights of a checkpoint folder, as `checkpoints.weight_files`, or the one of a repository."""
    if Path(source).is_dir():
        yield from checkpoints.weight_files(Path(source))
    elif (path := find_file(source, checkpoints.WEIGHTS)) is not None:
        yield path


@_names_its_setting
def load_image_processor(
    source: str, setting: str, image_size: int | tuple[int, int] | None = None
) -> BaseImageProcessor | None:
    """
    The image processor beside a checkpoint (a folder or Hub name, which a `setting` named), or beside an adapter's base
    model; `None` where there is none. Raises `InputError` where its file is damaged, or it does not make images of the
    model's size of any (`None`: of no matter).
    """
    beside = find_file(source, "config.json")
    written = None if beside is None else checkpoints.read_json(beside)
    of_timm = written.get("pretrained_cfg") if isinstance(written, dict) else None
    path = find_file(source, "preprocessor_config.json") if of_timm is None else beside
    if path is None:
        return None if (base := base_of_adapter(source)) is None else load_image_processor(base, BASE, image_size)
    if not isinstance(content := checkpoints.read_json(path), dict):
        raise InputError(f"{path} is no JSON object.")
    with refusing(f"{path} cannot be read", ".", whole=False):
        if of_timm is None:
            processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        else:
            content = convit.preparation(of_timm)
            processor = ViTImageProcessor(**content)
    if wrong := _wrong_in_processor(content):
        raise InputError(f"{path} {wrong}.")
    if image_size is None:
        return processor
    height, width = height_and_width(image_size)
    # Neither of the model's size nor of its shape.
    images = [Image.new("RGB", (2 * width + 1, height + 1), colour) for colour in ("black", "white")]
    with refusing(f"{path} does not prepare images", ".", whole=False):
        pixels = processor(images, return_tensors="pt")["pixel_values"]
    if pixels.shape != (2, 3, height, width):
        made = " x ".join(map(str, pixels.shape[-2:]))
        raise InputError(f"{path} makes images of {made} pixels, and the model takes {height} x {width}.")
    low, high = pixels.flatten(1).mean(1).tolist()
    # As where it divides by 255 twice, or never, or by a deviation that is nearly zero.
    if not pixels.abs().max() <= 255 or high - low < 0.01:
        raise InputError(f"{path} makes {low:.3g} of black and {high:.3g} of white, expected about -1 and 1.")
    return processor


def find_file(source: str, name: str) -> Path | None:
    """
    A file of a folder or Hub repository, if there is one. Raises `InputError` where what has its name is no file, as a
    folder, or a link that leads nowhere; or where the Hub cannot be asked.
    """
    if Path(source).is_dir():
        path = Path(source) / name
        if os.path.lexists(path) and not path.is_file():
            raise InputError(f"{path} is no file that can be read: put back a copy of it.")
        return path if path.is_file() else None
    return hub.download_file(source, name)


def _wrong_in_config(written: Any) -> str | None:
    """What of a configuration's file Transformers does not check, or loops over for hours, in words."""
    if not isinstance(written, dict):
        return "is no JSON object"
    kind = written.get("model_type", "timm_wrapper" if "pretrained_cfg" in written else None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return f"sets `model_type` to {kind!r}, {KNOWN}"
    number = "num_classes" if kind in convit.TYPES else "num_labels"
    labels, classes = written.get("id2label"), written.get(number)
    if classes is not None and (type(classes) is not int or not 0 < classes <= MOST_CLASSES):
        return f"sets `{number}` to {classes!r}, expected 1 to {MOST_CLASSES:,}"
    if kind in convit.TYPES and (wrong := convit.wrong_in_config(written)):
        return wrong
    if labels is not None:
        # Transformers itself writes and reads the numbers as text.
        pairs = labels.items() if isinstance(labels, dict) else []
        known = {str(index) for index in range(len(pairs))}
        if {index for index, _ in pairs} != known or not pairs or not all(isinstance(name, str) for _, name in pairs):
            return f"gives the classes {_short(labels)} as `id2label`, expected names by 0, 1, 2, ..."
        if classes not in (None, len(labels)):
            return f"names {len(labels)} classes in `id2label`, and `num_labels` is {classes}"
    if written.get("problem_type") == "regression":
        return "sets `problem_type` to 'regression', expected a classifier's"
    for name, value in written.items():
        if isinstance(value, float) and not math.isfinite(value):
            return f"sets `{name}` to {value}, expected a finite number"
    return None


def _wrong_in_processor(content: dict[str, Any]) -> str | None:
    """What of an image processor's file Transformers takes although it is wrong, in words."""
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        # Others do not crop where this is null. The rest would be left out in silence.
        if type(content.get(name, True)) is not bool and (name, content[name]) != ("do_center_crop", None):
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


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _some(items: list) -> str:
    return ", ".join(map(str, items[:4])) + more(items, 4)
