# SPDX-License-Identifier: Apache-2.0
"""How fast a run trains, without its evaluations and checkpoints; how long it took to start; its peak of memory."""

import contextlib
import sys
import time
from collections.abc import Iterator

import psutil
import torch


class Throughput:
    """Counts images and the seconds that training takes, from now on."""

    def __init__(self, device: torch.device):
        self.device = device
        self.images = self._images_logged = 0  # Trained on, by all processes: in all, and at the last log.
        self.startup_seconds: float | None = None  # From the process's start to the end of its first step.
        self._excluded = self._seconds_logged = 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._began = time.perf_counter()

    def note_startup(self) -> None:
        """Take the time where the first step is done."""
        if self.startup_seconds is None:
            self._wait()
            self.startup_seconds = time.time() - psutil.Process().create_time()

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Not to count what is done within as training."""
        self._wait()
        began = time.perf_counter()
        try:
            yield
        finally:
            self._excluded += time.perf_counter() - began

    def since_last_log(self) -> dict[str, float]:
        """`images_per_second` since this was asked last, if there were any."""
        seconds, images = self._seconds() - self._seconds_logged, self.images - self._images_logged
        self._seconds_logged, self._images_logged = self._seconds_logged + seconds, self.images
        return {"images_per_second": round(images / seconds, 2)} if images and seconds > 0 else {}

    def total(self) -> dict[str, float]:
        """The figures of a finished training, without its peak of memory."""
        rate = self.images / self._seconds() if self.images else None
        figures = {"train_startup_seconds": self.startup_seconds, "train_images_per_second": rate}
        return {name: round(value, 2) for name, value in figures.items() if value is not None}

    def _seconds(self) -> float:
        return time.perf_counter() - self._began - self._excluded

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_memory(device: torch.device) -> float:
    """GiB that this process has held at most: of the GPU, else of main memory (without the data workers)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # Not on Windows.

    # In bytes on macOS, else in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
