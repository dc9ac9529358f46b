"""How far a run is: a bar on a terminal, a plain line now and then elsewhere. No torch."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hpckv.quantity import format_count, format_duration

_log = logging.getLogger(__name__)

_LOG_EVERY_S = 10.0


class RunProgress:
    """Requests done, tokens a second (prompt and output), hit percentage, time left."""

    def __init__(self, total: int, already: int = 0, *, is_quiet: bool = False) -> None:
        self._total, self._done, self._already = total, already, already
        self._prompt_tokens = self._cached_tokens = self._output_tokens = 0
        self._start = self._last = time.monotonic()
        self._is_quiet = is_quiet
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not is_quiet:
            self._bar = Progress(
                TextColumn("answers"),
                BarColumn(bar_width=12),  # all of it fits 80 columns
                MofNCompleteColumn(),
                TextColumn("{task.fields[rates]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("run", total=total, completed=already, rates="")

    def answered(self, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> None:
        """One more answer."""
        self._done += 1
        self._prompt_tokens += prompt_tokens
        self._cached_tokens += cached_tokens
        self._output_tokens += output_tokens
        if self._bar:
            self._bar.update(self._task, completed=self._done, rates=self._rates())
        elif time.monotonic() - self._last > _LOG_EVERY_S:
            self._last = time.monotonic()
            self.log()

    def log(self) -> None:
        """One plain line."""
        elapsed = time.monotonic() - self._start
        fresh = self._done - self._already
        left = format_duration(elapsed / fresh * (self._total - self._done)) if fresh else "?"
        _log.info("%d of %d answers, %s, %s left", self._done, self._total, self._rates(), left)

    def _rates(self) -> str:
        elapsed = max(1e-6, time.monotonic() - self._start)
        hit = 100 * self._cached_tokens / max(1, self._prompt_tokens)
        read, written = (format_count(tokens / elapsed) for tokens in (self._prompt_tokens, self._output_tokens))
        return f"{read} in + {written} out tok/s, {hit:.0f} % hit"

    def __enter__(self) -> RunProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
