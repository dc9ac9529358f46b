"""Whatever happens to one rank, the run ends soon, names it, loses no answer, and the next start makes the output whole."""

import itertools
import os
import socket
import subprocess
import sys
import time

import pytest

from tests.cli.runs import chat_lines, hpckv, texts, write_run
from tests.parallel.ranks import MPIEXEC, TOP

GRIDS = {"tp": "parallel.tp=2", "pp": "parallel.pp=2", "replicas": "parallel.replicas=2"}
PHASES, ACTIONS, RANKS = ("start", "prefill", "decode", "write", "end"), ("kill", "stop", "raise"), (0, 1)
EVERY = list(itertools.product(GRIDS, PHASES, ACTIONS, RANKS))
# Each action in each phase, ranks and grids in turn.
SOME = [
    (list(GRIDS)[(n + n // 3) % 3], phase, action, (n // 2 + n) % 2)
    for n, (phase, action) in enumerate(itertools.product(PHASES, ACTIONS))
]


def start(run_file, grid: str, fault: str = "-1 none none") -> tuple[list[int], str]:
    """Both ranks to their end under mpiexec: its exit code, and what was said."""
    command = [MPIEXEC, "-n", "2", *program(run_file, grid)]
    done = subprocess.run(
        command, cwd=TOP, env=environ(fault), capture_output=True, text=True, timeout=120, check=False
    )
    return [done.returncode], done.stderr


def start_by_hand(run_file, grid: str, fault: str) -> tuple[list[int], str]:
    """The same without a launcher, which would kill the other rank at once: each rank's exit code."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {**environ(fault), **{name: str(value) for name, value in own.items()}}
        processes.append(
            subprocess.Popen(program(run_file, grid), cwd=TOP, env=variables, stderr=subprocess.PIPE, text=True)
        )
    try:
        said = "".join(process.communicate(timeout=120)[1] for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [process.returncode for process in processes], said


def program(run_file, grid: str) -> list[str]:
    settings = ["--set", GRIDS[grid], "--set", "parallel.silence_s=4"]
    return [sys.executable, "-m", "tests.parallel.faulty", "run", str(run_file), *settings]


def environ(fault: str) -> dict[str, str]:
    return {**os.environ, "FAULT": fault, "OMP_NUM_THREADS": "1"}


def some_run(folder, checkpoint):
    """A run file of twelve requests, four at a time."""
    return write_run(
        folder,
        checkpoint("llama", tokenizer=True, num_key_value_heads=2),
        chat_lines(12),
        sampling={"max_tokens": 12, "ignore_eos": True},
        engine={"max_requests": 4},
        store={"shared": str(folder / "store"), "write": "all", "seal_s": 0.2},
    )


def check(folder, checkpoint, grid, phase, action, rank):
    run_file = some_run(folder, checkpoint)
    begun = time.monotonic()
    codes, said = (start_by_hand if action == "kill" else start)(run_file, grid, f"{rank} {phase} {action}")
    assert time.monotonic() - begun < 60  # of it 30 at most after the fault, the rest is starting
    said += "".join(path.read_text() for path in sorted((folder / "out" / "logs").glob("*.log")))
    if (phase, action) == ("write", "raise"):  # trouble with a store is no trouble
        assert codes == [0], said
    elif action == "raise":
        assert codes == [70], said
        assert "struck" in said
    else:
        assert codes[-1 if action == "stop" else 1 - rank] == 75, (codes, said)
        assert f"rank {rank} on " in said, said
    output = folder / "out" / "output.jsonl"
    before = output.read_bytes() if output.exists() else b""
    codes, said = start(run_file, grid)
    assert codes == [0], said
    assert output.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    found = texts(folder)
    assert len(found) == 12
    assert hpckv("run", run_file, "--output", folder / "alone", "--set", "store.read=false").returncode == 0
    assert found == texts(folder, "alone")


@pytest.mark.mpi
@pytest.mark.parametrize(("grid", "phase", "action", "rank"), SOME)
def test_a_lost_rank_ends_the_run_and_the_next_start_completes_it(tmp_path, checkpoint, grid, phase, action, rank):
    check(tmp_path, checkpoint, grid, phase, action, rank)


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize(("grid", "phase", "action", "rank"), [case for case in EVERY if case not in SOME])
def test_every_rank_in_every_phase(tmp_path, checkpoint, grid, phase, action, rank):
    check(tmp_path, checkpoint, grid, phase, action, rank)


@pytest.mark.mpi
@pytest.mark.parametrize("rank", RANKS)
def test_a_signal_to_any_rank_drains_the_run(tmp_path, checkpoint, rank):
    run_file = some_run(tmp_path, checkpoint)
    codes, said = start(run_file, "tp", f"{rank} decode drain")
    assert codes == [75], said
    assert "requests left; the same command goes on from here" in said
    assert start(run_file, "pp")[0] == [0]  # on another grid, too
    assert len(texts(tmp_path)) == 12
