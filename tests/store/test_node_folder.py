"""Folders of copies on a node's own disk: what they take."""

import os
import shutil
from collections import namedtuple

import pytest

from hpckv.quantity import ByteSize
from hpckv.store import node_folder
from hpckv.store.node_folder import Budget, room_in
from hpckv.testing.tier_suite import make_block
from tests.store.shared_store import found_in, small_tiers

Usage = namedtuple("Usage", "total used free")


def copies(disk) -> int:
    """Bytes of this user's copies."""
    return sum(path.stat().st_size for path in disk.glob("hpckv-*/*/u/*/seg/*/*"))


def copy(store, disk, numbers, **options) -> None:
    """Read blocks of a store, so that they are copied to the disk."""
    tiers = small_tiers(store, local=str(disk), **options)
    for number in numbers:
        assert tiers.load(make_block(number))
        tiers.flush()
    tiers.close()


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.fixture
def store(tmp_path):
    """A store of 30 blocks."""
    tiers = small_tiers(tmp_path / "kv", local="none")
    for number in range(30):
        tiers.save(make_block(number))
        tiers.flush()
    tiers.close()
    return tmp_path / "kv"


def test_a_twentieth_of_the_disk_stays_free(disk, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000, 800, 200))
    assert room_in(disk) == 150
    assert Budget(disk, 10**6).excess(100) == -50
    assert Budget(disk, 10**6).excess(200) == 50


def test_what_any_process_left_counts(disk):
    (disk / "another.h5").write_bytes(bytes(700))
    (disk / ".tmp-being-written").write_bytes(bytes(200))
    assert Budget(disk, 1000).excess(50) == -50
    assert Budget(disk, 1000).excess(150) == 50


def test_copies_never_take_more_than_their_budget(store, disk, monkeypatch):
    most, seen = 64 * 1024, []
    publish = os.rename
    monkeypatch.setattr(os, "rename", lambda *names: (publish(*names), seen.append(copies(disk))))
    copy(store, disk, range(30), local_size=ByteSize(most))
    assert most // 2 < max(seen) <= most
    # A job with less room than the one before it.
    copy(store, disk, range(3), local_size=ByteSize(most // 2))
    assert 0 < copies(disk) <= most // 2


def test_on_a_disk_that_others_have_filled_there_are_no_copies_and_all_is_read(store, disk, monkeypatch, caplog):
    monkeypatch.setattr(node_folder.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 0))
    tiers = small_tiers(store, local=str(disk))
    assert found_in(tiers, range(30)) == list(range(30))
    assert copies(disk) == 0
    assert "no room for more copies" in caplog.text
