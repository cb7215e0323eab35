# SPDX-License-Identifier: Apache-2.0
"""Configuration of a Vision Transformer with Kolmogorov-Arnold Attention (KArAt, arXiv 2503.10632)."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import fields
from numbers import Real
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, ViTConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.generation import GenerationConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

FORMAT_VERSION = 1

BASIS_TYPES = ("fourier", "spline", "wavelet", "rational")
WAVELET_TYPES = ("mexican_hat", "morlet", "dog", "meyer", "shannon")
MODULAR_MODES = ("phi1_w2", "w1_phi2")
SHARINGS = ("blockwise", "universal")
KARAT_INITS = ("scaled", "normal")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
# The elementwise, parameter-free, deterministic activations of Transformers' ACT2FN.
BASE_FUNCTIONS = (
    *("zero", "gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "leaky_relu", "linear", "mish", "quick_gelu"),
    *("relu", "relu2", "relu6", "sigmoid", "silu", "swish", "tanh"),
)

# What an operator computes, wherever it is.
OPERATOR_STRUCTURE = (
    *("basis_type", "wavelet_type", "grid_size", "spline_order", "grid_range", "rational_order", "base_fn"),
    *("karat_rank", "karat_depth", "modular_mode", "project_l1"),
)
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels")
# What the weights of a checkpoint were trained for: changing one of these makes another model.
STRUCTURAL_FIELDS = (
    *(*_SIZES, "hidden_act", "image_size", "patch_size", "qkv_bias"),
    *(*OPERATOR_STRUCTURE, "sharing", "num_karat_heads", "karat_layers"),
)

# Least values of whole numbers.
_LEAST = dict.fromkeys((*_SIZES, "grid_size", "karat_rank", "karat_depth", "num_karat_heads"), 1) | {"spline_order": 0}
_MOST_LAYERS = 10_000
# The two ways to name a backbone's stages, of which one follows from the other.
_STAGES = ("out_features", "out_indices")
# Keys that are taken although they are no dataclass fields.
_PRETRAINED_KEYS = {
    *("_attn_implementation_internal", "_commit_hash", "_experts_implementation_internal", "_name_or_path"),
    *("attn_implementation", "auto_map", "custom_pipelines", "distributed_config", "experts_implementation"),
    *("model_type", "name_or_path", "num_labels", *_STAGES, "output_attentions", "output_attention_scores"),
    *("quantization_config", "tie_last_hidden_states", "torch_dtype"),
}


@strict
class KArAtViTConfig(BackboneConfigMixin, ViTConfig):
    r"""
    Configuration of `KArAtViTModel` and `KArAtViTForImageClassification`: every field of Transformers' `ViTConfig`,
    and the fields below. Defaults give the paper's operator (`phi1_w2`, Fourier, blockwise) on ViT-Base.

    Args:
        basis_type (str, defaults to "fourier"):
            Basis of the learnable scalar functions: `"fourier"`, `"spline"`, `"wavelet"` or `"rational"`.
        wavelet_type (str, defaults to "mexican_hat"):
            `"mexican_hat"`, `"morlet"`, `"dog"`, `"meyer"` or `"shannon"`; read with `basis_type="wavelet"`.
        grid_size (int, defaults to 3):
            G: the number of harmonics of the Fourier basis, or of intervals of the B-spline's grid.
        spline_order (int, defaults to 3):
            Degree k of the B-splines (0 or more; 0 gives the scores no gradient).
        grid_range (pair of float, defaults to (-4.0, 4.0)):
            The scores that the B-spline's grid spans. The splines fade to zero k intervals beyond it.
        rational_order (pair of int, defaults to (5, 4)):
            Degrees (m, n) of numerator and denominator of the rational functions.
        base_fn (str, defaults to "zero"):
            `"zero"`, or the name of an activation in Transformers' `ACT2FN`, added to every scalar function as
            `scale_base * base_fn(x)`.
        karat_rank (int, defaults to 12):
            r, the width between the two steps of the operator (the official `hidden_dim`).
        karat_depth (int, defaults to 2):
            Steps of the operator. 1 is the full-rank operator (N x N functions). With `modular_mode=None`, a depth of 2
            or more composes that many learnable steps N -> r -> ... -> r -> N.
        modular_mode (str or None, defaults to "phi1_w2"):
            `"phi1_w2"`: scalar functions N -> r, then a linear projector r -> N (the paper's operator). `"w1_phi2"`: a
            linear projector N -> r, then scalar functions r -> N. `None`: every step has scalar functions.
        sharing (str, defaults to "blockwise"):
            `"blockwise"`: each block has its own operator. `"universal"`: all blocks share one.
        num_karat_heads (int, optional):
            The first `num_karat_heads` heads are KArAt and the others softmax. `None`: all heads are KArAt.
        karat_layers (list of int, optional):
            Indices of the blocks with KArAt heads (negative ones count from the end); the others are plain softmax
            blocks. `None`: all blocks.
        project_l1 (bool, defaults to False):
            Project each activated row on the probability simplex.
        train_basis (bool, defaults to True):
            `False` freezes the parameters of the basis and `scale_basis`. The projector still learns.
        train_base (bool, defaults to True):
            `False` freezes `scale_base`. With the zero base function it never needs a gradient.
        karat_init (str, defaults to "scaled"):
            `"scaled"` keeps the variance of the attention output, damps the harmonics and starts one component at the
            mean over the tokens; `"normal"` is the paper's N(0, 1).
        drop_path_rate (float, defaults to 0.0):
            Stochastic depth: rate of the last block; the others rise linearly towards it from 0 in the first.
        apply_layernorm, reshape_hidden_states (bool, defaults to True):
            Of `KArAtViTBackbone`: normalise the feature maps; give them as (B, hidden, height, width), without [CLS],
            and not as (B, N, hidden).
        out_features, out_indices (list, optional):
            Stages of `KArAtViTBackbone` by name ("stem" for the embeddings, "stage1" for the first block, ...) or by
            index, from 0 for the stem. Default: the last one.
        format_version (int):
            Version of the checkpoint format, written by the library.

    A keyword that is no field raises. What a saved configuration has beyond the fields (a later Transformers or another
    tool wrote it) is kept and named in a warning, and attributes that are set later are kept and saved.

    Raises:
        ValueError: a field is unknown, out of range, or does not go with another; the message names it.

    Example:

    ```python
    >>> from modeling_karat_vit import KArAtViTConfig, KArAtViTForImageClassification

    >>> config = KArAtViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, grid_size=3)
    >>> model = KArAtViTForImageClassification(config)
    ```"""

    model_type = "karat_vit"

    basis_type: str = "fourier"
    wavelet_type: str = "mexican_hat"
    grid_size: int | float = 3
    spline_order: int | float = 3
    grid_range: list | tuple = (-4.0, 4.0)
    rational_order: list | tuple = (5, 4)
    base_fn: str = "zero"
    karat_rank: int | float = 12
    karat_depth: int | float = 2
    modular_mode: str | None = "phi1_w2"
    sharing: str = "blockwise"
    num_karat_heads: int | float | None = None
    karat_layers: list | tuple | None = None
    project_l1: bool = False
    train_basis: bool = True
    train_base: bool = True
    karat_init: str = "scaled"
    drop_path_rate: float | int = 0.0
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        self._reject_unknown_keys(kwargs)
        self.check()
        self.set_output_features_output_indices(**{name: kwargs.pop(name, None) for name in _STAGES})
        super().__post_init__(**kwargs)

    @property
    def stage_names(self) -> list[str]:
        """The stages of a backbone: the embeddings, and each block."""
        return ["stem", *(f"stage{index}" for index in range(1, self.num_hidden_layers + 1))]

    def to_dict(self) -> dict:
        """As in Transformers; the stages of a backbone only where they are others than the last one."""
        output = super().to_dict()
        if output["out_indices"] == [self.num_hidden_layers]:
            for name in _STAGES:
                del output[name]
        return output

    @classmethod
    def _reject_unknown_keys(cls, keys) -> None:
        unknown = set(keys) - _known_keys()
        if unknown:
            raise ValueError(
                f"KArAtViTConfig does not know {_with_hints(unknown)}. Correct or remove the key; "
                "`help(KArAtViTConfig)` lists every field."
            )

    def validate_output_attentions(self) -> None:
        """Accept `output_attentions` without `eager`, which Transformers forbids: here such calls run `eager`."""

    def check(self) -> None:
        """Normalise the numbers and pairs, and raise a `ValueError` for anything that cannot be built."""
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"`format_version` is {self.format_version}, and this release reads up to {FORMAT_VERSION}: the "
                "checkpoint was written by a newer release of KArAt-ViT. Upgrade the package to load it."
            )
        for name, allowed in (
            ("basis_type", BASIS_TYPES),
            ("wavelet_type", WAVELET_TYPES),
            ("base_fn", BASE_FUNCTIONS),
            ("modular_mode", (*MODULAR_MODES, None)),
            ("sharing", SHARINGS),
            ("karat_init", KARAT_INITS),
            ("problem_type", (*PROBLEM_TYPES, None)),
            ("hidden_act", tuple(ACT2FN)),
            ("pooler_act", tuple(ACT2FN)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"`{name}` is {value!r}, expected one of {', '.join(map(repr, allowed))}.")
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) is not None:
                setattr(self, name, _integer(name, value, least))
        self.grid_range = _pair("grid_range", self.grid_range, _finite)
        if self.grid_range[0] >= self.grid_range[1]:
            raise ValueError(f"`grid_range` is {self.grid_range}, expected (low, high) with low < high.")
        self.rational_order = _pair("rational_order", self.rational_order, lambda name, x: _integer(name, x, 0))
        if self.modular_mode is not None and self.karat_depth != 2:
            raise ValueError(
                f"`modular_mode={self.modular_mode!r}` is an operator of two steps, and `karat_depth` is "
                f"{self.karat_depth}. Set `modular_mode=None` for a depth of 1 or more than 2, or `karat_depth=2`."
            )
        self.drop_path_rate = _finite("drop_path_rate", self.drop_path_rate)
        for names, wanted, fits in (
            (("drop_path_rate",), "at least 0 and less than 1", lambda x: 0.0 <= x < 1.0),
            (("hidden_dropout_prob", "attention_probs_dropout_prob"), "a probability, 0 to 1", lambda x: 0 <= x <= 1),
            (("layer_norm_eps", "initializer_range"), "0 or more", lambda x: 0.0 <= x < math.inf),
        ):
            for name in names:
                if not fits(getattr(self, name)):
                    raise ValueError(f"`{name}` is {getattr(self, name)}, expected {wanted}.")
        if self.num_hidden_layers > _MOST_LAYERS:  # Each has a name.
            raise ValueError(f"`num_hidden_layers` is {self.num_hidden_layers}, expected at most {_MOST_LAYERS}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) is no multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        if self.num_karat_heads is not None and self.num_karat_heads > self.num_attention_heads:
            raise ValueError(
                f"`num_karat_heads` is {self.num_karat_heads}, and the model has "
                f"`num_attention_heads={self.num_attention_heads}`."
            )
        if self.karat_layers is not None:
            self.karat_layers = checked_layers("karat_layers", self.karat_layers, self.num_hidden_layers)
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            sides = [_integer(name, side, 1) for side in (value if isinstance(value, (list, tuple)) else [value])]
            if len(sides) > 2 or not sides:
                raise ValueError(f"`{name}` is {value}, expected an integer or a (height, width) pair.")
            setattr(self, name, sides if isinstance(value, (list, tuple)) else sides[0])
        if 0 in self.patch_grid():
            raise ValueError(f"`patch_size` {self.patch_size} is larger than `image_size` {self.image_size}.")

    def patch_grid(self, image_size: "int | Sequence[int] | None" = None) -> tuple[int, int]:
        """Count the patches along (height, width) of an image of `image_size` pixels (default: the model's own)."""
        return patches_of(self.image_size if image_size is None else image_size, self.patch_size)

    @property
    def num_tokens(self) -> int:
        """Number of tokens N: the patches and the [CLS] token."""
        height, width = self.patch_grid()
        return height * width + 1

    def is_karat_layer(self, index: int) -> bool:
        """Tell whether block `index` has KArAt heads."""
        return self.karat_layers is None or index in self.karat_layers

    def describe_operator(self) -> str:
        """Say in one line which operator runs, for logs and model cards."""
        basis = {
            "fourier": f"Fourier (G={self.grid_size})",
            "spline": f"B-spline (G={self.grid_size}, order {self.spline_order}, range {self.grid_range})",
            "wavelet": f"wavelet ({self.wavelet_type})",
            "rational": f"rational {self.rational_order}",
        }[self.basis_type]
        if self.karat_depth == 1:
            operator = f"full rank, Phi: {self.num_tokens} -> {self.num_tokens}"
        elif self.modular_mode is not None:
            operator = f"{self.modular_mode}, r={self.karat_rank}"
        else:
            operator = f"depth {self.karat_depth}, all steps learnable, r={self.karat_rank}"
        some = self.num_karat_heads not in (None, self.num_attention_heads)
        heads = f"{self.num_karat_heads} of {self.num_attention_heads} heads" if some else "all heads"
        blocks = "all blocks" if self.karat_layers is None else f"blocks {self.karat_layers}"
        extras = [f"base {self.base_fn}", *(["L1 projection"] if self.project_l1 else [])]
        extras += [] if self.train_basis else ["basis frozen"]
        extras += [] if self.train_base or self.base_fn == "zero" else ["base frozen"]
        return f"KArAt {operator}, {basis}, {', '.join(extras)}, {self.sharing}, {heads}, {blocks}"

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls._adopt(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        config_dict = cls._adopt(dict(config_dict))
        if any(kwargs.get(name) is not None for name in _STAGES):
            config_dict = {key: value for key, value in config_dict.items() if key not in _STAGES}
        # Fields given as keywords take part in the construction, so that they are checked with the others.
        for key in [key for key in kwargs if key in _own_keys()]:
            config_dict[key] = kwargs.pop(key)
        # What else is given may be meant for the model (`device_map`, ...), unless it looks like a field misspelt.
        cls._reject_unknown_keys(
            key
            for key in kwargs
            if key not in _known_keys() and difflib.get_close_matches(key, _own_keys(), n=1, cutoff=0.8)
        )
        extra = {key: config_dict.pop(key) for key in sorted(set(config_dict) - _known_keys())}
        if extra:
            logger.warning_once(
                f"The saved configuration has fields that KArAtViTConfig does not know: {_with_hints(extra)}. They are "
                "kept, and the model reads none of them."
            )
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        for key, value in extra.items():
            setattr(config, key, value)
        return made

    @classmethod
    def from_json_file(cls, json_file):
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    def _adopt(cls, config_dict: dict) -> dict:
        """Make the configuration of a ViT or DeiT checkpoint ours: keep what we know, name what is dropped."""
        source = config_dict.get("model_type", cls.model_type)
        if source == cls.model_type:
            return config_dict
        if source not in ("vit", "deit"):
            raise ValueError(
                f"The configuration is of model type {source!r}: KArAtViTConfig reads 'karat_vit', and takes over the "
                "backbone of 'vit' and 'deit' checkpoints."
            )
        dropped = sorted(set(config_dict) - _known_keys())
        if dropped:
            logger.warning_once(
                f"Keys of the {source} configuration that KArAt-ViT does not use: {', '.join(dropped)}."
            )
        ours = {key: value for key, value in config_dict.items() if key in _known_keys()}
        for key in ("model_type", "auto_map", "architectures"):
            ours.pop(key, None)
        return ours


def _known_keys() -> set[str]:
    names = {field.name for field in fields(KArAtViTConfig)}
    return names | _PRETRAINED_KEYS | set(GenerationConfig._get_default_generation_params())


def _with_hints(keys) -> str:
    """The keys, each with the known one that it resembles."""
    hints = []
    for key in sorted(keys):
        close = difflib.get_close_matches(key, _known_keys(), n=1)
        hints.append(f"`{key}`" + (f" (did you mean `{close[0]}`?)" if close else ""))
    return ", ".join(hints)


def _own_keys() -> set[str]:
    """The fields of KArAt and of ViT, without those of every Transformers configuration."""
    return {field.name for field in fields(KArAtViTConfig)} - {field.name for field in fields(PreTrainedConfig)} | set(
        _STAGES
    )


def height_and_width(size) -> tuple[int, int]:
    """A size in pixels, a number or a pair, as (height, width)."""
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    return int(sides[0]), int(sides[-1])


def patches_of(image_size, patch_size) -> tuple[int, int]:
    """Count the patches along (height, width) of an image; sizes in pixels as `height_and_width` takes them."""
    (height, width), (rows, columns) = height_and_width(image_size), height_and_width(patch_size)
    return height // rows, width // columns


def checked_layers(name: str, values: Sequence, count: int) -> list[int]:
    """
    Indices of blocks, negative ones counted from the end, as sorted natural numbers.

    Raises:
        ValueError: there are none, no such block, or one is named twice; the message names the setting, `name`.
    """
    layers = [_integer(name, value, -count) for value in values]
    if layers and max(layers) >= count:
        raise ValueError(f"`{name}` names block {max(layers)}, and the model has blocks 0 to {count - 1}.")
    chosen = sorted({index % count for index in layers})
    if not chosen or len(chosen) != len(layers):
        raise ValueError(f"`{name}` is {list(values)}, expected blocks, each once.")
    return chosen


def _integer(name: str, value: Any, minimum: int) -> int:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value % 1:
        raise ValueError(f"`{name}` is {value!r}, expected an integer.")
    if value < minimum:
        raise ValueError(f"`{name}` is {value}, expected {minimum} or more.")
    return int(value)


def _finite(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"`{name}` is {value!r}, expected a finite number.")
    return float(value)


def _pair(name: str, value, convert) -> tuple:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"`{name}` is {value!r}, expected a pair of numbers.")
    return tuple(convert(name, element) for element in value)


KArAtViTConfig.register_for_auto_class()

__all__ = ["KArAtViTConfig"]
