# SPDX-License-Identifier: Apache-2.0
"""
The command line of the official KArAt code (a DeiT derivative), translated to our settings.

`OFFICIAL_FLAGS` is the only place that knows the official spellings: the parser, the translation, the table of
docs/official-command-line.md and the tests read it. Spellings with `-` and `_` are both accepted, as for every flag.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import not_
from typing import Any

from ..errors import InputError, did_you_mean


# Names of the official code, lower case and without separators -> ours. Our own names are accepted beside them.
BASES = {name: name for name in ("fourier", "spline", "wavelet", "rational")} | {"bspline": "spline"}
WAVELETS = {"mexicanhat": "mexican_hat", "ricker": "mexican_hat", "derivativeofgaussian": "dog"}
# `torch.nn` modules by the name of Transformers' activation that computes the same.
BASE_FUNCTIONS = {"ZeroModule": "zero", "Identity": "linear", "LeakyReLU": "leaky_relu"} | {
    name: name.lower() for name in ("SiLU", "GELU", "ReLU", "ReLU6", "Mish", "Sigmoid", "Tanh")
}
OPTIMIZERS = {name: name for name in ("sgd", "adagrad", "adafactor", "rmsprop")} | {"adamw": "adamw_torch"}


def basis_type(value: str) -> str:
    """`FourierBasis` -> `fourier`; a name that is none of the official ones is left for the configuration to judge."""
    return BASES.get(_plain(value).removesuffix("basis"), value)


def wavelet_type(value: str) -> str:
    """`MexicanHat`, `mexican-hat` -> `mexican_hat`; `Morlet` -> `morlet`."""
    return WAVELETS.get(_plain(value), value.lower())


def base_fn(value: str) -> str:
    """`ZeroModule` -> `zero`, `nn.SiLU` -> `silu`: looked up by name, never evaluated."""
    name = value.removeprefix("torch.").removeprefix("nn.").removesuffix("()")
    if name in BASE_FUNCTIONS:
        return BASE_FUNCTIONS[name]
    if name != value:
        known = [f"nn.{known}" for known in BASE_FUNCTIONS if known != "ZeroModule"]
        raise InputError(f"--base_fn {value}: no such base function. Known: ZeroModule, {', '.join(known)}.")
    return value


# What distinguishes timm's optimisers from Transformers' in `optim`.
TIMM = "timm_"


def optimizer(value: str) -> str:
    """timm's name of an optimiser -> Transformers' where it has the same one, else `timm_NAME`."""
    return OPTIMIZERS.get(value.lower()) or TIMM + check_timm_optimizer(value.lower())


def check_timm_optimizer(value: str) -> str:
    """The name without `timm_`, if timm has that optimiser and it can be used here."""
    try:
        from timm.optim import get_optimizer_info, list_optimizers
    except ImportError as error:
        raise InputError(f"The optimiser {value} needs timm, which is not installed: pip install timm.") from error
    name = value.removeprefix(TIMM)
    # Second-order optimisers need a second backward pass.
    usable = map(str, list_optimizers(exclude_filters=["bnb*"]))
    known = [optimizer for optimizer in usable if not get_optimizer_info(optimizer).second_order]
    if name not in known:
        hint = f"{did_you_mean(name, known)}. timm has {', '.join(known)}"
        raise InputError(f"There is no optimiser {value}{hint}; `--optim` takes those as timm_NAME, and Transformers'.")
    return name


def scheduler(value: str) -> str:
    """timm's name of a schedule, with a hint for those that are done in another way."""
    instead = {
        "plateau": "reduce_lr_on_plateau (with --metric_for_best_model loss)",
        "wsd": "warmup_stable_decay",
        "rsqrt": "inverse_sqrt",
        "none": "constant",
    }
    if value in instead:
        raise InputError(f"--sched {value}: use --lr_scheduler_type {instead[value]}, which is Transformers' own.")
    return value


def device(value: str) -> bool:
    """`cpu` or `cuda`, as Transformers' `use_cpu`."""
    import torch

    if value == "cpu":
        return True
    if value != "cuda":
        raise InputError(f"--device {value}: expected cpu or cuda; CUDA_VISIBLE_DEVICES chooses among several GPUs.")
    if not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device here. Leave the flag out, or give --device cpu.")
    return False


def positive(value: int) -> int:
    """The number of KArAt heads, of which there must be any."""
    if value < 1:
        raise InputError(f"--num_attention {value}: expected the number of KArAt heads, 1 or more.")
    return value


def _plain(value: str) -> str:
    return re.sub(r"[^a-z0-9]", "", value.lower())


def name_of(flag: str) -> str:
    """`--some-flag`, or `--some_flag` and words after it -> `some_flag`."""
    return flag.split(" ")[0].lstrip("-").replace("-", "_")


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


