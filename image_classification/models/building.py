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
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
)

from modeling_karat_vit import KArAtViTConfig
from modeling_karat_vit.configuration_karat_vit import STRUCTURAL_FIELDS, height_and_width
from modeling_karat_vit.modeling_karat_vit import drop_path

from ..errors import InputError, did_you_mean, more, reason_of
from ..paths import CONFIGURATION
from ..settings.arguments import ModelArguments
from .backbones import KARAT_FIELDS, configure, load_backbone, put_karat_heads, try_out
from .families import (
    OWN,
    block_names,
    class_of,
    fixed_image_size,
    image_size,
    is_karatized,
    karat_heads,
    name_of,
    vision,
)
from .loading import (
    HEAD,
    HEAD_OR_OPERATOR,
    UNUSED,
    check_type,
    load_config,
    load_image_processor,
    load_model,
    load_weights,
)
from .softmax_attention import UNMASKED


logger = logging.getLogger(__name__)

# The paper's number of KArAt heads beside softmax heads, by the number of heads: ViT-Tiny, Small, Base.
PAPER_KARAT_HEADS = {3: 1, 6: 3, 12: 6}
# Of a family's configuration, what its weights do not depend on.
_NOT_STRUCTURE = (
    *("id2label", "label2id", "architectures", "auto_map", "dtype", "transformers_version", "_name_or_path"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "drop_path_rate"),
    *("initializer_range", "problem_type", "return_dict", "output_attentions", "output_hidden_states"),
)


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
    if args.karatize is not None:
        base = _base(args)
        config = build_config(base, labels)
        size = training_size(base, config)
        with torch.device("meta"):
            model = put_karat_heads(class_of(config)._from_config(config), _with_paper_heads(args, config), size, None)
        try_out(model, size, args.weights or "")
        return model.config
    source = load_config(args.finetune or "", "finetune") if args.model is None else _preset(args.model)
    check_type(source, args.model or args.finetune or "", "finetune" if args.model is None else "model")
    overrides = _overrides(args, source)
    if source.model_type not in OWN:
        if args.model is not None and args.finetune is not None:
            raise InputError(
                f"`model` {args.model} is a {source.model_type!r}, and `finetune` names weights, which bring their "
                "model along: leave out --model."
            )
        return _backbone_config(args, source, overrides, labels)
    if source.model_type == "vit":
        _check_drop_path(overrides.pop("drop_path_rate", 0.0))  # `build_model` adds it: the configuration has none.
        foreign = sorted(set(overrides) - set(ViTConfig().to_dict()))
        if foreign:
            raise InputError(
                f"`{foreign[0]}` is a setting of KArAt, and {args.model or args.finetune} is the softmax baseline. "
                "Name a KArAt --model (vit_tiny_patch16_224_karat, ...), or leave it out."
            )
    overrides |= _classes(labels)
    try:
        config = type(source).from_dict({**_plain(source, keep_labels=labels is None), **overrides})
    except Exception as error:  # `@strict` wraps type errors in its own class.
        raise InputError(f"The model cannot be configured: {error}") from error
    _check_channels(config)
    return config


def _check_channels(config: PreTrainedConfig) -> None:
    if (channels := vision(config).num_channels) != 3:
        raise InputError(
            f"`num_channels` is {channels}: this script reads every image as RGB (grey ones too), as the pipeline "
            "does. Expected 3."
        )


def _classes(labels: list[str] | None) -> dict[str, Any]:
    """The fields of a configuration that name the classes, where they are known."""
    if labels is None:
        return {}
    return {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}


def _backbone_config(
    args: ModelArguments, source: PreTrainedConfig, overrides: dict[str, Any], labels: list[str] | None
) -> PreTrainedConfig:
    """`build_config` of another family than ViT."""
    named = args.model or args.finetune or ""
    config = configure(source, overrides, named, args.finetune is not None)
    for name, value in _classes(labels).items():
        setattr(config, name, value)
    _check_channels(config)
    try:
        with torch.device("meta"):
            model = class_of(config)._from_config(config)
    except Exception as error:  # Whatever a layer says of sizes that it cannot have.
        raise InputError(f"The model {named} cannot be configured: {reason_of(error)}") from error
    try_out(model, training_size(args, config), named)
    return config


