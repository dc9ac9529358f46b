"""A block in another dtype: the same values where they fit, never a wrong one, and it goes no further."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpckv.store import Identity, Namespace, StoreConfig, open_store
from hpckv.store.block import BlockGeometry
from hpckv.store.bridge import convert, sibling, sources
from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.store.segment import StoredBlock

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SMALL_BITS = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}
GEOMETRY = BlockGeometry(num_kv_heads=2, num_layers=3, block_tokens=4, head_dim=8, item_bytes=2, layers_per_tile=2)
BF16 = Namespace(Identity(weights="w", config={"a": 1}), {"dtype": "bfloat16", "numerics": "fast"})
KEY = bytes(range(32))


def to_torch(payload: memoryview, dtype: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(payload), dtype=TORCH[dtype])


@pytest.mark.parametrize("source", TORCH)
@pytest.mark.parametrize("target", TORCH)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_conversion_is_what_torch_does_or_none(source, target, seed):
    if source == target:
        return
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, np.iinfo(SMALL_BITS[source]).max, 64, dtype=SMALL_BITS[source], endpoint=True)
    for payload in (bits, bits[:1], bits[1:2]):  # 64 random patterns often hold a value that does not fit, one rarely
        wanted = to_torch(memoryview(payload.view(np.uint8)), source).to(TORCH[target])
        found = convert(memoryview(payload.view(np.uint8).data), source, target)
        if bool(wanted.isfinite().all()):
            assert found is not None
            assert torch.equal(to_torch(found, target), wanted)
        else:
            assert found is None


def test_every_bfloat16_is_kept_or_refused_on_its_way_to_float16():
    bits = np.arange(2**16, dtype=np.uint16)
    values = to_torch(memoryview(bits.view(np.uint8)), "bfloat16").float().numpy()
    for pattern, value in zip(bits[::7], values[::7], strict=True):
        found = convert(memoryview(np.array([pattern]).view(np.uint8).data), "bfloat16", "float16")
        if not np.isfinite(value) or abs(value) >= 65520:
            assert found is None
            continue
        got = float(np.frombuffer(found, np.float16)[0])
        assert got == value if abs(value) >= 2**-14 else abs(got - value) <= 2**-25


def test_what_is_allowed():
    assert sources("float16", "exact") == ["bfloat16"]
    assert sources("bfloat16", "exact") == []
    assert sorted(sources("float32", "exact")) == ["bfloat16", "float16"]
    assert sorted(sources("bfloat16", "any")) == ["float16", "float32"]
    assert sources("float16", "off") == []


def opened(folder, namespace, geometry, **changes):
    return open_store(StoreConfig(shared=str(folder), write="all", **changes), namespace, geometry)


def test_a_sibling_serves_counted_apart_and_reaches_no_disk(tmp_path):
    values = np.random.default_rng(1).standard_normal(GEOMETRY.block_bytes // 2).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    writer = opened(tmp_path / "kv", BF16, GEOMETRY)
    writer.save(StoredBlock(KEY, bytes(32), 0, bits.tobytes()))
    writer.close()

    fp16, geometry = sibling(BF16, GEOMETRY, "float16")
    (tmp_path / "node").mkdir()
    store = opened(tmp_path / "kv", fp16, geometry, local=str(tmp_path / "node"))
    assert store.match([KEY]) == 1
    loaded = store.load(StoredBlock(KEY, bytes(32), 0, b""))
    assert (loaded.tier, loaded.is_bridged) == ("shared", True)
    wanted = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float16)
    assert bytes(loaded.payload) == wanted.tobytes()
    assert {tier.label: tier.stats.hits for tier in store.tiers if tier.stats.hits} == {"shared from bfloat16": 1}
    assert store.load(StoredBlock(KEY, bytes(32), 0, b"")).is_bridged, "no copy that would pass for one of our own"
    store.close()
    assert [p.parent.name for p in tmp_path.rglob("*.h5")] == [f"{BF16.name}.0"]

    for nothing in ({"bridging": "off"}, {"private": True}):
        assert opened(tmp_path / "kv", fp16, geometry, **nothing).match([KEY]) == 0
    strict = Namespace(fp16.identity, {**fp16.representation, "numerics": "strict"})
    assert opened(tmp_path / "kv", strict, geometry).match([KEY]) == 0


def test_a_value_that_does_not_fit_refuses_the_block(tmp_path):
    values = np.zeros(GEOMETRY.block_bytes // 2, np.float32)
    values[17] = 70000.0
    writer = opened(tmp_path / "kv", BF16, GEOMETRY)
    writer.save(StoredBlock(KEY, bytes(32), 0, (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()))
    writer.close()
    fp16, geometry = sibling(BF16, GEOMETRY, "float16")
    store = opened(tmp_path / "kv", fp16, geometry)
    assert store.load(StoredBlock(KEY, bytes(32), 0, b"")) is None
    assert store.tiers[-1].stats.misses == {"overflow": 1}
    store.close()


def test_the_store_may_allow_less_than_the_run_asks_for(tmp_path):
    StoreRoot.create(tmp_path / "kv", StorePolicy.new(bridging="off"))
    fp16, geometry = sibling(BF16, GEOMETRY, "float16")
    store = opened(tmp_path / "kv", fp16, geometry, bridging="any")
    assert not any(tier.is_bridge for tier in store.tiers)
    store.close()


def test_a_writer_who_is_found_out_is_not_read_over_bridges_either(tmp_path):
    StoreRoot.create(tmp_path / "kv", StorePolicy.new(group=os.getgid()))
    writer = opened(tmp_path / "kv", BF16, GEOMETRY)
    writer.save(StoredBlock(KEY, bytes(32), 0, bytes(GEOMETRY.block_bytes)))
    writer.close()
    fp16, geometry = sibling(BF16, GEOMETRY, "float16")
    store = opened(tmp_path / "kv", fp16, geometry)
    assert store.match([KEY]) == 1
    for catalog in store.auditor._catalogs:
        catalog.distrust(os.getuid())
    assert store.match([KEY]) == 0
    store.close()