@dataclass(frozen=True)
class OfficialFlag:
    """A flag as the official code spells it; `note` is what it does, where our setting's help does not say it."""

    flag: str
    setting: str | tuple[str, ...] = ()  # None where what the flag asks for is always so.
    convert: Callable[[Any], Any] | None = None  # From the flag's value (`True` for a switch) to the setting's.
    kind: type | None = str  # Of the flag's value, where it is no setting's name; `None` for a switch.
    nargs: str | int | None = None
    note: str = ""

    @property
    def settings(self) -> tuple[str, ...]:
        return (self.setting,) if isinstance(self.setting, str) else self.setting

    @property
    def name(self) -> str:
        return name_of(self.flag)


def _same(*flags: str) -> list[OfficialFlag]:
    """Flags that are called as our settings are."""
    return [OfficialFlag(flag, name_of(flag)) for flag in flags]


OFFICIAL_FLAGS: tuple[OfficialFlag, ...] = (
    # Model
    *_same("--model", "--modular_mode", "--grid_range", "--rational_order", "--project_l1"),
    OfficialFlag("--input-size", "image_size", lambda value: [value], int, note="side of the square image"),
    OfficialFlag("--drop", "hidden_dropout_prob", None, float),
    OfficialFlag("--drop-path", "drop_path_rate", None, float),
    OfficialFlag("--basis_type", "basis_type", basis_type, note="`FourierBasis`, `SplineBasis`, `WaveletBasis`, ..."),
    OfficialFlag("--wavelet_type", "wavelet_type", wavelet_type),
    OfficialFlag("--grid", "grid_size", None, int),
    OfficialFlag("--order", "spline_order", None, int),
    OfficialFlag("--base_fn", "base_fn", base_fn, note="`ZeroModule` or `nn.SiLU`, ...: looked up, never evaluated"),
    OfficialFlag("--hidden_dim", "karat_rank", None, int),
    OfficialFlag("--depth", "karat_depth", None, int, note="without `--modular_attn`, every step is learnable"),
    OfficialFlag("--modular_attn", "modular_mode", _constant("phi1_w2"), None, note="`phi1_w2` without a mode"),
    OfficialFlag("--blockwise", "sharing", _constant("blockwise"), None),
    OfficialFlag("--universal", "sharing", _constant("universal"), None),
    OfficialFlag("--mixed_head", "num_karat_heads", _constant(0), None, note="1, 3, 6 heads for Tiny, Small, Base"),
    OfficialFlag("--num_attention", "num_karat_heads", positive, int, note="needs `--mixed_head`"),
    OfficialFlag("--basis_not_trainable", "train_basis", not_, None),
    OfficialFlag("--base_not_trainable", "train_base", not_, None),
    # Data
    *_same("--data-set", "--data-path", "--eval-crop-ratio", "--color-jitter", "--train-interpolation"),
    *_same(
        "--mixup",
        "--cutmix",
        "--cutmix-minmax",
        "--mixup-prob",
        "--mixup-switch-prob",
        "--mixup-mode",
        "--repeated-aug",
    ),
    OfficialFlag("--num_workers", "dataloader_num_workers", None, int),
    OfficialFlag("--pin-mem", "dataloader_pin_memory", None, None),
    OfficialFlag("--no-pin-mem", "dataloader_pin_memory", not_, None),
    OfficialFlag("--aa", "auto_augment", note="`rand-m15-n2-mstd1.0-inc1`, ... or `none`"),
    OfficialFlag("--reprob", "random_erasing", None, float),
    OfficialFlag("--remode", "random_erasing_mode"),
    OfficialFlag("--recount", "random_erasing_count", None, int),
    OfficialFlag("--no-repeated-aug", "repeated_aug", not_, None),
    # Optimisation
    *_same("--momentum", "--weight-decay", "--attn_lr"),
    *_same("--warmup-epochs", "--warmup-lr", "--min-lr", "--decay-epochs", "--decay-rate", "--cooldown-epochs"),
    *_same("--model-ema", "--model-ema-decay"),
    OfficialFlag("--batch-size", "per_device_train_batch_size", None, int),
    OfficialFlag("--epochs", "num_train_epochs", None, float),
    OfficialFlag("--opt", "optim", optimizer, note="any of timm's"),
    OfficialFlag("--opt-eps", "adam_epsilon", None, float),
    OfficialFlag("--opt-betas", ("adam_beta1", "adam_beta2"), None, float, 2),
    OfficialFlag("--clip-grad", "max_grad_norm", None, float),
    OfficialFlag("--lr", "base_lr", None, float, note="per 512 images of the global batch"),
    OfficialFlag("--unscale-lr", "scale_lr", not_, None, note="`--lr` as it is, whatever the batch"),
    OfficialFlag("--sched", "sched", scheduler),
    OfficialFlag("--smoothing", "label_smoothing_factor", None, float),
    OfficialFlag("--no-model-ema", "model_ema", not_, None),
    OfficialFlag("--model-ema-force-cpu", "model_ema_device", _constant("cpu"), None),
    # Run
    *_same("--output_dir", "--seed", "--finetune", "--run_id"),
    OfficialFlag("--device", "use_cpu", device),
    OfficialFlag("--resume", "resume_from_checkpoint"),
    OfficialFlag("--eval", "do_train", _constant(False), None, note="evaluate the checkpoint of `--resume`"),
    OfficialFlag("--run_name", "run_name", note="reported to Weights & Biases or TensorBoard, if installed"),
    OfficialFlag("--dist-eval", kind=None, note="as it is: evaluation always uses all processes"),
)

