"""Tensors exchanged where they lie: between GPUs over NCCL, by `torch.distributed`'s backends without a process-global group.

Operations are put into the device's queue and not waited for by the host: what follows in the queue comes after them. A rank
that is lost meanwhile is noticed by the lifeline, which ends a process that hangs in a queue.
"""

from __future__ import annotations

import datetime
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from hpckv.comm.collectives import Collectives, add_in_order
from hpckv.comm.group import Group, Pending, Watch
from hpckv.comm.rendezvous import shared_store
from hpckv.comm.torch_group import MessagePending, distributed
from hpckv.log import warn_once

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

_TAG = 1
_UUID_BYTES = 64


class DevicePeers:
    """The ranks of a group by the tensors of their devices."""

    def __init__(
        self, group: Group, watch: Watch, device: torch.device, deadline_s: float, *, is_one_node: bool
    ) -> None:
        """Every rank of `group` must call it. NCCL for CUDA devices, gloo for others."""
        dist = distributed()
        self.rank, self.size, self.device = group.rank, group.size, device
        timeout = datetime.timedelta(seconds=deadline_s)
        store = shared_store(group, watch, timeout, is_one_node=is_one_node)
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._backend: Any = dist.ProcessGroupNCCL(store, self.rank, self.size, options)
        else:
            self._backend = dist.ProcessGroupGloo(store, self.rank, self.size, timeout)

    def all_reduce(self, x: torch.Tensor) -> None:
        """The sum of all ranks' `x`, in place and in its dtype."""
        self._backend.allreduce([x]).wait()

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's `x`, (ranks, *x.shape)."""
        own = x.contiguous()
        whole = own.new_empty((self.size, *own.shape))
        self._backend._allgather_base(whole.view(-1), own.view(-1)).wait()
        return whole

    def send(self, x: torch.Tensor, to: int) -> Pending:
        """`x` must not be changed before it is done."""
        work = self._backend.send([x], to, _TAG)
        return _Queued(work, x) if self.device.type == "cuda" else MessagePending(work, x)

    def receive(self, x: torch.Tensor, source: int) -> None:
        self._backend.recv([x], source, _TAG).wait()


class _Queued(Pending):
    def __init__(self, work: Any, x: torch.Tensor) -> None:
        self._work, self._kept = work, x

    def is_done(self) -> bool:
        return bool(self._work.is_completed())


class DeviceCollectives(Collectives):
    """Tensor ranks' sums on their devices; what lies on the host goes through it, as in `host`."""

    def __init__(self, peers: DevicePeers, host: Collectives, *, has_fixed_order: bool, reduces_in: str) -> None:
        """`reduces_in` is "float32" or "compute". With a fixed order parts are gathered and added by rank, in float32."""
        self._peers, self._host = peers, host
        self._has_fixed_order, self._reduces_in = has_fixed_order, reduces_in

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != self._peers.device.type:
            return self._host.all_reduce(x)
        if self._has_fixed_order:
            return add_in_order(self._peers.all_gather(x))
        total = x.float() if self._reduces_in == "float32" else x.clone()
        self._peers.all_reduce(total)
        return total.to(x.dtype)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        if x.device.type != self._peers.device.type:
            return self._host.all_gather(x)
        return torch.cat(list(self._peers.all_gather(x)), dim=-1)


def have_own_devices(group: Group, watch: Watch, device: torch.device) -> bool:
    """Whether every rank computes on a GPU that no other one of the group does, as NCCL needs. Every rank must call it."""
    import torch

    own = np.zeros(1, f"S{_UUID_BYTES}")
    if device.type == "cuda":
        own[0] = str(torch.cuda.get_device_properties(device).uuid).encode()[:_UUID_BYTES]
    everybody = np.zeros(group.size, own.dtype)
    watch.wait(group.all_gather(own, everybody), "the other ranks to say which GPU they compute on")
    found = everybody.tolist()
    if all(found) and len(set(found)) == len(found):
        return True
    if any(found):
        warn_once(_log, "several ranks compute on one GPU, or some on none: tensors pass through host memory")
    return False
