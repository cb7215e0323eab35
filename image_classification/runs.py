# SPDX-License-Identifier: Apache-2.0
"""
The output folder: whose run it holds, and whether to start, resume or leave it alone.

`run.json` records the settings of the run that owns the folder, and whether it is finished. The same command in the
same folder goes on where it stopped, or says that it is done; anything else that would overwrite files is an error.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .arguments import Settings, to_json
from .errors import InputError, more


RECORD = "run.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")

# Settings that may differ between two parts of one run: they change speed, output and place, not what is trained.
_FREE = (
    "check_images",
    "cpu_threads",
    "disable_tqdm",
    "do_eval",
    "eval_accumulation_steps",
    "output_dir",
    "per_device_eval_batch_size",
    "project",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "save_total_limit",
    "skip_memory_metrics",
    "use_cpu",
)
_FREE_PREFIXES = ("dataloader_", "log_", "logging_", "hub_", "push_to_hub", "trackio_", "ddp_", "local_rank")


@dataclass
class Plan:
    """
    Args:
        checkpoint: folder to resume from, or `None` to start anew.
        finished: what a finished run recorded, if this command has nothing left to do.
        message: what to tell the user.
    """

    checkpoint: str | None = None
    finished: dict[str, Any] | None = None
    message: str | None = None


def plan(settings: Settings) -> Plan:
    """
    Decide what a training command does with its output folder.

    Raises:
        InputError: the folder holds something else, or there is nothing to resume.
    """
    folder = Path(settings.training.output_dir)
    resume = settings.training.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise InputError(f"`output_dir` {folder} is a file, expected a folder.")
    entries = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    record = read_record(folder)
    if resume is not None:
        checkpoint = find_checkpoint(resume)
        if entries and record is None:
            raise InputError(f"`output_dir` {folder} holds files that are of no run ({_some(entries)}). {_ELSEWHERE}")
        if entries and Path(checkpoint).resolve().parent != folder.resolve():
            raise InputError(
                f"`output_dir` {folder} holds a run already, and {checkpoint} is of another one. {_ELSEWHERE}"
            )
        return Plan(checkpoint, message=f"Resuming from {checkpoint}.")
    if not entries:
        return Plan()
    if record is None:
        raise InputError(
            f"`output_dir` {folder} is not empty ({_some(entries)}), and it holds no run of this script. {_ELSEWHERE}"
        )
    different = differences(record["settings"], to_json(settings.record))
    if different:
        raise InputError(
            f"`output_dir` {folder} holds another run: {different}. {_ELSEWHERE} To go on with that run under these "
            "settings, give --resume_from_checkpoint with one of its checkpoint-* folders."
        )
    if record.get("finished"):
        if not any((folder / name).is_file() for name in WEIGHTS):
            raise InputError(f"{folder} holds a finished run without its weights ({WEIGHTS[0]}). {_ELSEWHERE}")
        return Plan(finished=record["finished"])
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        return Plan(message=f"{folder} holds this run, stopped before its first checkpoint: it starts again.")
    return Plan(checkpoint, message=f"{folder} holds this run, not finished: it goes on from {Path(checkpoint).name}.")


_ELSEWHERE = "Choose another --output_dir, or move that folder away."


def find_checkpoint(given: str) -> str:
    """The checkpoint that `--resume_from_checkpoint` means: that folder, or the last checkpoint in it."""
    path = Path(given)
    if not path.is_dir():
        raise InputError(f"`resume_from_checkpoint` is {given}: there is no such folder.")
    if is_complete(path):
        return str(path)
    last = last_checkpoint(path)
    if last is None:
        raise InputError(
            f"`resume_from_checkpoint` is {given}, which is no checkpoint and holds none: expected a checkpoint-* "
            "folder with weights and trainer_state.json, or a run's folder with such in it. To start from weights "
            "alone, give --finetune."
        )
    return last


def last_checkpoint(folder: Path) -> str | None:
    """The complete checkpoint of the highest step, if any."""
    found = {}
    for entry in folder.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", entry.name)
        if match and is_complete(entry):
            found[int(match[1])] = entry
    return str(found[max(found)]) if found else None


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint was written to the end: the Trainer's state comes last."""
    return (folder / "trainer_state.json").is_file() and any((folder / name).is_file() for name in WEIGHTS)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of the run in this folder, if there is one."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise InputError(f"{folder / RECORD} is damaged ({error}). {_ELSEWHERE}") from error
    return record if isinstance(record, dict) and "settings" in record else None


def write_record(settings: Settings, finished: dict[str, Any] | None = None) -> None:
    """Write the record, in one step, so that a run killed meanwhile keeps the old one."""
    folder = Path(settings.training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": to_json(settings.record), "finished": finished}
    part = folder / f".{RECORD}.part"
    part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(part, folder / RECORD)


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings in which two runs differ, in words; empty if in none that matters. Settings that only one of two
    releases knows are not compared."""
    different = [
        f"`{key}` was {before[key]!r} and is now {now[key]!r}"
        for key in sorted(before.keys() & now.keys())
        if before[key] != now[key] and key not in _FREE and not key.startswith(_FREE_PREFIXES)
    ]
    return "; ".join(different[:4]) + more(different, 4)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + more(names, 4)
