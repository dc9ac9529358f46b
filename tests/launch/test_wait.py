"""Waiting for a submitted run: what its starts say at their end, programs in Slurm's place; a real Slurm is in tests/cluster."""

import os

import pytest

from hpckv.launch import wait
from hpckv.launch.submit import Submitted
from hpckv.launch.wait import wait_for_run
from tests.launch.test_submit import made

JOB = "7"


class Watched:
    """A run that was submitted, whose Slurm says one thing after the other."""

    def __init__(self, folder, **slurm):
        self.submitted = Submitted(made(folder, slurm=slurm), JOB)
        self.starts = self.submitted.folder / "starts"
        self.starts.mkdir(parents=True)
        self.bin = folder / "bin"
        self.bin.mkdir()

    def start(self, name, *words):
        (self.starts / name).write_text("".join(f"{line}\n" for line in words))

    def program(self, name, *answers):
        """Whose n-th call prints the n-th answer, and every later one the last. An answer is code of bash."""
        texts = "".join(f"{n}) {answer};;\n" for n, answer in enumerate(answers[:-1], start=1))
        counter = f'echo >>"$0.calls"; case $(wc -l <"$0.calls") in\n{texts}*) {answers[-1]};;\nesac\n'
        (self.bin / name).write_text(f"#!/bin/bash\n{counter}")
        (self.bin / name).chmod(0o755)

    def calls(self, name):
        path = self.bin / f"{name}.calls"
        return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture
def watched(tmp_path, monkeypatch):
    monkeypatch.setattr(wait, "_FIRST_ASK_S", 0.0)
    monkeypatch.setattr(wait, "_LOOK_S", 0.01)

    def make(**slurm):
        one = Watched(tmp_path, **slurm)
        monkeypatch.setenv("PATH", f"{one.bin}:{os.environ['PATH']}")
        one.program("scontrol", "exit 1")
        return one

    return make


def done(one):
    return wait_for_run(one.submitted, lambda _: None)


def test_what_a_start_says_is_enough(watched):
    one = watched()
    one.program("sacct", f"echo '{JOB}|{JOB}|RUNNING|00:01|0:0|n'")
    one.program("squeue", f"echo '{JOB}|{JOB}|RUNNING|1||n'")
    one.start(f"0.00001.{JOB}", "start 7 1 1 0 0", "end 7 2 75 requeue")
    one.start(f"0.00002.{JOB}", "start 7 3 1 0 0", "end 7 4 3 stop")
    assert done(one) == 3


@pytest.mark.parametrize(
    ("sacct", "squeue"),
    [("REQUEUED", "PENDING"), ("PREEMPTED", "PENDING"), ("NODE_FAIL", "PENDING"), ("RUNNING", "COMPLETING")],
)
def test_a_start_that_was_ended_from_outside_is_waited_for_if_slurm_starts_it_again(watched, sacct, squeue):
    one = watched()
    one.start(f"0.00001.{JOB}", "start 7 1 1 0 0", "end 7 2 75 ended")
    one.program("sacct", f"echo '{JOB}|{JOB}|{sacct}|00:01|0:15|n'")
    again = f"printf 'start 7 3 1 0 0\\nend 7 4 0 stop\\n' >'{one.starts}/0.00002.{JOB}'"
    one.program("squeue", *2 * [f"echo '{JOB}|{JOB}|{squeue}|0||(BeginTime)'"], f"{again}; echo '7|7|PENDING|0||'")
    assert done(one) == 0
    assert one.calls("squeue") == 3


@pytest.mark.parametrize(("state", "code"), [("CANCELLED by 0", 75), ("PREEMPTED", 75), ("FAILED", 73)])
def test_a_start_that_was_ended_from_outside_is_the_last_if_slurm_says_so(watched, state, code):
    one = watched()
    one.start(f"0.00001.{JOB}", "start 7 1 1 0 0", f"end 7 2 {code} ended")
    one.program("sacct", f"echo '{JOB}|{JOB}|{state}|00:01|0:15|n'")
    one.program("squeue", f"echo '{JOB}|{JOB}|{state.split()[0]}|0||'")
    assert done(one) == code


def test_each_task_of_an_array_is_asked_for_by_its_own_number(watched):
    one = watched(array="0-2", continuation="chain")
    one.start("0.00001.8", "start 8 1 1 0 0", "end 8 2 75 stop")
    one.start("1.00001.9", "start 9 1 1 0 0", "end 9 2 75 chain")
    one.start("1.00002.12", "start 12 3 1 0 0", "end 12 4 75 ended")
    (one.submitted.folder / "jobs").write_text("7\n12\n13\n")  # the third's next has not begun
    one.start("2.00001.7", "start 7 1 1 0 0", "end 7 2 75 chain")
    # Without sacct, and with one that calls tasks by both of their numbers.
    one.program("sacct", "exit 1", "echo '12_1|12|CANCELLED|1|0:0|n'; echo '13_2|13|CANCELLED|0|0:0|'")
    one.program("squeue", "echo '12_1|12|RUNNING|1||n'; echo '13_2|13|PENDING|0||(Priority)'")
    assert done(one) == 75
    assert (one.calls("sacct"), one.calls("squeue")) == (2, 1)


def test_what_slurm_has_said_once_and_forgotten_counts(watched):
    one = watched(array="0-1")
    one.start("0.00001.8", "start 8 1 1 0 0", "end 8 2 75 ended")
    one.start("1.00001.7", "start 7 1 1 0 0")
    one.program("sacct", "exit 1")
    finish = f"echo 'end 7 9 0 stop' >>'{one.starts}/1.00001.7'"
    one.program("squeue", "echo '7_0|8|CANCELLED|1||n'; echo '7_1|7|RUNNING|1||n'", f"{finish}; exit 1")
    assert done(one) == 0


def test_of_a_job_that_was_killed_slurm_says_the_code(watched):
    one = watched()
    one.start(f"0.00001.{JOB}", "start 7 1 1 0 0")
    one.program("sacct", f"echo '{JOB}|{JOB}|TIMEOUT|00:01|0:9|n'")
    assert done(one) == 137
