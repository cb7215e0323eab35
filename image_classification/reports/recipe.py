# SPDX-License-Identifier: Apache-2.0
"""The recipe that repeats a run."""

import math
from pathlib import Path
from typing import Any

import yaml

from ..errors import one_line
from ..runs import run_folder
from ..settings.arguments import EXCLUSIVE, DataArguments, ModelArguments, RunArguments, default_record, to_json


RECIPE = "recipe.yaml"
# How a run is repeated, behind what starts the script.
AGAIN = f"run_image_classification.py {RECIPE} --output_dir outputs/again"


def recipe(record: dict[str, Any], args: RunArguments, reported: dict[str, float]) -> str:
    """
    A recipe (YAML) with every setting that decides what is trained, those of other recipes and of flags included. What
    a recipe need not say (speed, output, the Hub) is not in it, nor are the folders of this machine. `record` has the
    settings as they were given, `args` those of the training as it ran, `reported` the paper's figures for it, if any.
    """
    record = to_json(record)
    if record["base_lr"] is None and record["learning_rate"] is None:
        record["base_lr"] = args.base_lr
    own = {*ModelArguments.__annotations__, *DataArguments.__annotations__, *RunArguments.__annotations__}
    defaults = to_json(default_record())
    kept = {
        name: value
        for name, value in record.items()
        if value is not None and not run_folder.is_free(name) and (name in own or value != defaults[name])
    }
    for pair in EXCLUSIVE:
        for name, other in (pair, pair[::-1]):
            if name in kept and other in kept and kept[name] == defaults[name]:
                del kept[name]
    folders = {name: value for name, value in kept.items() if isinstance(value, str) and Path(value).is_absolute()}
    command = "python" if args.world_size == 1 else f"accelerate launch --num_processes {args.world_size}"
    lines = ["# Every setting of a run of KArAt-ViT, which this repeats:", f"#   {command} {AGAIN}"]
    for name, value in folders.items():
        lines.append(f"# Add --{name}: it was the folder {one_line(Path(value).name)}, elsewhere.")
    for group, title in ((ModelArguments, "Model"), (DataArguments, "Data"), (RunArguments, "Training")):
        part = [name for name in group.__dataclass_fields__ if name in kept and name not in folders]
        lines += ["", f"# {title}", *(f"{name}: {_yaml(kept[name])}" for name in part)]
    if reported:
        lines += ["", "# By the paper, in percent", f"reported: {_yaml(reported)}"]
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    """A value on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").rstrip()
