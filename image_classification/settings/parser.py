# SPDX-License-Identifier: Apache-2.0
"""
How settings are read and checked.

Four sources, each over the one before: the defaults of `arguments.py`, the model preset (for the model's own fields),
the recipe (YAML), the command line. One setting given twice with different values in the same source is an error that
names both spellings; so is a key or flag that does not exist. Nothing is abbreviated.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from transformers.training_args import OptimizerNames

from ..errors import InputError, did_you_mean, reason_of, refusing
from ..paths import CONFIGURATION
from . import official_flags
from .arguments import (
    DEFAULT_RECIPE,
    EXCLUSIVE,
    FALLING,
    SCHEDULES,
    THEIR_RANGES,
    DataArguments,
    ModelArguments,
    Numbers,
    Range,
    RunArguments,
    Settings,
    default_record,
)
from .official_flags import OFFICIAL_FLAGS, Given, name_of


class _Record(argparse.Action):
    """Keeps the spelling beside the value."""

    def __call__(self, parser, namespace, values, option_string=None):
        if option_string is None:
            setattr(namespace, self.dest, values)
        else:
            namespace.given.append((option_string, self.dest, self.const if self.nargs == 0 else values))


class _Help(argparse.HelpFormatter):
    """Each flag once (`-` and `_` are the same in all of them), and defaults where there are any."""

    def _format_action_invocation(self, action):
        if not action.option_strings or "-h" in action.option_strings:
            return super()._format_action_invocation(action)
        value = "" if action.nargs == 0 else " " + self._format_args(action, action.dest.rpartition(".")[2].upper())
        return action.option_strings[0] + value

    def _get_help_string(self, action):
        shown = action.help or ""
        if action.option_strings and action.default not in (None, False, argparse.SUPPRESS):
            default = getattr(action.default, "value", action.default)
            shown += f" (default: {str(default).replace('%', '%%')})"
        return shown


class Parser(HfArgumentParser):
    """`HfArgumentParser` over the three dataclasses, with the official flags beside them."""

    def __init__(self):
        super().__init__(
            prog="run_image_classification.py",
            usage="%(prog)s [recipe.yaml] [flags]",
            formatter_class=_Help,
            allow_abbrev=False,
            description=(
                "Train and evaluate image classifiers with Kolmogorov-Arnold Attention. Without arguments: a small "
                "model on the embedded handwritten digits. A recipe gives settings, flags override them."
            ),
            epilog=(
                "Examples: run_image_classification.py --model vit_tiny_patch16_224_karat --data_path path/to/imagenet "
                "--output_dir outputs/tiny | run_image_classification.py configuration/digits.yaml --num_train_epochs 5"
            ),
        )
        self.register("action", None, _Record)
        self.register("action", "store_true", functools.partial(_Record, nargs=0, const=True))
        self.register("action", "store_false", functools.partial(_Record, nargs=0, const=False))
        self.add_argument("recipe", nargs="?", help="YAML file of settings, such as configuration/digits.yaml.")
        for group in (ModelArguments, DataArguments, RunArguments):
            self._add_dataclass_arguments(group)
        self.settings: dict[str, argparse.Action] = {}
        for action in self._actions:
            if action.option_strings and action.dest != "help":
                self.settings.setdefault(action.dest, action)  # Not the `--no_...` after it.
        for action in self.settings.values():
            if action.type is string_to_bool:
                # A bare `--flag` means true, also where the setting may be unset.
                action.type, action.nargs, action.const = truth, "?", True
        # Transformers' setting needs a value; the bare flag is ours.
        debug = self.settings["debug"]
        debug.nargs, debug.const = "?", debug.default
        debug.help += " Without a value: show the traceback of an error."
        group = self.add_argument_group("official command line (translated to the settings above)")
        for flag in OFFICIAL_FLAGS:
            if flag.name in self.settings:
                continue
            to = f"sets {' and '.join(flag.settings)}" if flag.settings else ""
            spellings = dict.fromkeys([flag.flag, f"--{flag.name.replace('_', '-')}", f"--{flag.name}"])
            options = {"help": "; ".join(part for part in (to, flag.note) if part), "dest": f"official.{flag.name}"}
            if flag.kind is None:
                options |= {"action": "store_true"}
            else:
                options |= {"nargs": flag.nargs, "type": flag.kind}
            group.add_argument(*spellings, **options)

    def error(self, message):
        if message.startswith("unrecognized arguments:"):
            known = [f"--{name}" for name in self.settings] + [flag.flag for flag in OFFICIAL_FLAGS]
            words = [word.partition("=")[0] for word in message.split(":", 1)[1].split() if word.startswith("--")]
            hints = [word + official_flags.suggest(word, known) for word in words]
            message = f"unknown flag {', '.join(hints)}; --help lists all" if hints else message
        super().error(message)

    def coerce(self, source: str, name: str, value: str | list[str] | dict) -> Any:
        """What a recipe gives for a setting, as the flag of that name would read it (`1e-3` is no number to YAML)."""
        action = self.settings[name]
        if isinstance(value, list if name in MAPPINGS else dict):
            expected = "a mapping" if name in MAPPINGS else "no mapping"
            raise InputError(f"{source}: `{name}` is {value!r}, expected {expected}.")
        if isinstance(value, dict):
            return value
        if isinstance(value, list) and action.nargs != "+":
            raise InputError(f"{source}: `{name}` is the list {value!r}, expected one value.")
        convert: Any = action.type
        try:
            if action.nargs == "+":
                return [convert(element) for element in official_flags.split_numbers(value)]
            read = convert(value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            kind = getattr(convert, "__name__", str(convert))
            raise InputError(f"{source}: `{name}` is {value!r}, expected {EXPECTED.get(kind, kind)}.") from error
        self.check_choice(name, read, f"{source}: ")
        return read

    def check_choice(self, name: str, value: Any, source: str = "") -> None:
        """Raise an `InputError` for a value that is none of the setting's choices, if it has any."""
        if name == "optim" and str(value).startswith(official_flags.TIMM):
            return  # Checked where timm is asked.
        choices = {"sched": SCHEDULES, "optim": [known.value for known in OptimizerNames]}
        if (known := choices.get(name, self.settings[name].choices)) is not None and value not in known:
            hint = did_you_mean(str(value), map(str, known))
            raise InputError(f"{source}`{name}` is {value!r}{hint}, expected one of {', '.join(map(str, known))}.")


