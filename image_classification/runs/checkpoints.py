# SPDX-License-Identifier: Apache-2.0
"""
Checkpoint folders on the disk: written whole or not at all, and checked before a run goes on from them.

A checkpoint is written into a hidden folder beside its place, listed in `SHA256SUMS` (which `sha256sum -c` reads),
flushed to the disk, and only then given its name. So whatever is called `checkpoint-N` was complete once, and what
damages it later (a full disk, a copy that broke off, a failing disk) is seen in the sums.
"""

import contextlib
import itertools
import json
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ..errors import InputError, more, reason_of
from ..files import flush, part_of, sha256


SUMS, STATE = "SHA256SUMS", "trainer_state.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# In the order in which Transformers looks for them; the second pair is what PyTorch pickled.
WEIGHT_FILES = ((WEIGHTS, WEIGHTS_INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
OPTIMIZER, SCHEDULER, PROGRESS = "optimizer.pt", "scheduler.pt", "progress.json"
# What to do about a `NotWritten`.
MEND = "Free some space (or mend the permissions), then give the same command again"


class NotWritten(InputError):
    """Something could not be written: the disk is full, or the folder is not ours to write to."""


def checkpoint_folder(run: str | Path, step: int) -> Path:
    """The checkpoint of one step of a run."""
    return Path(run) / f"checkpoint-{step}"


def checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder that were written to the end, by step, in ascending order."""
    return {step: folder for step, folder in _numbered(run).items() if is_checkpoint(folder)}


def _numbered(run: Path) -> dict[int, Path]:
    """What is called a checkpoint, by step, in ascending order."""
    found = {}
    for entry in run.glob("checkpoint-*"):
        if entry.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", entry.name)):
            found[int(match[1])] = entry
    return dict(sorted(found.items()))


def is_checkpoint(folder: Path) -> bool:
    """Whether there is the Trainer's state and a model in it; `damage` looks closer."""
    return (folder / STATE).is_file() and any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX))


def damage(folder: Path) -> str | None:
    """
    What is wrong with a checkpoint, in words: a file is missing, too short, or of other content than was written;
    `None` if nothing is, or if it has no `SHA256SUMS` because something else wrote it.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        missing = WEIGHTS if (folder / STATE).is_file() else STATE
        return None if is_checkpoint(folder) else f"{missing} is missing"
    except (OSError, UnicodeDecodeError):
        return f"{SUMS} cannot be read"
    listed = [match for line in lines if (match := re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line))]
    if len(listed) < len(lines) or STATE not in {match[2] for match in listed}:
        return f"{SUMS} is truncated or damaged"
    for match in listed:
        path = folder / match[2]
        try:
            digest, size = sha256(path), path.stat().st_size
        except FileNotFoundError:
            return f"{match[2]} is missing"
        except OSError as error:
            return f"{match[2]} cannot be read ({error.strerror})"
        if digest != match[1]:
            return f"{match[2]} ({size:,} bytes) is truncated or was changed after it was written"
    return None


def check_progress(folder: Path) -> None:
    """Raise an `InputError` unless a checkpoint says how far its run was. What `SHA256SUMS` lists need not be asked."""
    from transformers import TrainerState  # Needs accelerate, and reading weights does not.

    number = (int, float)
    _check_fields(folder / STATE, {"global_step": int, "epoch": number}, {"log_history": dict})
    with reading(folder / STATE):
        state = TrainerState.load_from_json(str(folder / STATE))
        if state.global_step < 0:
            raise ValueError("`global_step` is negative")
    if not all("eval_loss" not in entry or "epoch" in entry for entry in state.log_history):
        raise InputError(f"{folder / STATE} is damaged: `log_history` has evaluations without their `epoch`.")
    if (folder / PROGRESS).is_file():
        fields = {"logged_loss": number, "last_logged_step": int, "seconds": number, "epoch_ended": bool}
        _check_fields(folder / PROGRESS, fields, {"losses": number, "due": str})


def _check_fields(path: Path, fields: dict[str, Any], lists: dict[str, Any]) -> None:
    """Of JSON: the types of fields, and of what is in lists."""
    content = read_json(path)
    for name, kind in (fields | lists).items():
        found = content.get(name) if isinstance(content, dict) else None
        values = [found] if name in fields else found
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise InputError(f"{path} is damaged: it has no `{name}`, or one of another type.")


def newest(run: Path) -> tuple[Path | None, dict[Path, str]]:
    """The undamaged checkpoint of the highest step, if any, and the damaged ones after it, with what is wrong."""
    damaged: dict[Path, str] = {}
    for folder in reversed(_numbered(run).values()):
        if (wrong := damage(folder)) is None:
            return folder, damaged
        damaged[folder] = wrong
    return None, damaged


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither taken for one nor counted, and return its new place."""
    names = itertools.chain([f"{folder.name}.damaged"], (f"{folder.name}.damaged.{n}" for n in itertools.count(1)))
    return folder.rename(next(aside for name in names if not (aside := folder.with_name(name)).exists()))


