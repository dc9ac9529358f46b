"""Signals that ask a run to stop: caught by one thread, seen between steps. No torch.

`block_signals()` must run before any other thread exists, so before numpy and torch are imported: a thread inherits
the mask, and one without it would let the signal end the process. `install()` starts the thread that takes the
signals with `sigwait`. No handler ever interrupts the interpreter inside a library.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)

_SAME_S = 2.0
"""Slurm sends SIGUSR1 and SIGTERM for one preemption, and scripts and srun hand on what the task has had from Slurm already."""

DRAIN_SIGNALS = frozenset({signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT})


class Drain:
    """Becomes `requested` when a drain signal arrives; a second SIGINT, or a second SIGTERM later, ends the process at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.signal: signal.Signals | None = None
        self._listener: Callable[[], None] | None = None

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def request(self, by: signal.Signals) -> None:
        """Ask for the drain as if `by` had arrived."""
        self.signal = self.signal or by
        self._event.set()
        if self._listener:
            self._listener()

    def tell(self, listener: Callable[[], None]) -> None:
        """Call `listener`, in the signal thread, when the drain is asked for."""
        self._listener = listener
        if self.requested:
            listener()


def block_signals() -> None:
    """Keep the drain signals pending in this thread and all that it starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, DRAIN_SIGNALS)


def unblock_signals() -> None:
    """Give the drain signals their ordinary effect again: for a process that does not drain."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, DRAIN_SIGNALS)


def install() -> Drain:
    """Start the thread that waits for the drain signals."""
    drain = Drain()
    block_signals()
    threading.Thread(target=_wait, args=(drain,), name="hpckv-signals", daemon=True).start()
    return drain


def _wait(drain: Drain) -> None:
    asked: float | None = None
    while True:
        received = signal.Signals(signal.sigwait(DRAIN_SIGNALS))
        if received in (signal.SIGINT, signal.SIGTERM):
            is_impatient = asked is not None and (received == signal.SIGINT or time.monotonic() - asked > _SAME_S)
            if is_impatient:
                os._exit(128 + received)  # asked twice: now
            asked = asked or time.monotonic()
        if not drain.requested:
            _log.warning("%s: finishing this step, keeping all answers, then stopping", received.name)
        drain.request(received)
