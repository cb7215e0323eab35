# SPDX-License-Identifier: Apache-2.0
"""`karatize` puts learnable attention into a pre-trained vision model of Transformers."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .configuration_karat_vit import KArAtViTConfig, checked_layers
from .karat_backbones import MODELS as BACKBONES
from .karat_backbones import KArAtBackbone, attention_modules, parent
from .karat_convit import MODELS as CONVIT
from .karat_heads import STARTS, KArAtHeads


logger = logging.get_logger(__name__)

MODELS = (*BACKBONES, *CONVIT)
_DROPPED = ("model_type", "architectures", "auto_map", "transformers_version", "label_names")


def karatize(
    model: PreTrainedModel,
    layers=(-2, -1),
    heads: int | None = None,
    start: str = "residual",
    image_size=None,
    images=None,
    calibration_steps: int = 300,
    **operator,
) -> PreTrainedModel:
    """
    Put KArAt heads into a pre-trained vision model.

    Args:
        model: of one of the families in docs/karatize.md. It is left as it is: the result has copies of its weights.
        layers: indices of the blocks (of all stages, counted through), negative ones from the end.
        heads: the first so many heads of each block; `None`: all.
        start: `"residual"`: `softmax(S) V + gamma KArAt(S) V` with `gamma`, a number per head, 0 at the start, so that
            the model computes what it did. `"replace"`: KArAt takes the place of softmax, fitted to it on `images`.
        image_size: pixels, or (height, width), of the images to come; default: the configuration's. The number of
            tokens is part of the operator's weights.
        images: for `"replace"`, calibration images (B, C, H, W) from the image processor, or batches of them.
        calibration_steps: steps of Adam that fit each block's heads.
        operator: settings of the operator as in `KArAtViTConfig` (`basis_type`, `grid_size`, `karat_rank`, ...).

    Returns:
        A model of the family's class in `karat_backbones`, on the same device, in the same dtype and mode.

    Raises:
        ValueError: the model cannot be supported, or a setting is out of range; the message says why.
    """
    cls = _class_for(model)
    cls.family.check(model.config)
    if start not in STARTS:
        raise ValueError(f"`start` is {start!r}, expected one of {', '.join(map(repr, STARTS))}.")
    if (images is None) == (start == "replace"):
        wanted = "needs `images`, on which the operator is fitted" if images is None else "takes no `images`"
        raise ValueError(f"`start={start!r}` {wanted}.")
    if heads is not None and (isinstance(heads, bool) or not isinstance(heads, int) or heads < 1):
        raise ValueError(f"`heads` is {heads!r}, expected a number of heads, or `None` for all.")
    count = len(attention_modules(model, cls.family))
    karat = {
        "layers": checked_layers("layers", layers, count),
        "heads": heads,
        "start": start,
        "image_size": cls.family.image_size(model) if image_size is None else image_size,
        "operator": dict(operator),
    }
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _DROPPED}
    config = cls.config_class.from_dict({**settings, "karat": karat})
    config.id2label, config.label2id = model.config.id2label, model.config.label2id
    made = cls._from_config(config, attn_implementation=model.config._attn_implementation)
    _take_over(model, made)
    made.train(model.training)
    if start == "replace":
        errors = calibrate(made, [images] if isinstance(images, torch.Tensor) else images, calibration_steps)
        for name, (before, after) in errors.items():
            logger.info(
                f"{name}: relative error of the KArAt heads' output {before:.3f} before the fit, {after:.3f} after."
            )
    return made


def _take_over(source: PreTrainedModel, made: PreTrainedModel) -> None:
    """Give `made` the weights of `source`, and its new parameters the dtype and device of their block."""
    state = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
    missing, unexpected = made.load_state_dict(state, strict=False, assign=True)
    karat = made.karat_parameter_names()
    if set(missing) - karat or unexpected:
        raise RuntimeError(f"Weights do not fit: missing {sorted(set(missing) - karat)}, unexpected {unexpected}.")
    for name, parameter in source.named_parameters():
        made.get_parameter(name).requires_grad_(parameter.requires_grad)
    for name, buffer in source.named_buffers():
        owner, _, leaf = name.rpartition(".")
        made.get_submodule(owner)._buffers[leaf] = buffer.clone()
    for module in made.modules():
        if isinstance(getattr(module, "karat", None), KArAtHeads):
            like = next(parameter for name, parameter in module.named_parameters() if not name.startswith("karat."))
            module.karat.to(device=like.device, dtype=like.dtype)


def calibrate(model: PreTrainedModel, batches, steps: int = 300, learning_rate: float = 0.01) -> dict:
    """
    Fit the KArAt heads of a model with `start="replace"` to the softmax heads that they replaced: Adam on the squared
    error of each block's output, for the queries, keys and values of the softmax model. A fit that is no
    better than the start is taken back.

    Args:
        model: made by `karatize`.
        batches: images (B, C, H, W), an iterable of such batches. Their queries, keys and values stay in memory.
        steps: gradient steps per block.

    Returns:
        By name of the attention module, the error relative to the output's own size, before and after.
    """
    found = {name: module.karat for name, module in model.named_modules() if hasattr(module, "karat")}
    training = model.training
    model.eval()
    for heads in found.values():
        heads.recorded = []
    try:
        with torch.no_grad():
            for images in batches:
                like = next(model.parameters())
                model(pixel_values=images.to(like.device, like.dtype))
        records = {name: heads.recorded for name, heads in found.items()}
    finally:
        for heads in found.values():
            heads.recorded = None
        model.train(training)
    return {name: _fit(heads, records.pop(name), steps, learning_rate) for name, heads in found.items()}


def _fit(heads: KArAtHeads, records: list, steps: int, learning_rate: float) -> tuple[float, float]:
    """Fit one block's heads to the recorded softmax outputs; relative errors before and after."""
    parameters = [parameter for parameter in heads.operator.parameters() if parameter.requires_grad]
    size = sum(float(target.float().square().sum()) for *_, target in records)

    def loss_of(query, key, value, mask, scaling, target):
        output, _ = heads.attend(query, key, value, mask, scaling, "sdpa")
        return (output.float() - target.float()).square().sum() / size

    def total() -> float:
        with torch.no_grad():
            return sum(float(loss_of(*record)) for record in records)

    before = total()
    start = [parameter.detach().clone() for parameter in parameters]
    with torch.enable_grad():
        optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        for _ in range(steps):
            optimizer.zero_grad()
            for record in records:
                loss_of(*record).backward()
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()
    after = total()
    if not after < before:
        after = before
        with torch.no_grad():
            for parameter, value in zip(parameters, start):
                parameter.copy_(value)
    return before**0.5, after**0.5