def truth(text: str) -> bool:
    """`true`, `yes`, `on`, `t`, `y` or `1`, or their opposites."""
    return string_to_bool({"on": "yes", "off": "no"}.get(text.lower(), text))


# In words, where the name of a type is none that everybody knows.
EXPECTED = {"truth": "true or false", "int": "a whole number (int)", "float": "a number (float)", "str": "text"}


def parse_settings(argv: list[str]) -> Settings:
    """
    Read the command line (the words after the script's name) and the recipe it names.

    Raises:
        InputError: a setting is contradicted, misspelt, of the wrong type, or none of the choices.
        SystemExit: argparse met `--help` or a flag that does not exist.
    """
    parser = Parser()
    # Defaults come later: a namespace that already has them keeps argparse from writing (and converting) its own.
    blank = {action.dest: None for action in parser._actions}
    namespace = parser.parse_args(argv, argparse.Namespace(**blank, given=[]))
    flags = _from_flags(namespace.given)
    for name in {"sched", "optim"} & flags.keys():
        parser.check_choice(name, flags[name])
    recipe = namespace.recipe
    if recipe is None and not any(flags.get(name) for name in ("model", "finetune", *_DATA_SOURCES)):
        if flags.get("resume_from_checkpoint") is None or flags.get("do_train", True):
            recipe = str(DEFAULT_RECIPE)
    from_recipe, reported = _from_recipe(parser, Path(recipe)) if recipe else ({}, {})
    if flags.get("do_train") is False:
        # The folder of the training run: an evaluation writes only where the command says.
        from_recipe.pop("output_dir", None)
    given = _without_counterparts(from_recipe, flags) | flags
    # What is given excludes the default of its counterpart.
    given |= {"sched": None} if "lr_scheduler_type" in given else {}
    given |= {"warmup_epochs": None} if "warmup_steps" in given else {}
    record = default_record() | given
    _check(record)

    def made(group: type) -> Any:
        return group(**{name: record[name] for name in default_record(group)})

    with refusing("The settings of training cannot be used"):  # By Transformers, accelerate or DeepSpeed.
        groups = made(ModelArguments), made(DataArguments), made(RunArguments)
    return Settings(*groups, record, Path(recipe) if recipe else None, reported)


