"""The shipped model: right answers on its own batch, and the same tokens as transformers gives."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpckv.engine.engine import Engine
from hpckv.engine.request import SamplingParams
from hpckv.kvcache import CacheConfig

EXAMPLES = Path(__file__).parent.parent / "examples"
FOLDER = EXAMPLES / "recall-1m"


@pytest.fixture(scope="module")
def batch():
    lines = [json.loads(raw) for raw in (EXAMPLES / "catalogue.jsonl").read_text().splitlines()]
    answers = [json.loads(raw)["answer"] for raw in (EXAMPLES / "catalogue_answers.jsonl").read_text().splitlines()]
    return [line["body"]["messages"] for line in lines], answers


def test_it_is_small_and_recorded():
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) <= 8 * 2**20
    training = json.loads((FOLDER / "training.json").read_text())
    assert training["finished"]
    assert training["held_out"]["1024"]["single"] >= 0.98


def test_its_batch_is_answered_right(batch):
    prompts, answers = batch
    assert len(prompts) >= 200
    engine = Engine(FOLDER, cache=CacheConfig(block_tokens=16))
    texts = [a.text.strip() for a in engine.generate(prompts, SamplingParams(max_tokens=16))]
    assert sum(map(str.__eq__, texts, answers)) >= 0.98 * len(answers)
    assert engine.scheduler.stats.prefill_tokens < 0.04 * sum(len(engine.prompt_ids(p)) for p in prompts)


def test_transformers_answers_the_same(batch):
    prompts, _ = batch
    engine = Engine(FOLDER, cache=CacheConfig(block_tokens=16))
    ours = [a.token_ids for a in engine.generate(prompts[:6], SamplingParams(max_tokens=16))]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    for prompt, wanted in zip(prompts, ours, strict=False):
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        assert out[0, ids.shape[1] :].tolist() == wanted


def test_the_batch_is_what_its_generator_writes(batch, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import make_catalogue

    monkeypatch.setattr(sys, "argv", ["make_catalogue.py", "--out", str(tmp_path / "catalogue.jsonl")])
    make_catalogue.main()
    for name in ("catalogue.jsonl", "catalogue_answers.jsonl"):
        assert (tmp_path / name).read_text() == (EXAMPLES / name).read_text()
