"""How a process learns that it is one of several, and what it refuses: missing launchers, idle nodes, wrong numbers."""

import datetime
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hpckv.comm import rendezvous
from hpckv.comm.group import RankLostError, Single
from hpckv.comm.launch import Launch, check_nodes, expand_nodelist
from hpckv.comm.lifeline import Member
from hpckv.comm.parallel_dims import ParallelDims
from hpckv.comm.rendezvous import own_address
from hpckv.comm.torch_group import distributed
from hpckv.comm.world import _exchange_members, warn_of_split_tensor_ranks
from hpckv.errors import ConfigError
from tests.parallel.ranks import MPIEXEC, TOP

BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2", "SLURM_LOCALID": "1"}
TORCHRUN = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, Launch("single")),
        (BATCH, Launch("single")),  # a batch script without srun, though Slurm's variables are there
        (SRUN, Launch("slurm", 2, 3, 1)),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": ""}, Launch("slurm", 2, 4, 1)),
        ({**SRUN, "SLURM_LOCALID": "0"}, Launch("slurm", 2, 3, 0)),
        ({**SRUN, "PMI_FD": "9"}, Launch("mpi", 2, 3, 1)),
        ({**SRUN, "PMIX_RANK": "2"}, Launch("mpi", 2, 3, 1)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Launch("mpi")),  # MPI itself says the rest
        ({"OMPI_COMM_WORLD_RANK": "1"}, Launch("mpi")),
        ({**BATCH, "PMI_RANK": "1"}, Launch("mpi")),
        (TORCHRUN, Launch("torchrun", 5, 8, 1)),
        ({**BATCH, **TORCHRUN}, Launch("torchrun", 5, 8, 1)),
        ({**SRUN, **TORCHRUN}, Launch("slurm", 2, 3, 1)),
        ({**TORCHRUN, "PMI_RANK": "0"}, Launch("mpi")),
        ({"MASTER_ADDR": "n1"}, Launch("single")),  # left over in the user's shell
    ],
)
def test_the_first_launcher_of_the_ladder_counts(environ, wanted):
    assert Launch.read(environ) == wanted


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("mpi", Launch("mpi", 2, 3, 1)), ("slurm", Launch("slurm", 2, 3, 1)), ("torchrun", Launch("torchrun", 5, 8, 1))],
)
def test_any_launcher_that_is_there_may_be_asked_for(kind, wanted):
    assert Launch.read({**SRUN, **TORCHRUN, "PMI_FD": "9"}, kind) == wanted
    assert Launch.read({**SRUN, **TORCHRUN, "PMI_FD": "9"}, "single") == Launch("single")


@pytest.mark.parametrize(
    ("kind", "hint"), [("mpi", "mpiexec, or srun --mpi=pmi2"), ("slurm", "srun"), ("torchrun", "torchrun")]
)
def test_a_launcher_that_is_asked_for_but_not_there_is_refused(kind, hint):
    with pytest.raises(ConfigError, match=rf"^parallel.coordinator: {kind}: this process was not started by {hint}$"):
        Launch.read(BATCH, kind)


def members(*hosts: str) -> tuple[Member, ...]:
    return tuple(Member(rank, host, 100 + rank) for rank, host in enumerate(hosts))


def test_a_node_that_is_paid_for_but_not_used_is_refused_by_name():
    two = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    text = "you pay for 2 nodes and use 1: of 4 ranks 4 on n1; none on n2 (parallel.allow_idle_nodes=true goes on all the same)"
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        check_nodes(["n1"] * 4, two)
    listed = {"SLURM_NNODES": "3", "SLURM_JOB_NODELIST": "n[1-2],gpu-07"}
    with pytest.raises(ConfigError, match=r"use 2: of 3 ranks 2 on n1\.site, 1 on n2\.site; none on gpu-07 "):
        check_nodes(["n1.site", "n1.site", "n2.site"], listed)
    check_nodes(["n1"], two, may_be_idle=True)


@pytest.mark.parametrize(
    "environ", [{}, {"SLURM_JOB_NUM_NODES": "2"}, {"SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": ""}]
)
def test_ranks_on_all_nodes_that_are_paid_for_are_right(environ):
    check_nodes(["n1", "n2"], environ)


def test_tensor_ranks_on_two_nodes_are_told_how_to_do_better(caplog):
    dims = [ParallelDims.of_world_rank(rank, tp=2, pp=2) for rank in range(4)]
    warn_of_split_tensor_ranks(dims[0], members("n1", "n1", "n2", "n2"))
    assert not caplog.messages
    warn_of_split_tensor_ranks(dims[2], members("n1", "n1", "n2", "n3"))
    assert "2 tensor ranks of a stage are on 2 nodes (n2, n3)" in caplog.text


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("login", ["login"]),
        ("gpu[1-3]", ["gpu1", "gpu2", "gpu3"]),
        ("gpu[08-10,2],login-1", ["gpu08", "gpu09", "gpu10", "gpu2", "login-1"]),
        ("r[1-2]n[1,4].site,x", ["r1n1.site", "r1n4.site", "r2n1.site", "r2n4.site", "x"]),
    ],
)
def test_lists_of_nodes_are_written_out(text, names):
    assert expand_nodelist(text) == names


def test_on_one_node_ranks_meet_on_the_loopback(monkeypatch):
    monkeypatch.delenv("HPCKV_HOST", raising=False)
    assert own_address(is_one_node=True) == "127.0.0.1"


