"""Every backend against attention written out naively in fp64, over pages in any order and with shared prefixes."""

import math
import random

import pytest
import torch

from hpckv.attention import HeadShape, SequenceChunk, make_backend
from hpckv.attention.sharing import find_shared_runs

SIZE = 4
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = {
    "gqa": HeadShape(6, 3, 16, 0.25),
    "mha": HeadShape(4, 4, 8, 0.3),
    "mqa-softcap": HeadShape(5, 1, 34, 0.2, softcap=20.0),
    "window": HeadShape(4, 2, 16, 0.25, window=7),
    "softcap-window": HeadShape(4, 2, 16, 0.25, softcap=15.0, window=11),
}


def make_chunks(rng: random.Random, *, consecutive: bool) -> list[SequenceChunk]:
    """Sequences over one common and one half-common prefix, in decode and prefill, one by itself."""
    pages = list(range(1, 400))
    if not consecutive:
        rng.shuffle(pages)
    take = iter(pages)
    head, middle = [next(take) for _ in range(70)], [next(take) for _ in range(9)]
    layouts = [
        (head + middle, 1),
        (head + middle, 1),
        (head + middle, 13),
        (head, 1),
        (head, 5),
        ([], 9),
        ([], 1),
        (head[:3], 13),
    ]
    chunks = []
    for shared, count in layouts:
        start = len(shared) * SIZE + rng.randint(0, 9)
        own = -(-(start + count) // SIZE) - len(shared)
        chunks.append(SequenceChunk(start, count, shared + [next(take) for _ in range(own)]))
    return chunks


def naive(q, keys, values, chunks, shape):
    out, row = torch.empty_like(q, dtype=torch.float64), 0
    for chunk in chunks:
        slots = [chunk.pages[p // SIZE] * SIZE + p % SIZE for p in range(chunk.end)]
        for position in range(chunk.start, chunk.end):
            first = 0 if shape.window is None else max(0, position - shape.window + 1)
            for head in range(shape.num_heads):
                kv = head // shape.group_size
                k, v = keys[slots[first : position + 1], kv].double(), values[slots[first : position + 1], kv].double()
                scores = k @ q[row, head].double() * shape.scale
                if shape.softcap:
                    scores = shape.softcap * torch.tanh(scores / shape.softcap)
                out[row, head] = scores.softmax(-1) @ v
            row += 1
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("numerics", ["fast", "strict"])
@pytest.mark.parametrize("consecutive", [True, False], ids=["consecutive", "scattered"])
@pytest.mark.parametrize("name", SHAPES)
def test_backend_equals_naive_attention(name, consecutive, numerics, device):
    shape = SHAPES[name]
    chunks = make_chunks(random.Random(1), consecutive=consecutive)
    generator = torch.Generator().manual_seed(0)
    rows = sum(c.num_tokens for c in chunks)
    q = torch.randn(rows, shape.num_heads, shape.head_dim, generator=generator) * 3
    keys, values = torch.randn(2, 400 * SIZE, shape.num_kv_heads, shape.head_dim, generator=generator)
    backend = make_backend(numerics, block_tokens=SIZE, device=torch.device(device))
    plan = backend.plan(chunks, frozenset({None, shape.window}))
    found = backend.attend(q.to(device), keys.to(device), values.to(device), plan, shape)
    assert (found.cpu() - naive(q, keys, values, chunks, shape)).abs().max() < 2e-5


def test_long_runs_read_in_place_give_the_same(monkeypatch):
    shape = SHAPES["gqa"]
    chunks = make_chunks(random.Random(4), consecutive=True)
    q = torch.randn(sum(c.num_tokens for c in chunks), 6, 16)
    keys, values = torch.randn(2, 400 * SIZE, 3, 16)
    monkeypatch.setattr("hpckv.attention.sdpa.LONG_TAIL_TOKENS", 4)
    monkeypatch.setattr("hpckv.attention.sdpa.MIN_SAVED_TOKENS", 1 << 40)
    backend = make_backend("fast", block_tokens=SIZE, device=torch.device("cpu"))
    plan = backend.plan(chunks, frozenset({None}))
    assert sum(type(p).__name__ == "Full" for p in plan.problems[None]) > 6
    found = backend.attend(q, keys, values, plan, shape)
    assert (found - naive(q, keys, values, chunks, shape)).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_within_its_rounding(dtype):
    shape = SHAPES["gqa"]
    chunks = make_chunks(random.Random(2), consecutive=True)
    q = torch.randn(sum(c.num_tokens for c in chunks), 6, 16)
    keys, values = torch.randn(2, 400 * SIZE, 3, 16)
    backend = make_backend("fast", block_tokens=SIZE, device=torch.device("cpu"))
    q, keys, values = q.to(dtype), keys.to(dtype), values.to(dtype)
    found = backend.attend(q, keys, values, backend.plan(chunks, frozenset({None})), shape)
    assert found.dtype == dtype
    assert (found.double() - naive(q, keys, values, chunks, shape)).abs().max() < 0.03


def test_shared_runs_nest_and_stop_where_pages_part():
    chunks = [
        SequenceChunk(41, 1, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 30]),
        SequenceChunk(42, 1, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 31]),
        SequenceChunk(25, 1, [1, 2, 3, 4, 5, 6, 32]),
        SequenceChunk(25, 1, [41, 42, 43, 44, 45, 46, 47]),
    ]
    runs, covered = find_shared_runs(chunks, SIZE, min_saved_tokens=8)
    assert [(run.members, run.first, run.last) for run in runs] == [((0, 1, 2), 0, 6), ((0, 1), 6, 10)]
    assert covered == [10, 10, 6, 0]


def test_a_page_that_is_still_being_filled_is_never_shared():
    chunks = [SequenceChunk(6, 1, [1, 2]), SequenceChunk(7, 1, [1, 2])]
    runs, _ = find_shared_runs(chunks, SIZE, min_saved_tokens=1)
    assert [(run.first, run.last) for run in runs] == [(0, 1)]


def test_sharing_is_not_sought_where_it_saves_little():
    chunks = [SequenceChunk(8, 1, [1, 2, 3]), SequenceChunk(8, 1, [1, 2, 4])]
    assert find_shared_runs(chunks, SIZE) == ([], [0, 0])


def test_log_sum_exp_merge_is_exact_for_disjoint_keys():
    from hpckv.attention.kernels import Merger, attend_with_lse

    q, k, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    whole, _ = attend_with_lse(q, k, v, scale=0.5)
    merger = Merger(q[0].transpose(0, 1))
    for part in (slice(0, 7), slice(7, 8), slice(8, 30)):
        out, lse = attend_with_lse(q, k[:, :, part], v[:, :, part], scale=0.5)
        merger.add(slice(0, 5), out[0].transpose(0, 1), lse[0].transpose(0, 1))
    assert (merger.out_TNH.transpose(0, 1) - whole[0]).abs().max() < 1e-6
    assert not math.isnan(float(merger.lse_TN.sum()))
