"""Ranks on hosts of their own under a real Slurm: they meet by MPI or by Slurm's variables, and a cut cable ends the run well."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.runs import chat_lines, hpckv, texts, write_run
from tests.cluster.conftest import HOSTS
from tests.cluster.slurm import Slurm

pytestmark = [pytest.mark.root, pytest.mark.slurm, pytest.mark.mpi]

TOP = Path(__file__).parents[2]


def srun(*flags: str) -> list[str]:
    """Two nodes, two ranks on each."""
    step = ["srun", "--partition=a100", "-N", "2", "--ntasks-per-node=2", "--cpus-per-task=1", "--immediate=30", *flags]
    return [*step, f"--chdir={TOP}", "env", "OMP_NUM_THREADS=1"]


def program(run_file, *settings: str) -> list[str]:
    flags = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", "hpckv.cli.main", "run", str(run_file), *flags]


def hosts_of(folder) -> list[str]:
    return json.loads((folder / "out" / "provenance.json").read_text())["hosts_of_ranks"]


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (["--mpi=pmi2"], ["parallel.tp=2", "parallel.pp=2"]),
        (["--mpi=pmi2"], ["parallel.pp=2", "parallel.replicas=2"]),
        (["--mpi=none"], ["parallel.tp=2", "parallel.pp=2"]),
    ],
    ids=["mpi tp pp", "mpi replicas", "slurm's variables"],
)
def test_ranks_on_two_hosts_give_the_answers_of_one(cluster: Slurm, tmp_path, checkpoint, flags, settings):
    model = checkpoint("llama", tokenizer=True, num_key_value_heads=2)
    run_file = write_run(tmp_path, model, chat_lines(12), sampling={"max_tokens": 8, "ignore_eos": True})
    done = cluster.run(*srun(*flags), *program(run_file, *settings))
    assert done.returncode == 0, done.stderr
    assert hosts_of(tmp_path) == [HOSTS[0]] * 2 + [HOSTS[1]] * 2
    assert hpckv("run", run_file, "--output", tmp_path / "alone").returncode == 0
    assert texts(tmp_path) == texts(tmp_path, "alone")


def test_a_step_that_leaves_a_node_idle_is_refused_by_name(cluster: Slurm, tmp_path, checkpoint):
    run_file = write_run(tmp_path, checkpoint("llama", tokenizer=True), chat_lines(2))
    inside = ["srun", "--mpi=pmi2", "-N", "1", "-n", "2", *program(run_file, "parallel.tp=2")]
    outer = ["salloc", "--partition=a100", "-N", "2", "--ntasks-per-node=2", "--immediate=30", "--chdir", str(TOP)]
    done = cluster.run(*outer, *inside)
    assert "you pay for 2 nodes and use 1: of 2 ranks 2 on a100-0; none on a100-1" in done.stderr, done.stderr
    assert "64" in done.stderr
    assert not (tmp_path / "out" / "output.jsonl").exists()


def test_a_cut_cable_ends_the_run_soon_and_the_next_start_completes_it(cluster: Slurm, tmp_path, checkpoint):
    run_file = write_run(
        tmp_path,
        checkpoint("llama", tokenizer=True, num_key_value_heads=2),
        chat_lines(200),
        sampling={"max_tokens": 40, "ignore_eos": True},
        engine={"max_requests": 8},
    )
    settings = ["parallel.tp=2", "parallel.pp=2", "parallel.silence_s=4"]
    output, said = tmp_path / "out" / "output.jsonl", tmp_path / "said"
    outcome = tmp_path / "outcome"
    outcome.touch()
    command = [*srun("--mpi=pmi2"), f"HPCKV_OUTCOME={outcome}", *program(run_file, *settings)]
    with said.open("w") as errors:
        process = cluster.start_command(*command, stdout=errors, stderr=errors)
    try:
        while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < 8):
            time.sleep(0.05)
        assert process.poll() is None, said.read_text()
        cluster.set_link(HOSTS[1], up=False)
        cut = time.monotonic()
        while " on a100-1 (pid " not in said.read_text() and time.monotonic() < cut + 30:
            time.sleep(0.1)
        assert " on a100-1 (pid " in said.read_text()  # within half a minute, and with its name
        before = output.read_bytes()
        cluster.set_link(HOSTS[1], up=True)
        process.wait(120)
    finally:
        cluster.set_link(HOSTS[1], up=True)
        process.kill()
        process.wait()
    # srun's is the highest: of the ranks that ended by themselves, or of one that was killed by then.
    assert process.returncode in (75, 137), said.read_text()
    assert outcome.read_text() == "75\n"
    assert 8 <= before.count(b"\n") < 200
    # The half of the ranks that was cut off has ended by itself, and left what the others wrote.
    assert subprocess.run(["pgrep", "-f", str(run_file)], check=False, capture_output=True).returncode == 1
    assert output.read_bytes() == before
    cluster.wait_until_idle(120)
    done = cluster.run(*command)
    assert done.returncode == 0, done.stderr
    assert output.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert hpckv("run", run_file, "--output", tmp_path / "alone").returncode == 0
    assert texts(tmp_path) == texts(tmp_path, "alone")
