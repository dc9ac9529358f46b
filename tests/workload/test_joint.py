"""Several processes share one run, some die: every request has its answer, once, and little is computed twice."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.cli.runs import answers, chat_lines, hpckv, texts, write_run

QUEUE = {"lease_s": 3.0, "items": 16}
SAMPLING = {"max_tokens": 12, "ignore_eos": True}
COUNT = 60


@pytest.fixture(scope="module")
def model(checkpoint):
    return checkpoint("llama", tokenizer=True, num_key_value_heads=2)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory, model):
    """What one process answers alone."""
    folder = tmp_path_factory.mktemp("alone")
    assert hpckv("run", write_run(folder, model, chat_lines(COUNT), sampling=SAMPLING)).returncode == 0
    return texts(folder)


def join(run_file, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "hpckv.cli.main", "run", str(run_file), "--join", *more]
    with (run_file.parent / f"log-{time.monotonic_ns()}").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def logs(folder) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("log-*")))


def num_answers(folder) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("out/queue/1/parts/*.jsonl"))


def wait_for_answers(folder, count: int) -> None:
    end = time.monotonic() + 120
    while num_answers(folder) < count and not (folder / "out" / "output.jsonl").exists():
        assert time.monotonic() < end, logs(folder)
        time.sleep(0.02)


def summary(folder) -> dict:
    return json.loads((folder / "out" / "summary.json").read_text())


def test_one_that_joins_alone_gives_what_a_run_gives(tmp_path, model, wanted):
    run_file = write_run(tmp_path, model, chat_lines(COUNT), sampling=SAMPLING, queue=QUEUE)
    done = hpckv("run", run_file, "--join")
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path) == wanted
    assert sorted(path.name for path in (tmp_path / "out" / "queue" / "1").iterdir()) == [
        "done",
        "plan.json",
        "workers",
    ]
    assert summary(tmp_path)["requests"] == COUNT
    again = hpckv("run", run_file, "--join")
    assert again.returncode == 0
    assert f"all {COUNT} answers are there" in again.stderr


def test_three_share_a_run(tmp_path, model, wanted):
    run_file = write_run(tmp_path, model, chat_lines(COUNT), sampling=SAMPLING, queue=QUEUE, engine={"max_requests": 2})
    jobs = [join(run_file) for _ in range(3)]
    assert [job.wait(240) for job in jobs] == [0, 0, 0], logs(tmp_path)
    assert texts(tmp_path) == wanted
    found = summary(tmp_path)
    assert found["requests"] == COUNT
    assert len(found["workers"]) == 3
    assert hpckv("status", tmp_path / "out").stdout.count("done") == 1


def test_the_work_of_one_that_is_killed_is_done_by_the_others(tmp_path, model, wanted):
    run_file = write_run(tmp_path, model, chat_lines(COUNT), sampling=SAMPLING, queue=QUEUE, engine={"max_requests": 2})
    jobs = [join(run_file) for _ in range(2)]
    wait_for_answers(tmp_path, 6)
    jobs[0].send_signal(signal.SIGKILL)
    late = join(run_file)
    assert [job.wait(240) for job in (*jobs, late)] == [-9, 0, 0], logs(tmp_path)
    assert texts(tmp_path) == wanted


def test_when_all_are_told_to_stop_the_next_goes_on(tmp_path, model, wanted):
    run_file = write_run(tmp_path, model, chat_lines(COUNT), sampling=SAMPLING, queue=QUEUE, engine={"max_requests": 2})
    jobs = [join(run_file) for _ in range(2)]
    wait_for_answers(tmp_path, 4)
    for job in jobs:
        job.send_signal(signal.SIGUSR1)
    assert {job.wait(240) for job in jobs} == {75}, logs(tmp_path)
    before = num_answers(tmp_path)
    assert 4 <= before < COUNT
    assert not (tmp_path / "out" / "output.jsonl").exists()
    plain = hpckv("run", run_file)
    assert (plain.returncode, "run it with --join" in plain.stderr) == (64, True)
    status = json.loads(hpckv("status", tmp_path / "out", "--json").stdout)
    assert (status["answered"], status["state"]) == (before, "stopped")
    assert hpckv("run", run_file, "--join").returncode == 0
    assert texts(tmp_path) == wanted
    assert summary(tmp_path)["requests"] == COUNT


def test_one_that_hangs_loses_its_work_and_spoils_nothing_when_it_wakes(tmp_path, model, wanted):
    run_file = write_run(tmp_path, model, chat_lines(COUNT), sampling=SAMPLING, queue=QUEUE, engine={"max_requests": 2})
    asleep = join(run_file)
    wait_for_answers(tmp_path, 4)
    asleep.send_signal(signal.SIGSTOP)
    try:
        other = join(run_file)
        assert other.wait(240) == 0, logs(tmp_path)
        before = (tmp_path / "out" / "output.jsonl").read_bytes()
    finally:
        asleep.send_signal(signal.SIGCONT)
    assert asleep.wait(240) == 0, logs(tmp_path)
    assert (tmp_path / "out" / "output.jsonl").read_bytes() == before
    assert texts(tmp_path) == wanted


SLOW_TO_LOAD = """
import pathlib, sys, time
from hpckv.engine.engine import Engine
load, go = Engine.load, pathlib.Path(sys.argv.pop())
def slowly(*given, **more):
    (go.parent / "loading").touch()
    while not go.exists():
        time.sleep(0.02)
    load(*given, **more)
