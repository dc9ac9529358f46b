"""A block written in any boxes is read in any other: right, verified, and no byte beyond the reader's share of tiles."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpckv.store.block import BlockGeometry
from hpckv.store.catalog import Catalog
from hpckv.store.file_tier import FileTier
from hpckv.store.layout import StoreLayout
from hpckv.store.segment import Segment, SegmentContext, StoredBlock, build_segment

HEADS, LAYERS = 4, 11
WHOLE = BlockGeometry(HEADS, LAYERS, block_tokens=2, head_dim=3, item_bytes=2, layers_per_tile=4)
KEY = bytes(range(32))
VALUES = np.random.default_rng(0).integers(0, 256, (HEADS, LAYERS, WHOLE.layer_bytes), dtype=np.uint8)

heads = st.tuples(st.integers(0, HEADS - 1), st.integers(1, HEADS)).filter(lambda r: r[0] < r[1])
layers = st.tuples(st.integers(0, LAYERS - 1), st.integers(1, LAYERS)).filter(lambda r: r[0] < r[1])
boxes = st.tuples(heads, layers).map(lambda b: (*b[0], *b[1]))


def cut(box) -> bytes:
    h0, h1, l0, l1 = box
    return VALUES[h0:h1, l0:l1].tobytes()


def context(box) -> SegmentContext:
    return SegmentContext(b"\x07" * 32, 0, b"k" * 32, b"{}", WHOLE.with_box(*box))


def write(path, box):
    path.write_bytes(b"".join(build_segment(context(box), [StoredBlock(KEY, bytes(32), 0, cut(box))])))
    path.chmod(0o440)
    return path


@settings(max_examples=200, deadline=None)
@given(written=boxes, wanted=boxes)
def test_one_file_gives_exactly_the_overlap(tmp_path_factory, written, wanted):
    path = write(tmp_path_factory.mktemp("box") / "x.h5", written)
    segment = Segment(path, context(wanted))
    geometry = WHOLE.with_box(*wanted)
    buffer = bytearray(b"\xee" * geometry.block_bytes)
    filled = segment.read(0, memoryview(buffer), geometry)
    h0, h1, l0, l1 = wanted
    g0, g1, m0, m1 = written
    assert filled == (max(h0, g0), min(h1, g1), max(l0, m0), min(l1, m1))
    for h in range(h0, h1):
        for n in range(l0, l1):
            is_filled = filled[0] <= h < filled[1] and filled[2] <= n < filled[3]
            expected = VALUES[h, n].tobytes() if is_filled else b"\xee" * WHOLE.layer_bytes
            assert bytes(buffer[geometry.span(h, n, n + 1)]) == expected


TOPOLOGIES = {
    "1x1": [(0, 4, 0, 11)],
    "2x1": [(0, 2, 0, 11), (2, 4, 0, 11)],
    "4x1": [(h, h + 1, 0, 11) for h in range(4)],
    "1x2": [(0, 4, 0, 6), (0, 4, 6, 11)],
    "1x3": [(0, 4, 0, 4), (0, 4, 4, 8), (0, 4, 8, 11)],
    "2x2": [(h, h + 2, a, b) for h in (0, 2) for a, b in ((0, 6), (6, 11))],
}


def tier(folder, box) -> FileTier:
    catalog = Catalog(StoreLayout(folder), context(box))
    own = catalog.own_folder(os.getuid())
    own.mkdir(parents=True, exist_ok=True)
    return FileTier(catalog, context(box), own, refresh_s=1e6)


@pytest.mark.parametrize("writers", TOPOLOGIES)
@pytest.mark.parametrize("readers", TOPOLOGIES)
def test_any_topology_reads_any_other(tmp_path, writers, readers):
    for box in TOPOLOGIES[writers]:
        one = tier(tmp_path, box)
        # Another rank's box of the block may be in the store already: this rank's is still missing.
        one.put(StoredBlock(KEY, bytes(32), 0, cut(box)))
        one.close()
    for box in TOPOLOGIES[readers]:
        one = tier(tmp_path, box)
        assert one.present([KEY])[0]
        assert bytes(one.get(KEY)) == cut(box)
        one.close()


def test_a_missing_box_is_a_miss_called_partial(tmp_path):
    one = tier(tmp_path, (0, 2, 0, 11))
    one.put(StoredBlock(KEY, bytes(32), 0, cut((0, 2, 0, 11))))
    one.close()
    whole = tier(tmp_path, (0, 4, 0, 11))
    assert not whole.get(KEY)
    assert whole.stats.misses == {"partial": 1}
    whole.close()
