"""Keeping a ledger file while work goes on: a record every minute and one at the end. Trouble with it never stops the work."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from hpckv.log import warn_once
from hpckv.store.fetch import within
from hpckv.usage.ledger import LedgerFile
from hpckv.usage.record import Counters

_log = logging.getLogger(__name__)

INTERVAL_S = 60.0


class Meter:
    """Writes what was added since the last record, from a thread of its own."""

    def __init__(
        self,
        file: LedgerFile,
        sample: Callable[[], Counters],
        *,
        patience_s: float,
        interval_s: float = INTERVAL_S,
    ) -> None:
        """`sample` gives everything so far, from any thread; the first record is written now.

        A filesystem that does not answer holds up the beginning and the end for `patience_s` each.
        """
        self._patience_s = patience_s
        self._file, self._sample, self._interval_s = file, sample, interval_s
        self._written = Counters()
        self.is_broken = False
        """It has stopped writing; from the start, if nothing was written."""
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._patiently(self._write)
        threading.Thread(target=self._run, name="hpckv-ledger", daemon=True).start()

    def close(self) -> None:
        """The last record; idempotent."""
        if not self._ended.is_set():
            self._ended.set()
            self._patiently(self._write)
            if not self.is_broken:  # else even closing it may hang
                self._patiently(self._file.close)

    def _run(self) -> None:
        while not self._ended.wait(self._interval_s):
            self._write()

    def _patiently(self, work: Callable[[], None]) -> None:
        if self.is_broken:
            return
        try:
            within(self._patience_s, work)
        except OSError as error:
            self._give_up(error)

    def _write(self) -> None:
        with self._lock:
            if self.is_broken:
                return
            now = self._sample()
            try:
                self._file.append(now - self._written)
            except OSError as error:
                self._give_up(error)
            else:
                self._written = now

    def _give_up(self, error: OSError) -> None:
        self.is_broken = True
        warn_once(
            _log, f"ledger {self._file.path}: {error.strerror}; what this run does from now on is not accounted for"
        )
