"""The beat by which the workers of a run know which of them live (`docs/queue-format.md`). No torch."""

from __future__ import annotations

import logging
import threading
import time

from hpckv.errors import CannotWriteError
from hpckv.workload.queue import WorkQueue

_log = logging.getLogger(__name__)

_STUCK = 4
"""Leases without a tick: the beat stops."""


class Heart:
    """A thread that shows the others that this worker lives, as long as its engine comes back."""

    def __init__(self, queue: WorkQueue, lease_s: float) -> None:
        self._queue, self._lease_s = queue, lease_s
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._ticked = time.monotonic()
        queue.show()
        self._thread = threading.Thread(target=self._run, name="hpckv-heart", daemon=True)
        self._thread.start()

    def tick(self, *, is_idle: bool) -> None:
        """The engine came back. A change of `is_idle` is shown at once."""
        self._ticked = time.monotonic()
        if is_idle != self._queue.worker.is_idle:
            with self._lock:
                self._queue.worker.is_idle = is_idle
                self._queue.show()

    def stop(self) -> None:
        """This worker has left."""
        self._ended.set()
        self._thread.join()
        with self._lock:
            self._queue.worker.has_left = True
            self._queue.show()

    def _run(self) -> None:
        while not self._ended.wait(self._lease_s / 10):
            if time.monotonic() - self._ticked > _STUCK * self._lease_s:
                continue
            try:
                with self._lock:
                    self._queue.show()
            except CannotWriteError as error:
                _log.warning("%s; the other jobs of this run will take over", error)