def training_size(args: ModelArguments, config: PreTrainedConfig) -> tuple[int, int]:
    """
    Height and width of the images of a run: `--image_size`, or what the checkpoint's image processor makes, or what its
    configuration says.

    Args:
        args: the model arguments.
        config: that `build_config` made of them.
    """
    if config.model_type in OWN or is_karatized(config):
        return image_size(config)
    if args.image_size is not None:
        return height_and_width(args.image_size if len(args.image_size) > 1 else args.image_size[0])
    return image_size(config, load_image_processor(args.finetune, "finetune") if args.finetune else None)


def _base(args: ModelArguments) -> ModelArguments:
    """The arguments of the model that `--karatize` puts KArAt heads into."""
    if args.model is not None and args.finetune is not None:
        raise InputError(
            f"`karatize` puts KArAt heads into one pre-trained model, and there are two: --model {args.model} and "
            f"--finetune {args.finetune}. Leave one out."
        )
    if args.model in presets():
        trained = args.model if "karat" in args.model else f"{args.model}_karat"
        raise InputError(
            f"`karatize` puts KArAt heads into a pre-trained model, and the preset {args.model} has no weights. Name a "
            f"checkpoint with --model, or train the preset {trained} from scratch."
        )
    weights = args.weights or ""
    config = load_config(weights, "model" if args.finetune is None else "finetune")
    check_type(config, weights, "karatize")
    if config.model_type.startswith("karat_"):
        raise InputError(f"`karatize`: {weights} has KArAt heads already. --finetune trains it on.")
    return _with(args, model=None, finetune=args.weights, karatize=None, **dict.fromkeys(KARAT_FIELDS))


def _with_paper_heads(args: ModelArguments, config: PreTrainedConfig) -> ModelArguments:
    return _with(args, num_karat_heads=_overrides(args, vision(config)).get("num_karat_heads"))


def build_model(args: ModelArguments, labels: list[str], images: torch.Tensor | None = None) -> PreTrainedModel:
    """
    The model that a run starts from: newly initialised, or with the weights of `--finetune`, or karatized.

    Args:
        args: the model arguments.
        labels: names of the classes, by index.
        images: (B, 3, height, width), that `--karatize replace` fits the operators on, on the device that does it;
            `None` leaves them as they are, for a checkpoint to be loaded.

    Raises:
        InputError: see `build_config`; or the weights do not fit the model.
    """
    config = build_config(args, labels)
    if args.karatize is not None:
        return _karatized(args, labels, images)
    how = _attention(args, config)
    try:
        if args.finetune is None:
            model = class_of(config)._from_config(config, **how)
        elif config.model_type not in OWN:
            model = load_backbone(config, args.finetune, training_size(args, config), **how)
        else:
            model = _start_from(args, config, how)
        if config.model_type == "vit" and args.drop_path_rate:
            add_drop_path(model, args.drop_path_rate)
        return model
    except InputError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise InputError(str(error)) from error


def _karatized(args: ModelArguments, labels: list[str], images: torch.Tensor | None) -> PreTrainedModel:
    base = _with(_base(args), attn_implementation=None, drop_path_rate=None)
    rate = args.drop_path_rate
    is_vit = load_config(base.finetune or "", "finetune").model_type == "vit"
    model = build_model(base if is_vit else _with(base, drop_path_rate=rate), labels)
    if images is not None:
        model.to(images.device)
    model = put_karat_heads(model, _with_paper_heads(args, model.config), training_size(base, model.config), images)
    if args.attn_implementation is not None:
        try:
            model.set_attn_implementation(args.attn_implementation)
        except (ValueError, ImportError) as error:
            raise InputError(str(error)) from error
    if is_vit and rate:
        add_drop_path(model, rate)
    return model


def _attention(args: ModelArguments, config: PreTrainedConfig) -> dict[str, Any]:
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


def _drop(module: Any, _, branch: torch.Tensor) -> torch.Tensor:
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
    check_type(config, folder, "resume_from_checkpoint")
    if args.model is not None:
        check_same_model(build_config(args), config, folder)
    elif args.given():
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


