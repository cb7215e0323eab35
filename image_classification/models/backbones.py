# SPDX-License-Identifier: Apache-2.0
"""From settings to models, of other families than ViT: pre-trained backbones, and KArAt heads in them."""

import logging
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_karat_vit import karatize
from modeling_karat_vit.karat_heads import OPERATOR_FIELDS

from ..errors import InputError, more, reason_of
from ..settings.arguments import ModelArguments
from . import convit
from .families import class_of, fixed_image_size, is_timm, vision
from .loading import HEAD, UNUSED, load_weights


logger = logging.getLogger(__name__)

# Settings of KArAt heads, which `karatize` takes; and those that change nothing of what the weights were trained for.
KARAT_FIELDS = (*OPERATOR_FIELDS, "sharing", "num_karat_heads", "karat_layers")
_FREE = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "initializer_range")


def configure(config: PreTrainedConfig, overrides: dict[str, Any], source: str, has_weights: bool) -> PreTrainedConfig:
    """
    A family's configuration with the settings of a run.

    Args:
        config: of the checkpoint.
        overrides: fields by name; `image_size` is no matter of the configuration where there are weights.
        source: which model, for errors.
        has_weights: whether it is pre-trained, so that its structure stays.

    Raises:
        InputError: a setting is none of this family's, or would make another model.
    """
    made = type(config).from_dict(config.to_dict())
    made.architectures = config.architectures
    # Of timm's: the classes and the preparation of images that it was trained for.
    for name in ("label_names", "pretrained_cfg"):
        vars(made).pop(name, None)
    part = vision(made)
    for name, value in overrides.items():
        own = part.to_dict().get(name, made.karat.get(name) if getattr(made, "karat", None) else None)
        if name in KARAT_FIELDS:
            hint = "" if getattr(made, "karat", None) else " --karatize puts KArAt heads into it."
            raise InputError(f"`{name}` is a setting of KArAt, and {source} is a trained {made.model_type!r}.{hint}")
        if name not in part.to_dict():
            raise InputError(f"`{name}` is no setting of {source}, a model of type {made.model_type!r}. Leave it out.")
        if has_weights and name not in (*_FREE, "image_size") and value != own:
            raise InputError(f"`{name}` is {value}, and {source} was trained with {own}. Leave it out.")
        if has_weights and name == "image_size":
            continue
        if not is_timm(made):
            setattr(part, name, value)
        elif name in convit.ARGUMENTS:
            made.model_args = {**(made.model_args or {}), convit.ARGUMENTS[name]: value}
        elif value != own:
            raise InputError(f"`{name}` is {value}, and {source}, of timm, has {own}. Leave it out.")
    return made


def put_karat_heads(
    model: PreTrainedModel, args: ModelArguments, size: tuple[int, int], images: torch.Tensor | None
) -> PreTrainedModel:
    """
    `karatize` by the settings of a run.

    Args:
        model: without KArAt heads.
        args: `karatize`, `karat_layers`, `num_karat_heads`, and the operator's.
        size: height and width of the images.
        images: (B, 3, height, width), with `karatize: replace`, to fit the operators on; `None` leaves them unfitted,
            as for a model whose weights are loaded afterwards.

    Raises:
        InputError: the model cannot have such heads.
    """
    if args.sharing not in (None, "blockwise"):
        raise InputError(
            f"`sharing` is {args.sharing}: with `karatize` each block has operators of its own (blockwise)."
        )
    operator = {name: value for name, value in args.given().items() if name in OPERATOR_FIELDS}
    further: dict[str, Any] = {"layers": args.karat_layers} if args.karat_layers else {}
    if args.karatize == "replace":
        further |= {"images": [], "calibration_steps": 0} if images is None else {"images": images}
    try:
        made = karatize(
            model,
            heads=args.num_karat_heads,
            start=str(args.karatize),
            image_size=size[0] if size[0] == size[1] else size,
            **further,
            **operator,
        )
    except Exception as error:  # `@strict` wraps type errors in its own class.
        said = reason_of(error).replace("`layers`", "`karat_layers`").replace("`heads`", "`num_karat_heads`")
        raise InputError(f"`karatize`: {args.weights} cannot have these KArAt heads: {said}") from error
    made.config.architectures = [type(made).__name__]
    return made


def try_out(model: PreTrainedModel, size: tuple[int, int], source: str) -> list[str]:
    """
    Names of the parameters that have no part in the logits.

    Args:
        model: on the meta device.
        size: height and width of the images to come.
        source: which model, for errors.

    Raises:
        InputError: the model does not take such images.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        logits = model(pixel_values=torch.empty(1, 3, *size, device="meta")).logits
    except Exception as error:  # Whatever a layer says of it.
        own = fixed_image_size(model.config)
        fits = "" if own is None else f" Its own are of {own[0]} x {own[1]}."
        raise InputError(
            f"`image_size`: {source} does not take images of {size[0]} x {size[1]} pixels: "
            f"{reason_of(error).rstrip('.')}.{fits}"
        ) from error
    gradients = torch.autograd.grad(logits.sum(), list(trainable.values()), allow_unused=True)
    return [name for name, gradient in zip(trainable, gradients, strict=True) if gradient is None]


def load_backbone(config: PreTrainedConfig, source: str, size: tuple[int, int], **how: Any) -> PreTrainedModel:
    """
    A pre-trained classifier of a family, in fp32; its head is new where the classes are others, or it has none. What
    has no part in the logits is frozen: several processes would wait for its gradients.

    Args:
        config: of the model, with its classes.
        source: folder or Hub name.
        size: height and width of the images to come.
        how: further arguments of `from_pretrained`.
    """
    model, new = load_weights(source, "finetune", config, may_lack=HEAD, may_drop=UNUSED, **how)
    logger.info(f"Weights of {source}; new: {', '.join(sorted(new)[:4]) + more(sorted(new), 4) or 'nothing'}.")
    with torch.device("meta"):
        unused = try_out(class_of(config)._from_config(config), size, source)
    for name in unused:
        model.get_parameter(name).requires_grad_(False)
    return model
