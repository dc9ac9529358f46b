#!/usr/bin/env python3
"""Write the golden files of this format version. Run once for a version, never again: later versions must read them."""

from pathlib import Path

from hpckv.store.block_index import Entries
from hpckv.store.index_file import IndexedSegment, IndexFile
from hpckv.store.segment import Segment, SegmentContext, build_segment
from hpckv.testing.tier_suite import GEOMETRY, make_block

CONTEXT = SegmentContext(
    bytes(range(32)), 3, b"golden key of thirty-two bytes!!", b'{"golden": true}', GEOMETRY.with_box(1, 3, 2, 5)
)
FOLDER = Path(__file__).parent / "golden"
NUMBERS = (4, 9, 2)


def payload(number: int) -> bytes:
    """The part of a test block that lies in the golden box."""
    whole = make_block(number).payload
    return b"".join(whole[GEOMETRY.span(head, 2, 5)] for head in (1, 2))


def main() -> None:
    """Write both files."""
    from hpckv.store.segment import StoredBlock

    blocks = [StoredBlock(make_block(n).key, bytes([n]) * 32, n * 4, payload(n)) for n in NUMBERS]
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "segment-v1.h5"
    path.write_bytes(b"".join(build_segment(CONTEXT, blocks, keep_s=3600)))
    segment = Segment(path, CONTEXT)
    name = bytes.fromhex("00112233445566778899aabbccddeeff")
    file = IndexFile([IndexedSegment(name, 3, CONTEXT.geometry.box)], Entries.of_segment(0, segment.keys), [b"o" * 16])
    (FOLDER / "index-v1.idx").write_bytes(b"".join(file.build(CONTEXT)))


if __name__ == "__main__":
    main()
