"""Scratch filesystems count files: at 256 MiB a segment a store must need no more than 4,000 a stored terabyte, all included."""

import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from hpckv.quantity import ByteSize
from hpckv.store import BlockGeometry, StoreConfig, open_store
from hpckv.store.collect import Collector
from hpckv.store.compact import compact
from hpckv.store.root import StoreRoot
from hpckv.store.segment import StoredBlock
from hpckv.store.segment_writer import _SEALING_AT_ONCE
from hpckv.store.survey import Survey
from tests.store.shared_store import NAMESPACE

TERABYTE = 10**12
SEGMENT = ByteSize(256 * 1024**2)
BLOCK = BlockGeometry(num_kv_heads=8, num_layers=32, block_tokens=16, head_dim=128, item_bytes=2)
"""2 MiB: 16 tokens of a model of 8 billion parameters."""
SCALE = 2**14
TINY_BLOCK = BlockGeometry(num_kv_heads=1, num_layers=1, block_tokens=1, head_dim=32, item_bytes=2)
"""As many to a segment, each smaller by `SCALE`."""
WRITERS = 16
"""Processes that write at one moment."""


@pytest.fixture
def folder():
    """In memory where there is such a folder: half a gigabyte is written."""
    shm = Path("/dev/shm")
    found = Path(tempfile.mkdtemp(prefix="hpckv-files-", dir=shm if shm.is_dir() else None))
    yield found
    shutil.rmtree(found)


def job(store: Path, geometry: BlockGeometry, segment_size: int, numbers: range) -> None:
    """Write blocks as a run does, and read some."""
    config = StoreConfig(
        shared=str(store), write="all", local="none", host_size=ByteSize(0), segment_size=ByteSize(segment_size)
    )
    tiers = open_store(config, NAMESPACE, geometry)
    payload = bytes(geometry.block_bytes)
    per_segment = segment_size // geometry.block_bytes
    for n, number in enumerate(numbers, start=1):
        tiers.save(StoredBlock(number.to_bytes(32, "little"), bytes(32), 0, payload))
        if n % per_segment == 0:
            tiers.flush()
    tiers.flush()
    assert tiers.load(StoredBlock(numbers[0].to_bytes(32, "little"), bytes(32), 0, b""))
    tiers.close()


def kinds(store: Path) -> Counter[str]:
    """Every file there is, by kind."""
    found = Survey(StoreRoot.open(store).layout)
    found.refresh()
    known = Counter(file.kind for file in found.files.values())
    known["marker and keys"] = sum(p.is_file() for p in store.rglob("*")) - known.total()
    return known


def test_a_full_segment_holds_all_it_should_in_one_file(folder):
    per_segment = SEGMENT // BLOCK.block_bytes
    job(folder / "kv", BLOCK, SEGMENT, range(2 * per_segment))
    sizes = [path.stat().st_size for path in folder.glob("kv/u/*/seg/*/*.h5")]
    assert len(sizes) == 2
    assert all(SEGMENT <= size < 1.01 * SEGMENT for size in sizes)


def test_a_terabyte_takes_at_most_4000_files(folder):
    """Sixteen jobs, the last segment of each a quarter full; what is not a segment does not grow with them."""
    store, segment = folder / "kv", SEGMENT // SCALE
    assert BLOCK.block_bytes == SCALE * TINY_BLOCK.block_bytes
    per_segment = segment // TINY_BLOCK.block_bytes
    per_job = 16 * per_segment + per_segment // 4
    others = []
    for number in range(16):
        job(store, TINY_BLOCK, segment, range(number * per_job, (number + 1) * per_job))
        found = kinds(store)
        others.append(found.total() - found["segment"])
    assert found["segment"] == 16 * 17
    assert max(others) <= 20, others
    assert max(others[8:]) <= max(others[:8]), others

    def files_a_terabyte() -> float:
        found = kinds(store)
        stored = 16 * per_job * BLOCK.block_bytes
        temporary = WRITERS * _SEALING_AT_ONCE
        return found["segment"] * TERABYTE / stored + found.total() - found["segment"] + temporary

    assert files_a_terabyte() <= 4_000
    before = files_a_terabyte()
    compact(StoreRoot.open(store), target_bytes=segment)
    Collector(StoreRoot.open(store)).collect()
    assert files_a_terabyte() < before - 100
