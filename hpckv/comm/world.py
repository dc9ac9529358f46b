"""How the processes of one run find each other: by MPI, by Slurm's variables, by torchrun's, or there is only one.

`enter()` is called once a process, before CUDA is touched. Nothing is kept globally: it returns a `World`.
"""

from __future__ import annotations

import datetime
import logging
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpckv.comm.group import Group, RankLostError, Single, Watch
from hpckv.comm.lifeline import BEAT_S, SECRET_BYTES, Lifeline, Listener, Member, connect
from hpckv.comm.parallel_dims import ParallelConfig, ParallelDims
from hpckv.errors import ConfigError, HpckvError
from hpckv.log import warn_once

_log = logging.getLogger(__name__)

_HOST_BYTES, _LOG_BYTES = 64, 192
_MEMBER = np.dtype([("pid", "<i8"), ("host", f"S{_HOST_BYTES}"), ("log", f"S{_LOG_BYTES}")])
_ADDRESS = np.dtype([("host", "S64"), ("port", "<u4"), ("secret", "u1", (SECRET_BYTES,))])
_FIND_S = 60.0
LEAVE_S = 15.0


@dataclass(frozen=True)
class Launch:
    """What the launcher's environment says of this process."""

    kind: str
    """`mpi`, `slurm`, `torchrun` or `single`."""
    rank: int = 0
    size: int = 1
    local_rank: int | None = None

    @classmethod
    def read(cls, environ: Mapping[str, str], kind: str = "auto") -> Launch:
        """The first of the ladder that is there, or the one asked for; raises `ConfigError` if that is not."""

        def number(name: str, default: int = 0) -> int:
            return int(environ.get(name, "") or default)

        local = environ.get("SLURM_LOCALID")
        found = {
            "mpi": any(name in environ for name in ("PMI_RANK", "PMI_FD", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")),
            # SLURM_STEP_ID: set by srun, not in the batch script itself.
            "slurm": "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ,
            "torchrun": "MASTER_ADDR" in environ and "RANK" in environ,
            "single": True,
        }
        if kind == "auto":
            kind = next(name for name, is_there in found.items() if is_there)
        elif not found[kind]:
            hints = {"mpi": "mpiexec, or srun --mpi=pmi2", "slurm": "srun", "torchrun": "torchrun"}
            raise ConfigError(f"parallel.coordinator: {kind}: this process was not started by {hints[kind]}")
        if kind == "slurm" or (kind == "mpi" and found["slurm"]):
            size = number("SLURM_STEP_NUM_TASKS", number("SLURM_NTASKS", 1))
            return cls(kind, number("SLURM_PROCID"), size, int(local) if local else None)
        if kind == "torchrun":
            return cls(kind, number("RANK"), number("WORLD_SIZE", 1), number("LOCAL_RANK"))
        return cls(kind)


@dataclass(frozen=True)
class World:
    """This process among those of its replica."""

    dims: ParallelDims
    group: Group
    """All ranks of the replica: stages one after another, tensor ranks neighbours. Rank 0 schedules."""
    tensor: Group
    """The tensor ranks of this stage."""
    watch: Watch
    lifeline: Lifeline
    members: tuple[Member, ...] = ()
    """Every rank of the run."""
    local_rank: int = 0
    num_local: int = 1
    """Ranks on this node."""
    kind: str = "single"
    everyone: Group = field(default_factory=Single)
    """All ranks of the run."""
    _mpi: Any = None

    @classmethod
    def single(cls) -> World:
        return cls(ParallelDims(), Single(), Single(), Watch(120.0), Lifeline.single())

    @property
    def is_root(self) -> bool:
        """Whether this rank schedules its replica."""
        return self.group.rank == 0

    @property
    def is_single(self) -> bool:
        return self.group.size == 1

    def rank_of(self, pp_rank: int, tp_rank: int) -> int:
        """A rank's number in `group`."""
        return pp_rank * self.dims.tp + tp_rank

    def shaped(self, tp: int, pp: int) -> World:
        """The ranks of the run in another grid; every rank must call it. Those that are too many make further replicas."""
        dims = ParallelDims.of_world_rank(self.everyone.rank, tp=tp, pp=pp)
        if self.everyone.size == 1:
            return self
        replica = self.everyone.split(dims.replica)
        return replace(self, dims=dims, group=replica, tensor=replica.split(dims.pp_rank))

    def with_stages(self, ends: tuple[int, ...]) -> World:
        """The same, the layers cut differently."""
        return replace(self, dims=replace(self.dims, stage_ends=ends))

    def leave(self, exit_code: int = 0) -> None:
        """The run is over on this rank; what follows must be quick, for its launcher ends the process after `LEAVE_S`."""
        self.lifeline.close()
        if self._mpi is not None:
            late = threading.Timer(LEAVE_S, os._exit, [exit_code])  # a rank that never comes would hold up the others
            late.daemon = True
            late.start()
            self._mpi.Finalize()
            late.cancel()

    def give_up(self, error: BaseException) -> None:
        """End all ranks because this one cannot go on: the error has been said, and nothing is left to save."""
        code = error.exit_code if isinstance(error, HpckvError) else 70
        self.lifeline.report(error)
        sys.stderr.flush()
        if self.everyone.rank:
            self.lifeline.wait_for_root(LEAVE_S)
        if self._mpi is not None:
            with suppress(Exception):
                self._mpi.COMM_WORLD.Abort(code)
        os._exit(code)


def enter(
    config: ParallelConfig, *, log_of: Callable[[int], str] = lambda rank: "", rendezvous: Path | None = None
) -> World:
    """Find the other ranks; raises `ConfigError` if there are not as many as the run file says.

    `log_of` a rank is where it writes its log, for messages that name it. `rendezvous` is a folder that all ranks see; Slurm's
    ranks need it where there is no MPI.
    """
    launch = Launch.read(os.environ, config.coordinator)
    if launch.kind == "single":
        _expect(config, 1)
        return World.single()
    mpi = None
    if launch.kind == "mpi":
        group, mpi = _enter_mpi(launch, config.coordinator)
        if mpi is None:  # the launcher's PMI is another one than this MPI's
            launch = replace(launch, kind="slurm")
    if launch.kind != "mpi":
        group = _enter_torch(launch, config, rendezvous)
    try:
        _expect(config, group.size)
        if group.size == 1:
            return replace(World.single(), _mpi=mpi)
        members = _exchange_members(group, log_of(group.rank))
        check_nodes(members, os.environ)
    except ConfigError:  # on every rank
        if mpi is not None:
            mpi.Finalize()  # mpiexec kills the others if one ends without
        raise
    return _join(config, group, mpi, launch, members)


def _expect(config: ParallelConfig, num_started: int) -> None:
    if num_started != config.num_ranks:
        shape = f"tp {config.tp} x pp {config.pp} x replicas {config.replicas}"
        raise ConfigError(
            f"parallel: {shape} needs {config.num_ranks} processes, {num_started} were started; "
            f"start the same command with srun -n {config.num_ranks} or mpiexec -n {config.num_ranks}"
        )


def _enter_mpi(launch: Launch, asked: str) -> tuple[Group, Any]:
    from hpckv.comm.mpi_group import MpiGroup, start_mpi

    try:
        mpi = start_mpi()
    except (ImportError, RuntimeError) as error:
        if asked == "mpi" or launch.size == 1:
            raise ConfigError(f"parallel.coordinator: MPI cannot be used here ({error})") from None
        warn_once(_log, f"MPI cannot be used ({error}); ranks find each other by Slurm's variables")
        return Single(), None
    group = MpiGroup.world(mpi)
    if group.size == 1 and launch.size > 1:
        text = (
            f"MPI sees 1 process, srun started {launch.size}: the MPI of this environment does not speak srun's PMI "
            "(srun --mpi=list shows what it offers; try --mpi=pmi2)"
        )
        if asked == "mpi":
            raise ConfigError(text)
        warn_once(_log, f"{text}; ranks find each other by Slurm's variables")
        return Single(), None
    return group, mpi


def _enter_torch(launch: Launch, config: ParallelConfig, rendezvous: Path | None) -> Group:
    """A gloo group; its store is rank 0's, on a port the kernel chose, or torchrun's."""
    from hpckv.comm.torch_group import TorchGroup, distributed

    dist = distributed()
    timeout = datetime.timedelta(seconds=config.start_deadline_s)
    if launch.kind == "torchrun":
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun's own agent holds the store where it says so, else rank 0 does.
        is_master = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store = dist.TCPStore(host, port, launch.size, is_master, timeout)
        store = dist.PrefixStore("hpckv", store)
    else:
        store = _store_by_file(launch, rendezvous, timeout)
    return TorchGroup(store, launch.rank, launch.size, config.start_deadline_s)


def _store_by_file(launch: Launch, folder: Path | None, timeout: datetime.timedelta) -> Any:
    """Rank 0 writes its address into a file that is named for this start of this job step."""
    from hpckv.comm.torch_group import distributed

    dist = distributed()
    if launch.size == 1:
        return dist.HashStore()
    if folder is None:
        raise ConfigError(
            "parallel.coordinator: ranks without MPI need a run directory (--output) that all of them see"
        )
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    path = folder / f".ranks-{'-'.join(os.environ.get(name, '0') for name in names)}"
    if launch.rank == 0:
        host = own_address(is_one_node=os.environ.get("SLURM_STEP_NUM_NODES", "1") == "1")
        store = dist.TCPStore(host, 0, launch.size, is_master=True, timeout=timeout, wait_for_workers=False)
        path.write_text(f"{host} {store.port} .\n")
        return store
    deadline = time.monotonic() + _FIND_S
    while True:
        with suppress(OSError, ValueError):
            host, port, _ = path.read_text().split()  # without the dot it is not all there yet
            return dist.TCPStore(host, int(port), launch.size, is_master=False, timeout=timeout)
        if time.monotonic() > deadline:
            raise RankLostError(f"rank 0 has not said where it is in {_FIND_S:g} s ({path})")
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


def _join(config: ParallelConfig, group: Group, mpi: Any, launch: Launch, members: tuple[Member, ...]) -> World:
    watch = Watch(config.start_deadline_s)
    num_hosts = len({member.host for member in members})
    lifeline = _connect_lifeline(group, members, watch, config.silence_s, is_one_node=num_hosts == 1)
    watch.check, watch.naming_s = lifeline.check, config.silence_s + BEAT_S
    mates = [member for member in members if member.host == members[group.rank].host]
    local_rank = [member.rank for member in mates].index(group.rank)
    if launch.local_rank is not None and launch.local_rank != local_rank:
        warn_once(_log, f"rank {group.rank} is number {local_rank} of its node, the launcher says {launch.local_rank}")
    found = World(
        ParallelDims(), group, Single(), watch, lifeline, members, local_rank, len(mates), launch.kind, group, mpi
    )
    return found.shaped(config.tp, config.pp)


def _exchange_members(group: Group, log: str) -> tuple[Member, ...]:
    """Who is where."""
    own = np.zeros(1, _MEMBER)
    own["pid"], own["host"], own["log"] = os.getpid(), socket.gethostname().encode()[:_HOST_BYTES], log.encode()
    everybody = np.zeros(group.size, _MEMBER)
    Watch(_FIND_S).wait(group.all_gather(own, everybody), "every rank to say where it is")
    return tuple(
        Member(rank, bytes(row["host"]).decode(), int(row["pid"]), bytes(row["log"]).decode(errors="ignore"))
        for rank, row in enumerate(everybody)
    )


def check_nodes(members: tuple[Member, ...], environ: Mapping[str, str]) -> None:
    """Raise `ConfigError` if nodes are paid for on which no rank runs."""
    paid = int(environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES") or 1)
    used = Counter(member.host for member in members)
    if len(used) < paid:
        where = ", ".join(f"{count} on {host}" for host, count in used.items())
        raise ConfigError(f"you pay for {paid} nodes and use {len(used)}: of {len(members)} ranks {where}")


def _connect_lifeline(
    group: Group, members: tuple[Member, ...], watch: Watch, silence_s: float, *, is_one_node: bool
) -> Lifeline:
    address = np.zeros(1, _ADDRESS)
    listener = Listener(own_address(is_one_node=is_one_node)) if group.rank == 0 else None
    if listener:
        address["host"], address["port"] = listener.address[0].encode(), listener.address[1]
        address["secret"] = np.frombuffer(listener.secret, np.uint8)
    watch.wait(group.broadcast(address), "rank 0's address")
    if listener:
        return listener.accept(list(members), _FIND_S, silence_s)
    row = address[0]
    where = (bytes(row["host"]).decode(), int(row["port"]))
    return connect(group.rank, members[0], where, row["secret"].tobytes(), _FIND_S, silence_s)
