"""Damage of every kind is detected and nothing damaged is served: each bit, each length, a hundred thousand random flips."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpckv.store.block import BlockGeometry
from hpckv.store.block_index import Entries
from hpckv.store.catalog import Catalog
from hpckv.store.file_tier import FileTier
from hpckv.store.foreign_file import UnusableFileError
from hpckv.store.index_file import IndexedSegment, IndexFile
from hpckv.store.layout import StoreLayout
from hpckv.store.segment import Segment, SegmentContext, StoredBlock, build_segment
from tests.store.test_boxes import TOPOLOGIES, VALUES, WHOLE, context, cut
from tests.store.test_faults import RefusedError, tiers, write
from tests.store.test_faults import read as read_back

pytestmark = pytest.mark.filterwarnings("default")

COUNT = 6
GEOMETRY = BlockGeometry(num_kv_heads=3, num_layers=5, block_tokens=4, head_dim=6, item_bytes=2, layers_per_tile=2)
CONTEXT = SegmentContext(b"\x07" * 32, 0, b"k" * 32, b"{}", GEOMETRY)
BOXED = bytes(range(32))
PAYLOADS = np.random.default_rng(0).integers(0, 256, (COUNT, GEOMETRY.block_bytes), dtype=np.uint8)


class Damaged:
    """A file of known content that is damaged in place and mended again."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content = path, content
        path.write_bytes(content)
        path.chmod(0o600)
        self._fd = os.open(path, os.O_RDWR)

    def flip(self, place: int, bit: int) -> None:
        os.pwrite(self._fd, bytes([self.content[place] ^ 1 << bit]), place)

    def mend(self, place: int) -> None:
        os.pwrite(self._fd, self.content[place : place + 1], place)

    def every_bit(self, places: range) -> Iterator[None]:
        for place in places:
            for bit in range(8):
                self.flip(place, bit)
                yield
            self.mend(place)

    def every_length(self) -> Iterator[None]:
        for length in reversed(range(len(self.content))):
            os.ftruncate(self._fd, length)
            yield


def segment_file(folder: Path) -> Damaged:
    blocks = [StoredBlock(bytes([n]) * 32, bytes(32), n, PAYLOADS[n].tobytes()) for n in range(COUNT)]
    return Damaged(folder / "x.h5", b"".join(build_segment(CONTEXT, blocks)))


def index_file(folder: Path, entries: int) -> Damaged:
    keys = np.random.default_rng(1).integers(0, 256, (entries, 32), dtype=np.uint8)
    segments = [IndexedSegment(b"n" * 16, entries, (0, 3, 0, 5))]
    file = IndexFile(segments, Entries.of_segment(0, keys), [b"o" * 16])
    return Damaged(folder / "x.idx", b"".join(file.build(CONTEXT)))


def places_of(path: Path, *names: str) -> list[range]:
    """Where datasets' bytes lie in the file, by libhdf5."""
    with h5py.File(path) as file:
        sizes = [(file[n].id.get_offset(), file[n].id.get_storage_size()) for n in names]
    return [range(at, at + size) for at, size in sizes]


def refused(read, path: Path) -> bool:
    try:
        read(path, CONTEXT)
    except UnusableFileError:
        return True
    return False


def test_every_bit_of_a_segments_trailer_and_tables_matters(tmp_path):
    file = segment_file(tmp_path)
    trailer = range(len(file.content) - 512, len(file.content))
    tables = places_of(file.path, "keys", "parents", "positions", "digests")
    results = [refused(Segment, file.path) for part in (trailer, *tables) for _ in file.every_bit(part)]
    assert len(results) == 8 * (512 + COUNT * (32 + 32 + 8 + 16 * len(GEOMETRY.tiles)))
    assert all(results)
    assert not refused(Segment, file.path)


def test_every_bit_of_an_index_file_matters(tmp_path):
    file = index_file(tmp_path, 10)
    results = [refused(IndexFile.read, file.path) for _ in file.every_bit(range(len(file.content)))]
    assert len(results) == 8 * (256 + 40 + 16 + 10 * 16)
    assert all(results)
    assert not refused(IndexFile.read, file.path)


def test_every_length_of_a_segment_is_refused(tmp_path):
    file = segment_file(tmp_path)
    assert all(refused(Segment, file.path) for _ in file.every_length())


def test_every_length_of_an_index_file_is_refused(tmp_path):
    file = index_file(tmp_path, 10)
    assert all(refused(IndexFile.read, file.path) for _ in file.every_length())


def payload_flips(folder: Path, count: int) -> None:
    file, rng = segment_file(folder), np.random.default_rng(2)
    (kv,) = places_of(file.path, "kv")
    segment, buffer = Segment(file.path, CONTEXT), memoryview(bytearray(GEOMETRY.block_bytes))
    for place, bit in zip(
        rng.integers(len(kv), size=count).tolist(), rng.integers(8, size=count).tolist(), strict=True
    ):
        row = place // GEOMETRY.block_bytes
        file.flip(kv.start + place, bit)
        with pytest.raises(UnusableFileError):
            segment.read(row, buffer)
        segment.read((row + 1) % COUNT, buffer)
        assert buffer == PAYLOADS[(row + 1) % COUNT].data
        file.mend(kv.start + place)
    for row in range(COUNT):
        segment.read(row, buffer)


