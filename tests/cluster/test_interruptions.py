"""Whatever the queue does to a run, its output is whole and exact in the end, or the job says what a person must do."""

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.runs import chat_lines, hpckv, texts, write_run
from tests.cluster.slurm import Slurm
from tests.cluster.test_batch_scripts import check, interrupt, logs, long_run, sbatch, wait_for

pytestmark = [pytest.mark.root, pytest.mark.slurm, pytest.mark.mpi]

NO_GPU = ("--gpus-per-node=0",)
"""A Slurm 22.05 that has been restarted beside a job with GPUs refuses steps with GPUs on its node for a while."""


@pytest.fixture(scope="module")
def wanted(tmp_path_factory, checkpoint) -> dict[str, str]:
    """What `long_run` answers when nobody interrupts it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert hpckv("run", long_run(folder, checkpoint)).returncode == 0
    return texts(folder)


def one_at_a_time(folder: Path, checkpoint, num_requests: int) -> Path:
    """A run that takes its time."""
    sampling = {"max_tokens": 120, "ignore_eos": True}
    model = checkpoint("llama", tokenizer=True)
    return write_run(folder, model, chat_lines(num_requests), sampling=sampling, engine={"max_requests": 1})


def test_a_run_goes_on_while_the_controller_is_away(cluster: Slurm, tmp_path, checkpoint, wanted):
    run_file = long_run(tmp_path, checkpoint)
    job = sbatch(cluster, tmp_path, "single_a100.sh", run_file, flags=NO_GPU, HPCKV_RUN_DIR=str(tmp_path / "out"))
    before = interrupt(cluster, tmp_path, job, "true")
    cluster.restart_controller()
    assert wait_for(cluster, job) == ("COMPLETED", "0:0"), logs(tmp_path)
    check(tmp_path, before, wanted)


def test_a_full_filesystem_ends_the_job_with_a_word_and_the_next_start_completes_it(
    cluster: Slurm, tmp_path, checkpoint, wanted
):
    run_file, out = long_run(tmp_path, checkpoint), tmp_path / "out"
    out.mkdir()
    node = cluster.in_mounts_of("a100-0")
    subprocess.run([*node, "mount", "-t", "tmpfs", "-o", "size=44k", "small", str(out)], check=True)
    try:
        flags = ("--nodelist=a100-0", *NO_GPU)
        job = sbatch(cluster, tmp_path, "single_a100.sh", run_file, flags=flags, HPCKV_RUN_DIR=str(out))
        assert wait_for(cluster, job) == ("FAILED", "73:0"), logs(tmp_path)
        assert "No space left on device" in logs(tmp_path)
        subprocess.run([*node, "mount", "-o", "remount,size=64m", str(out)], check=True)
        job = sbatch(cluster, tmp_path, "single_a100.sh", run_file, flags=flags, HPCKV_RUN_DIR=str(out))
        assert wait_for(cluster, job) == ("COMPLETED", "0:0"), logs(tmp_path)
        copied = subprocess.run([*node, "cat", str(out / "output.jsonl")], capture_output=True, check=True)
    finally:
        subprocess.run([*node, "umount", "-l", str(out)], check=True)
    (out / "output.jsonl").write_bytes(copied.stdout)
    assert texts(tmp_path) == wanted


def test_a_job_whose_node_is_lost_goes_on_elsewhere_although_the_node_still_writes(
    cluster: Slurm, tmp_path, checkpoint
):
    run_file = one_at_a_time(tmp_path, checkpoint, 600)  # more than there is time for until Slurm starts it elsewhere
    job = sbatch(cluster, tmp_path, "preemptible.sh", run_file, flags=NO_GPU, HPCKV_RUN_DIR=str(tmp_path / "out"))
    before = interrupt(cluster, tmp_path, job, "true")
    node = cluster.run("squeue", "-h", "-j", job, "-o", "%N").stdout.strip()
    cluster.set_link(node, up=False)
    try:
        # Else Slurm takes a minute to find it out. Nobody can reach the node, so the worker there goes on.
        assert cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost").returncode == 0
        end = time.monotonic() + 180
        while "is lost to Slurm and not dead; this start takes over" not in logs(tmp_path):
            assert time.monotonic() < end, logs(tmp_path)
            time.sleep(0.2)
        while "another start of this run has taken over; this one ends" not in logs(tmp_path):
            assert time.monotonic() < end, logs(tmp_path)
            time.sleep(0.2)
        assert wait_for(cluster, job, 300) == ("COMPLETED", "0:0"), logs(tmp_path)
    finally:
        cluster.set_link(node, up=True)
        cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
    cluster.wait_until_idle(120)
    assert hpckv("run", run_file, "--output", tmp_path / "alone", "--set", "engine.max_requests=64").returncode == 0
    check(tmp_path, before, texts(tmp_path, "alone"))


def kill_workers(run_file: Path) -> None:
    """As the kernel does when memory is short: without a word."""
    found = subprocess.run(["pgrep", "-f", f"hpckv.*run {run_file}"], capture_output=True, text=True, check=False)
    for pid in found.stdout.split():
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(int(pid), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_200_interruptions_of_every_kind(cluster: Slurm, tmp_path, checkpoint):
    chance = random.Random(200)
    run_file = one_at_a_time(tmp_path, checkpoint, 6000)
    out = tmp_path / "out"
    output = out / "output.jsonl"

    def num_answers() -> int:
        return output.read_bytes().count(b"\n") if output.exists() else 0

    def submit() -> str:
        flags = ("--partition=low", "--nodelist=a100-0", *NO_GPU)
        return sbatch(
            cluster, tmp_path, "preemptible.sh", run_file, flags=flags, HPCKV_RUN_DIR=str(out), HPCKV_ATTEMPTS="500"
        )

    urgent = ["sbatch", "--account=root", "--partition=a100", "--nodelist=a100-0", "--exclusive", "--wrap=sleep 1"]
    kinds = {
        "the time is nearly up": lambda job: cluster.run("scancel", "--batch", "--signal=USR1", job),
        "another job needs the node": lambda job: cluster.run(*urgent, f"--output={tmp_path}/urgent"),
        "the worker is killed": lambda job: kill_workers(run_file),
        "it is cancelled": lambda job: cluster.run("scancel", job),
        "it is requeued": lambda job: cluster.run("scontrol", "requeue", job),
        "the controller restarts": lambda job: cluster.restart_controller(),
    }
    job = submit()
    done = dict.fromkeys(kinds, 0)
    while sum(done.values()) < 200:
        before, end = num_answers(), time.monotonic() + 180
        while num_answers() <= before:
            state = cluster.run("squeue", "-h", "-j", job, "-o", "%T").stdout.strip()
            if not state:
                job = submit()  # it was cancelled or killed: somebody submits it again
            assert time.monotonic() < end, logs(tmp_path)[-4000:]
            time.sleep(0.1)
        time.sleep(chance.random() / 2)
        kind = chance.choice(list(kinds))
        kinds[kind](job)
        done[kind] += 1
        if num_answers() > 5900:
            break
    print(done, num_answers(), "answers by then")
    while num_answers() < 6000:
        if not cluster.run("squeue", "-h", "-j", job, "-o", "%T").stdout.strip():
            job = submit()
        time.sleep(0.5)
    assert wait_for(cluster, job, 1200) == ("COMPLETED", "0:0")
    assert sum(done.values()) == 200, done
    alone = ("--output", tmp_path / "alone", "--set", "engine.max_requests=64")
    assert hpckv("run", run_file, *alone, timeout=3600).returncode == 0
    assert texts(tmp_path) == texts(tmp_path, "alone")
