# SPDX-License-Identifier: Apache-2.0
"""
The output folder: whose run it holds, and whether to start, resume or leave it alone.

`run.json` records the settings of the run that owns the folder, and whether it is finished. The same command in the
same folder goes on where it stopped, or says that it is done; anything else that would overwrite files is an error.
"""

import contextlib
import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .. import hub
from ..errors import InputError, more
from ..files import part_of, written_whole
from ..settings.arguments import RunArguments, to_json
from . import checkpoints


RECORD, LOCK = "run.json", ".lock"
ELSEWHERE = "Choose another --output_dir, or move that folder away."
# Settings that may differ between two parts of one run: they change speed, output and place, not what is trained.
_FREE = (
    "check_images cpu_threads disable_tqdm do_eval eval_accumulation_steps output_dir per_device_eval_batch_size "
    "project record_step report_to resume_from_checkpoint run_id run_name save_total_limit skip_memory_metrics "
    "use_cpu"
).split()
_FREE_PREFIXES = ("dataloader_", "log_", "logging_", "hub_", "push_to_hub", "trackio_", "ddp_", "local_rank")
_NOT_FREE = ("dataloader_drop_last",)
# What the global batch is made of: another number of devices needs another of these for the same run.
_BATCH, _BATCH_PARTS = "global_batch_size", ("per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Request:
    """What a training command asks of its output folder."""

    folder: Path
    settings: dict[str, Any]  # As the record keeps them.
    resume: str | None = None  # What to go on from: a checkpoint, a run's folder, or a repository of the Hub.
    token: str | None = None  # For the Hub.

    @classmethod
    def of(cls, record: dict[str, Any], args: RunArguments) -> "Request":
        """Make that of settings as they were given, and of what follows from them."""
        settings = {**to_json(record), _BATCH: args.global_batch_size}
        return cls(Path(args.output_dir), settings, args.resume_from_checkpoint, args.hub_token)


@dataclass
class Plan:
    """What a training command does with its output folder, and what it tells the user."""

    checkpoint: str | None = None  # To resume from.
    finished: dict[str, Any] | None = None  # What a finished run recorded, if nothing is left to do.
    message: str | None = None
    anew: bool = False  # The folder has another run's record, and nothing that was trained.
    # A new run's own, else that of its folder or, under the same settings, of its checkpoint.
    identity: str = field(default_factory=lambda: uuid.uuid4().hex, compare=False)


def plan(request: Request, lock: "FolderLock | None" = None) -> Plan:
    """
    Decide what a training command does with its output folder. Damaged checkpoints of the folder's run are renamed,
    where an undamaged one is left to go on from. The lock is taken on the folder first.

    Raises:
        InputError: the folder holds something else, there is nothing to resume, or another process has the folder.
    """
    if lock is not None:
        lock.take(request.folder)
    found = _plan(request)
    record = {} if found.anew else read_record(request.folder) or {}
    known = record.get("id") or (_continued(Path(found.checkpoint), request) if found.checkpoint else None)
    found.identity = known or found.identity
    return found


def _plan(request: Request) -> Plan:
    folder = request.folder
    if folder.exists() and not folder.is_dir():
        raise InputError(f"`output_dir` {folder} is a file, expected a folder.")
    entries = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    entries = [name for name in entries if name not in (LOCK, part_of(Path(RECORD)).name)]
    record = read_record(folder)
    if entries and record is None:
        shown = ", ".join(entries[:4]) + more(entries, 4)
        raise InputError(f"`output_dir` {folder} is not empty ({shown}), and holds no run of this script. {ELSEWHERE}")
    if record is not None:
        checkpoints.tidy(folder)
    # Of a command that was refused, or stopped before its first checkpoint.
    empty = record is not None and not record.get("finished") and not _trained(folder)
    if request.resume is not None:
        checkpoint, damaged = _given(request.resume, request.token)
        anew = empty and checkpoint.resolve().parent != folder.resolve()
        if entries and checkpoint.resolve().parent != folder.resolve() and not anew:
            raise InputError(f"`output_dir` {folder} holds a run already, and {checkpoint} is of another. {ELSEWHERE}")
        told = _told(damaged, own=bool(entries) and not anew)
        return Plan(str(checkpoint), message=f"Resuming from {checkpoint}.{told}", anew=anew)
    if record is None:
        return Plan()
    different = differences(record["settings"], request.settings)
    if different and empty:
        return Plan(message=f"{folder} holds nothing that was trained: it is used again.", anew=True)
    if different:
        raise InputError(
            f"`output_dir` {folder} holds another run: {different}. {ELSEWHERE} To go on with that run under these "
            "settings, give --resume_from_checkpoint with one of its checkpoint-* folders."
        )
    if record.get("finished"):
        if not any((folder / name).is_file() for name in (checkpoints.WEIGHTS, checkpoints.WEIGHTS_INDEX)):
            raise InputError(f"{folder} holds a finished run without its weights ({checkpoints.WEIGHTS}). {ELSEWHERE}")
        for file in checkpoints.weight_files(folder):
            checkpoints.read_header(file)
        return Plan(finished=record["finished"])
    newest, damaged = _newest(folder)
    if newest is None:
        return Plan(message=f"{folder} holds this run, stopped before its first checkpoint: it starts again.")
    message = f"{folder} holds this run, not finished: it goes on from {newest.name}.{_told(damaged, own=True)}"
    return Plan(str(newest), message=message)


def _trained(folder: Path) -> bool:
    """Whether there are weights, or a checkpoint, be it damaged, in a run's folder."""
    names = ("checkpoint-*", checkpoints.WEIGHTS, checkpoints.WEIGHTS_INDEX)
    return any(True for name in names for _ in folder.glob(name))


def _continued(checkpoint: Path, request: Request) -> str | None:
    """The identity of the run that goes on from a checkpoint in a new folder; `None` where it becomes another one."""
    record, path = read_record(checkpoint.parent), checkpoint / checkpoints.PROGRESS
    if not path.is_file() or (record is not None and differences(record["settings"], request.settings)):
        return None
    return checkpoints.read_json(path).get("run")


def _given(given: str, token: str | None) -> tuple[Path, dict[Path, str]]:
    """
    The checkpoint that `--resume_from_checkpoint` means: that folder, or the newest undamaged one in it, or the last
    one in a repository of the Hub; and the damaged ones.
    """
    path = Path(given)
    if not path.is_dir():
        if not hub.is_name(given):
            raise InputError(f"`resume_from_checkpoint` is {given}: there is no such folder.")
        path = hub.download_checkpoint(given, token)
    if checkpoints.is_checkpoint(path):
        if wrong := checkpoints.damage(path):
            hint = "Give another checkpoint-* folder, or the run's, whose newest undamaged one is taken."
            raise InputError(f"`resume_from_checkpoint` is {given}, which is damaged: {wrong}. {hint}")
        return path, {}
    checkpoint, damaged = _newest(path)
    if checkpoint is None:
        raise InputError(
            f"`resume_from_checkpoint` is {given}, which is no checkpoint and holds none: expected a checkpoint-* "
            "folder with weights and trainer_state.json, or a run's folder with such in it. To start from weights "
            "alone, give --finetune."
        )
    return checkpoint, damaged


def _newest(run: Path) -> tuple[Path | None, dict[Path, str]]:
    checkpoint, damaged = checkpoints.newest(run)
    if checkpoint is None and damaged:
        hint = "Put back a copy of one of them, or move the folder away to start again."
        raise InputError(f"Every checkpoint of {run} is damaged: {_described(damaged)}. {hint}")
    return checkpoint, damaged


def _told(damaged: dict[Path, str], own: bool) -> str:
    """What is said about damaged checkpoints; those of the output folder are set aside."""
    if not damaged:
        return ""
    said = f"\nDamaged, and left out: {_described(damaged)}."
    if own:
        aside = [checkpoints.set_aside(folder).name for folder in damaged]
        said += f" Now called {', '.join(aside)}: delete what you do not need."
    return said


def _described(damaged: dict[Path, str]) -> str:
    return "; ".join(f"{folder.name} ({wrong})" for folder, wrong in damaged.items())


class FolderLock:
    """
    A context that keeps a second command out of an output folder, as long as its process lives.

    The system drops the lock with the process, however that ends. A folder that was made to be locked, and stayed
    empty, is removed at the end.
    """

    def __init__(self):
        self._lock: FileLock | None = None
        self._made: list[Path] = []

    def __enter__(self) -> "FolderLock":
        return self

    def take(self, output_dir: str | Path) -> None:
        """
        Lock a folder, made if it does not exist, before anything is read of it or written to it. Raises `InputError`
        where another process has it, or it cannot be written to.
        """
        folder = Path(output_dir).absolute()
        with checkpoints.writing("The lock file", folder, ELSEWHERE):
            if folder.exists() and not folder.is_dir():
                raise InputError(f"`output_dir` {output_dir} is a file, expected a folder.")
            self._made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / LOCK, timeout=0)
            try:
                lock.acquire()
            except Timeout as error:
                hint = "Wait for it or stop it, or choose another --output_dir."
                raise InputError(f"Another process is training in {output_dir}. {hint}") from error
        self._lock = lock

    def __exit__(self, *_) -> None:
        if self._lock is not None:
            # Before it is released, or it might be another's by then. Windows removes no file that is open.
            with contextlib.suppress(OSError):
                Path(self._lock.lock_file).unlink()
            with contextlib.suppress(OSError):  # From the first on that is not empty.
                for folder in self._made:
                    folder.rmdir()
            self._lock.release()
            self._lock = None


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of the run in this folder, if there is one."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{folder / RECORD} is damaged ({error}). {ELSEWHERE}") from error
    if not isinstance(record, dict) or "settings" not in record:
        return None
    for key, kind in (("settings", dict), ("finished", dict | None), ("id", str | None)):
        if not isinstance(record.get(key), kind):
            raise InputError(f"{folder / RECORD} is damaged: `{key}` is {record[key]!r}. {ELSEWHERE}")
    if not record["settings"] or not _has_figures(record.get("finished")):
        raise InputError(f"{folder / RECORD} is damaged: expected the settings of a run and its figures. {ELSEWHERE}")
    return record