def _class_for(model) -> Any:
    """The class of `karat_backbones` that holds a model like this one."""
    if isinstance(model, KArAtBackbone) or getattr(model.config, "model_type", None) == KArAtViTConfig.model_type:
        raise ValueError(f"A {type(model).__name__} has KArAt heads already: `karatize` takes the model without them.")
    for cls in MODELS:
        if parent(cls) is type(model):
            return cls
    names = ", ".join(parent(cls).__name__ for cls in MODELS)
    raise ValueError(f"{type(model).__name__} cannot be karatized: {_obstacle(model)}. Supported are {names}.")


def _obstacle(model) -> str:
    """Why a model of a class that is not known cannot have KArAt heads."""
    config = model.config
    kind = type(model).__name__
    if kind == "ViTMAEForPreTraining":
        return "ViT-MAE's pre-training hides and shuffles tokens, which KArAt heads know by their place"
    kv_heads = getattr(config, "num_key_value_heads", None)
    if kv_heads is not None and kv_heads != config.num_attention_heads:
        return f"its attention is grouped-query ({kv_heads} heads of keys for {config.num_attention_heads} of queries)"
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        return "it has cross attention, whose number of keys is not fixed by the image"
    if any(getattr(module, "is_causal", False) for module in model.modules()) or getattr(config, "is_decoder", False):
        return "its attention is causal, and KArAt rows are functions of all tokens"
    takes = model.main_input_name
    blind = "" if takes == "pixel_values" else f", which takes `{takes}` and no images"
    return f"no adapter for `model_type` {config.model_type!r}{blind}"