def tidy(run: Path) -> None:
    """Clear away what a killed process left half written or half deleted."""
    for replaced in run.glob(".checkpoint-*.replaced"):
        place = run / replaced.name[1:].removesuffix(".replaced")
        if place.exists():
            shutil.rmtree(replaced)
        else:  # Killed between the two renames of `publish`.
            replaced.rename(place)
    for part in (*run.glob(".checkpoint-*.part"), *run.glob(".push-*")):
        shutil.rmtree(part)


def begin(folder: Path) -> None:
    """Make the empty folder `part_of(folder)`."""
    abandon(folder)
    part_of(folder).mkdir(parents=True)


def abandon(folder: Path) -> None:
    """Remove what was written of a checkpoint, which also frees its space."""
    shutil.rmtree(part_of(folder), ignore_errors=True)


def publish(folder: Path) -> None:
    """Sum up and flush what is in `part_of(folder)`, and give it its name, in place of one that has it already."""
    part = part_of(folder)
    files = sorted(path for path in part.rglob("*") if path.is_file())
    lines = [f"{sha256(path)}  {path.relative_to(part).as_posix()}\n" for path in files]
    (part / SUMS).write_text("".join(lines), encoding="utf-8")
    for path in (*part.rglob("*"), part):
        flush(path)
    replaced = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        folder.rename(replaced)
    part.rename(folder)
    flush(folder.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def rotate(run: Path, limit: int | None, last: Path, best: Path | None) -> None:
    """Delete a run's oldest checkpoints beyond `limit`, of which the `last`, to go on from, and the `best` are two."""
    if limit is None:
        return
    keep = {last, best} - {None}
    others = [folder for folder in reversed(checkpoints(run).values()) if folder not in keep]
    for folder in others[max(0, limit - len(keep)) :]:
        # Under another name first: killed meanwhile, half a checkpoint would be left.
        abandon(folder)
        shutil.rmtree(folder.rename(part_of(folder)))


def best(run: Path, log: list[dict[str, float]], metric: str, greater_is_better: bool) -> Path | None:
    """The checkpoint of the best evaluation (the first, of equals), by the Trainer's log; `None` without any."""
    scores = {entry["step"]: entry[metric] * (1 if greater_is_better else -1) for entry in log if metric in entry}
    there = {step: folder for step, folder in checkpoints(run).items() if step in scores}
    return there[max(there, key=lambda step: (scores[step], -step))] if there else None


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's weights. Raises `InputError` where their list is damaged, or one is missing."""
    there = [folder / name for pair in WEIGHT_FILES for name in pair if (folder / name).exists()]
    if not there or there[0].suffix != ".json":
        return there[:1] or [folder / WEIGHTS]
    listed = there[0]
    index = read_json(listed)
    names = index.get("weight_map") if isinstance(index, dict) else None
    whole = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    if not whole or not names or not isinstance(index.get("metadata"), dict):
        raise InputError(f"{listed} is damaged: expected `metadata`, and `weight_map` with the file of each weight.")
    files = [folder / name for name in sorted(set(names.values()))]
    for file in files:
        if file.parent != folder or not file.is_file():
            raise InputError(f"{listed} names {file.name}, which is not there: put back a copy of it.")
    held = [(name, file.name) for file in files for name in read_header(file)]
    if sorted(held) != sorted(index["weight_map"].items()):
        what = "it does not list the weights that the files hold, each once"
        raise InputError(f"{listed} is damaged, or a file beside it is: {what}. Put back copies of them.")
    return files


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of the tensors in a file of weights. Raises `InputError` where it is damaged."""
    if path.suffix != ".safetensors":
        with reading(path):
            tensors = torch.load(path, map_location="meta", weights_only=True)
        if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
        ):
            raise InputError(f"{path} holds no weights by name: it is damaged, or no checkpoint of Transformers.")
        kinds = ((name, "F" if tensor.is_floating_point() else str(tensor.dtype)) for name, tensor in tensors.items())
        return {name: (kind, list(tensors[name].shape)) for name, kind in kinds}
    with reading(path), safe_open(path, framework="pt") as file:
        parts = ((name, file.get_slice(name)) for name in file.keys())
        return {name: (part.get_dtype(), part.get_shape()) for name, part in parts}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file, on the CPU. Raises `InputError` where it is damaged."""
    with reading(path):
        return load_file(path)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, in one file or in several, on the CPU."""
    return {name: tensor for path in weight_files(folder) for name, tensor in read_tensors(path).items()}


def read_state(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU. Raises `InputError` where it is damaged."""
    with reading(path):
        return torch.load(path, map_location="cpu", weights_only=True)


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises `InputError` where it is damaged."""
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while reading a file of a checkpoint into an `InputError` that names it."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no file: put back a copy of it.")  # Reading a pipe would wait for ever.
    try:
        yield
    except InputError:
        raise
    except pickle.UnpicklingError as error:  # Whose advice is to trust the file.
        raise InputError(f"{path} is nothing that PyTorch saved: it is damaged. Put back a copy of it.") from error
    except Exception as error:  # Of the file system, JSON or safetensors, or what the content leads to.
        reason = reason_of(error) if str(error) else "it ends too early"
        raise InputError(f"{path} cannot be read ({reason}): it is damaged. Put back a copy of it.") from error


def check_weights(expected: dict[str, torch.Size], found: dict[str, torch.Tensor], where: Path) -> None:
    """Raise an `InputError` unless a checkpoint, or its file `where`, has exactly the weights of these shapes."""
    both = expected.keys() & found.keys()
    for names, what in (
        (expected.keys() - found.keys(), "lacks weights that the model has"),
        (found.keys() - expected.keys(), "has weights that the model does not have"),
        ([name for name in both if found[name].shape != expected[name]], "has weights that do not fit the model"),
        ([name for name in both if not found[name].is_floating_point()], "has weights of whole numbers"),
        (not_finite(found), "has weights that are NaN or infinite"),
    ):
        if names:
            shown = ", ".join(sorted(names)[:4]) + more(sorted(names), 4)
            raise InputError(f"{where} {what}: {shown}. It is damaged or of another model; nothing was trained.")


def not_finite(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are NaN or infinite somewhere."""
    return sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())


@contextlib.contextmanager
def writing(what: str, folder: Path, advice: str) -> Iterator[None]:
    """
    Turn what goes wrong while writing into a `NotWritten` that says what, where, why, and what to do.

    PyTorch and safetensors each have errors of their own for a full disk, so every `Exception` counts here.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = str(getattr(error, "strerror", None) or error).strip().splitlines() or [type(error).__name__]
        free = ""
        with contextlib.suppress(OSError):
            free = f"; {shutil.disk_usage(folder).free / 1e9:,.1f} GB are free there"
        raise NotWritten(f"{what} could not be written to {folder} ({reason[0]}{free}). {advice}") from error