def describe_attention(model: PreTrainedModel) -> str:
    """In words: the operator of KArAt heads and where they are, or softmax."""
    config = model.config
    if teacher := getattr(config, "teacher_attention", None):
        return f"attention of its teacher {teacher}"
    if not is_karatized(config):
        return config.describe_operator() if hasattr(config, "describe_operator") else "softmax attention"
    heads = karat_heads(model)[0][1]
    operator = heads.operator.config.describe_operator().rsplit(", ", 3)[0]  # Without its words on heads and blocks.
    start = "in place of softmax" if heads.gamma is None else "beside softmax (residual)"
    count = config.karat["heads"]
    which = "all" if count is None else f"the first {count}"
    return f"{operator}, {start}, in {which} heads of blocks {config.karat['layers']}"


def describe_model(model: PreTrainedModel) -> str:
    """One line for the log and the card: which attention, how large."""
    config, part = model.config, vision(model.config)
    attention = describe_attention(model)
    if config.model_type not in OWN:
        attention = f"{name_of(config)} with {attention}"
    heads: Any = part.num_attention_heads
    heads = "/".join(map(str, heads)) if isinstance(heads, (list, tuple)) else heads
    size = fixed_image_size(config)
    images = "images of any size" if size is None else f"images {size[0]}x{size[1]}"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{attention}; {len(block_names(model))} blocks, {heads} heads, width {part.hidden_size}, {images}; "
        f"{parameters:,} parameters"
    )


def _preset(name: str) -> PreTrainedConfig:
    if name in presets():
        return AutoConfig.from_pretrained(CONFIGURATION / name)
    if Path(name).is_dir():
        return load_config(name, "model")
    raise InputError(
        f"There is no model {name!r}{did_you_mean(name, presets())}: expected a preset ({', '.join(presets())}), or a "
        "folder with a config.json. Weights to start from are given with --finetune (or --karatize beside --model)."
    )


def _with(args: ModelArguments, **changes: Any) -> ModelArguments:
    return ModelArguments(**{**vars(args), **changes})


def _overrides(args: ModelArguments, source: PreTrainedConfig) -> dict[str, Any]:
    overrides = args.given()
    for key in ("image_size", "patch_size"):
        if key in overrides and len(overrides[key]) == 1:
            overrides[key] = overrides[key][0]
    if overrides.get("num_karat_heads") == 0:
        heads = overrides.get("num_attention_heads", source.num_attention_heads)
        if isinstance(heads, (list, tuple)) or heads not in PAPER_KARAT_HEADS:
            raise InputError(
                f"The paper mixes heads in models of 3, 6 and 12 heads; this one has {heads}. Say how many are KArAt "
                "with --num_karat_heads (--num_attention)."
            )
        overrides["num_karat_heads"] = PAPER_KARAT_HEADS[heads]
    if "hidden_size" in overrides and source.model_type in OWN:
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
    if config.model_type in OWN:
        fields = {key: getattr(config, key) for key in STRUCTURAL_FIELDS if hasattr(config, key)}
    else:
        fields = {key: value for key, value in vision(config).to_dict().items() if key not in _NOT_STRUCTURE}
        fields["karat"] = getattr(config, "karat", None)
    return json.loads(json.dumps({"model_type": config.model_type, **fields}))


def _start_from(args: ModelArguments, config: PreTrainedConfig, how: dict[str, Any]) -> PreTrainedModel:
    """Weights of a checkpoint under `config`: another head is new, another image size is resampled."""
    finetune = args.finetune or ""
    source = load_config(finetune, "finetune")
    size, own_size = height_and_width(config.image_size), height_and_width(source.image_size)
    at_own_size = type(config).from_dict({**config.to_dict(), "image_size": source.image_size})
    if isinstance(config, KArAtViTConfig):
        how = {**how, "drop_distillation_token": args.drop_distillation_token}
    else:
        if source.model_type != config.model_type:
            raise InputError(
                f"{args.finetune} is of type {source.model_type!r}, and --model {args.model} is the softmax baseline: "
                "it starts from 'vit' checkpoints. A KArAt --model also takes DeiT's."
            )
    if source.model_type == config.model_type:
        check_same_model(at_own_size, source, finetune)
    model, new = load_weights(
        finetune,
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
