"""A start that should be dead and is not: the next one completes the run, and the output is whole and right."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.cli.runs import chat_lines, hpckv, texts, write_run

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
"""Two at once wait for each other's threads else."""


def forty_requests(folder: Path, checkpoint) -> Path:
    sampling = {"max_tokens": 60, "ignore_eos": True}
    model = checkpoint("llama", tokenizer=True)
    return write_run(folder, model, chat_lines(40), sampling=sampling, engine={"max_requests": 2})


def started(run_file: Path, environ: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "hpckv.cli.main", "run", str(run_file)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)


def wait_for_answers(run_file: Path, process: subprocess.Popen) -> None:
    """Until some are there."""
    output = run_file.parent / "out" / "output.jsonl"
    while not output.exists() or output.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.02)


def test_a_requeued_job_goes_on_although_its_lost_node_still_runs(tmp_path, checkpoint):
    run_file = forty_requests(tmp_path, checkpoint)
    environ = {**ONE_THREAD, "SLURM_JOB_ID": "7"}
    with started(run_file, environ) as lost:
        try:
            wait_for_answers(run_file, lost)
            refused = hpckv("run", run_file, env={**environ, "SLURM_JOB_ID": "8"})
            assert refused.returncode == 73
            assert f"process {lost.pid} on " in refused.stderr
            done = hpckv("run", run_file, env={**environ, "SLURM_RESTART_COUNT": "1"})
            said = lost.communicate(timeout=120)[1]
        finally:
            lost.kill()
    assert done.returncode == 0, done.stderr
    assert lost.returncode == 73, said
    assert len(texts(tmp_path)) == 40
    assert hpckv("run", run_file, "--output", tmp_path / "alone").returncode == 0
    assert texts(tmp_path) == texts(tmp_path, "alone")


def test_two_starts_at_once_leave_every_answer_once(tmp_path, checkpoint):
    run_file = forty_requests(tmp_path, checkpoint)
    zombie = started(run_file, ONE_THREAD)
    try:
        wait_for_answers(run_file, zombie)
        os.unlink(tmp_path / "out" / ".lock")  # as on a filesystem that has no locks, or whose server gave it back
        done = hpckv("run", run_file, env=ONE_THREAD)
        said = zombie.communicate(timeout=120)[1]
    finally:
        zombie.kill()
        zombie.wait()
    assert done.returncode == 0, done.stderr
    assert zombie.returncode == 73, said
    assert "another start of this run has taken over" in said
    found = texts(tmp_path)
    assert len(found) == 40
    assert hpckv("run", run_file, "--output", tmp_path / "alone").returncode == 0
    assert found == texts(tmp_path, "alone")
