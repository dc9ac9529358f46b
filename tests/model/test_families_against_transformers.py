"""Every family, odd shapes and rope scalings against `transformers`, which nobody here wrote."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hpckv.engine.config import EngineConfig
from hpckv.engine.engine import Engine
from hpckv.engine.request import SamplingParams
from hpckv.kvcache import CacheConfig
from hpckv.model import ModelSettings
from hpckv.testing.tiny_model import ROPE_SCALINGS
from tests.engine.forward import logits_at_every_position

CASES = {
    "llama": ("llama", {}),
    "llama-tied-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 6}),
    "llama-mqa-head-33x2": ("llama", {"num_key_value_heads": 1, "head_dim": 34}),
    "llama-seed-7": ("llama", {"seed": 7, "vocab_size": 129}),
    **{f"llama-rope-{n}": ("llama", {"rope_parameters": {"rope_theta": 5e3, **rope}}) for n, rope in ROPE_SCALINGS.items()},
    "mistral-window-24": ("mistral", {"sliding_window": 24}),
    "mistral-no-window": ("mistral", {"sliding_window": None, "seed": 3}),
    "qwen2": ("qwen2", {}),
    "qwen2-window-16": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "seed": 5}),
    "qwen3": ("qwen3", {"seed": 1}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 48}),
    "gemma2-window-20": ("gemma2", {"sliding_window": 20, "query_pre_attn_scalar": 80}),
    "gemma2-no-caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "seed": 2}),
}  # fmt: skip

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=CASES, ids=str)
def folder(request, checkpoint) -> Path:
    family, changes = CASES[request.param]
    return checkpoint(family, **changes)


def reference(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def greedy(model, prompt: list[int], count: int) -> tuple[list[int], float]:
    """transformers' greedy tokens, and the smallest lead of a chosen token over the next."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    best = torch.stack([step[0].topk(2).values for step in out.scores])
    return out.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())


def prompts_without_ties(model) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts that share 53 tokens, and their answers; where two tokens tie within 2e-4, rounding decides and nobody is right."""
    rng = random.Random(2)
    shared = rng.choices(range(3, 120), k=53)
    prompts, answers = [], []
    for length in (1, 9, 30, 0):
        for _ in range(50):
            prompt = shared + rng.choices(range(3, 120), k=length) if length else shared[: rng.randint(40, 52)]
            tokens, lead = greedy(model, prompt, 64)
            if lead > 2e-4:
                prompts.append(prompt)
                answers.append(tokens)
                break
    assert len(prompts) == 4
    return prompts, answers


@pytest.mark.parametrize("device", DEVICES)
def test_logits_equal_at_every_position(folder, device):
    prompt = random.Random(1).choices(range(3, 120), k=91)
    with torch.no_grad():
        wanted = reference(folder)(torch.tensor([prompt])).logits[0]
    settings = ModelSettings(path=str(folder), dtype="float32", device=device)
    engine = Engine(settings, cache=CacheConfig(block_tokens=8, device_memory="16MiB"))
    assert (logits_at_every_position(engine, prompt, chunk=0).cpu() - wanted).abs().max() < 1e-4
    assert (logits_at_every_position(engine, prompt, chunk=13).cpu() - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_tokens_equal_with_and_without_hits_under_any_chunk(folder, device):
    prompts, wanted = prompts_without_ties(reference(folder))
    params = SamplingParams(max_tokens=64, ignore_eos=True)
    for chunk in (1, 7, 64, 0):
        engine = Engine(
            ModelSettings(path=str(folder), dtype="float32", device=device),
            cache=CacheConfig(block_tokens=8, device_memory="16MiB"),
            engine=EngineConfig(chunk_tokens=chunk),
        )
        assert [a.token_ids for a in engine.generate(prompts, params)] == wanted
        again = list(engine.generate(prompts, params))
        assert [a.token_ids for a in again] == wanted
        assert all(a.usage.cached["device"] >= 40 - 1 for a in again)
        engine.cache.check_integrity(engine.scheduler.running)
