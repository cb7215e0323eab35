# SPDX-License-Identifier: Apache-2.0
"""From the model arguments to a model: presets, overrides, and weights to start from."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
)

from modeling_karat_vit import KArAtViTConfig, KArAtViTForImageClassification
from modeling_karat_vit.configuration_karat_vit import STRUCTURAL_FIELDS, height_and_width
from modeling_karat_vit.modeling_karat_vit import drop_path

from ..errors import InputError, did_you_mean, more
from ..paths import CONFIGURATION
from ..settings.arguments import NOT_OF_THE_CONFIG, ModelArguments
from .loading import HEAD, HEAD_OR_OPERATOR, UNUSED, load_config, load_model, load_weights
from .softmax_attention import UNMASKED


logger = logging.getLogger(__name__)

# The paper's number of KArAt heads beside softmax heads, by the number of heads: ViT-Tiny, Small, Base.
PAPER_KARAT_HEADS = {3: 1, 6: 3, 12: 6}


def presets() -> list[str]:
    """Names of the model presets in configuration/."""
    return sorted(path.parent.name for path in CONFIGURATION.glob("*/config.json"))


def build_config(args: ModelArguments, labels: list[str] | None = None) -> PreTrainedConfig:
    """
    The configuration of `--model` (a preset or a folder), or of the `--finetune` checkpoint, with the overrides.

    Args:
        args: the model arguments.
        labels: names of the classes, if they are known.

    Raises:
        InputError: no or an unknown model is named, a setting is none of that model's, or the configuration is refused.
    """
    if args.model is None and args.finetune is None:
        raise InputError(
            f"No model is named. Give --model with a preset ({', '.join(presets())}) or a folder with a config.json, "
            "or --finetune with a checkpoint."
        )
    source = load_config(args.finetune, "finetune") if args.model is None else _preset(args.model)
    if source.model_type not in ("vit", "karat_vit"):
        raise InputError(
            f"{args.model or args.finetune} is a model of type {source.model_type!r}. This script trains 'karat_vit' "
            "and its softmax baseline 'vit'"
            + (": name the KArAt model that takes over this backbone with --model." if args.model is None else ".")
        )
    overrides = _overrides(args, source)
    if source.model_type == "vit":
        _check_drop_path(overrides.pop("drop_path_rate", 0.0))  # `build_model` adds it: the configuration has none.
        foreign = sorted(set(overrides) - set(ViTConfig().to_dict()))
        if foreign:
            raise InputError(
                f"`{foreign[0]}` is a setting of KArAt, and {args.model or args.finetune} is the softmax baseline. "
                "Name a KArAt --model (vit_tiny_patch16_224_karat, ...), or leave it out."
            )
    if labels is not None:
        overrides["id2label"] = dict(enumerate(labels))
        overrides["label2id"] = {name: index for index, name in enumerate(labels)}
    try:
        config = type(source).from_dict({**_plain(source, keep_labels=labels is None), **overrides})
    except Exception as error:  # `@strict` wraps type errors in its own class.
        raise InputError(f"The model cannot be configured: {error}") from error
    if config.num_channels != 3:
        raise InputError(
            f"`num_channels` is {config.num_channels}: this script reads every image as RGB (grey ones too), as the "
            "pipeline does. Expected 3."
        )
    return config


def build_model(args: ModelArguments, labels: list[str]) -> PreTrainedModel:
    """
    The model that a run starts from: newly initialised, or with the weights of `--finetune`.

    Args:
        args: the model arguments.
        labels: names of the classes, by index.

    Raises:
        InputError: see `build_config`; or the weights do not fit the model.
    """
    config = build_config(args, labels)
    how = _attention(args, config)
    try:
        if args.finetune is None:
            model = AutoModelForImageClassification.from_config(config, **how)
        else:
            model = _start_from(args, config, how)
        if config.model_type == "vit" and args.drop_path_rate:
            add_drop_path(model, args.drop_path_rate)
        return model
    except InputError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise InputError(str(error)) from error


def _attention(args: ModelArguments, config: PreTrainedConfig) -> dict[str, str]:
    """The argument that chooses how attention is computed, where it is not left to the model."""
    name = args.attn_implementation
    if config.model_type == "vit" and name in (None, "sdpa"):
        name = UNMASKED
    return {} if name is None else {"attn_implementation": name}


def add_drop_path(model: PreTrainedModel, rate: float) -> None:
    """
    Give Transformers' ViT stochastic depth, in training: as KArAt-ViT has it, from 0 in the first block to `rate` in
    the last. By hooks, so that the model, its parameters and its checkpoints stay Transformers' own.
    """
    layers = model.vit.layers
    for index, layer in enumerate(layers):
        # Each of a block's two branches ends with it. A tensor, as in KArAt's blocks: equal ones are compiled once.
        own = torch.tensor(rate * index / max(1, len(layers) - 1))
        layer.dropout.register_buffer("drop_path_rate", own, persistent=False)
        layer.dropout.register_forward_hook(_drop)


def _drop(module: torch.nn.Module, _, branch: torch.Tensor) -> torch.Tensor:
    return drop_path(branch, module.drop_path_rate) if module.training else branch


def _check_drop_path(rate: float) -> None:
    if not 0.0 <= rate < 1.0:
        raise InputError(f"`drop_path_rate` is {rate:g}, expected at least 0 and less than 1.")


def load_trained(folder: str, args: ModelArguments, labels: list[str]) -> PreTrainedModel:
    """
    A trained checkpoint as it is, for evaluation.

    Args:
        folder: its folder, or Hub name.
        args: where they name a model, it must be the checkpoint's.
        labels: names of the data's classes, which must be the model's.

    Raises:
        InputError: there is no checkpoint, it is another model than asked for, or it has other classes.
    """
    config = load_config(folder, "resume_from_checkpoint")
    if args.model is not None:
        check_same_model(build_config(args), config, folder)
    elif _given(args):
        check_same_model(build_config(_with(args, finetune=folder)), config, folder)
    check_labels(config, labels, folder)
    return load_model(folder, "resume_from_checkpoint", **_attention(args, config))[0]


def check_same_model(wanted: PreTrainedConfig, found: PreTrainedConfig, folder: str) -> None:
    """Raise an `InputError` that names the first fields in which a checkpoint is another model than asked for."""
    ours, theirs = _structure(wanted), _structure(found)
    different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if different:
        fields = ", ".join(f"`{key}` {theirs.get(key)!r}, not {ours.get(key)!r}" for key in different[:4])
        raise InputError(f"{folder} is another model than the one asked for: it has {fields}{more(different, 4)}.")


def check_labels(config: PreTrainedConfig, labels: list[str], folder: str) -> None:
    """Raise an `InputError` unless a trained model's classes are the data's."""
    theirs = [config.id2label[index] for index in range(config.num_labels)]
    unnamed = theirs == [f"LABEL_{index}" for index in range(len(theirs))]
    if len(theirs) != len(labels) or (theirs != labels and not unnamed):
        shown = ", ".join(theirs[:4]), ", ".join(labels[:4])
        raise InputError(
            f"{folder} knows {len(theirs)} classes ({shown[0]}{more(theirs, 4)}), and the data has {len(labels)} "
            f"({shown[1]}{more(labels, 4)}): they must be the same, in the same order. `--finetune` trains a new head."
        )


def sum_of_weights(model: PreTrainedModel) -> float:
    """A number by which to tell one draw of the same initial weights from another."""
    return sum(parameter.detach().double().sum().item() for parameter in model.parameters())


def describe_model(model: PreTrainedModel) -> str:
    """One line for the log and the card: which attention, how large."""
    config = model.config
    operator = config.describe_operator() if hasattr(config, "describe_operator") else "softmax attention"
    if teacher := getattr(config, "teacher_attention", None):
        operator = f"attention of its teacher {teacher}"
    height, width = height_and_width(config.image_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{operator}; {config.num_hidden_layers} blocks, {config.num_attention_heads} heads, width "
        f"{config.hidden_size}, images {height}x{width}; {parameters:,} parameters"
    )


def _preset(name: str) -> PreTrainedConfig:
    if name in presets():
        return AutoConfig.from_pretrained(CONFIGURATION / name)
    if Path(name).is_dir():
        return load_config(name, "model")
    raise InputError(
        f"There is no model {name!r}{did_you_mean(name, presets())}: expected a preset ({', '.join(presets())}), or a "
        "folder with a config.json. Weights to start from are given with --finetune."
    )


def _given(args: ModelArguments) -> dict[str, Any]:
    return {key: value for key, value in vars(args).items() if key not in NOT_OF_THE_CONFIG and value is not None}


def _with(args: ModelArguments, **changes: Any) -> ModelArguments:
    return ModelArguments(**{**vars(args), **changes})


def _overrides(args: ModelArguments, source: PreTrainedConfig) -> dict[str, Any]:
    overrides = _given(args)
    for key in ("image_size", "patch_size"):
        if key in overrides and len(overrides[key]) == 1:
            overrides[key] = overrides[key][0]
    if overrides.get("modular_mode") == "none":
        overrides["modular_mode"] = None
    if overrides.get("num_karat_heads") == 0:
        heads = overrides.get("num_attention_heads", source.num_attention_heads)
        if heads not in PAPER_KARAT_HEADS:
            raise InputError(
                f"The paper mixes heads in models of 3, 6 and 12 heads; this one has {heads}. Say how many are KArAt "
                "with --num_karat_heads (--num_attention)."
            )
        overrides["num_karat_heads"] = PAPER_KARAT_HEADS[heads]
    if "hidden_size" in overrides:
        # ViT derives it from the width.
        overrides["pooler_output_size"] = None
    return overrides


def _plain(config: PreTrainedConfig, keep_labels: bool) -> dict[str, Any]:
    """The configuration as a dictionary, without where it came from, and whose maps it attended with."""
    drop = {"_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "teacher_attention"}
    drop |= set() if keep_labels else {"id2label", "label2id"}
    return {key: value for key, value in config.to_dict().items() if key not in drop}


def _structure(config: PreTrainedConfig) -> dict[str, Any]:
    """What the weights depend on. Through JSON, so that pairs compare equal whether they are lists or tuples."""
    fields = {key: getattr(config, key) for key in STRUCTURAL_FIELDS if hasattr(config, key)}
    return json.loads(json.dumps({"model_type": config.model_type, **fields}))


def _start_from(args: ModelArguments, config: PreTrainedConfig, how: dict[str, Any]) -> PreTrainedModel:
    """Weights of a checkpoint under `config`: another head is new, another image size is resampled."""
    source = load_config(args.finetune, "finetune")
    size, own_size = height_and_width(config.image_size), height_and_width(source.image_size)
    at_own_size = type(config).from_dict({**config.to_dict(), "image_size": source.image_size})
    if isinstance(config, KArAtViTConfig):
        kind = KArAtViTForImageClassification
        how = {**how, "drop_distillation_token": args.drop_distillation_token}
    else:
        kind = AutoModelForImageClassification
        if source.model_type != config.model_type:
            raise InputError(
                f"{args.finetune} is of type {source.model_type!r}, and --model {args.model} is the softmax baseline: "
                "it starts from 'vit' checkpoints. A KArAt --model also takes DeiT's."
            )
    if source.model_type == config.model_type:
        check_same_model(at_own_size, source, args.finetune)
    model, new = load_weights(
        kind,
        args.finetune,
        "finetune",
        at_own_size,
        # A KArAt checkpoint has its operator; any other head may be asked for.
        may_lack=HEAD_OR_OPERATOR if source.model_type != config.model_type else HEAD,
        may_drop=UNUSED,
        **how,
    )
    operator = sorted(name for name in new if not HEAD.match(name))
    parts = [f"{len(operator)} KArAt parameters"] * bool(operator) + ["the classifier"] * (len(new) > len(operator))
    logger.info(f"Weights of {args.finetune}; new: {', '.join(parts) or 'nothing'}.")
    if size != own_size:
        if isinstance(config, KArAtViTConfig):
            model.resize(size if size[0] != size[1] else size[0])
        else:
            _resize_softmax(model, config.image_size, own_size, size)
        logger.info(f"Resampled from {own_size[0]}x{own_size[1]} to {size[0]}x{size[1]} pixels.")
    return model


@torch.no_grad()
def _resize_softmax(model: PreTrainedModel, image_size, old: tuple[int, int], new: tuple[int, int]) -> None:
    """Resample the position embeddings of Transformers' ViT in place, [CLS] apart, bicubic."""
    embeddings = model.vit.embeddings
    patch = height_and_width(model.config.patch_size)
    grid, new_grid = [tuple(math.floor(side / p) for side, p in zip(size, patch, strict=True)) for size in (old, new)]
    positions = embeddings.position_embeddings
    patches = positions[:, 1:].mT.unflatten(-1, grid)
    patches = torch.nn.functional.interpolate(patches.float(), size=new_grid, mode="bicubic", align_corners=False)
    resized = torch.cat([positions[:, :1], patches.to(positions.dtype).flatten(2).mT], dim=1)
    embeddings.position_embeddings = torch.nn.Parameter(resized.contiguous())
    projection = embeddings.patch_embeddings
    embeddings.image_size = projection.image_size = new
    projection.num_patches = new_grid[0] * new_grid[1]
    model.config.image_size = image_size