Engine.load = slowly
from hpckv.cli.main import main
main()
"""


def test_one_whose_model_is_loaded_when_the_others_have_finished_ends_in_peace(tmp_path, model, wanted):
    run_file = write_run(tmp_path, model, chat_lines(COUNT), sampling=SAMPLING, queue=QUEUE)
    command = [sys.executable, "-c", SLOW_TO_LOAD, "run", str(run_file), "--join", str(tmp_path / "go")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as late:
        end = time.monotonic() + 120
        while not (tmp_path / "loading").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        assert hpckv("run", run_file, "--join").returncode == 0
        (tmp_path / "go").touch()
        _, said = late.communicate(timeout=120)
    assert late.returncode == 0, said
    assert texts(tmp_path) == wanted
    assert summary(tmp_path)["requests"] == COUNT


def task(number: int) -> dict[str, str]:
    names = {"SLURM_JOB_ID": f"{70 + number}", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": f"{number}"}
    return {**os.environ, **names}


def test_a_late_task_of_an_array_leaves_alone_what_failed(tmp_path, model):
    lines = chat_lines(6)
    lines.append({**lines[0], "custom_id": "long", "body": {"messages": [{"role": "user", "content": "word " * 5000}]}})
    run_file = write_run(tmp_path, model, lines, sampling=SAMPLING, queue=QUEUE)
    assert hpckv("run", run_file, "--join", "--skip-bad-lines", env=task(0)).returncode == 3
    before = (tmp_path / "out" / "summary.json").read_bytes()
    late = hpckv("run", run_file, "--join", "--skip-bad-lines", env=task(1))
    assert (late.returncode, "the other tasks of this array have finished" in late.stderr) == (3, True)
    assert not (tmp_path / "out" / "queue" / "2").exists()
    assert (tmp_path / "out" / "summary.json").read_bytes() == before
    # Another job looks again, has nothing to compute, and forgets nothing.
    again = hpckv("run", run_file, "--join", "--skip-bad-lines")
    assert again.returncode == 3
    assert "load" not in again.stderr
    assert summary(tmp_path)["requests"] == 6
    assert len((tmp_path / "out" / "errors.jsonl").read_text().splitlines()) == 1


def test_failed_requests_are_tried_again_by_the_next_start_only(tmp_path, model):
    lines = chat_lines(6)
    lines.append({**lines[0], "custom_id": "long", "body": {"messages": [{"role": "user", "content": "word " * 5000}]}})
    run_file = write_run(tmp_path, model, lines, sampling=SAMPLING, queue=QUEUE)
    refused = hpckv("run", run_file, "--join")
    assert (refused.returncode, "the model's context is" in refused.stderr) == (65, True)
    skipped = hpckv("run", run_file, "--join", "--skip-bad-lines")
    assert skipped.returncode == 3, skipped.stderr
    assert set(answers(tmp_path)) == {f"q{n}" for n in range(6)}
    (error,) = (json.loads(raw) for raw in (tmp_path / "out" / "errors.jsonl").read_text().splitlines())
    assert error["custom_id"] == "long"


def test_what_fits_no_gpu_that_is_there_is_said(tmp_path, model):
    lines = chat_lines(4)
    lines.append({**lines[0], "custom_id": "long", "body": {"messages": [{"role": "user", "content": "word " * 90}]}})
    small = {"block_tokens": 16, "device_memory": "1200KiB"}
    run_file = write_run(tmp_path, model, lines, sampling=SAMPLING, queue=QUEUE, cache=small)
    done = hpckv("run", run_file, "--join")
    assert done.returncode == 78, done.stderr
    assert "let a job with more GPU memory join" in done.stderr


def test_another_input_is_refused(tmp_path, model):
    run_file = write_run(tmp_path, model, chat_lines(COUNT), sampling=SAMPLING, queue=QUEUE, engine={"max_requests": 2})
    job = join(run_file)
    wait_for_answers(tmp_path, 2)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(240) == 75
    other = hpckv("run", run_file, "--join", "--set", "sampling.temperature=1")
    assert (other.returncode, "other jobs work there on another input" in other.stderr) == (64, True)
