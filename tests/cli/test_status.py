"""Where a run stands, from its directory alone; with Slurm, tests/cluster has the same."""

import json
import os
import subprocess
import sys
import time

from tests.cli.runs import chat_lines, hpckv, write_run


def status(directory) -> dict:
    done = hpckv("status", directory, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_run_is_running_then_stopped_then_done(tmp_path, checkpoint):
    lines = [*chat_lines(12), {"custom_id": "bad", "body": {"messages": []}}]
    sampling = {"max_tokens": 100, "ignore_eos": True}
    model = checkpoint("llama", tokenizer=True)
    run_file = write_run(tmp_path, model, lines, sampling=sampling, engine={"max_requests": 2})
    command = [sys.executable, "-m", "hpckv.cli.main", "run", str(run_file), "--skip-bad-lines"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        output = tmp_path / "out" / "output.jsonl"
        while not output.exists() or output.read_bytes().count(b"\n") < 2:
            assert process.poll() is None
            time.sleep(0.02)
        running = status(tmp_path / "out")
    finally:
        process.kill()
        process.wait()
    assert running["state"] == "running"
    assert running["requests"] == 13
    assert running["failed"] == 1
    assert running["answered"] + running["left"] == 12
    assert running["tokens_per_s"] > 0
    assert running["seconds_left"] > 0

    stopped = status(tmp_path / "out")
    assert (stopped["state"], stopped["seconds_left"], stopped["starts"]) == ("stopped", None, 1)
    assert "the same command goes on from there" in hpckv("status", tmp_path / "out").stdout
    assert hpckv("run", run_file, "--skip-bad-lines", "--allow-errors").returncode == 0
    done = status(tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (done["state"], done["answered"], done["failed"], done["left"], done["starts"]) == ("done", 12, 1, 0, 2)
    assert done["prompt_tokens"] > summary["prompt_tokens"]  # of both starts
    assert done["output_tokens"] == 12 * 100
    assert 0 < done["hit_percent"] < 100
    said = hpckv("status", tmp_path / "out").stdout
    assert "done" in said
    assert "% from cache" in said
    assert "no job of this run" in hpckv("cancel", tmp_path / "out").stdout


def test_a_folder_that_is_no_run_directory_is_said(tmp_path):
    done = hpckv("status", tmp_path)
    assert done.returncode == 66
    assert "no run directory" in done.stderr


def test_torn_lines_are_left_out(tmp_path):
    (tmp_path / "logs").mkdir()
    start = {"time": 1.0, "host": "elsewhere", "pid": 1, "requests": 3}
    (tmp_path / "logs" / "starts.jsonl").write_text(json.dumps(start) + '\n{"time": 2.0, "ho')
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "cache_read_input_tokens": 4}
    line = json.dumps({"custom_id": "a", "response": {"body": {"created": 100, "usage": usage}}})
    (tmp_path / "output.jsonl").write_text(line + "\n" + line[:40])
    found = status(tmp_path)
    assert (found["state"], found["answered"], found["left"], found["hit_percent"]) == ("stopped", 1, 2, 80.0)


def test_tasks_of_an_array_that_wait_are_seen_and_cancelled(tmp_path):
    (tmp_path / "logs").mkdir()
    start = {"time": 1.0, "host": "elsewhere", "pid": 1, "requests": 3, "job": "7_0"}
    (tmp_path / "logs" / "starts.jsonl").write_text(json.dumps(start) + "\n")
    (tmp_path / "submit" / "one").mkdir(parents=True)
    (tmp_path / "submit" / "one" / "jobs").write_text("7\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    answers = {
        "sacct": "7_0|8|COMPLETED|00:01:00|0:0|n1\n7_[1-5%2]|7|PENDING|00:00:00|0:0|None assigned",
        "squeue": "7_1|9|RUNNING|0:05||n2\n7_[2-5%2]|7|PENDING|0:00||(JobArrayTaskLimit)",
    }
    for name, text in answers.items():
        (tools / name).write_text(f"#!/bin/sh\necho '{text}'\n")
    (tools / "scancel").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/cancelled\n[ "$1" != 7 ] || echo busy >&2\n')
    for path in tools.iterdir():
        path.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    shown = json.loads(hpckv("status", tmp_path, "--json", env=environ).stdout)
    jobs = [(job["job"], job["state"]) for job in shown["jobs"]]
    assert (shown["state"], jobs) == (
        "running",
        [("7_0", "COMPLETED"), ("7_1", "RUNNING"), ("7_[2-5%2]", "PENDING")],
    )
    queued = (tools / "squeue").read_text()
    (tools / "squeue").write_text("#!/bin/sh\nexit 1\n")  # the controller is away
    jobs = json.loads(hpckv("status", tmp_path, "--json", env=environ).stdout)["jobs"]
    assert [(job["job"], job["state"]) for job in jobs] == [("7_0", "COMPLETED"), ("7_[1-5%2]", "PENDING")]
    (tools / "squeue").write_text(queued)
    done = hpckv("cancel", tmp_path, env=environ)
    assert (done.returncode, done.stdout) == (69, "7_1: cancelled\n7_[2-5%2]: busy\n")
    assert (tmp_path / "cancelled").read_text().split() == ["7_1", "7"]