# Settings whose value is a mapping: in a recipe as such, on the command line in JSON.
MAPPINGS = (*RunArguments._VALID_DICT_FIELDS, "liger_kernel_config")
# Transformers' settings with which a run of this script would fail, after an epoch or at once, or without a word.
NOT_HERE = {
    "accelerator_config": "how images are drawn, shared among processes and accumulated is this script's own",
    "auto_find_batch_size": "the learning rate is that of the batch, so choose `per_device_train_batch_size`",
    "bf16_full_eval": "the weights would be saved as they were rounded; `bf16` evaluates in bfloat16, too",
    "fp16_full_eval": "the weights would be saved as they were rounded; `fp16` evaluates in half precision, too",
    "batch_eval_metrics": "the metrics are computed over all images",
    "eval_do_concat_batches": "the metrics are computed over all images",
    "prediction_loss_only": "the accuracy needs the predictions",
    "label_names": "the labels are called `labels`",
    "include_for_metrics": "accuracy and loss need nothing more",
    "train_sampling_strategy": "images have no length; `repeated_aug` draws in another way",
    "use_liger_kernel": "Liger has no kernels for ViT",
    "liger_kernel_config": "Liger has no kernels for ViT",
    "parallelism_config": "the layout is that of the `accelerate` configuration, or of `fsdp`",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint in any case",
}
# What a recipe may name of the paper's figures.
REPORTED = {"top1", "top5"}
_DATA_SOURCES = ("data_set", "data_path", "dataset_name")


def _from_flags(spelt: list[tuple[str, str, Any]]) -> dict[str, Any]:
    given = []
    # Of one flag given twice, the last one wins.
    last = {name_of(spelling): (spelling, *rest) for spelling, *rest in spelt}
    for spelling, name, value in last.values():
        if name.startswith("official."):
            given += official_flags.translate(name.removeprefix("official."), spelling, value)
        else:
            given.append(Given(spelling, name, _normalised(name, value)))
    given = official_flags.combine(given)
    settings: dict[str, Given] = {}
    for item in given:
        before = settings.setdefault(item.setting, item)
        if before is not item and before.value != item.value:
            raise InputError(
                f"{before.spelling} and {item.spelling} contradict each other: they set `{item.setting}` to "
                f"{before.value!r} and {item.value!r}. Give one of them."
            )
    _refuse_two_ways({name: item.spelling for name, item in settings.items()})
    return {name: item.value for name, item in settings.items()}


def _refuse_two_ways(spelt: dict[str, str], source: str = "") -> None:
    """Raise an `InputError` where one source sets one thing by two settings."""
    for name, other in EXCLUSIVE:
        if name in spelt and other in spelt:
            raise InputError(f"{source}{spelt[name]} and {spelt[other]} set one thing (`{name}`, `{other}`): give one.")


def _from_recipe(parser: Parser, path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, float]]:
    """
    The settings of a recipe, over those that it `extends`; and the figures that the paper reports for it, in percent.
    """
    if path.resolve() in above:
        raise InputError(f"{path} extends itself, by way of {', '.join(str(other) for other in above)}.")
    if path.suffix not in (".yaml", ".yml"):
        by = f"{above[-1]} extends it" if above else "flags begin with --"
        raise InputError(f"{path}: a recipe is a .yaml file; {by}.")
    if not path.is_file():
        if above:
            raise InputError(f"{above[-1]} extends {path}, which does not exist. Paths are relative to the recipe.")
        known = {file.parent if file.parent.name != "configuration" else file for file in CONFIGURATION.rglob("*.yaml")}
        names = sorted(str(file.relative_to(CONFIGURATION.parent)) + "/" * file.is_dir() for file in known)
        raise InputError(f"There is no recipe {path}. Recipes here: {', '.join(names)}.")
    content = _read_yaml(path)
    extended, reported = content.pop("extends", None) or [], content.pop("reported", None) or {}
    if isinstance(extended, dict):
        raise InputError(f"{path}: `extends` is {extended!r}, expected the path of a recipe, or a list of them.")
    numbers = isinstance(reported, dict) and all(type(value) in (int, float) for value in reported.values())
    if not numbers or not set(reported) <= REPORTED or not all(value in Range(0, 100) for value in reported.values()):
        raise InputError(f"{path}: `reported` is {reported!r}, expected percentages, as top1: 76.69, top5: 98.57.")
    inherited: dict[str, Any] = {}
    for other in [extended] if isinstance(extended, str) else extended:
        inherited |= _from_recipe(parser, path.parent / other, (*above, path.resolve()))[0]
    settings = {}
    for key, value in content.items():
        if key not in parser.settings:
            official = official_flags.BY_NAME.get(name_of(key))
            if official is not None and official.settings:
                hint = f": it is an official flag. Recipes use our name, `{'`, `'.join(official.settings)}`"
            else:
                hint = official_flags.suggest(key, parser.settings)
            raise InputError(f"{path}: unknown setting `{key}`{hint}.")
        if value is None and key == "modular_mode":
            value = "none"
        if value is not None:
            settings[key] = _normalised(key, parser.coerce(str(path), key, value))
    _refuse_two_ways({name: f"`{name}`" for name in settings}, f"{path}: ")
    return _without_counterparts(inherited, settings) | settings, reported