def test_between_nodes_ranks_meet_where_the_hosts_name_leads(monkeypatch):
    monkeypatch.delenv("HPCKV_HOST", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.1.2.3")
    assert own_address(is_one_node=False) == "10.1.2.3"


class Route(socket.socket):
    """A datagram socket of a machine that reaches others as 10.9.8.7."""

    def connect(self, address) -> None:
        assert address[0].startswith("192.0.2.")  # nobody's

    def getsockname(self):
        return "10.9.8.7", 1234


@pytest.mark.parametrize("answer", ["127.0.1.1", OSError("no such host")])
def test_a_name_that_leads_nowhere_else_is_replaced_by_the_address_that_routes_use(answer, monkeypatch):
    def lookup(name: str) -> str:
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.delenv("HPCKV_HOST", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", lookup)
    monkeypatch.setattr(socket, "socket", Route)
    assert own_address(is_one_node=False) == "10.9.8.7"


def test_where_no_address_can_be_found_one_is_asked_for(monkeypatch):
    def unreachable(self, address) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.delenv("HPCKV_HOST", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.setattr(Route, "connect", unreachable)
    monkeypatch.setattr(socket, "socket", Route)
    with pytest.raises(ConfigError, match="has no address that other nodes reach; give one with HPCKV_HOST"):
        own_address(is_one_node=False)


@pytest.mark.parametrize("is_one_node", [True, False])
def test_an_address_that_is_given_wins(is_one_node, monkeypatch):
    monkeypatch.setenv("HPCKV_HOST", "ib0.n1")
    assert own_address(is_one_node=is_one_node) == "ib0.n1"


def test_a_log_whose_name_is_too_long_is_named_as_far_as_it_fits():
    (member,) = _exchange_members(Single(), "x" + "ä" * 200)
    assert (member.pid, member.host) == (os.getpid(), socket.gethostname())
    assert member.log.startswith("x" + "ä" * 90)


def start(folder, number: int, *launcher: str) -> tuple[int, dict[str, str]]:
    """The exit code of a launch, and what each rank of it says."""
    folder.mkdir(exist_ok=True)
    command = [*launcher, sys.executable, "-m", "tests.comm.launch_program", str(number), str(folder)]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=120)
    return done.returncode, {path.name: path.read_text() for path in sorted(folder.glob("rank-*"))}


@pytest.mark.mpi
def test_as_many_ranks_as_are_wanted_come_together(tmp_path):
    code, said = start(tmp_path, 2, MPIEXEC, "-n", "2")
    assert code == 0
    assert said == {f"rank-{rank}": f"rank {rank} of 2 by mpi, 2 members" for rank in range(2)}


@pytest.mark.mpi
def test_too_many_ranks_are_refused_on_every_one_of_them(tmp_path):
    """Each exit code is kept by a shell, so that a launcher that kills the others is found out."""
    keep = f'"$@"; code=$?; echo $code > {tmp_path}/code-$PMI_RANK; exit $code'
    code, said = start(tmp_path, 2, MPIEXEC, "-n", "3", "sh", "-c", keep, "sh")
    refusal = (
        "ConfigError: parallel: tp 2 x pp 1 x replicas 1 needs 2 processes, 3 were started; "
        "start the same command with srun -n 2 or mpiexec -n 2"
    )
    assert said == {f"rank-{rank}": refusal for rank in range(3)}
    assert [(tmp_path / f"code-{rank}").read_text() for rank in range(3)] == ["64\n"] * 3
    assert code == 64


@pytest.mark.mpi
def test_too_few_ranks_are_refused(tmp_path):
    code, said = start(tmp_path, 2, MPIEXEC, "-n", "1")
    assert (code, list(said)) == (64, ["rank-0"])
    assert "needs 2 processes, 1 were started" in said["rank-0"]


def test_a_process_that_nobody_else_was_started_with_is_refused(tmp_path):
    code, said = start(tmp_path, 2)
    assert (code, list(said)) == (64, ["rank-alone"])
    assert "needs 2 processes, 1 were started" in said["rank-alone"]


@pytest.mark.parametrize("launcher", [[], pytest.param([MPIEXEC, "-n", "1"], marks=pytest.mark.mpi)])
def test_one_process_needs_no_others(launcher, tmp_path):
    code, said = start(tmp_path, 1, *launcher)
    assert (code, list(said.values())) == (0, ["rank 0 of 1 by single, 0 members"])


def test_ranks_that_do_not_come_are_named(monkeypatch):
    monkeypatch.setattr(rendezvous, "FIND_S", 0.3)
    store = distributed().HashStore()
    store.set("hpckv-here-2", "n2")
    with pytest.raises(RankLostError, match=r"^of 4 ranks these have not come in 0\.3 s: 1, 3$"):
        rendezvous._meet(store, Launch("torchrun", 0, 4))
    store.set("hpckv-here-1", "n1")
    store.set("hpckv-here-3", "n3")
    rendezvous._meet(store, Launch("torchrun", 0, 4))


def test_a_store_listens_at_its_address_and_nowhere_else():
    store = rendezvous.serve_store("127.0.0.1", 0, 2, datetime.timedelta(seconds=5))
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    listening = [row[1] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == store.port]
    assert listening == [f"0100007F:{store.port:04X}"]
    with pytest.raises(ConfigError, match=r"^cannot listen at 192\.0\.2\.1:0 "):
        rendezvous.serve_store("192.0.2.1", 0, 2, datetime.timedelta(seconds=5))
