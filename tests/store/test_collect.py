"""A store keeps to its quota, gives up what is worth least, and nobody's quota deletes another's files."""

import json
import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from hpckv.quantity import ByteSize
from hpckv.store import Identity, Namespace, StoreConfig, open_store
from hpckv.store.collect import ORPHAN_S, Collector, in_order_of_worth, is_orphan
from hpckv.store.policy import Quota, StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.store.survey import StoredFile, Survey, Use, heat_record, read_heat
from hpckv.testing.tier_suite import GEOMETRY, make_block
from tests.store.users import MEMBER, OTHER, OWNER, PROJECT, as_user, reachable, start_as

NAMESPACE = Namespace(Identity(weights="w", config={"a": 1}), {"dtype": "bfloat16"})
SEGMENT = 4 * GEOMETRY.block_bytes


def open_tiers(store: Path, **options):
    settings = {"write": "all", "segment_size": ByteSize(SEGMENT), "host_size": ByteSize(0), **options}
    return open_store(StoreConfig(shared=str(store), **settings), NAMESPACE, GEOMETRY)


def write(store: Path, numbers) -> None:
    tiers = open_tiers(store)
    for n, number in enumerate(numbers, start=1):
        tiers.save(make_block(number))
        if n % 4 == 0:
            tiers.flush()
    tiers.close()


def hits(store: Path, numbers) -> int:
    tiers = open_tiers(store, write="off")
    count = 0
    for number in numbers:
        if loaded := tiers.load(make_block(number)):
            assert bytes(loaded[1]) == make_block(number).payload
            count += 1
    tiers.close()
    return count


def segment_bytes(tmp_path) -> int:
    write(tmp_path / "one", range(4))
    (path,) = (tmp_path / "one").glob("u/*/seg/*/*.h5")
    return path.stat().st_size


def survey(store: Path) -> Survey:
    found = Survey(StoreRoot.open(store).layout)
    found.refresh()
    return found


def test_expired_first_then_the_coldest_a_byte_then_the_oldest():
    def file(name, size=1000, age=0.0):
        return StoredFile(Path(name), 1, "segment", size, 1e6 - age)

    files = [
        file("hot"),
        file("warm"),
        file("warm but large", 4000),
        file("old", age=50),
        file("new"),
        file("expired", age=5e5),
    ]
    uses = {
        Path("hot"): Use(9, 1e6),
        Path("warm"): Use(3, 1e6),
        Path("warm but large"): Use(3, 1e6),
        Path("expired"): Use(100, 1e6 - 4e5),
    }
    order = [f.path.name for f in in_order_of_worth(files, uses, keep_s=1e5, now=1e6)]
    assert order == ["expired", "old", "new", "warm but large", "warm", "hot"]


@pytest.mark.parametrize("bound", ["bytes", "files", "user_bytes", "user_files"])
def test_a_bound_holds_at_every_moment_and_the_newest_stay(tmp_path, bound):
    one = segment_bytes(tmp_path)
    limit = 5 if "files" in bound else ByteSize(5 * one)
    StoreRoot.create(tmp_path / "kv", StorePolicy.new(quota=Quota(**{bound: limit})))
    for first in range(0, 80, 8):
        write(tmp_path / "kv", range(first, first + 8))
        found = survey(tmp_path / "kv")
        assert len(found.segments()) <= 5
        assert found.num_files() <= 5 or "files" not in bound
    assert hits(tmp_path / "kv", range(72, 80)) == 8
    assert hits(tmp_path / "kv", range(8)) == 0


def test_what_is_read_stays_longer(tmp_path):
    one = segment_bytes(tmp_path)
    StoreRoot.create(tmp_path / "kv", StorePolicy.new(quota=Quota(bytes=ByteSize(6 * one))))
    write(tmp_path / "kv", range(4))
    tiers = open_tiers(tmp_path / "kv", write="all")
    for _ in range(5):
        assert tiers.load(make_block(2))
    tiers.close()
    write(tmp_path / "kv", range(4, 60))
    assert hits(tmp_path / "kv", range(4)) == 4
    assert hits(tmp_path / "kv", range(4, 12)) == 0


def test_a_quota_smaller_than_a_segment_only_means_no_writing(tmp_path):
    StoreRoot.create(tmp_path / "kv", StorePolicy.new(quota=Quota(bytes=ByteSize(100))))
    write(tmp_path / "kv", range(8))
    assert survey(tmp_path / "kv").segments() == []


