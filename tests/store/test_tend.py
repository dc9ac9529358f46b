"""check finds every damage and nothing else; compact loses nothing; a rotated key hides what was stored."""

import os
import resource
import secrets

import pytest

from hpckv.store.compact import compact
from hpckv.store.inspect import check, namespaces
from hpckv.store.root import StoreRoot
from hpckv.store.survey import Survey
from hpckv.testing.tier_suite import GEOMETRY, make_block
from tests.store.shared_store import found_in, small_tiers


def write(store, numbers):
    one = small_tiers(store)
    for n, number in enumerate(numbers, start=1):
        one.save(make_block(number))
        if n % 3 == 0:
            one.flush()
    one.close()


def hits(store, numbers):
    return found_in(small_tiers(store, write="off"), numbers)


def survey(store):
    found = Survey(StoreRoot.open(store).layout)
    found.refresh()
    return found


def findings(store):
    return [(f.file.path, f.what) for f in check(StoreRoot.open(store), survey(store)).findings]


def segments(store):
    return sorted(store.glob("u/*/seg/*/*.h5"))


def spoil(path, place):
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    path.chmod(0o440)


def test_a_store_in_use_is_clean(tmp_path):
    write(tmp_path, range(60))
    hits(tmp_path, range(60))
    report = check(StoreRoot.open(tmp_path), survey(tmp_path))
    assert (report.segments, report.blocks, report.findings) == (20, 60, [])


@pytest.mark.parametrize("damage", ["payload", "trailer", "truncated", "identity", "index", "stray", "foreign name"])
def test_each_damage_is_found_by_name(tmp_path, damage):
    write(tmp_path, range(60))
    path = segments(tmp_path)[7]
    if damage == "payload":
        spoil(path, 4096 * (path.stat().st_size // 4096 - 1))
    elif damage == "trailer":
        spoil(path, -100)
    elif damage == "truncated":
        path.chmod(0o600)
        os.truncate(path, path.stat().st_size // 2)
        path.chmod(0o440)
    elif damage == "identity":
        path = path.with_name("identity.json")
        spoil(path, 30)
    elif damage == "index":
        (path,) = tmp_path.glob("u/*/idx/*/*.idx")
        spoil(path, 300)
    elif damage == "stray":
        path = path.with_name("notes.txt")
        path.write_text("mine")
    else:
        path = path.parent.parent / "results" / path.name
        path.parent.mkdir()
        segments(tmp_path)[3].rename(path)
    ((found, what),) = findings(tmp_path)
    assert found == path
    assert "\n" not in what


def test_compaction_makes_few_full_segments_and_loses_nothing(tmp_path):
    write(tmp_path, range(60))
    for path in segments(tmp_path)[:4]:  # the same blocks once more, as two jobs at once would write them
        path.with_name(f"{secrets.token_hex(16)}.h5").write_bytes(path.read_bytes())
    for path in segments(tmp_path):
        path.chmod(0o440)
    assert len(segments(tmp_path)) == 24
    before = survey(tmp_path).num_bytes()
    report = compact(StoreRoot.open(tmp_path), target_bytes=20 * GEOMETRY.block_bytes)
    assert (report.read_segments, report.duplicate_blocks) == (24, 12)
    assert len(segments(tmp_path)) == report.written_segments <= 4
    assert survey(tmp_path).num_bytes() < before - report.freed_bytes / 2
    assert hits(tmp_path, range(60)) == list(range(60))
    assert findings(tmp_path) == []
    assert compact(StoreRoot.open(tmp_path), target_bytes=20 * GEOMETRY.block_bytes).duplicate_blocks == 0


@pytest.mark.parametrize("target", [1, 100], ids=["full", "small"])
def test_compaction_keeps_the_good_one_of_two_copies(tmp_path, target):
    write(tmp_path, range(3))
    (damaged,) = segments(tmp_path)
    copy = damaged.with_name(f"{secrets.token_hex(16)}.h5")
    copy.write_bytes(damaged.read_bytes())
    copy.chmod(0o440)
    spoil(damaged, 4096 * (damaged.stat().st_size // 4096 - 1))
    os.utime(damaged, (1, 1))
    compact(StoreRoot.open(tmp_path), target_bytes=target * GEOMETRY.block_bytes)
    assert hits(tmp_path, range(3)) == [0, 1, 2]


def test_compaction_keeps_heat_and_leaves_damaged_segments_alone(tmp_path):
    write(tmp_path, range(12))
    hits(tmp_path, [0, 1, 2])
    (view,) = namespaces(survey(tmp_path))
    damaged = segments(tmp_path)[0]
    spoil(damaged, -100)
    compact(StoreRoot.open(tmp_path), target_bytes=100 * GEOMETRY.block_bytes)
    assert damaged in segments(tmp_path)
    assert len(segments(tmp_path)) == 2
    assert view.use.heat == 0  # a run that only reads keeps no log: it may not be able to write
    assert len(hits(tmp_path, range(12))) == 9


def test_after_a_rotation_nothing_old_is_found_and_old_runs_go_on(tmp_path):
    write(tmp_path, range(3))
    old = small_tiers(tmp_path)
    StoreRoot.open(tmp_path).rotate()
    assert hits(tmp_path, range(3)) == []
    assert old.match([make_block(n).key for n in range(3)]) == 3
    old.close()
    write(tmp_path, range(3))
    assert hits(tmp_path, range(3)) == [0, 1, 2]
    assert findings(tmp_path) == []
    assert len(namespaces(survey(tmp_path))) == 2


@pytest.mark.parametrize("target_blocks", [1, 100], ids=["the first stays", "both are rewritten"])
def test_of_two_copies_the_one_that_verifies_is_kept(tmp_path, target_blocks):
    write(tmp_path, range(6))
    for path in segments(tmp_path):
        twin = path.with_name(f"{secrets.token_hex(16)}.h5")
        twin.write_bytes(path.read_bytes())
        twin.chmod(0o440)
        spoil(path, 4096 * (path.stat().st_size // 4096 - 1))
        os.utime(path, (1, 1))
    compact(StoreRoot.open(tmp_path), target_bytes=target_blocks * GEOMETRY.block_bytes)
    assert hits(tmp_path, range(6)) == [*range(6)]


def test_compaction_needs_few_descriptors_for_many_segments(tmp_path):
    write(tmp_path, range(180))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, limits[1]))
    try:
        report = compact(StoreRoot.open(tmp_path), target_bytes=60 * GEOMETRY.block_bytes)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (report.read_segments, report.written_segments) == (60, 3)
    assert hits(tmp_path, range(180)) == [*range(180)]
