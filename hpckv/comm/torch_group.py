"""Groups over `torch.distributed`'s gloo, where there is no MPI that the launcher understands. No process-global group is made."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from hpckv.comm.group import Array, Group, Pending, RankLostError

_A_YEAR = datetime.timedelta(days=365)


class _TorchPending(Pending):
    def __init__(self, work: Any, *kept: Any) -> None:
        self._work, self._kept = work, kept
        self._is_checked = False

    def is_done(self) -> bool:
        if self._is_checked:
            return True
        if not self._work.is_completed():
            return False
        try:
            self._work.wait()
        except RuntimeError as error:
            raise _broken(error) from None
        self._is_checked = True
        return True


class MessagePending(Pending):
    """gloo says that a message has passed only to who waits for it (`is_completed` stays false), so a thread does."""

    def __init__(self, work: Any, *kept: Any) -> None:
        self._work, self._kept = work, kept
        self._error: RuntimeError | None = None
        self._thread = threading.Thread(target=self._wait, name="hpckv-gloo", daemon=True)
        self._thread.start()

    def is_done(self) -> bool:
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise _broken(self._error) from None
        return True

    def _wait(self) -> None:
        try:
            self._work.wait(_A_YEAR)  # who waits has a `Watch`, and a mailbox may be empty for long
        except RuntimeError as error:
            self._error = error


class TorchGroup(Group):
    """A gloo process group over a `torch.distributed` store that all ranks reach."""

    def __init__(self, store: Any, rank: int, size: int, deadline_s: float) -> None:
        dist = distributed()
        self.rank, self.size = rank, size
        self._store, self._deadline_s = store, deadline_s
        self._splits = itertools.count()
        timeout = datetime.timedelta(seconds=deadline_s)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def broadcast(self, buffer: Array) -> Pending:
        with _connected():
            return _TorchPending(self._gloo.broadcast(_bytes(buffer), 0), buffer)

    def reduce_min(self, values: Array) -> Pending:
        import torch

        assert values.dtype == np.int32
        with _connected():
            return _TorchPending(self._gloo.allreduce(torch.from_numpy(values), distributed().ReduceOp.MIN), values)

    def reduce_sum(self, values: Array) -> Pending:
        import torch

        assert values.dtype == np.float32
        with _connected():
            return _TorchPending(self._gloo.allreduce(torch.from_numpy(values), distributed().ReduceOp.SUM), values)

    def all_gather(self, part: Array, whole: Array) -> Pending:
        assert whole.nbytes == self.size * part.nbytes
        pieces = list(_bytes(whole).chunk(self.size))
        with _connected():
            return _TorchPending(self._gloo.allgather(pieces, _bytes(part)), part, whole, pieces)

    def send(self, buffer: Array, to: int, tag: int) -> Pending:
        with _connected():
            return MessagePending(self._gloo.send([_bytes(buffer)], to, tag), buffer)

    def receive(self, buffer: Array, source: int, tag: int) -> Pending:
        with _connected():
            return MessagePending(self._gloo.recv([_bytes(buffer)], source, tag), buffer)

    def split(self, color: int) -> Group:
        colors = np.zeros(self.size, np.int32)
        pending = self.all_gather(np.array([color], np.int32), colors)
        while not pending.is_done():
            pass
        members = [rank for rank in range(self.size) if colors[rank] == color]
        store = distributed().PrefixStore(f"split-{next(self._splits)}-{color}", self._store)
        return TorchGroup(store, members.index(self.rank), len(members), self._deadline_s)


def distributed() -> Any:
    """`torch.distributed`, imported on use; its type stubs leave out most of it."""
    import torch.distributed

    return torch.distributed


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """An operation on a connection that is known to be broken fails when it is started."""
    try:
        yield
    except RuntimeError as error:
        raise _broken(error) from None


def _broken(error: RuntimeError) -> RankLostError:
    return RankLostError(f"a connection between ranks broke ({str(error).splitlines()[0]})")


def _bytes(buffer: Array) -> Any:
    import torch

    assert buffer.flags.c_contiguous
    return torch.from_numpy(buffer.reshape(-1).view(np.uint8))
