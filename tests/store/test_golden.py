"""Files that version 1 wrote are read for ever; and other programs read what we write."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

from hpckv.store.index_file import IndexFile
from hpckv.store.segment import Segment
from hpckv.testing.tier_suite import make_block
from tests.store.make_golden import CONTEXT, FOLDER, NUMBERS, payload

TOP = Path(__file__).parents[2]


@pytest.fixture
def golden(tmp_path, monkeypatch):
    """Copies as a store would hold them: read-only, and root's, who wrote them."""
    found = {}
    for name in ("segment-v1.h5", "index-v1.idx"):
        found[name] = shutil.copyfile(FOLDER / name, tmp_path / name)
        found[name].chmod(0o440)
    plain = os.fstat

    def as_root(fd):
        status = list(plain(fd))
        status[4] = 0
        return os.stat_result(status)

    monkeypatch.setattr(os, "fstat", as_root)
    return found


def test_the_golden_segment_is_read(golden):
    segment = Segment(golden["segment-v1.h5"], CONTEXT)
    assert (segment.count, segment.keep_s, segment.geometry) == (3, 3600, CONTEXT.geometry)
    assert [segment.key(row) for row in range(3)] == [make_block(n).key for n in NUMBERS]
    assert segment.positions.tolist() == [16, 36, 8]
    buffer = bytearray(CONTEXT.geometry.block_bytes)
    for row, number in enumerate(NUMBERS):
        segment.read(row, memoryview(buffer))
        assert bytes(buffer) == payload(number)


def test_the_golden_index_is_read(golden):
    file = IndexFile.read(golden["index-v1.idx"], CONTEXT)
    assert [(s.name.hex(), s.count, s.box) for s in file.segments] == [
        ("00112233445566778899aabbccddeeff", 3, (1, 3, 2, 5))
    ]
    assert file.supersedes == [b"o" * 16]
    assert sorted(file.entries.places.tolist()) == [0, 1, 2]


def test_h5py_h5dump_and_h5ls_read_it():
    path = FOLDER / "segment-v1.h5"
    with h5py.File(path) as file:
        assert file["kv"][1].tobytes() == payload(NUMBERS[1])
        assert file["box"][:].tolist() == [1, 3, 2, 5]
    header = subprocess.run(["h5dump", "-H", path], capture_output=True, text=True, check=True).stdout
    for name in ("keys", "parents", "positions", "digests", "scales", "kv", "box"):
        assert f'DATASET "{name}"' in header
    dumped = subprocess.run(["h5dump", "-d", "/positions", path], capture_output=True, text=True, check=True).stdout
    assert "(0): 16, 36, 8" in dumped
    listed = subprocess.run(["h5ls", path], capture_output=True, text=True, check=True).stdout
    assert "Dataset {3, 32}" in listed


def test_the_example_shows_a_segment():
    command = [sys.executable, TOP / "examples" / "inspect_segment.py", FOLDER / "segment-v1.h5"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "KV heads 1 to 2, layers 2 to 4" in shown
    assert make_block(9).key.hex()[:16] in shown