def test_the_free_space_watermark_is_kept(tmp_path):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    StoreRoot.create(tmp_path / "kv", StorePolicy.new(quota=Quota(free=ByteSize(2 * free))))
    write(tmp_path / "kv", range(8))
    assert survey(tmp_path / "kv").segments() == []


def test_orphans_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path):
    root = StoreRoot.create(tmp_path / "kv", StorePolicy.new())
    folder = root.layout.segments(os.getuid(), "n")
    root.make_own_folder(folder)
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = os.uname().nodename
    names = {
        "dead": f".tmp-aa-{host}-{dead.pid}",
        "alive": f".tmp-bb-{host}-{os.getpid()}",
        "elsewhere": f".tmp-cc-other-{dead.pid}",
        "elsewhere, ancient": f".tmp-dd-other-{dead.pid}",
    }
    for name in names.values():
        (folder / name).write_bytes(b"x")
    os.utime(folder / names["elsewhere, ancient"], (time.time() - 2 * ORPHAN_S,) * 2)
    Collector(root).collect()
    assert {p.name for p in folder.iterdir()} == {names["alive"], names["elsewhere"]}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"time": "x"}', b'{"time": 1, "reads": {"a": "b"}}', b'{"time": 1, "reads": []}']
)
def test_a_heat_log_that_cannot_be_read_says_nothing(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    path.chmod(0o440)
    assert list(read_heat(path, os.getuid(), 10.0)) == []


def test_heat_halves_with_time_and_cannot_come_from_the_future(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(heat_record({"a": 8}, 1000.0))
    path.chmod(0o440)
    ((_, use),) = read_heat(path, os.getuid(), 1000.0 + 7 * 86400)
    assert use == Use(4.0, 1000.0)
    ((_, use),) = read_heat(path, os.getuid(), 10.0)
    assert use == Use(8.0, 10.0)


@pytest.mark.root
def test_eight_processes_of_three_users_keep_a_quota_of_half_of_what_they_write(tmp_path_factory):
    folder = reachable(tmp_path_factory.mktemp("shared"))
    one = as_user(OWNER, lambda: None) or segment_bytes(folder)
    os.chown(folder, OWNER, PROJECT)
    store, quota = folder / "kv", ByteSize(20 * one)
    as_user(OWNER, lambda: StoreRoot.create(store, StorePolicy.new(group=PROJECT, quota=Quota(bytes=quota))) and None)

    def work(seed: int) -> list[int]:
        """Batches that share prefixes: what is there is read, what is not is written."""
        rng = random.Random(seed)
        computed = hit = stored = 0
        for _ in range(4):
            tiers = open_tiers(store)
            for number in rng.choices(range(160), k=40):
                if loaded := tiers.load(make_block(number)):
                    assert bytes(loaded[1]) == make_block(number).payload
                    hit += 1
                else:
                    tiers.save(make_block(number))
                    computed += 1
            tiers.close()
            stored += tiers.tiers[-1].stats.stored
        return [computed, hit, stored]

    waits = [start_as((OWNER, MEMBER, OTHER)[n % 3], lambda n=n: work(n)) for n in range(8)]
    results = [wait() for wait in waits]
    assert all(hit > 0 for _, hit, _ in results), results
    found = survey(store)
    # Two writers may look at once before either has written: within one segment a writer.
    assert sum(f.num_bytes for f in found.segments()) <= quota + 8 * one
    assert sum(computed for computed, _, _ in results) > 2 * 20 * 4, "half of what they write must not fit"
    # Each of the three has published segments; whose are left at the end is the collectors' to say.
    assert all(sum(stored for _, _, stored in results[user::3]) > 0 for user in range(3)), results
    assert json.loads((store / "STORE.json").read_text())["quota"]["bytes"] == str(quota)


@pytest.mark.parametrize("host", ["node1", "gpu-node-07", os.uname().nodename])
def test_whose_temporary_file_it_is_is_told_on_hosts_of_any_name(tmp_path, monkeypatch, host):
    system = os.uname()
    monkeypatch.setattr(os, "uname", lambda: type(system)((system.sysname, host, *system[2:])))

    def left_by(pid: int) -> StoredFile:
        path = tmp_path / f".tmp-{3:016x}-{host}-{pid}"
        return StoredFile(path, os.getuid(), "temporary", 1, time.time())

    assert is_orphan(left_by(2**22 + 1))
    assert not is_orphan(left_by(os.getpid()))
