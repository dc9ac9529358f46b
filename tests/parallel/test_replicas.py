"""Replicas give the answers of one engine, each once, wherever they were computed; and prefixes are found where they lie."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.cli.runs import chat_lines, hpckv, texts, write_run
from tests.parallel.ranks import MPIEXEC, TOP

pytestmark = pytest.mark.mpi

LONG = "All the same words for everybody here, and a few more of them. " * 5
DOCUMENTS = 6


def launch(size: int, run_file, *settings: str, own: dict[int, dict[str, str]] | None = None) -> list[str]:
    """A command line that starts so many ranks; `own` are variables of single ones."""
    flags = [part for setting in settings for part in ("--set", setting)]
    program = [sys.executable, "-m", "hpckv.cli.main", "run", str(run_file), *flags]
    if own is None:
        return [MPIEXEC, "-n", str(size), *program]
    parts = []
    for rank in range(size):
        variables = [part for name, value in own[rank].items() for part in ("-env", name, value)]
        parts += [":"] * bool(parts) + ["-n", "1", *variables, *program]
    return [MPIEXEC, *parts]


def run(size: int, run_file, *settings: str, own=None) -> subprocess.CompletedProcess:
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = launch(size, run_file, *settings, own=own)
    return subprocess.run(command, cwd=TOP, env=environ, capture_output=True, text=True, timeout=300, check=False)


def summary(folder, name: str = "out") -> dict:
    return json.loads((folder / name / "summary.json").read_text())


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (2, ["parallel.replicas=2"]),
        (3, ["parallel.replicas=3", "engine.max_requests=2"]),
        (4, ["parallel.replicas=2", "parallel.tp=2"]),
        (4, ["parallel.replicas=2", "parallel.pp=2", "engine.max_requests=3"]),
        (2, ["parallel.replicas=2", "parallel.coordinator=torchrun"]),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, list) else str(given),
)
def test_replicas_together_give_the_answers_of_one(tmp_path, checkpoint, size, settings):
    model = checkpoint("llama", tokenizer=True, num_key_value_heads=2)
    sampling = {"max_tokens": 10, "temperature": 0.7, "ignore_eos": True, "logprobs": 2}
    run_file = write_run(tmp_path, model, chat_lines(24, heads=5), sampling=sampling)
    if "parallel.coordinator=torchrun" in settings:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m"]
        program = launch(1, run_file, *settings)[5:]
        done = subprocess.run([*command, *program], cwd=TOP, capture_output=True, text=True, timeout=300, check=False)
    else:
        done = run(size, run_file, *settings)
    assert done.returncode == 0, done.stderr
    assert hpckv("run", run_file, "--output", tmp_path / "alone").returncode == 0
    assert texts(tmp_path) == texts(tmp_path, "alone")

    record, alone = summary(tmp_path), summary(tmp_path, "alone")
    assert [part["replica"] for part in record["replicas"]] == list(range(len(record["replicas"])))
    prefilled = [part["scheduler"]["prefill_tokens"] for part in record["replicas"]]
    assert all(prefilled)
    # What the answers say of themselves is what the replicas computed, and only shared beginnings were computed more than once.
    assert sum(prefilled) == record["computed_tokens"]
    assert record["prompt_tokens"] == alone["prompt_tokens"]
    assert alone["computed_tokens"] <= sum(prefilled) < len(prefilled) * alone["computed_tokens"]


def document_lines(question: str, order) -> list[dict]:
    texts = [f"Document {n}. {LONG}" for n in range(DOCUMENTS)]
    return [
        {
            "custom_id": f"{question} {n}",
            "body": {"messages": [{"role": "system", "content": texts[n]}, {"role": "user", "content": question}]},
        }
        for n in order
    ]


def test_documents_go_to_the_replica_whose_disk_holds_them(tmp_path, checkpoint):
    model = checkpoint("llama", tokenizer=True)
    own = {rank: {"HPCKV_LOCAL": str(tmp_path / f"disk-{rank}")} for rank in range(2)}
    for variables in own.values():
        os.mkdir(variables["HPCKV_LOCAL"])

    def ask(question: str, order) -> dict:
        folder = tmp_path / question
        folder.mkdir()
        store = {"shared": str(tmp_path / "store"), "write": "all", "host_size": 0, "local": "set by the environment"}
        run_file = write_run(folder, model, document_lines(question, order), store=store)
        done = run(2, run_file, "parallel.replicas=2", "engine.max_requests=1", own=own)
        assert done.returncode == 0, done.stderr
        return summary(folder)

    forwards, backwards = range(DOCUMENTS), reversed(range(DOCUMENTS))
    first = ask("What is it?", forwards)
    assert sum(part["kept_tokens"] for part in first["replicas"]) > 0
    second = ask("Who wrote it?", forwards)  # read from the shared store, copied to the disk beside
    assert all(part["loaded_tokens"].get("shared") for part in second["replicas"])
    third = ask("When was it?", backwards)
    local, shared = (
        sum(part["loaded_tokens"].get(tier, 0) for part in third["replicas"]) for tier in ("local", "shared")
    )
    # One of them may have copied five of six: so that both have three, two go to the other.
    assert local >= 2 * shared
    assert all(part["loaded_tokens"].get("local") for part in third["replicas"])


def test_a_signal_to_another_replica_drains_all_and_the_next_start_goes_on(tmp_path, checkpoint):
    model = checkpoint("llama", tokenizer=True)
    sampling = {"max_tokens": 60, "ignore_eos": True}
    run_file = write_run(tmp_path, model, chat_lines(40), sampling=sampling, engine={"max_requests": 2})
    output = tmp_path / "out" / "output.jsonl"
    command = launch(2, run_file, "parallel.replicas=2")
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=TOP, env=environ, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < 4):
            time.sleep(0.02)
        ranks = subprocess.run(
            ["pgrep", "-f", f"hpckv.cli.main run {run_file}"], capture_output=True, text=True, check=True
        )
        pids = [int(pid) for pid in ranks.stdout.split() if int(pid) != process.pid]
        os.kill(max(pids), signal.SIGUSR1)
        said = process.communicate(timeout=120)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75, said
    assert "requests left; the same command goes on from here" in said
    before = output.read_bytes()
    assert 4 <= before.count(b"\n") < 40
    assert run(2, run_file, "parallel.replicas=2").returncode == 0
    assert output.read_bytes().startswith(before)
    assert len(texts(tmp_path)) == 40


def test_with_nothing_left_to_do_all_replicas_end(tmp_path, checkpoint):
    model = checkpoint("llama", tokenizer=True)
    run_file = write_run(tmp_path, model, chat_lines(2))
    assert hpckv("run", run_file).returncode == 0
    done = run(3, run_file, "parallel.replicas=3")
    assert done.returncode == 0, done.stderr
    assert "0 answers (2 were there)" in done.stderr
