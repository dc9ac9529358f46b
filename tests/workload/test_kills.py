"""SIGKILL at random moments of a run, again and again: no id missing, none twice, no torn line left, no wrong answer.

One helper process imports everything and forks a child for each attempt, so that a thousand kills take minutes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.runs import chat_lines, hpckv, texts, write_run

HELPER = """
import json, os, random, signal, sys, time
run_file, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
import torch
import hpckv.engine.engine
from pathlib import Path
from hpckv import log
from hpckv.comm import World
from hpckv.workload.drain import Drain
from hpckv.workload.run import RunOptions, run_batch
from hpckv.workload.runfile import load_run

rng = random.Random(seed)
config = load_run(Path(run_file))
output = Path(config.output) / "output.jsonl"
done = finished = 0
longest = 0.4
while done < kills:
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        log.setup(-2)
        os._exit(run_batch(config, RunOptions(is_quiet=True), Drain(), World.single()))
    time.sleep(rng.random() * longest)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        done += 1
    else:
        assert os.WEXITSTATUS(status) == 0, status
        finished += 1
    lines = output.read_bytes().splitlines() if output.exists() else []
    ids = []
    for number, raw in enumerate(lines):
        try:
            ids.append(json.loads(raw)["custom_id"])
        except ValueError:
            assert number == len(lines) - 1, "a torn line that is not the last"
    assert len(ids) == len(set(ids)), "an id twice"
    if len(ids) == 24:
        output.unlink()  # complete: begin anew
print(json.dumps({"kills": done, "finished": finished}))
"""


def interrupted(tmp_path: Path, model: Path, kills: int, **sections) -> dict:
    run = write_run(tmp_path, model, chat_lines(24), engine={"max_requests": 6}, **sections)
    assert hpckv("run", run, "--output", tmp_path / "wanted").returncode == 0
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HELPER, str(run), str(kills), "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=6000)
    assert done.returncode == 0, done.stderr
    last = hpckv("run", run)
    assert last.returncode == 0, last.stderr
    assert texts(tmp_path) == texts(tmp_path, "wanted")
    return json.loads(done.stdout)


def test_killed_runs_come_to_a_complete_and_exact_output(checkpoint, tmp_path):
    report = interrupted(tmp_path, checkpoint("llama", tokenizer=True), 40)
    assert report["kills"] == 40


def test_killed_runs_with_a_store_too(checkpoint, tmp_path):
    store = {"shared": str(tmp_path / "kv"), "write": "all", "segment_size": "1MiB", "seal_s": 0.05}
    assert interrupted(tmp_path, checkpoint("llama", tokenizer=True), 40, store=store)["kills"] == 40


@pytest.mark.slow
def test_a_thousand_killed_runs(checkpoint, tmp_path):
    store = {"shared": str(tmp_path / "kv"), "write": "all", "segment_size": "1MiB", "seal_s": 0.05}
    assert interrupted(tmp_path, checkpoint("llama", tokenizer=True), 1000, store=store)["kills"] == 1000
