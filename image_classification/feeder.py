# SPDX-License-Identifier: Apache-2.0
"""
Training batches that a process of its own prepares, on the device that trains.

Where the device decodes and augments, some thread has to call it. Within the training's process that thread and the
training wait for each other, for Python's lock and the driver's, and a step takes a quarter longer. So there it is a
process: the training tells it which images are next and finds the batches in memory that both share, CUDA's for a GPU.
"""

import atexit
import collections
import contextlib
import multiprocessing
import pickle
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .errors import InputError
from .stopping import outlive_signals


SLOTS = 2  # Batches that lie ready: one to take, one to fill.


class Feeder:
    """
    The training's end.

    Args:
        dataset, collate: of batches with `.to(device) -> dict of tensors`, `labels` among them, equal in shape but for
            the number of images. The process gets a copy of both.
        workers: data workers of the process, 1 or more.
        prefetch: batches that each of them prepares ahead.
        device: where the batches are wanted.
        start: how the workers are started (`fork`, ...); by default as those of this process.
    """

    def __init__(
        self, dataset: Dataset, collate, workers: int, prefetch: int, device: torch.device, start: str | None = None
    ):
        self.options = {"dataset": dataset, "collate_fn": collate, "num_workers": workers, "prefetch_factor": prefetch}
        # The process itself is spawned, and would spawn them, too.
        self.options["multiprocessing_context"] = start or multiprocessing.get_start_method()
        self.device = device
        # Its data loader asks for the next images before it hands over a batch.
        self.ahead = workers * prefetch + SLOTS + 2
        self.process: multiprocessing.process.BaseProcess | None = None

    def start(self) -> None:
        """Start the process, if it is not there: importing takes it some seconds."""
        if self.process is not None:
            return
        # Not forked: CUDA does not work in a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        # Daemons may not have data workers; so this is none, and has to be ended before the interpreter waits for it.
        process = context.Process(
            target=_prepare, args=(other, self.options, self.device), name="batches", daemon=False
        )
        process.start()
        other.close()
        self.process, self.slots = process, []
        atexit.register(self.close)

    def batches(self, numbers: Iterator[np.ndarray]) -> Iterator[tuple[dict[str, torch.Tensor], bool]]:
        """
        An epoch.

        Args:
            numbers: of the images of each batch, int64 (B,).

        Yields:
            A batch on the device, and whether it is the last one.

        Raises:
            InputError: of the data set or the collation; or the process has died.
        """
        self.start()
        asked, more = 0, True
        try:
            while more or asked:
                while more and asked < self.ahead:
                    if (wanted := next(numbers, None)) is None:
                        more = False
                    else:
                        asked += 1
                    self._send("images", wanted)
                if asked:
                    batch = self._receive()
                    asked -= 1
                    yield batch, not (more or asked)
        finally:
            if more or asked:  # Left in the middle: what was asked for would come first in the next epoch.
                self.close()

    def close(self) -> None:
        """End the process. The next epoch starts another one."""
        if self.process is None:
            return
        process, self.process, self.slots = self.process, None, []
        atexit.unregister(self.close)
        self.connection.close()  # By which it knows.
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()

    def _send(self, kind: str, value) -> None:
        try:
            self.connection.send((kind, value))
        except OSError:
            self._raise_dead()

    def _receive(self) -> dict[str, torch.Tensor]:
        while True:
            try:
                kind, value = self.connection.recv()
            except (EOFError, OSError):
                self._raise_dead()
            if kind == "error":
                self.close()
                raise value
            if kind == "batch":
                break
            self.slots = [_Slot(value, self.device) for _ in range(SLOTS)]
            self._send("slots", self.slots)
        number, images = value
        slot = self.slots[number]
        batch = {name: tensor[:images].clone() for name, tensor in slot.tensors.items()}
        if slot.emptied is not None:
            slot.emptied.record()
        self._send("emptied", number)
        return batch

    def _raise_dead(self) -> None:
        process = self.process
        process.join(10)
        self.close()
        raise InputError(
            f"The process that prepares the batches has ended (exit code {process.exitcode}; -9 is mostly for want of "
            "memory). Try fewer --dataloader_num_workers, or --dataloader_process false, which needs no such process."
        )


class _Slot:
    """Memory of a batch, which both processes see."""

    def __init__(self, layout: dict[str, tuple[torch.Size, torch.dtype]], device: torch.device):
        self.tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in layout.items()}
        self.emptied = None
        if device.type == "cuda":
            self.emptied = torch.cuda.Event(interprocess=True)
            self.emptied.record()
        else:
            for tensor in self.tensors.values():
                tensor.share_memory_()


class _Requests:
    """The process's end: a batch sampler, of epoch after epoch, and where the batches go."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.images: collections.deque[np.ndarray | None] = collections.deque()
        self.slots: list[_Slot] = []
        self.empty: collections.deque[int] = collections.deque()

    def _read(self) -> None:
        kind, value = self.connection.recv()
        if kind == "images":
            self.images.append(value)
        elif kind == "slots":  # What was in others before has been taken.
            self.slots, self.empty = value, collections.deque(range(len(value)))
        else:
            self.empty.append(value)

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            while not self.images:
                self._read()
            if (images := self.images.popleft()) is None:
                return
            yield images.tolist()

    def hand_over(self, batch: dict[str, torch.Tensor]) -> None:
        images = len(batch["labels"])
        # The first batch, unless that was the last one of an epoch which the run goes on within.
        if not self.slots or images > len(self.slots[0].tensors["labels"]):
            self.slots, self.empty = [], collections.deque()
            self.connection.send(("layout", {name: (tensor.shape, tensor.dtype) for name, tensor in batch.items()}))
            while not self.slots:
                self._read()
        while not self.empty:
            self._read()
        number = self.empty.popleft()
        slot = self.slots[number]
        if slot.emptied is not None:
            slot.emptied.wait()
        for name, tensor in batch.items():
            slot.tensors[name][:images].copy_(tensor)
        if slot.emptied is not None:
            torch.cuda.current_stream().synchronize()
        self.connection.send(("batch", (number, images)))


def _prepare(connection: Connection, options: dict, device: torch.device) -> None:
    outlive_signals()
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    requests = _Requests(connection)
    try:
        loader = DataLoader(
            batch_sampler=requests,
            pin_memory=device.type == "cuda",
            persistent_workers=True,
            worker_init_fn=outlive_signals,
            generator=torch.Generator(),
            **options,
        )
        while True:
            for batch in loader:
                requests.hand_over(batch.to(device))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # The training has ended.
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send(("error", _sendable(error)))


def _sendable(error: Exception) -> Exception:
    """With its traceback, which pickling leaves behind."""
    if isinstance(error, InputError):
        return error
    lines = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(str(error))
    error.add_note(f"In the process that prepares the batches:\n{lines}")
    return error
