"""What a plan says of tokens is what the run then computes and finds: to the token."""

import json
import random
from pathlib import Path

import pytest

from hpckv.usage.rates import Rates
from hpckv.usage.record import TIERS
from hpckv.workload.forecast import Decoding, Forecast, decode_steps, decoding, forecast
from hpckv.workload.outlook import look_ahead, seconds_of
from hpckv.workload.plan import PlannedPrompt, plan_run
from hpckv.workload.prepare import RunOptions
from hpckv.workload.runfile import load_run
from tests.cli.runs import answers, chat_lines, hpckv, write_run

SIZE = 4


def planned(*prompts: list[int]) -> list[PlannedPrompt]:
    """Keys that are the tokens before a block's end."""
    found = []
    for ids in prompts:
        keys = [repr(ids[: end * SIZE]).encode() for end in range(1, len(ids) // SIZE + 1)]
        found.append(PlannedPrompt(ids, keys))
    return found


def test_a_prefix_is_computed_once_and_found_on_the_device_afterwards():
    found = forecast(planned([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7], [9, 9]), SIZE)
    assert (found.prompt_tokens, dict(found.cached), found.computed_tokens) == (13, {"device": 4}, 9)
    assert (found.new_blocks, found.new_shared_blocks, found.loaded_blocks) == (1, 1, 0)


def test_of_a_prompt_that_is_wholly_known_the_last_token_is_computed():
    found = forecast(planned([1, 2, 3, 4], [1, 2, 3, 4]), SIZE)
    assert found.computed_tokens == 5
    assert found.cached["device"] == 3


def test_what_a_store_has_is_loaded_once_and_ends_where_a_block_is_missing():
    first, second = planned(list(range(14)), [*range(12), 99])
    stored = set(first.keys[:2])

    def nearest(keys):
        return ["local" if key == first.keys[0] else "shared" for key in keys if key in stored]

    found = forecast([first, second], SIZE, nearest)
    assert dict(found.cached) == {"device": 12, "local": 4, "shared": 4}
    assert (found.loaded_blocks, found.new_blocks) == (2, 1)
    assert found.computed_tokens == 6 + 1


def test_the_steps_of_a_decode_are_those_of_the_busiest_slot():
    assert decode_steps([5, 5, 5], 2) == 8
    assert decode_steps([5, 1, 9], 8) == 8
    assert decode_steps([], 3) == 0


def test_a_block_that_sequences_share_is_read_once_for_those_that_run_together():
    prompts = planned([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [7])
    # Tokens before: half of the shared block and one, twice; one. Each token of an answer adds itself for the next.
    assert decoding(prompts, [2, 4, 6], SIZE, 8).attended_tokens == 2 * (3 + 1) + 4 * (3 + 2) + 6 * (1 + 3)
    assert decoding(prompts, [2, 4, 6], SIZE, 1).attended_tokens == 2 * (5 + 1) + 4 * (5 + 2) + 6 * (1 + 3)


def test_long_contexts_make_answers_take_longer(tmp_path, checkpoint):
    run_file = write_run(tmp_path, checkpoint("llama", tokenizer=True), chat_lines(6), sampling={"max_tokens": 5})
    config, work = load_run(run_file, sets=[]), Decoding([5] * 6, 1200.0)
    plain = Rates(gpu="cpu", prefill_tokens_per_s=100, decode_tokens_per_s=10)
    attending = Rates(gpu="cpu", prefill_tokens_per_s=100, decode_tokens_per_s=10, decode_attended_tokens_per_s=300)
    nothing = Forecast()
    assert seconds_of(plain, nothing, work, config, 0) == pytest.approx(3)
    assert seconds_of(attending, nothing, work, config, 0) == pytest.approx(3 + 4)


def test_with_an_empty_store_the_least_possible_is_computed():
    rng = random.Random(0)
    heads = [[rng.randrange(9) for _ in range(rng.randrange(20))] for _ in range(5)]
    prompts = planned(
        *([*rng.choice(heads), *(rng.randrange(9) for _ in range(rng.randrange(1, 12)))] for _ in range(60))
    )
    plan = plan_run(prompts, SIZE)
    assert forecast([prompts[n] for n in plan.order], SIZE).computed_tokens == plan.least_prefill_tokens


BATCHES = {
    "shared heads": chat_lines(24, heads=3),
    "one head": chat_lines(9, heads=1),
    "nothing shared": [
        {"custom_id": f"q{n}", "url": "/v1/completions", "body": {"prompt": [3 + n] + [7] * 40}} for n in range(7)
    ],
    "the same again and again": [
        {"custom_id": f"q{n}", "url": "/v1/completions", "body": {"prompt": list(range(3, 67))}} for n in range(6)
    ],
    "several answers each": [
        {"custom_id": f"q{n}", "url": "/v1/completions", "body": {"prompt": [5] * (33 + n), "n": 2, "temperature": 1}}
        for n in range(5)
    ],
}


def look(run_file: Path, *sets: str) -> dict:
    """As `hpckv plan --gpu V100 --json` in this process."""
    config = load_run(run_file, sets=["model.dtype=float32", *sets])
    return look_ahead(config, RunOptions(), gpus=["V100"]).record


@pytest.mark.parametrize("name", BATCHES)
def test_a_run_computes_and_finds_what_the_plan_says_cold_and_warm(name, tmp_path, checkpoint):
    store = {"shared": str(tmp_path / "kv"), "write": "all", "local": "none"}
    run_file = write_run(tmp_path, checkpoint("llama", tokenizer=True), BATCHES[name], store=store)
    for output in ("cold", "warm"):
        expected = look(run_file, f"output={tmp_path / output}")["gpus"][0]
        done = hpckv("run", run_file, "--output", tmp_path / output, "--set", "model.dtype=float32")
        assert done.returncode == 0, done.stderr
        usages = [body["usage"]["hpckv"] for body in answers(tmp_path, output).values()]
        sums = {tier: sum(usage[tier] for usage in usages) for tier in (*TIERS, "computed")}
        found = {tier: expected["cached"].get(tier, 0) for tier in TIERS}
        assert sums == {**found, "computed": expected["computed_tokens"]}
        summary = json.loads((tmp_path / output / "summary.json").read_text())
        assert summary["expected"]["computed_tokens"] == summary["computed_tokens"] == sums["computed"]
        assert f"{sums['computed']:,} ({sums['computed']:,}) prompt tokens to compute" in done.stderr
    assert sums["shared"] > 0


def test_what_is_answered_is_not_planned_again(tmp_path, checkpoint):
    run_file = write_run(tmp_path, checkpoint("llama", tokenizer=True), chat_lines(6))
    everything = look(run_file)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "output.jsonl").write_text("".join(json.dumps({"custom_id": f"q{n}"}) + "\n" for n in range(5)))
    left = look(run_file)
    assert (everything["requests"], everything["answered"]) == (6, 0)
    assert (left["requests"], left["answered"]) == (6, 5)
    assert 0 < left["prompt_tokens"] < everything["prompt_tokens"] / 5


def test_without_reuse_everything_is_computed():
    found = forecast(planned([1, 2, 3, 4, 5], [1, 2, 3, 4, 6]), SIZE, lambda keys: ["shared"] * len(keys), reuses=False)
    assert (found.computed_tokens, found.new_blocks, found.loaded_blocks) == (10, 0, 0)


def test_answers_of_jobs_that_work_on_it_together_are_not_planned_again(tmp_path, checkpoint):
    run_file = write_run(tmp_path, checkpoint("llama", tokenizer=True), chat_lines(6))
    parts = tmp_path / "out" / "queue" / "1" / "parts"
    parts.mkdir(parents=True)
    (parts / "w.jsonl").write_text("".join(json.dumps({"custom_id": f"q{n}"}) + "\n" for n in range(4)))
    (tmp_path / "out" / "queue" / "1" / "plan.json").write_text("{}")
    assert look(run_file)["answered"] == 4