def _has_figures(finished: dict[str, Any] | None) -> bool:
    """Whether what a finished run recorded can be told; that of an unfinished one can."""
    if finished is None:
        return True
    metrics, images = finished.get("metrics"), finished.get("eval_images")
    numbers = [*metrics.values(), images] if isinstance(metrics, dict) and "eval_accuracy" in metrics else [None]
    return all(type(number) in (int, float) for number in numbers)


def write_record(
    request: Request, finished: dict[str, Any] | None = None, identity: str | None = None, start: float | None = None
) -> None:
    """
    Write the record, in one step, so that a run killed meanwhile keeps the old one: what a finished run records, its
    identity (unset, what is recorded already stays), and the `sum_of_weights` that it began with (if none is recorded).
    Of a run of another identity, nothing stays.
    """
    folder = request.folder
    before = read_record(folder) or {}
    if identity not in (None, before.get("id")):
        before = {}
    record = {"id": identity or before.get("id"), "settings": request.settings, "finished": finished}
    record["start"] = before.get("start", start)
    with checkpoints.writing(RECORD, folder, f"{checkpoints.MEND}, or choose another --output_dir."):
        with written_whole(folder / RECORD) as part:
            part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings in which two runs differ, in words; empty if in none that matters. Settings that only one of two
    releases knows are not compared."""
    known = before.keys() & now.keys()
    parts = _BATCH_PARTS if _BATCH in known else ()
    different = [
        f"`{key}` was {before[key]!r} and is now {now[key]!r}"
        for key in sorted(known)
        if before[key] != now[key] and key not in parts and not is_free(key)
    ]
    said = "; ".join(different[:4]) + more(different, 4)
    if _BATCH in known and before[_BATCH] != now[_BATCH]:
        said += " (images in a step of all processes: --per_device_train_batch_size keeps it the same for others)"
    return said


def is_free(setting: str) -> bool:
    """Whether a setting may differ between two parts of one run, because it does not change what is trained."""
    return setting in _FREE or (setting.startswith(_FREE_PREFIXES) and setting not in _NOT_FREE)
