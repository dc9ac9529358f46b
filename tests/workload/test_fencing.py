"""A start that should be dead and is not: the next one completes the run, and the output is whole and right."""

import os
import subprocess
import sys
import time

from tests.cli.runs import chat_lines, hpckv, texts, write_run


def test_a_requeued_job_goes_on_although_its_lost_node_still_runs(tmp_path, checkpoint):
    sampling = {"max_tokens": 60, "ignore_eos": True}
    model = checkpoint("llama", tokenizer=True)
    run_file = write_run(tmp_path, model, chat_lines(40), sampling=sampling, engine={"max_requests": 2})
    output = tmp_path / "out" / "output.jsonl"
    command = [sys.executable, "-m", "hpckv.cli.main", "run", str(run_file)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ) as lost:
        try:
            while not output.exists() or output.read_bytes().count(b"\n") < 3:
                assert lost.poll() is None
                time.sleep(0.02)
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
    sampling = {"max_tokens": 60, "ignore_eos": True}
    model = checkpoint("llama", tokenizer=True)
    run_file = write_run(tmp_path, model, chat_lines(40), sampling=sampling, engine={"max_requests": 2})
    output = tmp_path / "out" / "output.jsonl"
    command = [sys.executable, "-m", "hpckv.cli.main", "run", str(run_file)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}  # two at once wait for each other's threads else
    zombie = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)
    try:
        while not output.exists() or output.read_bytes().count(b"\n") < 3:
            assert zombie.poll() is None
            time.sleep(0.02)
        os.unlink(tmp_path / "out" / ".lock")  # as on a filesystem that has no locks, or whose server gave it back
        done = hpckv("run", run_file, env=environ)
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