BY_NAME = {flag.name: flag for flag in OFFICIAL_FLAGS}

# Converters that also apply to a recipe's values, where official and native spelling are the same.
NORMALISE = {flag.setting: flag.convert for flag in OFFICIAL_FLAGS if flag.convert and flag.name == flag.setting}


@dataclass(frozen=True)
class Given:
    """One setting that a user gave: how it was spelled, and its value as ours."""

    spelling: str
    setting: str
    value: Any


def translate(name: str, spelling: str, value: Any) -> list[Given]:
    """Translate one official flag, a key of `BY_NAME`, with its value as argparse read it (`True` for a switch)."""
    flag = BY_NAME[name]
    if len(flag.settings) == 1:
        value = [flag.convert(value) if flag.convert else value]
    return [Given(spelling, *pair) for pair in zip(flag.settings, value, strict=True)] if flag.settings else []


def combine(given: list[Given]) -> list[Given]:
    """
    Apply the official rules that concern more than one flag.

    * `--modular_attn` is refined by `--modular_mode`; `--depth` without either is the operator that is not modular.
    * `--mixed_head` is refined by `--num_attention`, which means nothing without it.
    """
    names = {name_of(item.spelling) for item in given}
    if "num_attention" in names and "mixed_head" not in names:
        raise InputError("--num_attention counts the KArAt heads of mixed attention: add --mixed_head.")
    pairs = (("modular_mode", "modular_attn"), ("num_attention", "mixed_head"))
    refined = {refined for by, refined in pairs if by in names}
    combined = [item for item in given if name_of(item.spelling) not in refined]
    if "depth" in names and not names & {"modular_attn", "modular_mode"}:
        combined.append(Given("--depth without --modular_attn", "modular_mode", "none"))
    return combined


def split_numbers(value: Any) -> list[str]:
    """The numbers of `-4 4`, `[-4, 4]`, `(-4,4)` or `-4,4`, as argparse hands them over."""
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return [part for part in re.split(r"[\s,]+", text.strip("()[] ")) if part]


# Flags of Transformers' `run_image_classification.py`, of earlier `TrainingArguments` and of timm's `train.py` -> ours.
OTHERS = {
    "train_dir": "--data_path, the folder with train/ and validation/ in it",
    "validation_dir": "--data_path, the folder with train/ and validation/ in it",
    "data_dir": "--data_path",
    "model_name_or_path": "--finetune for weights to start from, --model for an architecture",
    "model_type": "--model",
    "config_name": "--model",
    "image_column_name": "--image_column",
    "label_column_name": "--label_column",
    "train_val_split": "--validation_fraction",
    "train_split_name": "--train_split",
    "ignore_mismatched_sizes": "--finetune, which gives other classes a new head",
    "per_gpu_train_batch_size": "--per_device_train_batch_size",
    "per_gpu_eval_batch_size": "--per_device_eval_batch_size",
    "evaluation_strategy": "--eval_strategy",
    "no_cuda": "--use_cpu",
    "warmup_ratio": "--warmup_steps with a number below 1, or --warmup_epochs",
    "overwrite_output_dir": "another --output_dir: nothing is overwritten",
    "img_size": "--image_size",
    "workers": "--dataloader_num_workers",
    "amp": "--bf16",
    "teacher_model": "--teacher_attention, which takes over a teacher's attention maps",
}


def suggest(flag: str, known: Iterable[str]) -> str:
    """A hint for a flag or setting that does not exist: what another script's is here, or what is spelt alike."""
    other = OTHERS.get(name_of(flag))
    return f" (here: {other})" if other else did_you_mean(flag, known)


def markdown_table() -> str:
    """The table of docs/official-command-line.md, from official flag to our setting."""
    lines = ["| official flag | our setting | remark |", "| --- | --- | --- |"]
    for flag in OFFICIAL_FLAGS:
        settings = ", ".join(f"`{setting}`" for setting in flag.settings)
        lines.append(f"| `{flag.flag}` | {settings} | {flag.note} |")
    return "\n".join(lines)
