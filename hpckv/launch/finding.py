"""What `hpckv doctor` says of one matter, and the one clock that everything it asks is under."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from hpckv.store.fetch import within

Result = TypeVar("Result")

PATIENCE_S = 10.0
"""For one look at a filesystem."""


class Verdict(Enum):
    """How a matter stands."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One matter."""

    matter: str
    verdict: Verdict
    found: str
    remedy: str = ""
    """What to do; empty where nothing need be."""


class Clock:
    """The time that is left for all of it; for any number of threads."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._end = time.monotonic() + limit_s
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()

    @property
    def left_s(self) -> float:
        """Below 0 when the time is up."""
        return self._end - time.monotonic()

    def within(self, work: Callable[[], Result], most_s: float | None = None) -> Result:
        """What `work` returns or raises; `TimeoutError` if that takes longer: a system call that hangs is left to its thread."""
        return within(max(0.0, min(PATIENCE_S if most_s is None else most_s, self.left_s)), work)

    def run(self, command: Sequence[str], most_s: float = math.inf) -> subprocess.CompletedProcess[str] | None:
        """None if the program is not there, or gives no answer in time: it is then ended with all that it started."""
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError:
            return None
        with self._lock:
            self._running.add(process)
        try:
            out, err = process.communicate(timeout=max(0.0, min(most_s, self.left_s)))
        except subprocess.TimeoutExpired:
            _kill(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=1.0)  # in a dead filesystem's system call it stays
            return None
        finally:
            with self._lock:
                self._running.discard(process)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def stop(self) -> None:
        """End the programs that still run."""
        with self._lock:
            for process in self._running:
                _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