def written_in_boxes(layout: StoreLayout, writers: str) -> list[Damaged]:
    """A segment for every box, each with its part of the block BOXED."""
    own = Catalog(layout, context(WHOLE.box)).own_folder(os.getuid())
    own.mkdir(parents=True)
    files = []
    for number, box in enumerate(TOPOLOGIES[writers]):
        parts = build_segment(context(box), [StoredBlock(BOXED, bytes(32), 0, cut(box))])
        files.append(Damaged(own / f"{number:032x}.h5", b"".join(parts)))
    return files


def flips_in_boxes(folder: Path, count: int) -> None:
    """One bit of a part of a block is flipped, and the part read for some other box: refused, or without that tile."""
    rng = np.random.default_rng(3)
    boxes = [box for topology in TOPOLOGIES.values() for box in topology]
    for writers in ("2x1", "2x2", "1x3"):
        files = written_in_boxes(StoreLayout(folder / writers), writers)
        kv = [places_of(file.path, "kv")[0] for file in files]
        segments = [Segment(file.path, context(WHOLE.box)) for file in files]
        num_refused = 0
        for which, draw, bit, box in rng.integers((len(files), 1 << 30, 8, len(boxes)), size=(count // 3, 4)).tolist():
            geometry, place = WHOLE.with_box(*boxes[box]), kv[which][draw % len(kv[which])]
            buffer = bytearray(geometry.block_bytes)
            files[which].flip(place, bit)
            try:
                filled = segments[which].read(0, memoryview(buffer), geometry)
            except UnusableFileError:
                num_refused += 1
                filled = (0, 0, 0, 0)
            files[which].mend(place)
            for head, layer in itertools.product(range(*filled[:2]), range(*filled[2:])):
                assert buffer[geometry.span(head, layer, layer + 1)] == VALUES[head, layer].tobytes()
        assert count // 30 < num_refused < count // 3


def index_flips(folder: Path, count: int) -> None:
    file, rng = index_file(folder, 500), np.random.default_rng(4)
    for place, bit in zip(
        rng.integers(len(file.content), size=count).tolist(), rng.integers(8, size=count).tolist(), strict=True
    ):
        file.flip(place, bit)
        assert refused(IndexFile.read, file.path)
        file.mend(place)
    assert not refused(IndexFile.read, file.path)


def test_a_block_with_a_damaged_part_is_a_miss(tmp_path):
    for writers in ("2x1", "2x2", "1x3"):
        layout = StoreLayout(tmp_path / writers)
        for number, file in enumerate(written_in_boxes(layout, writers)):
            (kv,) = places_of(file.path, "kv")
            for place, bit in ((kv.start, 0), (kv.stop - 1, 7), (kv.start + number * 11, number)):
                file.flip(place, bit)
                tier = FileTier(Catalog(layout, context(WHOLE.box)), context(WHOLE.box), None, refresh_s=1e6)
                assert tier.get(BOXED) is None
                assert tier.stats.misses.total() == 1
                tier.close()
                file.mend(place)
        tier = FileTier(Catalog(layout, context(WHOLE.box)), context(WHOLE.box), None, refresh_s=1e6)
        assert bytes(tier.get(BOXED)) == VALUES.tobytes()
        tier.close()


@pytest.mark.parametrize("flips", [payload_flips, flips_in_boxes, index_flips])
def test_random_flips_are_never_served(tmp_path, flips):
    flips(tmp_path, 3_000)


@pytest.mark.slow
@pytest.mark.parametrize("flips", [payload_flips, flips_in_boxes, index_flips])
def test_a_hundred_thousand_random_flips_are_never_served(tmp_path, flips):
    flips(tmp_path, 100_000)


@pytest.mark.parametrize("which", ["STORE.json", "key/0.key", "u/*/seg/*/identity.json"])
def test_a_flip_in_a_stores_small_files_is_refused_in_one_line_or_serves_what_is_right(tmp_path, which):
    store = tmp_path / "kv"
    write(store, range(3))
    (path,) = store.glob(which)
    file, found = Damaged(path, path.read_bytes()), []
    places = range(len(file.content))
    for _ in file.every_bit(places[:: max(1, len(places) // 16)]):
        try:
            found.append(read_back(store, range(3)))  # compares
            tiers(store).close()
        except RefusedError as error:
            found.append(str(error).count("\n"))
    # Another key finds nothing; what is not STORE.json's or the identity's is refused; a flip in a quota hurts nobody.
    assert all(outcome in ([], 0) if which == "key/0.key" else outcome in ([], 0, [0, 1, 2]) for outcome in found)
    assert read_back(store, range(3)) == [0, 1, 2]
