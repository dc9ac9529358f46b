"""Groups over MPI, over gloo and of one pass the conformance suite, and a rank on which it fails ends the launch with an error."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hpckv.comm.group import RankLostError, Single, Watch
from hpckv.comm.torch_group import TorchGroup, distributed
from hpckv.testing.group_suite import check_group
from tests.parallel.ranks import MPIEXEC, TOP

PROGRAM = [sys.executable, "-m", "tests.comm.group_program"]


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=120)


def test_a_group_of_one_conforms():
    check_group(Single())


@pytest.mark.mpi
def test_groups_over_mpi_conform():
    done = run(MPIEXEC, "-n", "3", *PROGRAM, "mpi", "-1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of 3 conforms") == 3


def test_groups_over_gloo_conform(tmp_path):
    done = run(*PROGRAM, "gloo", "-1", str(tmp_path / "store"))
    assert done.stdout.splitlines()[-1] == "exit codes 0 0 0", done.stderr
    assert done.stdout.count("of 3 conforms") == 3


@pytest.mark.mpi
def test_one_wrong_rank_over_mpi_ends_the_launch_with_an_error():
    done = run(MPIEXEC, "-n", "3", *PROGRAM, "mpi", "2")
    assert done.returncode != 0
    assert "AssertionError" in done.stderr
    assert "conforms" not in done.stdout


def test_one_wrong_rank_over_gloo_ends_every_rank_with_an_error(tmp_path):
    done = run(*PROGRAM, "gloo", "2", str(tmp_path / "store"))
    assert done.stdout == "exit codes 1 1 1\n"
    assert "AssertionError" in done.stderr
    assert "RankLostError: a connection between ranks broke" in done.stderr


def test_over_gloo_waiting_for_a_message_of_a_rank_that_goes_is_an_error():
    store = distributed().HashStore()
    with ThreadPoolExecutor(2) as threads:
        here, gone = threads.map(lambda rank: TorchGroup(store, rank, 2, 60.0), range(2))
    pending = here.receive(np.zeros(4, np.uint8), 1, 5)
    assert not pending.is_done()
    del gone
    with pytest.raises(RankLostError, match="a connection between ranks broke"):
        Watch(30.0).wait(pending, "rank 1")
