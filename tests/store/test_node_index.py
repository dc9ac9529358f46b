"""One process of a node looks at the store, the others see what it saw: no more, no less, and no call on the store."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from hpckv.store import node_index
from hpckv.store.catalog import Catalog
from hpckv.store.file_tier import FileTier
from hpckv.store.layout import StoreLayout
from hpckv.store.node_index import NodeIndex
from hpckv.store.tier import PutOutcome
from hpckv.testing.tier_suite import make_block
from tests.store.test_index import CONTEXT, write_segments


@pytest.fixture(autouse=True)
def _leaders_have_time(monkeypatch):
    """Leaving a view takes long on a busy machine, and a leader would rest for a multiple of it."""
    monkeypatch.setattr(node_index, "_BUSY_SHARE", 0)


class LookedError(AssertionError):
    """A follower has gone to the store itself."""


def member(tmp_path) -> Catalog:
    """Another process of the node: locks of one file are apart also within a process, by descriptor."""
    return Catalog(StoreLayout(tmp_path / "kv"), CONTEXT, node=NodeIndex(tmp_path / "node"))


def follower(tmp_path) -> Catalog:
    found = member(tmp_path)

    def look() -> None:
        raise LookedError

    found._look = look
    return found


def present(catalog: Catalog, numbers) -> list[bool]:
    return catalog.present([make_block(n).key for n in numbers]).tolist()


def test_a_follower_sees_what_the_leader_sees_and_never_looks(tmp_path):
    write_segments(tmp_path / "kv", range(20))
    leader, other = member(tmp_path), follower(tmp_path)
    leader.refresh()
    other.refresh()
    assert present(other, range(21)) == [True] * 20 + [False]
    assert len(other) == len(leader) == 20
    assert other.places(make_block(7).key) == leader.places(make_block(7).key)

    write_segments(tmp_path / "kv", range(20, 24))
    victim, _ = leader.places(make_block(3).key)[0]
    victim.unlink()
    leader.refresh()
    other.refresh()
    assert present(other, [2, 3, 4, 23]) == [False, False, True, True]
    for catalog in (other, leader):
        catalog.close()
        catalog.close()


def test_an_unchanged_view_is_not_read_again(tmp_path):
    write_segments(tmp_path / "kv", range(4))
    leader, other = member(tmp_path), follower(tmp_path)
    leader.refresh()
    assert other._node.news() is not None
    assert other._node.news() is None
    leader.refresh()
    assert other._node.news() is None


def publishing_follower(tmp_path):
    """A leader, a follower, and the follower's tier with block 1 published, which the leader has not seen."""
    leader, other = member(tmp_path), follower(tmp_path)
    leader.refresh()
    other.refresh()
    folder = other.own_folder(os.getuid())
    folder.mkdir(parents=True)
    tier = FileTier(other, CONTEXT, folder, refresh_s=1e6)
    tier.put(make_block(1))
    tier.flush()
    return leader, other, tier


def test_what_a_follower_published_stays_found_until_the_leader_shows_it(tmp_path):
    leader, other, tier = publishing_follower(tmp_path)
    write_segments(tmp_path / "kv", [2, 3])
    assert present(other, [1]) == [True]
    leader.refresh()
    other.refresh()
    assert present(other, [1, 2, 3]) == [True] * 3
    assert len(other.places(make_block(1).key)) == 1, "once, not twice"
    tier.close()


def test_what_a_follower_published_and_lost_does_not_come_back(tmp_path):
    leader, other, tier = publishing_follower(tmp_path)
    ((path, _),) = other.places(make_block(1).key)
    path.unlink()  # somebody's collector, before the leader has looked
    assert tier.get(make_block(1).key) is None
    write_segments(tmp_path / "kv", [2, 3])
    leader.refresh()
    other.refresh()
    assert present(other, [1, 2, 3]) == [False, True, True]
    assert tier.put(make_block(1)) is PutOutcome.STORED
    tier.close()


def test_a_dead_leaders_place_is_taken(tmp_path):
    write_segments(tmp_path / "kv", range(4))
    reads, writes = os.pipe()

    def lead() -> None:
        catalog = member(tmp_path)
        catalog.refresh()
        os.write(writes, b"x")
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=lead)
    process.start()
    assert os.read(reads, 1)
    other = member(tmp_path)
    other.refresh()
    assert not other._node.leads()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    write_segments(tmp_path / "kv", range(4, 6))
    other.refresh()
    assert other._node.leads()
    assert present(other, range(7)) == [True] * 6 + [False]
    other.close()


def test_those_that_start_first_wait_for_the_leaders_first_look(tmp_path):
    write_segments(tmp_path / "kv", range(4))
    leader, other = member(tmp_path), follower(tmp_path)
    assert leader._node.leads()
    thread = threading.Thread(target=other.refresh)
    thread.start()
    time.sleep(0.2)
    assert thread.is_alive()
    leader.refresh()
    thread.join(30)
    assert present(other, range(4)) == [True] * 4


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("damage", ["empty", "nonsense", "torn", "counts", "foreign numbers"])
def test_a_damaged_view_only_costs_looking(tmp_path, damage):
    write_segments(tmp_path / "kv", range(4))
    leader = member(tmp_path)
    leader.refresh()
    view = tmp_path / "node" / "view"
    good = view.read_bytes()
    bad = {
        "empty": b"",
        "nonsense": b"x" * 500,
        "torn": good[:-9],
        "counts": good.replace(b"4]]", b"9]]"),
        "foreign numbers": good.replace(b"[[0, ", b"[[7, "),
    }[damage]
    assert bad != good
    view.chmod(0o600)
    view.write_bytes(bad)
    view.chmod(0o400)
    other = member(tmp_path)
    other.refresh()
    assert present(other, range(5)) == [True] * 4 + [False]


@pytest.mark.filterwarnings("default")
def test_a_node_whose_disk_is_full_looks_for_itself(tmp_path, monkeypatch):
    write_segments(tmp_path / "kv", range(4))
    catalogs = [member(tmp_path) for _ in range(3)]

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hpckv.store.node_index.publish", full)
    for catalog in catalogs:
        catalog.refresh()
        assert present(catalog, range(4)) == [True] * 4
        catalog.refresh()


def test_only_the_leader_consolidates(tmp_path):
    write_segments(tmp_path / "kv", range(40))
    leader, other = member(tmp_path), follower(tmp_path)
    leader.refresh()
    other.refresh()
    assert other.consolidate(os.getuid()) is None
    assert leader.consolidate(os.getuid()) is not None
