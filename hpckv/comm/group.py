"""A group of processes that pass arrays to each other: the contract, and how to wait without ever hanging.

Every operation is started and then waited for through a `Watch`, which polls: Python's signal handlers run meanwhile,
a deadline ends the wait, and so does the news that a rank is lost. Buffers are numpy arrays, contiguous, of equal size on
all sides; nothing is pickled. Ranks of a group must start its collective operations in the same order. An operation's
buffers must not be touched before it is done.
"""

from __future__ import annotations

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hpckv.errors import HpckvError

Array = npt.NDArray[Any]

_SPINS = 200
_YIELDS = 200
_NAP_S = 0.0002
_STOPPED_S = 1.0


class RankLostError(HpckvError):
    """A rank died, hangs, or cannot be reached: what is left of the run can be done by the next start."""

    exit_code = 75


class Pending(ABC):
    """An operation under way. Keeps its buffers alive."""

    @abstractmethod
    def is_done(self) -> bool:
        """Move it on; whether it is complete. May be asked again."""


class Done(Pending):
    """Nothing to wait for."""

    def is_done(self) -> bool:
        return True


class Group(ABC):
    """`size` processes, of which this is number `rank`. What a group must do is checked by `hpckv.testing.group_suite`."""

    rank: int
    size: int

    @abstractmethod
    def broadcast(self, buffer: Array) -> Pending:
        """Rank 0's buffer into everybody's."""

    @abstractmethod
    def reduce_min(self, values: Array) -> Pending:
        """Element by element the least of all ranks' int32 values, in place, on every rank."""

    @abstractmethod
    def reduce_sum(self, values: Array) -> Pending:
        """Element by element the sum of all ranks' float32 values, in place, on every rank; in any order."""

    @abstractmethod
    def all_gather(self, part: Array, whole: Array) -> Pending:
        """Every rank's part one after another into `whole`, on every rank."""

    @abstractmethod
    def send(self, buffer: Array, to: int, tag: int) -> Pending:
        """To one rank. Messages of one tag arrive in order."""

    @abstractmethod
    def receive(self, buffer: Array, source: int, tag: int) -> Pending:
        """From one rank; the sizes must be equal."""

    @abstractmethod
    def split(self, color: int) -> Group:
        """The ranks that say the same `color`, in this group's order. Every rank of the group must call it."""


class Single(Group):
    """A group of one."""

    rank, size = 0, 1

    def broadcast(self, buffer: Array) -> Pending:
        return Done()

    def reduce_min(self, values: Array) -> Pending:
        return Done()

    def reduce_sum(self, values: Array) -> Pending:
        return Done()

    def all_gather(self, part: Array, whole: Array) -> Pending:
        np.copyto(whole.reshape(-1), part.reshape(-1))
        return Done()

    def send(self, buffer: Array, to: int, tag: int) -> Pending:
        raise AssertionError("a group of one has nobody to send to")

    def receive(self, buffer: Array, source: int, tag: int) -> Pending:
        raise AssertionError("a group of one has nobody to hear from")

    def split(self, color: int) -> Group:
        return self


class Watch:
    """Waits for operations, no longer than a deadline, and never past bad news."""

    def __init__(self, deadline_s: float, check: Callable[[], None] = lambda: None) -> None:
        """`check` raises if a rank is known to be lost."""
        self.deadline_s = deadline_s
        self.check = check
        self.waited_s = 0.0
        """Seconds spent in `wait` so far."""
        self.naming_s = 0.0
        """So long after a transport's error `check` may still find out which rank was lost."""
        self.is_broken = False
        """A wait has failed: nothing that needs the other ranks can be done any more."""

    def wait(self, pending: Pending, what: str) -> None:
        """Until it is done; raises `RankLostError` after the deadline, naming `what` was waited for."""
        with self._naming():
            self._wait(pending, what)

    def is_done(self, pending: Pending) -> bool:
        """Whether it is, without waiting; raises as `wait` does."""
        with self._naming():
            self.check()
            return pending.is_done()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except RankLostError as error:
            self.is_broken = True
            self._name(error)
            raise
        except BaseException:
            self.is_broken = True
            raise

    def named(self, error: BaseException) -> BaseException:
        """What rank was lost, if that is what `error` comes from and it can be found out."""
        if isinstance(error, RankLostError):
            try:
                self._name(error)
            except RankLostError as named:
                return named
        return error

    def _name(self, error: RankLostError) -> None:
        """A transport knows only that a connection broke: who it was is known soon, and raised instead."""
        deadline = time.monotonic() + self.naming_s
        while time.monotonic() < deadline:
            try:
                self.check()
            except RankLostError as named:
                raise named from error
            time.sleep(_NAP_S)

    def _wait(self, pending: Pending, what: str) -> None:
        if pending.is_done():
            return
        begun, polls = time.perf_counter(), 0
        looked = begun
        while not pending.is_done():
            polls += 1
            if polls < _SPINS:
                continue
            if polls < _SPINS + _YIELDS:
                os.sched_yield()
                continue
            self.check()
            now = time.perf_counter()
            if now - looked > _STOPPED_S:  # it was this process that stood still, perhaps with all others
                begun += now - looked
            looked = now
            if now - begun > self.deadline_s:
                raise RankLostError(f"no answer in {self.deadline_s:g} s: {what}")
            time.sleep(_NAP_S)
        self.waited_s += time.perf_counter() - begun
