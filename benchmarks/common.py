# SPDX-License-Identifier: Apache-2.0
"""Tools that the benchmarks share: timing, memory, hardware and versions, the CSV."""

import csv
import itertools
import math
import os
import platform
import resource
import statistics
import threading
import time
from pathlib import Path

import torch
import transformers
from transformers import TrainerCallback


_CYCLES_PER_SECOND = 3e9  # No GPU's clock is faster.
HOST = ("hardware", "cpu", "cores", "torch", "transformers", "triton", "date")


def hardware(device: str) -> str:
    """Name what computes."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def cpu() -> str:
    """Read the processor's name, on which whatever is bound by Python depends."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def host(device: str) -> dict[str, str | int]:
    """Collect what every row says of the machine and its software, by `HOST`."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    versions = (torch.__version__, transformers.__version__, triton, time.strftime("%Y-%m-%d"))
    return dict(zip(HOST, (hardware(device), cpu(), os.cpu_count(), *versions), strict=True))


def measure(step, device: str, repeats: int, warmup: int = 3) -> dict[str, float]:
    """
    Measure `step`, run again and again: 20th, 50th and 80th percentile of its time in ms, and the peak memory in GiB,
    allocated on CUDA; of the whole process, libraries included, on a CPU.

    On CUDA, times are read from events, so that the launches of a step overlap with the work of the one before, as they
    do in training; `gpu_ms` is `gpu_time`.
    """
    for _ in range(warmup):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
        peak = torch.cuda.max_memory_allocated() / 2**30
        gpu = {"gpu_ms": gpu_time(step)}
    else:
        gpu = {}
        with PeakMemory() as memory:
            times = [stopped(step) for _ in range(repeats)]
        peak = memory.gib
    return {**percentiles(times), "peak_gib": peak, **gpu}


def measure_in_turn(steps: dict, repeats: int, warmup: int = 3) -> dict[str, dict[str, float]]:
    """
    Measure several steps by name, on a CPU, one after the other and over again: what slows a shared machine down for
    seconds then meets all of them, and not one.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(warmup + repeats):
        for name, step in steps.items():
            taken = stopped(step)
            if index >= warmup:
                times[name].append(taken)
    return {name: percentiles(taken) for name, taken in times.items()}


def stopped(step) -> float:
    """Time a call, in ms."""
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def percentiles(times: list[float]) -> dict[str, float]:
    """Compute the 20th, 50th and 80th percentile."""
    values = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double())
    return dict(zip(("p20_ms", "median_ms", "p80_ms"), values.tolist()))


def gpu_time(step, repeats: int = 5) -> float:
    """
    Time a step on the GPU in ms, where it does not wait for launches: they wait for it, behind a pause (about a
    thousand of them; the rest are launched while it works). PyTorch's profiler would tell as much, but once used it
    makes later launches of the process up to twice as slow.
    """
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    host = time.perf_counter() - began
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(1.5 * host * _CYCLES_PER_SECOND))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


class PeakMemory:
    """Peak memory of the process within the context, sampled from a thread."""

    def __enter__(self):
        self.gib, self.done = 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self):
        page = resource.getpagesize()
        while True:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            self.gib = max(self.gib, resident / 2**30)
            if self.done.wait(0.002):
                return

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


class Clock(TrainerCallback):
    """Images per second, `images` of a step, from one step until another, or for about so many seconds."""

    def __init__(self, images: int, device: str, begin: int, end: float = math.inf, seconds: float = math.inf):
        self.images, self.device, self.begin, self.end, self.seconds = images, device, begin, end, seconds
        self.steps, self.per_second = 0, math.nan

    def step(self) -> bool:
        """Count a step, and tell whether it was the last."""
        self.steps += 1
        if self.steps == self.begin:
            self.began = self._now()
        elif self.steps == self.end or (self.steps > self.begin and time.perf_counter() - self.began > self.seconds):
            self.per_second = self.images * (self.steps - self.begin) / (self._now() - self.began)
        return not math.isnan(self.per_second)

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = self.step()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Compute the RMS difference over the RMS of what is expected."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


class Rows:
    """Rows as they are measured: printed, and kept for the CSV."""

    measured: tuple[str, ...]
    suffix = ""  # Of the name of their file.

    def __init__(self, device: str):
        self.rows: list[dict] = []
        self.constant = host(device)

    def add(self, **row) -> None:
        """Keep a row for the CSV, and print it, in the order of the columns."""
        self.rows.append({**row, **self.constant})
        shown = {key: row[key] for key in self.measured if row.get(key) not in (None, "")}
        print(", ".join(f"{key} {x:.4g}" if isinstance(x, float) else str(x) for key, x in shown.items()), flush=True)

    def write(self, path: Path) -> None:
        """Append to the CSV at `path`."""
        if not self.rows:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, (*self.measured, *HOST), lineterminator="\n")
            if new:
                writer.writeheader()
            for row in self.rows:
                writer.writerow({key: f"{x:.4g}" if isinstance(x, float) else x for key, x in row.items()})
        print(f"Written to {path}", flush=True)


class Table(Rows):
    """Rows with their ratio to the softmax baseline."""

    measured: tuple[str, ...] = (
        *("benchmark", "model", "provider", "mode", "basis", "batch", "tokens", "dtype", "what", "p20_ms", "median_ms"),
        *("p80_ms", "gpu_ms", "peak_gib", "ratio_time", "ratio_gpu", "ratio_memory", "error"),
    )
    # The provider to which the ratios are, in the row where all these are the same.
    base = "softmax"
    same: tuple[str, ...] = ("benchmark", "model", "mode", "batch", "tokens", "dtype", "what")
    ratios: dict[str, str] = {"ratio_time": "median_ms", "ratio_memory": "peak_gib", "ratio_gpu": "gpu_ms"}

    def baseline(self, row: dict) -> dict:
        """Find the row to which the ratios of `row` are, itself if it is one; empty where there is none."""
        alike = (other for other in self.rows if all(other.get(key) == row.get(key) for key in self.same))
        own = row if row["provider"] == self.base else {}
        return next((other for other in alike if other["provider"] == self.base), own)

    def add(self, **row) -> None:
        baseline = self.baseline(row)
        for ratio, what in self.ratios.items():
            if what in row and what in baseline:
                row[ratio] = row[what] / baseline[what]
        super().add(**row)


class Rates(Rows):
    """Rows of images per second, with their ratio to the synthetic images' where there is one."""

    suffix = "_input_pipeline"
    measured = (
        *("benchmark", "model", "provider", "mode", "basis", "batch", "dtype", "what", "images_per_second", "ratio"),
        *("ms", "cpu_ms", "error"),
    )
