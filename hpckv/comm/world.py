"""How the processes of one run find each other: by MPI, by Slurm's variables, by torchrun's, or there is only one.

`enter()` is called once a process, before CUDA is touched. Nothing is kept globally: it returns a `World`.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from hpckv.comm.group import Group, Single, Watch
from hpckv.comm.launch import Launch, check_nodes
from hpckv.comm.lifeline import BEAT_S, SECRET_BYTES, Lifeline, Listener, Member, connect
from hpckv.comm.outcome import note_exit_code
from hpckv.comm.parallel_dims import ParallelConfig, ParallelDims
from hpckv.comm.rendezvous import FIND_S, meet_by_torch, own_address
from hpckv.errors import ConfigError, HpckvError
from hpckv.log import warn_once

_log = logging.getLogger(__name__)

_HOST_BYTES, _LOG_BYTES = 64, 192
_MEMBER = np.dtype([("pid", "<i8"), ("host", f"S{_HOST_BYTES}"), ("log", f"S{_LOG_BYTES}")])
_ADDRESS = np.dtype([("host", "S64"), ("port", "<u4"), ("secret", "u1", (SECRET_BYTES,))])
LEAVE_S = 15.0
END_S = 600.0
"""Others may still seal and write down what they have; one that is lost is known sooner, by its heartbeat."""
_LAST_WORDS_S = 0.3
"""mpiexec ends all at once on an abort and drops what was said just before it."""


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
    roots: Group = field(default_factory=Single)
    """Those that schedule a replica, in the replicas' order; on other ranks of no use."""
    _mpi: Any = None

    @classmethod
    def single(cls) -> World:
        return cls(ParallelDims(), Single(), Single(), Watch(120.0), Lifeline.single())

    @property
    def is_root(self) -> bool:
        """Whether this rank schedules its replica."""
        return self.group.rank == 0

    @property
    def is_router(self) -> bool:
        """Whether this rank reads the input, gives replicas their work and writes the answers."""
        return self.everyone.rank == 0

    @property
    def is_single(self) -> bool:
        """Whether this rank has the whole model."""
        return self.group.size == 1

    @property
    def is_one_node(self) -> bool:
        return len({member.host for member in self.members}) <= 1

    @property
    def num_replicas(self) -> int:
        return self.everyone.size // self.group.size

    def rank_of(self, pp_rank: int, tp_rank: int) -> int:
        """A rank's number in `group`."""
        return pp_rank * self.dims.tp + tp_rank

    def shaped(self, tp: int, pp: int) -> World:
        """The ranks of the run in another grid; every rank must call it. Those that are too many make further replicas."""
        dims = ParallelDims.of_world_rank(self.everyone.rank, tp=tp, pp=pp)
        if self.everyone.size == 1:
            return self
        replica = self.everyone.split(dims.replica)
        roots = self.everyone.split(min(replica.rank, 1))
        return replace(self, dims=dims, group=replica, tensor=replica.split(dims.pp_rank), roots=roots)

    def with_stages(self, ends: tuple[int, ...]) -> World:
        """The same, the layers cut differently."""
        return replace(self, dims=replace(self.dims, stage_ends=ends))

    def leave(self, exit_code: int) -> None:
        """The run is over on this rank, once it is on every other; raises `RankLostError` for one that does not come.

        It ends with `exit_code` also if MPI does not let it go within `LEAVE_S`.
        """
        if (
            self.everyone.size > 1
        ):  # MPI's own end of a run waits for a lost rank for ever, and lets no other thread run
            self.watch.deadline_s = max(self.watch.deadline_s, END_S)
            self.watch.wait(self.everyone.reduce_min(np.zeros(1, np.int32)), "the other ranks to end")
        self.lifeline.close()
        if self._mpi is not None:
            late = threading.Timer(LEAVE_S, os._exit, [exit_code])  # a rank that never comes would hold up the others
            late.daemon = True
            late.start()
            self._mpi.Finalize()
            late.cancel()

    def give_up(self, error: BaseException) -> NoReturn:
        """End all ranks because this one cannot go on: the error has been said, and nothing is left to save."""
        code = error.exit_code if isinstance(error, HpckvError) else 70
        self.lifeline.report(error)
        note_exit_code(code)
        sys.stderr.flush()
        if self.everyone.rank:
            self.lifeline.wait_for_root(LEAVE_S)
        if self._mpi is not None:
            time.sleep(_LAST_WORDS_S)
            with suppress(Exception):  # the process ends in any case
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
        check_nodes([socket.gethostname()], os.environ, may_be_idle=config.allow_idle_nodes)
        return World.single()
    mpi = None
    if launch.kind == "mpi":
        group, mpi = _enter_mpi(launch, config.coordinator)
        if mpi is None:  # the launcher's PMI is another one than this MPI's
            launch = replace(launch, kind="slurm")
    if launch.kind != "mpi":
        group = meet_by_torch(launch, config, rendezvous)
    try:
        _expect(config, group.size)
        if group.size == 1:  # a step of its own: others of the job may use the other nodes
            return replace(World.single(), _mpi=mpi)
        members = _exchange_members(group, log_of(group.rank))
        check_nodes([member.host for member in members], os.environ, may_be_idle=config.allow_idle_nodes)
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
        ParallelDims(),
        group,
        Single(),
        watch,
        lifeline,
        members=members,
        local_rank=local_rank,
        num_local=len(mates),
        kind=launch.kind,
        everyone=group,
        _mpi=mpi,
    )
    found = found.shaped(config.tp, config.pp)
    warn_of_split_tensor_ranks(found.dims, members)
    return found


def _exchange_members(group: Group, log: str) -> tuple[Member, ...]:
    """Who is where."""
    own = np.zeros(1, _MEMBER)
    own["pid"], own["host"], own["log"] = os.getpid(), socket.gethostname().encode()[:_HOST_BYTES], log.encode()
    everybody = np.zeros(group.size, _MEMBER)
    Watch(FIND_S).wait(group.all_gather(own, everybody), "every rank to say where it is")
    return tuple(
        Member(rank, bytes(row["host"]).decode(), int(row["pid"]), bytes(row["log"]).decode(errors="ignore"))
        for rank, row in enumerate(everybody)
    )


def warn_of_split_tensor_ranks(dims: ParallelDims, members: Sequence[Member]) -> None:
    """Two sums a layer should not cross the network."""
    first = dims.world_rank - dims.tp_rank
    hosts = list(dict.fromkeys(member.host for member in members[first : first + dims.tp]))
    if len(hosts) > 1 and dims.tp_rank == 0:
        warn_once(
            _log,
            f"the {dims.tp} tensor ranks of a stage are on {len(hosts)} nodes ({', '.join(hosts)}): their sums, two a layer, cross "
            "the network; start a multiple of tp ranks on each node (srun --ntasks-per-node) and use parallel.pp across nodes",
        )


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
        return listener.accept(list(members), FIND_S, silence_s)
    row = address[0]
    where = (bytes(row["host"]).decode(), int(row["port"]))
    return connect(group.rank, members[0], where, row["secret"].tobytes(), FIND_S, silence_s)
