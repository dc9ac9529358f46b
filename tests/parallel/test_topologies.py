"""Every grid of tensor and pipeline ranks computes what one process computes, over real MPI.

The exact model: every row of every matrix has two terms with factors 1 or 2 (one beside a bias), so that a sum is rounded once,
whatever the order and wherever the terms lie. Queries are so large that each sees one key with probability 1 and the others with 0:
in which order a processor's kernels add scores and values, which may differ with the number of heads, changes nothing. Its logits
are equal bit by bit on every grid, if nothing is left out, counted twice or exchanged. A model with random weights is compared by
its tokens.
"""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hpckv.testing.tiny_model import FAMILIES
from tests.parallel.ranks import run_cases

GRIDS = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 3), (2, 2)]
SHAPES = {
    "3 KV heads": {"num_attention_heads": 12, "num_key_value_heads": 3},
    "2 KV heads, odd vocabulary": {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 129},
    "biased": {"num_attention_heads": 8, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
}


def make_exact(folder) -> None:
    """Replace the weights of a checkpoint by those of the exact model."""
    path = folder / "model.safetensors"
    tensors, generator = load_file(path), torch.Generator().manual_seed(5)
    for name, weight in tensors.items():
        if weight.dim() < 2 or "embed" in name:
            continue
        rows, columns = weight.shape
        terms = 1 if name.replace(".weight", ".bias") in tensors else 2
        exact = torch.zeros(rows, columns)
        # The columns far apart, so that tensor ranks split most pairs.
        first = torch.randint(columns // 2, (rows,), generator=generator)
        for term in range(terms):
            factor = torch.randint(1, 3, (rows,), generator=generator).float()
            sign = 1 - 2 * torch.randint(2, (rows,), generator=generator).float()
            exact[torch.arange(rows), first + term * (columns // 2)] = factor * sign
        tensors[name] = exact * 2.0**30 if "q_proj" in name else exact
    save_file(tensors, path, metadata={"format": "pt"})


def prompts(vocab: int, count: int = 5, *, num_shared: int = 19) -> list[list[int]]:
    rng = random.Random(3)
    shared = rng.choices(range(3, vocab), k=num_shared)
    return [shared + rng.choices(range(3, vocab), k=5 + 7 * n) for n in range(count)]


@pytest.mark.mpi
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_bitwise_equal_on_every_grid(shape, checkpoint, tmp_path):
    # Shares of whole vectors: what is left over of an activation torch computes by another exp().
    folder = checkpoint("llama", num_hidden_layers=5, intermediate_size=256, head_dim=32, seed=11, **SHAPES[shape])
    make_exact(folder)
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    cases = [
        {
            "model": str(folder),
            "tp": tp,
            "pp": pp,
            # Nothing shared: where partial results are merged torch's sigmoid, too, depends on how many there are.
            "prompts": prompts(vocab, num_shared=0),
            "sampling": {"max_tokens": 6, "ignore_eos": True},
            "logits": str(tmp_path / f"{tp}x{pp} {'-'.join(transport.values())}.npy"),
            # One step at a time: which rows are computed together is then the same on every grid.
            "parallel": {"micro_batches": 1, **transport},
        }
        for transport in ({"transport": "host"}, {"transport": "device"}, {"transport": "device", "reduce": "compute"})
        for tp, pp in GRIDS
        if transport == {"transport": "host"} or (tp, pp) in [(4, 1), (1, 3), (2, 2)]
    ]
    results = run_cases(tmp_path, cases, size=4)
    wanted = np.load(cases[0]["logits"])
    assert wanted.shape == (5 * 6, vocab)
    assert len(np.unique(wanted)) > 1000
    for case, result in zip(cases, results, strict=True):
        assert result["tokens"] == results[0]["tokens"]
        assert case["tp"] * case["pp"] == 1 or {rank["transport"] for rank in result["ranks"]} == {
            case["parallel"]["transport"]
        }
        assert np.array_equal(np.load(case["logits"]), wanted), (case["tp"], case["pp"])


@pytest.mark.mpi
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_random_weights_are_equal_on_every_grid(family, checkpoint, tmp_path):
    folder = checkpoint(family, num_attention_heads=12, num_hidden_layers=4, head_dim=24, seed=2)
    cases = [
        {
            "model": str(folder),
            "tp": tp,
            "pp": pp,
            "prompts": prompts(307),
            "sampling": {"max_tokens": 64, "ignore_eos": True},
        }
        for tp, pp in GRIDS
    ]
    results = run_cases(tmp_path, cases, size=4)
    assert len(results[0]["tokens"][0]) == 64
    assert all(result["tokens"] == results[0]["tokens"] for result in results)
