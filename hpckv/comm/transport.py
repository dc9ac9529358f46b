"""What carries tensors between the ranks of a replica: host memory and the control group, or the devices themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpckv.comm.collectives import Collectives, GroupCollectives, SingleRank, as_bytes
from hpckv.comm.device_group import DeviceCollectives, DevicePeers, have_own_devices
from hpckv.comm.group import Group, Pending, Watch
from hpckv.comm.parallel_dims import ParallelConfig
from hpckv.comm.world import World
from hpckv.errors import CapabilityError

if TYPE_CHECKING:
    import torch

STREAM_TAG = 1


class StreamLink:
    """How stages hand each other the stream (tokens x width): through host memory."""

    def __init__(self, group: Group, watch: Watch, device: torch.device) -> None:
        self._group, self._watch, self._device = group, watch, device

    def expect(self, shape: tuple[int, int], dtype: torch.dtype, source: int) -> Callable[[], torch.Tensor]:
        """Ask for a stream of the rank `source`; the function returned waits for it.

        Called before anything is sent, so that two stages never wait for each other to receive.
        """
        import torch

        x_TD = torch.empty(shape, dtype=dtype)
        pending = self._group.receive(as_bytes(x_TD), source, STREAM_TAG)

        def wait() -> torch.Tensor:
            self._watch.wait(pending, f"the stream of rank {source} of the replica")
            return x_TD.to(self._device)

        return wait

    def send(self, x_TD: torch.Tensor, to: int) -> Pending:
        return self._group.send(as_bytes(x_TD.cpu().contiguous()), to, STREAM_TAG)


class DeviceStreamLink(StreamLink):
    """From device to device."""

    def __init__(self, peers: DevicePeers) -> None:
        self._peers = peers

    def expect(self, shape: tuple[int, int], dtype: torch.dtype, source: int) -> Callable[[], torch.Tensor]:
        import torch

        # A stream only ever goes to the next stage and sending waits for nobody, so there is no need to be early.
        def wait() -> torch.Tensor:
            x_TD = torch.empty(shape, dtype=dtype, device=self._peers.device)
            self._peers.receive(x_TD, source)
            return x_TD

        return wait

    def send(self, x_TD: torch.Tensor, to: int) -> Pending:
        return self._peers.send(x_TD.contiguous(), to)


@dataclass(frozen=True)
class Transport:
    """One rank's, to the other ranks of its replica."""

    collectives: Collectives
    stream: StreamLink
    kind: str
    """`host` or `device`."""


def make_transport(world: World, parallel: ParallelConfig, device: torch.device, *, is_strict: bool) -> Transport:
    """Every rank of the replica must call it; raises `CapabilityError` if `parallel.transport` is not possible."""
    collectives: Collectives = SingleRank()
    stream = StreamLink(world.group, world.watch, device)
    if world.is_single:
        return Transport(collectives, stream, "host")
    if world.dims.tp > 1:
        collectives = GroupCollectives(world.tensor, world.watch, has_fixed_order=is_strict)
    if parallel.transport == "host":
        return Transport(collectives, stream, "host")
    have_own = have_own_devices(world.group, world.watch, device)
    if parallel.transport == "device" and device.type == "cuda" and not have_own:
        raise CapabilityError("parallel.transport: device needs a GPU for every rank")
    if parallel.transport == "auto" and not have_own:
        return Transport(collectives, stream, "host")

    def peers(group: Group) -> DevicePeers:
        return DevicePeers(group, world.watch, device, parallel.deadline_s, is_one_node=world.is_one_node)

    if world.dims.tp > 1:
        own = peers(world.tensor)
        collectives = DeviceCollectives(own, collectives, has_fixed_order=is_strict, reduces_in=parallel.reduce)
    if world.dims.pp > 1:
        stream = DeviceStreamLink(peers(world.group))
    return Transport(collectives, stream, "device")