def _without_counterparts(lower: dict[str, Any], higher: dict[str, Any]) -> dict[str, Any]:
    """What is left of the settings `lower` where `higher` sets the same things in another way."""
    gone = {other for pair in EXCLUSIVE for name, other in (pair, pair[::-1]) if name in higher and other not in higher}
    return {name: value for name, value in lower.items() if name not in gone}


def _read_yaml(path: Path) -> dict[str, Any]:
    """
    The keys of a YAML file and their values, as they are written: a `010`, a `1.10` or a `no` is read by the setting
    that it is of, and not by YAML, which makes 8, 1.1 and false of them. What is in mappings is read by YAML.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        if (node := loader.get_single_node()) is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"{path}: expected lines of `setting: value`, found a {node.id}.")
        keys = [str(key.value) for key, _ in node.value]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise InputError(f"{path}: {', '.join(twice)} is given twice.")
        loader.flatten_mapping(node)
        return {str(key.value): _as_written(loader, value) for key, value in node.value}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise InputError(f"{path} is no valid YAML in UTF-8: {reason_of(error, whole=True)}") from error


def _as_written(loader: yaml.SafeLoader, node: yaml.Node) -> str | list[str] | dict | None:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_object(node, deep=True)
    if isinstance(node, yaml.ScalarNode):
        if "\0" in node.value:
            raise yaml.YAMLError("a value has the character NUL")
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if not all(isinstance(element, yaml.ScalarNode) for element in node.value):
        raise yaml.YAMLError("expected plain values in a list, found a list or a mapping in it")
    return [element.value for element in node.value]


def _normalised(name: str, value: Any) -> Any:
    """Return the value of a setting that has the official code's names, under our name for it."""
    convert = official_flags.NORMALISE.get(name)
    return convert(value) if convert is not None and isinstance(value, str) else value


def _limits() -> dict[str, tuple[Range | Numbers, ...]]:
    """What is said beside the fields: the range of every number, and how many there are in a list."""
    limits: dict[str, tuple[Range | Numbers, ...]] = {name: (item,) for name, item in THEIR_RANGES.items()}
    for group in (ModelArguments, DataArguments, RunArguments):
        for name, hint in get_type_hints(group, include_extras=True).items():
            for part in (hint, *get_args(hint)):  # `Share | None` says it of its first part.
                if said := getattr(part, "__metadata__", ()):
                    limits[name] = said
    return limits


def _check(record: dict[str, Any]) -> None:
    """What neither the model's configuration nor Transformers checks, before anything is derived from it."""
    limits = _limits()
    for name, value in record.items():
        if value == "" and name not in ("auto_augment", "debug"):
            raise InputError(f"`{name}` is empty. Give it a value, or leave it out.")
        numbers = [item for item in (value if isinstance(value, list) else [value]) if type(item) in (int, float)]
        for limit in limits.get(name, (Range(),)) if numbers or value == [] else ():
            if not all(number in limit for number in (numbers if isinstance(limit, Range) else [value])):
                raise InputError(f"`{name}` is {value}, expected {limit}.")
    defaults = default_record(RunArguments)
    for name, why in NOT_HERE.items():
        if record.get(name) not in (None, defaults.get(name)):
            raise InputError(f"`{name}` does not work here: {why}. Leave it out.")
    for name in MAPPINGS:
        _check_mapping(name, record.get(name))
    if record["save_strategy"] == "best" and record["eval_strategy"] == "no":
        raise InputError("`save_strategy: best` saves after an evaluation, and `eval_strategy` is no.")
    sched = record["sched"]
    if record["cooldown_epochs"] and sched not in FALLING:
        raise InputError(
            f"`cooldown_epochs` stays at `min_lr`, to which {sched or record['lr_scheduler_type']} does "
            f"not fall. Leave it out, or choose a `sched` of {', '.join(FALLING)}."
        )


def _check_mapping(name: str, value: Any) -> None:
    """Of a setting of `MAPPINGS`; a flag's is JSON, which Transformers reads without a word of the flag's name."""
    if not isinstance(value, str):
        return
    if value.startswith("{"):
        try:
            json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"`{name}` is no valid JSON: {error}") from error
    elif name.endswith("_kwargs"):
        raise InputError(f"`{name}` is {value!r}, expected a mapping, as '{{\"key\": 1}}'.")
    elif name != "deepspeed" and not Path(value).is_file():
        raise InputError(f"`{name}` is {value!r}, expected a mapping, or a file of JSON. There is no such file.")
