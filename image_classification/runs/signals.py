# SPDX-License-Identifier: Apache-2.0
"""Stopping a run by SIGTERM or Ctrl-C: once, and it saves a checkpoint; twice, and it is gone."""

import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import psutil


SIGNALS = (signal.SIGINT, signal.SIGTERM)
NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_LAUNCHERS = {"accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run"}
# A launcher hands on the signal that the terminal sends to all processes anyway: that is no second one.
_SAME = 1.0


class Stopped(Exception):
    """The run was asked to stop by a signal, and has saved the checkpoint from which it goes on."""

    def __init__(self, number: int, checkpoint: Path, step: int, epoch: float):
        super().__init__(f"Stopped by {NAMES[number]} at step {step} (epoch {epoch:.4g})")
        self.number, self.checkpoint = number, checkpoint

    @property
    def exit_status(self) -> int:
        """What a shell shows for a process that this signal ended."""
        return 128 + self.number


class StopSignals:
    """
    While this context is open, the first SIGINT or SIGTERM is kept in `received` (0 before), and a second one ends the
    process at once. With `speak`, this process says so.
    """

    def __init__(self, speak: bool):
        self.received, self.speak = 0, speak

    def __enter__(self) -> "StopSignals":
        self.process = os.getpid()
        # Only the main thread may set handlers; elsewhere (a notebook's, a service's) they stay the program's own.
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame) -> None:
        if os.getpid() != self.process:
            return  # A forked data worker: it ends when the run does.
        if not self.received:
            self.received, self.at = number, time.monotonic()
            self._say(f"\n{NAMES[number]}: a checkpoint is saved when this step is done. Twice stops at once.\n")
        elif time.monotonic() - self.at > _SAME:
            self._say("\nStopped at once. The same command goes on from the last checkpoint.\n")
            signal.signal(number, signal.SIG_DFL)
            os.kill(self.process, number)

    def _say(self, text: str) -> None:
        if self.speak:
            os.write(2, text.encode())  # Not `print`: the signal may have come in the middle of one.


def outlive_signals(_worker: int | None = None) -> None:
    """
    For data workers: terminals and schedulers signal them too, while the run still needs them for its last step. Only
    the process that started them ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return  # Only Linux tells who sent a signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    starter = multiprocessing.parent_process()
    assert starter is not None, "a data worker has a parent"

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != starter.pid:
            pass
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def same_command() -> str:
    """How this process was started, as it can be typed again: with its launcher, if it has one; without a token."""
    parent = psutil.Process().parent()
    above = parent.cmdline() if parent is not None else []
    launched = sys.argv[0] in above and _LAUNCHERS & {Path(word).name for word in above[:3]}
    return shlex.join(without_token(above if launched else sys.orig_argv))


def without_token(words: list[str]) -> list[str]:
    """A command line as it may be shown: `hub_token` is not."""
    shown, hide = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        is_flag = not hide and name.replace("-", "_") == "__hub_token"
        shown.append("TOKEN" if hide else f"{name}=TOKEN" if is_flag and equals else word)
        hide = is_flag and not equals
    return shown
