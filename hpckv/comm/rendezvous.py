"""Where ranks meet that have no MPI: a `torch.distributed` store that rank 0 serves, on a port the kernel chose."""

from __future__ import annotations

import datetime
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from hpckv.comm.group import Group, RankLostError, Watch
from hpckv.comm.launch import Launch
from hpckv.comm.parallel_dims import ParallelConfig
from hpckv.comm.torch_group import TorchGroup, distributed
from hpckv.errors import CannotWriteError, ConfigError

FIND_S = 60.0
"""Within so long every rank has to show up."""


def meet_by_torch(launch: Launch, config: ParallelConfig, rendezvous: Path | None) -> Group:
    """A gloo group; its store is rank 0's, on a port the kernel chose, or torchrun's."""
    dist = distributed()
    find, path = datetime.timedelta(seconds=FIND_S), None
    try:
        if launch.kind == "torchrun":
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            # torchrun's own agent holds the store where it says so, else rank 0 does.
            is_master = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            store = (
                serve_store(host, port, launch.size, find) if is_master else _reach_store(host, port, launch.size, find)
            )
        else:
            path = _address_file(rendezvous) if launch.size > 1 else None
            store = _store_by_file(launch, path, find)
        _meet(store, launch)
        if path and launch.rank == 0:
            path.unlink(missing_ok=True)
    except RuntimeError as error:
        raise RankLostError(f"rank 0's store cannot be reached: {str(error).splitlines()[0]}") from None
    store.set_timeout(datetime.timedelta(seconds=config.start_deadline_s))
    return TorchGroup(dist.PrefixStore("hpckv", store), launch.rank, launch.size, config.start_deadline_s)


def _meet(store: Any, launch: Launch) -> None:
    """Until all ranks are there; raises `RankLostError` naming those that are not."""
    names = [f"hpckv-here-{rank}" for rank in range(launch.size)]
    store.set(names[launch.rank], socket.gethostname())
    deadline = time.monotonic() + FIND_S
    while not store.check(names):
        if time.monotonic() > deadline:
            missing = ", ".join(str(rank) for rank, name in enumerate(names) if not store.check([name]))
            raise RankLostError(f"of {launch.size} ranks these have not come in {FIND_S:g} s: {missing}")
        time.sleep(0.1)


def _address_file(folder: Path | None) -> Path:
    """Where rank 0 says where it is, named for this start of this job step."""
    if folder is None:
        raise ConfigError(
            "parallel.coordinator: ranks without MPI need a run directory (--output) that all of them see"
        )
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return folder / f".ranks-{'-'.join(os.environ.get(name, '0') for name in names)}"


def _store_by_file(launch: Launch, path: Path | None, timeout: datetime.timedelta) -> Any:
    """Rank 0's store, or the way to it."""
    if path is None:
        return distributed().HashStore()
    if launch.rank == 0:
        host = own_address(is_one_node=os.environ.get("SLURM_STEP_NUM_NODES", "1") == "1")
        store = serve_store(host, 0, launch.size, timeout)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{host} {store.port} .\n")
        except OSError as error:
            raise CannotWriteError(f"{path}: {error.strerror}") from None
        return store
    deadline = time.monotonic() + FIND_S
    while True:
        with suppress(OSError, ValueError):
            host, port, _ = path.read_text().split()  # without the dot it is not all there yet
            return _reach_store(host, int(port), launch.size, timeout)
        if time.monotonic() > deadline:
            raise RankLostError(f"rank 0 has not said where it is in {FIND_S:g} s ({path})")
        time.sleep(0.2)


def own_address(*, is_one_node: bool) -> str:
    """Where this node's other ranks, or other nodes', reach this process, or `HPCKV_HOST`; raises `ConfigError` if nowhere."""
    if given := os.environ.get("HPCKV_HOST"):
        return given
    if is_one_node:
        return "127.0.0.1"
    with suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127."):
            return address
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: the kernel says which of its addresses it would use
        return str(probe.getsockname()[0])
    raise ConfigError(f"{socket.gethostname()} has no address that other nodes reach; give one with HPCKV_HOST")


def shared_store(group: Group, watch: Watch, timeout: datetime.timedelta, *, is_one_node: bool) -> Any:
    """A `torch.distributed` store for a group that has met. Every rank must call it."""
    address = np.zeros(1, np.dtype([("host", "S64"), ("port", "<u4")]))
    store = None
    if group.rank == 0:
        host = own_address(is_one_node=is_one_node)
        store = serve_store(host, 0, group.size, timeout)
        address["host"], address["port"] = host.encode(), store.port
    watch.wait(group.broadcast(address), "rank 0 to say where its store is")
    return store or _reach_store(bytes(address["host"][0]).decode(), int(address["port"][0]), group.size, timeout)


def serve_store(host: str, port: int, size: int, timeout: datetime.timedelta) -> Any:
    """A store that listens at `host` and nowhere else, as torch's own would; `port` 0 is the kernel's choice.

    Raises `ConfigError` if that is no address of this node, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}:{port} ({error.strerror}); HPCKV_HOST names another address"
        ) from None
    number = listener.getsockname()[1]
    options = {"timeout": timeout, "wait_for_workers": False, "master_listen_fd": listener.detach()}
    return distributed().TCPStore(host, number, size, is_master=True, **options)


def _reach_store(host: str, port: int, size: int, timeout: datetime.timedelta) -> Any:
    return distributed().TCPStore(host, port, size, is_master=False, timeout=timeout)
