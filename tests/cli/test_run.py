"""`hpckv run` from outside: right answers, warm from the store, usage that adds up, resume, drain, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from tests.cli.runs import answers, chat_lines, hpckv, texts, write_run


def test_a_warm_run_in_a_new_process_takes_its_prefixes_from_the_store_and_answers_the_same(checkpoint, tmp_path):
    model = checkpoint("llama", tokenizer=True)
    run = write_run(tmp_path, model, chat_lines(12), store={"shared": str(tmp_path / "kv"), "write": "planned"})
    for name in ("cold", "warm"):
        done = hpckv("run", run, "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
    plain = hpckv("run", write_run(tmp_path, model, chat_lines(12)))
    assert plain.returncode == 0, plain.stderr
    assert texts(tmp_path, "cold") == texts(tmp_path, "warm") == texts(tmp_path, "out")

    for name in ("cold", "warm"):
        for body in answers(tmp_path, name).values():
            usage = body["usage"]
            assert sum(usage["hpckv"].values()) == usage["prompt_tokens"]
            assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
            cached = usage["prompt_tokens"] - usage["hpckv"]["computed"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == usage["cache_read_input_tokens"] == cached
    cold, warm = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("cold", "warm"))
    assert cold["cached"]["shared"] == cold["cached"]["host"] == 0
    assert cold["scheduler"]["prefill_tokens"] == cold["least_prefill_tokens"]
    assert warm["cached"]["shared"] > 0
    assert warm["hit_percent"] > 80


def test_an_openai_client_reads_the_lines(checkpoint, tmp_path):
    line = chat_lines(1)[0]
    line["body"] |= {"n": 2, "logprobs": True, "top_logprobs": 2, "temperature": 1.0, "seed": 5}
    text = {"custom_id": "t", "url": "/v1/completions", "body": {"prompt": "Once", "logprobs": 1, "max_tokens": 3}}
    done = hpckv("run", write_run(tmp_path, checkpoint("llama", tokenizer=True), [line, text]))
    assert done.returncode == 0, done.stderr
    rows = {r["custom_id"]: r for r in map(json.loads, (tmp_path / "out" / "output.jsonl").read_text().splitlines())}
    assert rows["q0"]["error"] is None
    assert rows["q0"]["response"]["status_code"] == 200
    body = rows["q0"]["response"]["body"]
    assert body["object"] == "chat.completion"
    assert [c["index"] for c in body["choices"]] == [0, 1]
    assert body["usage"]["completion_tokens"] == 16
    entry = body["choices"][0]["logprobs"]["content"][0]
    assert entry["logprob"] <= 0
    assert len(entry["top_logprobs"]) == 2
    ChatCompletion.model_validate(body, strict=True)
    completion = rows["t"]["response"]["body"]
    Completion.model_validate(completion, strict=True)
    assert completion["object"] == "text_completion"
    assert len(completion["choices"][0]["logprobs"]["tokens"]) == 3


def test_token_ids_run_without_a_tokenizer(checkpoint, tmp_path):
    lines = [{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": [5, 6, 7]}}]
    done = hpckv("run", write_run(tmp_path, checkpoint("qwen2"), lines))
    assert done.returncode == 0, done.stderr
    (body,) = answers(tmp_path).values()
    assert len(body["choices"][0]["token_ids"]) == 8


def test_a_second_start_answers_only_what_is_left(checkpoint, tmp_path):
    run = write_run(tmp_path, checkpoint("llama", tokenizer=True), chat_lines(6))
    assert hpckv("run", run).returncode == 0
    output = tmp_path / "out" / "output.jsonl"
    whole = texts(tmp_path)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    again = hpckv("run", run)
    assert again.returncode == 0
    assert "3 answers (3 were there)" in again.stderr
    assert texts(tmp_path) == whole
    assert output.read_bytes().startswith(b"".join(lines[:3]))
    assert hpckv("run", run).returncode == 0
    assert len(output.read_bytes().splitlines()) == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_drain_signal_ends_with_75_and_the_rest_follows(checkpoint, tmp_path, number):
    lines = chat_lines(60)
    run = write_run(
        tmp_path, checkpoint("llama", tokenizer=True), lines, sampling={"max_tokens": 60}, engine={"max_requests": 4},
        store={"shared": str(tmp_path / "kv"), "write": "all"},
    )  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "hpckv.cli.main", "run", str(run)], stderr=subprocess.PIPE, text=True
    )
    output = tmp_path / "out" / "output.jsonl"
    deadline = time.time() + 120
    while not (output.exists() and output.stat().st_size) and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 75, log
    assert number.name in log
    some = texts(tmp_path)
    assert 0 < len(some) < 60
    assert list((tmp_path / "kv").glob("u/*/seg/*/*.h5"))
    done = hpckv("run", run)
    assert done.returncode == 0, done.stderr
    assert len(texts(tmp_path)) == 60
    assert texts(tmp_path).items() >= some.items()


def test_the_run_directory_tells_what_was_run(checkpoint, tmp_path):
    run = write_run(
        tmp_path, checkpoint("llama", tokenizer=True), chat_lines(4), store={"shared": str(tmp_path / "kv")}
    )
    assert hpckv("run", run, "--set", "engine.seed=4").returncode == 0
    out = tmp_path / "out"
    again = hpckv("run", out / "config.yaml", "--output", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    plan = json.loads((out / "plan.json").read_text())
    assert plan["requests"] == 4
    assert sorted(plan["lines"]) == ["q0", "q1", "q2", "q3"]
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["seed"] == 4
    assert len(provenance["model"]["weights_blake3"]) == 64
    assert provenance["topology"] == {"tp": 1, "pp": 1, "replicas": 1}
    assert (out / "logs").is_dir()


def test_the_environment_overrides_the_run_file(checkpoint, tmp_path):
    run = write_run(tmp_path, checkpoint("llama", tokenizer=True), chat_lines(2))
    env = {**os.environ, "HPCKV_RUN_DIR": str(tmp_path / "elsewhere"), "HPCKV_STORE": str(tmp_path / "envkv")}
    assert hpckv("run", run, env=env).returncode == 0
    assert len(texts(tmp_path, "elsewhere")) == 2
    assert (tmp_path / "envkv" / "STORE.json").exists()


def test_a_run_with_other_settings_is_not_mixed_into_the_answers_that_are_there(checkpoint, tmp_path):
    run = write_run(tmp_path, checkpoint("llama", tokenizer=True), chat_lines(2))
    assert hpckv("run", run).returncode == 0
    other = hpckv("run", run, "--set", "sampling.temperature=0.5")
    assert other.returncode == 64
    assert "another sampling" in other.stderr
    assert hpckv("run", run, "--set", "engine.max_requests=1").returncode == 0


def test_an_answer_is_not_passed_off_as_another_prompts(tmp_path, checkpoint):
    lines = chat_lines(4)
    run_file = write_run(tmp_path, checkpoint("llama", tokenizer=True), lines)
    assert hpckv("run", run_file).returncode == 0
    before = (tmp_path / "out" / "output.jsonl").read_bytes()
    for name in ("other.jsonl", "fewer.jsonl"):
        changed = [dict(line) for line in lines]
        changed[2]["body"] = lines[3]["body"]
        chosen = changed if name == "other.jsonl" else lines[:2]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in chosen))
    done = hpckv("run", run_file, "--input", tmp_path / "other.jsonl")
    assert done.returncode == 64
    assert "other.jsonl:3: 'q2' was answered in" in done.stderr
    assert "take another --output" in done.stderr
    fewer = hpckv("run", run_file, "--input", tmp_path / "fewer.jsonl")
    assert fewer.returncode == 0, fewer.stderr
    assert "2 answers are of requests that" in fewer.stderr
    answered = [json.loads(raw) for raw in (tmp_path / "out" / "output.jsonl").read_bytes().splitlines()]
    assert answered == [json.loads(raw) for raw in before.splitlines()]
    assert len({line["id"] for line in answered}) == 4


def test_a_batch_script_is_told_the_run_directory_and_the_answers_that_were_there(checkpoint, tmp_path):
    run, told = write_run(tmp_path, checkpoint("llama", tokenizer=True), chat_lines(3)), tmp_path / "told"
    for answered in (0, 3):
        told.touch()
        done = hpckv("run", run.name, "--output", "out", cwd=tmp_path, env={**os.environ, "HPCKV_BEGINNING": str(told)})
        assert done.returncode == 0, done.stderr
        assert told.read_text() == f"{answered} {tmp_path}/out\n"
        told.unlink()
    assert hpckv("run", run, env={**os.environ, "HPCKV_BEGINNING": str(told)}).returncode == 0
    assert not told.exists()  # on another node than the script's
