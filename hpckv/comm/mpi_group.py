"""Groups over MPI. mpi4py is imported on use: importing it starts MPI, which a login node must not.

Only upper-case calls with explicit byte counts are used, so nothing is pickled and any dtype can be sent, bfloat16 as bytes.
All calls come from one thread (`THREAD_FUNNELED`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpckv.comm.group import Array, Group, Pending


def start_mpi() -> Any:
    """The `mpi4py.MPI` module, MPI started; raises `ImportError` or `RuntimeError` where there is none."""
    import mpi4py

    mpi4py.rc.threads = True
    mpi4py.rc.thread_level = "funneled"
    mpi4py.rc.finalize = False  # a rank that was given up would make every other one wait for it
    from mpi4py import MPI

    return MPI


class _MpiPending(Pending):
    def __init__(self, request: Any, *buffers: Array) -> None:
        self._request, self._buffers = request, buffers
        self._is_done = False

    def is_done(self) -> bool:
        # A request that was completed is gone: asking MPI again would be an error.
        self._is_done = self._is_done or self._request.Test()
        return self._is_done


class MpiGroup(Group):
    """An MPI communicator of its own: nobody else's messages are on it."""

    def __init__(self, communicator: Any, mpi: Any) -> None:
        self._communicator, self._mpi = communicator, mpi
        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()

    @classmethod
    def world(cls, mpi: Any) -> MpiGroup:
        return cls(mpi.COMM_WORLD.Dup(), mpi)

    def broadcast(self, buffer: Array) -> Pending:
        return _MpiPending(self._communicator.Ibcast(self._bytes(buffer), root=0), buffer)

    def reduce_min(self, values: Array) -> Pending:
        assert values.dtype == np.int32
        request = self._communicator.Iallreduce(self._mpi.IN_PLACE, [values, self._mpi.INT32_T], op=self._mpi.MIN)
        return _MpiPending(request, values)

    def reduce_sum(self, values: Array) -> Pending:
        assert values.dtype == np.float32
        request = self._communicator.Iallreduce(self._mpi.IN_PLACE, [values, self._mpi.FLOAT], op=self._mpi.SUM)
        return _MpiPending(request, values)

    def all_gather(self, part: Array, whole: Array) -> Pending:
        assert whole.nbytes == self.size * part.nbytes
        request = self._communicator.Iallgather(self._bytes(part), [whole, part.nbytes, self._mpi.BYTE])
        return _MpiPending(request, part, whole)

    def send(self, buffer: Array, to: int, tag: int) -> Pending:
        return _MpiPending(self._communicator.Isend(self._bytes(buffer), dest=to, tag=tag), buffer)

    def receive(self, buffer: Array, source: int, tag: int) -> Pending:
        return _MpiPending(self._communicator.Irecv(self._bytes(buffer), source=source, tag=tag), buffer)

    def split(self, color: int) -> Group:
        return MpiGroup(self._communicator.Split(color, self.rank), self._mpi)

    def split_by_node(self) -> Group:
        """The ranks that share memory with this one."""
        return MpiGroup(self._communicator.Split_type(self._mpi.COMM_TYPE_SHARED, self.rank), self._mpi)

    def _bytes(self, buffer: Array) -> list[Any]:
        assert buffer.flags.c_contiguous
        return [buffer, buffer.nbytes, self._mpi.BYTE]
