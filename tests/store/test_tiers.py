"""Every tier keeps the contract; and what only the file tier promises: durable, checked, foreign files refused."""

import os
import stat
import threading
import time
from pathlib import Path

import h5py
import pytest

from hpckv.store.catalog import Catalog
from hpckv.store.file_tier import FileTier
from hpckv.store.host_tier import HostTier
from hpckv.store.layout import StoreLayout
from hpckv.store.segment import SegmentContext, build_segment
from hpckv.store.tier import PutOutcome
from hpckv.testing.tier_suite import GEOMETRY, TierSuite, make_block

CONTEXT = SegmentContext(
    namespace=b"\x07" * 32, namespace_json=b'{"name":"test"}', geometry=GEOMETRY, epoch=0, epoch_key=b"k" * 32
)


def make_file_tier(folder: Path, **options) -> FileTier:
    layout = StoreLayout(folder)
    catalog = Catalog(layout, CONTEXT)
    own = catalog.own_folder(os.getuid())
    own.mkdir(parents=True, exist_ok=True)
    return FileTier(catalog, CONTEXT, own, **{"refresh_s": 1e6, **options})


class TestHostTier(TierSuite):
    def make_tier(self, folder):
        return HostTier(GEOMETRY, budget_bytes=64 * GEOMETRY.block_bytes)


class TestFileTier(TierSuite):
    def make_tier(self, folder):
        return make_file_tier(folder)


def test_under_pressure_a_put_is_dropped_and_what_was_stored_is_served(tmp_path):
    tier = make_file_tier(tmp_path, segment_bytes=3 * GEOMETRY.block_bytes)
    outcomes = [tier.put(make_block(n)) for n in range(200)]
    tier.close()
    stored = [n for n, outcome in enumerate(outcomes) if outcome is PutOutcome.STORED]
    assert tier.stats.dropped == 200 - len(stored) > 0
    assert len(segments(tmp_path)) == -(-len(stored) // 3)
    found = readable(tmp_path, 200)
    assert [n for n in range(200) if found[n]] == stored


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("u/*/seg/*/*.h5"))


def stored_segment(folder: Path, count: int = 6) -> Path:
    tier = make_file_tier(folder)
    for number in range(count):
        tier.put(make_block(number))
    tier.close()
    (path,) = segments(folder)
    return path


def readable(folder: Path, count: int = 6) -> list[bool]:
    tier = make_file_tier(folder)
    found = []
    for number in range(count):
        payload = tier.get(make_block(number).key)
        assert payload is None or bytes(payload) == make_block(number).payload
        found.append(payload is not None)
    tier.close()
    return found


def test_hdf5_tools_open_a_segment(tmp_path):
    path = stored_segment(tmp_path)
    with h5py.File(path) as file:
        assert file.attrs["format"] == "hpckv segment"
        assert list(file.attrs["kv_shape"]) == [3, 5, 2, 4, 6]
        assert bytes(file["keys"][2]) == make_block(2).key
        assert file["positions"][:].tolist() == [0, 4, 8, 12, 16, 20]
        assert file["kv"][3].tobytes() == make_block(3).payload
        assert file["box"][:].tolist() == [0, 3, 0, 5]
        assert file["digests"].shape == (6, len(GEOMETRY.tiles), 16)
        assert file["kv"].id.get_offset() % 4096 == 0


def test_a_segment_is_read_only_and_leaves_no_temporary_file(tmp_path):
    path = stored_segment(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o440
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_damaged_or_vanished_segment_is_a_miss_counted_by_cause(tmp_path):
    path = stored_segment(tmp_path)
    tier = make_file_tier(tmp_path, refresh_s=1e9)
    assert tier.get(make_block(0).key)
    tier._forget_file(path)
    path.unlink()
    assert not tier.get(make_block(0).key)
    assert tier.stats.misses == {"gone": 1}
    assert not tier.present([make_block(1).key])[0]
    tier.close()


@pytest.mark.parametrize(
    "spoil", ["group writable", "link", "fifo", "other key", "other namespace", "empty", "not hdf5"]
)
def test_unsafe_and_foreign_files_are_passed_over(tmp_path, spoil):
    path = stored_segment(tmp_path)
    good = path.read_bytes()
    path.unlink()
    if spoil == "group writable":
        path.write_bytes(good)
        path.chmod(0o660)
    elif spoil == "link":
        (tmp_path / "real.h5").write_bytes(good)
        path.symlink_to(tmp_path / "real.h5")
    elif spoil == "fifo":
        os.mkfifo(path)
    elif spoil in ("other key", "other namespace"):
        changed = {"epoch_key": b"x" * 32} if spoil == "other key" else {"namespace": b"\x08" * 32}
        context = SegmentContext(**{**CONTEXT.__dict__, **changed})
        path.write_bytes(b"".join(build_segment(context, [make_block(n) for n in range(6)])))
        path.chmod(0o440)
    else:
        path.write_bytes(b"" if spoil == "empty" else b"hello" * 500)
        path.chmod(0o440)
    assert readable(tmp_path) == [False] * 6


def test_two_instances_see_each_others_segments_after_a_refresh(tmp_path):
    first, second = make_file_tier(tmp_path), make_file_tier(tmp_path)
    first.put(make_block(1))
    first.flush()
    assert not second.present([make_block(1).key])[0]
    second.catalog.refresh()
    assert second.present([make_block(1).key])[0]
    first.evict(1)
    second.catalog.refresh()
    assert not second.present([make_block(1).key])[0]
    first.close()
    second.close()


def test_a_full_disk_turns_writing_off_and_hurts_nobody(tmp_path, monkeypatch):
    tier = make_file_tier(tmp_path)
    tier.put(make_block(1))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hpckv.store.segment_writer.publish", full)
    tier.flush()
    assert not tier.get(make_block(1).key)
    assert tier.put(make_block(2)) is PutOutcome.DROPPED
    tier.close()
    assert segments(tmp_path) == []


@pytest.mark.filterwarnings("default")
def test_a_device_that_takes_nothing_is_given_up(tmp_path, monkeypatch):
    tier = make_file_tier(tmp_path)
    tier._writer._patience_s = 0.2
    release = threading.Event()
    monkeypatch.setattr("hpckv.store.segment_writer.publish", lambda *_, **__: release.wait())
    tier.put(make_block(1))
    tier.close()
    assert tier._writer.num_lost == 1
    assert tier.put(make_block(2)) is PutOutcome.DROPPED
    release.set()


def test_the_host_tier_keeps_to_its_budget_least_recently_used_first():
    tier = HostTier(GEOMETRY, budget_bytes=3 * GEOMETRY.block_bytes)
    for number in range(3):
        tier.put(make_block(number))
    assert tier.get(make_block(0).key)
    tier.put(make_block(3))
    assert tier.present([make_block(n).key for n in range(4)]).tolist() == [True, False, True, True]


def test_an_old_open_segment_is_sealed_without_another_put(tmp_path):
    tier = make_file_tier(tmp_path, seal_s=0.05)
    tier.put(make_block(1))
    deadline = time.monotonic() + 30
    while not segments(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert readable(tmp_path, 2) == [False, True]
    tier.close()
