"""The index agrees with a dictionary; index files are verified; a consolidated store is read without opening segments."""

import os

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hpckv.store.block_index import BlockIndex, Entries
from hpckv.store.catalog import Catalog
from hpckv.store.file_tier import FileTier
from hpckv.store.index_file import IndexedSegment, IndexFile
from hpckv.store.layout import StoreLayout
from hpckv.store.segment import Segment, SegmentContext
from hpckv.testing.tier_suite import GEOMETRY, make_block

CONTEXT = SegmentContext(b"\x07" * 32, 0, b"k" * 32, b"{}", GEOMETRY)


def key(number: int) -> bytes:
    """Few distinct prefixes, so that keys collide in them."""
    return (number % 13).to_bytes(8, "little") + number.to_bytes(24, "little")


class IndexMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.index = BlockIndex()
        self.segments: dict[int, list[int]] = {}
        self.next = 0

    @rule(numbers=st.lists(st.integers(0, 200), min_size=1, max_size=30))
    def add(self, numbers):
        rows = np.frombuffer(b"".join(map(key, numbers)), np.uint8).reshape(-1, 32)
        self.index.add(Entries.of_segment(self.next, rows))
        self.segments[self.next] = numbers
        self.next += 1

    @rule(which=st.integers(0, 40))
    def remove(self, which):
        self.index.remove(which)
        self.segments.pop(which, None)

    @invariant()
    def agrees(self):
        assert len(self.index) == sum(map(len, self.segments.values()))
        numbers = list(range(0, 201, 7))
        prefixes = {n % 13 for numbers in self.segments.values() for n in numbers}
        assert self.index.present([key(n) for n in numbers]).tolist() == [n % 13 in prefixes for n in numbers]
        for n in (0, 14, 33):
            wanted = {(s, row) for s, rows in self.segments.items() for row, m in enumerate(rows) if m % 13 == n % 13}
            assert set(self.index.places(key(n))) == wanted
        assert len(self.index.entries()) == len(self.index)


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_large_index_takes_16_bytes_a_block_and_no_more():
    index = BlockIndex()
    rng = np.random.default_rng(0)
    for number in range(50):
        index.add(Entries.of_segment(number, rng.integers(0, 256, (2000, 32), dtype=np.uint8)))
    assert not index.present([bytes(32)])[0]
    assert len(index) == 100_000
    assert index.num_bytes / len(index) == 16


def index_file() -> IndexFile:
    keys = np.random.default_rng(1).integers(0, 256, (10, 32), dtype=np.uint8)
    segments = [IndexedSegment(b"n" * 16, 10, (0, 3, 0, 5))]
    return IndexFile(segments, Entries.of_segment(0, keys), [b"o" * 16])


def test_an_index_file_is_read_as_it_was_written(tmp_path):
    file = index_file()
    path = tmp_path / "x.idx"
    path.write_bytes(b"".join(file.build(CONTEXT)))
    path.chmod(0o440)
    found = IndexFile.read(path, CONTEXT)
    assert (found.segments, found.supersedes) == (file.segments, file.supersedes)
    assert np.array_equal(found.entries.places, file.entries.places)


def catalog(folder) -> Catalog:
    found = Catalog(StoreLayout(folder), CONTEXT)
    found.refresh()
    return found


def write_segments(folder, numbers, per_segment=2) -> Catalog:
    own = Catalog(StoreLayout(folder), CONTEXT)
    own.own_folder(os.getuid()).mkdir(parents=True, exist_ok=True)
    size = per_segment * GEOMETRY.block_bytes
    tier = FileTier(own, CONTEXT, own.own_folder(os.getuid()), refresh_s=1e6, segment_bytes=size)
    for number in numbers:
        tier.put(make_block(number))
        if number % per_segment == per_segment - 1:
            tier.flush()
    tier.close()
    return own


def count_opened(monkeypatch) -> list:
    opened: list = []
    plain = Segment.__init__

    def counting(self, path, *args):
        opened.append(path)
        plain(self, path, *args)

    monkeypatch.setattr(Segment, "__init__", counting)
    return opened


def test_a_consolidated_store_is_indexed_without_opening_its_segments(tmp_path, monkeypatch):
    own = write_segments(tmp_path, range(40))
    assert own.consolidate(os.getuid()) is not None
    assert own.consolidate(os.getuid()) is None
    opened = count_opened(monkeypatch)
    fresh = catalog(tmp_path)
    assert opened == []
    keys = [make_block(n).key for n in range(41)]
    assert fresh.present(keys).tolist() == [True] * 40 + [False]
    write_segments(tmp_path, range(40, 44))
    opened.clear()
    fresh.refresh()
    assert len(opened) == 2
    assert fresh.present([make_block(43).key])[0]
    (path, row), *_ = fresh.places(make_block(7).key)
    assert Segment(path, CONTEXT).key(row) == make_block(7).key


def test_a_newer_index_supersedes_and_removes_the_older(tmp_path):
    own = write_segments(tmp_path, range(40))
    first = own.consolidate(os.getuid())
    write_segments(tmp_path, range(40, 80))
    again = catalog(tmp_path)
    second = again.consolidate(os.getuid())
    assert not first.exists()
    assert [p.name for p in second.parent.iterdir()] == [second.name]
    assert catalog(tmp_path).present([make_block(n).key for n in range(80)]).all()


def test_segments_that_went_are_forgotten_although_an_index_names_them(tmp_path):
    own = write_segments(tmp_path, range(40))
    own.consolidate(os.getuid())
    (path, _), *_ = own.places(make_block(3).key)
    path.unlink()
    fresh = catalog(tmp_path)
    assert fresh.present([make_block(n).key for n in (2, 3, 4)]).tolist() == [False, False, True]


@pytest.mark.filterwarnings("default")
def test_a_damaged_index_only_costs_opening_the_segments(tmp_path):
    own = write_segments(tmp_path, range(40))
    path = own.consolidate(os.getuid())
    path.chmod(0o600)
    path.write_bytes(b"nonsense")
    path.chmod(0o440)
    assert catalog(tmp_path).present([make_block(n).key for n in range(40)]).all()


@pytest.mark.filterwarnings("default")
def test_an_index_file_that_claims_a_petabyte_costs_only_itself(tmp_path):
    write_segments(tmp_path, range(4))
    folder = catalog(tmp_path).own_indexes(os.getuid())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{7:032x}.idx"
    with path.open("wb") as file:
        file.truncate(1 << 43)
    path.chmod(0o440)
    assert catalog(tmp_path).present([make_block(n).key for n in range(4)]).all()
