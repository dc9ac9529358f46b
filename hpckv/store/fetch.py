"""Bringing blocks from the tiers into memory without waiting for them, and never longer than a deadline.

Reads run in threads that are never joined: one may hang for ever in a dead filesystem's system call. What hangs keeps
its own buffer; nobody else ever sees it.
"""

from __future__ import annotations

import errno
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Loaded(NamedTuple):
    """A verified block, and where it came from."""

    tier: str
    payload: memoryview
    is_bridged: bool = False
    """It was converted from another dtype."""
    writer: int | None = None
    """The uid of who had computed and stored it, as far as known."""


class DaemonPool:
    """A few threads for work that may hang. Threads that hang are replaced, up to `num_threads * 4` in all."""

    def __init__(self, num_threads: int, name: str) -> None:
        self.num_threads, self._name = num_threads, name
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_alive = self._num_hanging = 0

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work`, which must not raise, when a thread is free."""
        with self._lock:
            if self._num_alive - self._num_hanging < self.num_threads and self._num_alive < 4 * self.num_threads:
                self._num_alive += 1
                threading.Thread(target=self._run, name=f"{self._name}-{self._num_alive}", daemon=True).start()
        self._work.put(work)

    def hangs(self, change: int) -> None:
        """One more thread (or, with -1, one less) is known to hang."""
        with self._lock:
            self._num_hanging += change

    @property
    def is_exhausted(self) -> bool:
        """Whether every thread hangs that there may be: nothing more would be done."""
        with self._lock:
            return self._num_hanging >= 4 * self.num_threads

    def _run(self) -> None:
        while True:
            self._work.get()()


def for_each(work: Callable[[Item], None], items: Sequence[Item], num_threads: int) -> None:
    """`work` on every item, in threads that nobody else ever has to wait for; returns when all is done."""
    waiting: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
    for item in (*items, *[None] * num_threads):
        waiting.put(item)

    def run() -> None:
        while (item := waiting.get()) is not None:
            work(item)

    threads = [
        threading.Thread(target=run, name="hpckv-each", daemon=True) for _ in range(min(num_threads, len(items)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """What `work` returns or raises; `TimeoutError` if that takes longer, and then its thread is left alone."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            future.set_exception(error)

    threading.Thread(target=run, name="hpckv-within", daemon=True).start()
    if not wait([future], seconds).done:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer in {seconds:g} s")
    return future.result()


class Breaker:
    """Turns a tier off for a while after `limit` time-outs in a row; for twice as long each time it happens again."""

    def __init__(self, limit: int = 3, pause_s: float = 60.0) -> None:
        self.num_timeouts = self.num_trips = 0
        self._limit, self._pause_s = limit, pause_s
        self._in_a_row = 0
        self._closed_until = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the tier must be left alone now."""
        return time.monotonic() < self._closed_until

    def note_success(self) -> None:
        self._in_a_row = 0

    def note_timeout(self) -> bool:
        """Whether this one tripped the breaker."""
        self.num_timeouts += 1
        self._in_a_row += 1
        if self._in_a_row < self._limit or self.is_open:
            return False
        self._closed_until = time.monotonic() + self._pause_s * 2**self.num_trips
        self.num_trips += 1
        self._in_a_row = 0
        return True


@dataclass
class Job:
    """One block on its way."""

    key: bytes
    parent: bytes
    is_started: bool = False
    is_done: bool = False
    is_late: bool = False
    """It missed the deadline, and its thread may hang."""
    loaded: Loaded | None = None
    tier: int = 0
    """Index of the tier it is being read from."""

    def enter(self, tier: int) -> None:
        self.tier = tier


class Fetch:
    """Leading blocks of a prefix on their way into memory. `is_done` and `loaded` are for one thread, the owner's."""

    def __init__(self, keys: Sequence[bytes], parent: bytes, deadline_s: float, on_late: Callable[[Job], None]) -> None:
        parents = [parent, *keys[:-1]]
        self.jobs = [Job(key, before) for key, before in zip(keys, parents, strict=True)]
        self.is_over = False
        """No more blocks are wanted: all came, one failed, or time is up."""
        self.arrival = threading.Event()
        """Set whenever a block has come or failed."""
        self._started = self._last = time.monotonic()
        self._deadline = self._started + deadline_s
        self._on_late = on_late
        self._lock = threading.Lock()

    def finish(self, job: Job, loaded: Loaded | None) -> bool:
        """A reader is through with a block; whether it came too late."""
        with self._lock:
            job.loaded, job.is_done = loaded, True
            self._last = time.monotonic()
        self.arrival.set()
        return job.is_late

    @property
    def is_done(self) -> bool:
        """Whether `loaded` says all there will be."""
        if self.is_over:
            return True
        first_open = next((job for job in self.jobs if not (job.is_done and job.loaded)), None)
        if first_open is None or first_open.is_done:
            self.is_over = True
        elif time.monotonic() > self._deadline:
            self.is_over = True
            with self._lock:
                late = [job for job in self.jobs if job.is_started and not job.is_done]
                for job in late:
                    job.is_late = True
            for job in late:
                self._on_late(job)
        return self.is_over

    def wait(self, most_s: float) -> None:
        """Until a block has come or failed, or there is no more to wait for; no longer than `most_s` seconds."""
        if not self.is_done:
            self.arrival.clear()
            if not self.is_done:
                self.arrival.wait(min(most_s, self.seconds_left + 0.001))

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    @property
    def seconds(self) -> float:
        """From the start to the last block so far."""
        return self._last - self._started

    @property
    def loaded(self) -> list[Loaded]:
        """Contiguous from the first block on, verified."""
        found: list[Loaded] = []
        for job in self.jobs:
            if job.loaded is None:
                break
            found.append(job.loaded)
        return found
