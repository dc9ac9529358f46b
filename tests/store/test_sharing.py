"""A store shared by real users of a group: everybody reads, nobody can touch another's, strangers see nothing."""

import json
import os
import stat
from pathlib import Path

import pytest

from hpckv.errors import AccessError, StoreError
from hpckv.store.catalog import INDEX_FROM
from hpckv.store.root import StoreRoot
from tests.store.shared_store import get, policy, put
from tests.store.users import MEMBER, OTHER, OWNER, PROJECT, STRANGER, as_user, reachable, readable, successes

pytestmark = pytest.mark.root


def modes(*paths: Path) -> list[str]:
    return [f"{stat.S_IMODE(p.stat().st_mode):o} {p.stat().st_uid} {p.stat().st_gid}" for p in paths]


def test_modes_are_as_the_format_says_under_the_strictest_umask(store):
    (segment,) = as_user(MEMBER, lambda: put(store, [1]))
    assert modes(store, store / "key", store / "plan", store / "u") == [
        f"2750 {OWNER} {PROJECT}",
        f"2750 {OWNER} {PROJECT}",
        f"2750 {OWNER} {PROJECT}",
        f"3770 {OWNER} {PROJECT}",
    ]
    assert modes(store / "STORE.json", store / "key" / "0.key") == [f"640 {OWNER} {PROJECT}"] * 2
    path = Path(segment)
    assert modes(path) == [f"440 {MEMBER} {PROJECT}"]
    assert (
        modes(*[p for p in path.parents if p.is_relative_to(store / "u" / str(MEMBER))])
        == [f"2750 {MEMBER} {PROJECT}"] * 3
    )


def test_members_hit_each_others_blocks_and_strangers_get_one_line(store):
    as_user(MEMBER, lambda: put(store, [1, 2]))
    as_user(OTHER, lambda: put(store, [3]))
    for uid in (OWNER, MEMBER, OTHER):
        assert as_user(uid, lambda: get(store, [1, 2, 3, 4])) == [True, True, True, False]

    def refused() -> str:
        with pytest.raises((AccessError, StoreError)) as caught:
            get(store, [1])
        return str(caught.value)

    assert "\n" not in as_user(STRANGER, refused)


def test_indexes_are_shared_like_segments(store):
    as_user(MEMBER, lambda: [put(store, [number]) for number in range(INDEX_FROM)])
    (index,) = store.glob("u/*/idx/*/*.idx")
    assert modes(index) == [f"440 {MEMBER} {PROJECT}"]
    assert modes(index.parent, index.parent.parent) == [f"2750 {MEMBER} {PROJECT}"] * 2
    assert as_user(OTHER, lambda: get(store, range(INDEX_FROM + 1))) == [True] * INDEX_FROM + [False]


def test_no_operation_on_anothers_files_succeeds(store):
    (segment,) = as_user(MEMBER, lambda: put(store, [1]))
    victim, folder = Path(segment), Path(segment).parent
    user = store / "u" / str(MEMBER)

    def attempts() -> list[str]:
        mine = store / "u" / str(os.getuid())
        tries = {
            "write": lambda: victim.open("ab"),
            "truncate": lambda: os.truncate(victim, 0),
            "chmod": lambda: victim.chmod(0o666),
            "unlink": victim.unlink,
            "rename away": lambda: victim.rename(folder / "gone.h5"),
            "rename over": lambda: _file(mine).rename(victim),
            "link into": lambda: os.link(victim, folder / "second.h5"),
            "symlink into": lambda: (folder / "link.h5").symlink_to("/etc/passwd"),
            "create in": lambda: (folder / "new.h5").touch(),
            "replace folder": lambda: user.rename(store / "u" / "old"),
            "remove folder": user.rmdir,
            "write the marker": lambda: (store / "STORE.json").write_text("{}"),
            "replace the key": lambda: (store / "key" / "0.key").unlink(),
            "create in the root": lambda: (store / "x").touch(),
            "create a plan": lambda: (store / "plan" / "x").touch(),
        }
        return successes(tries)

    assert as_user(OTHER, attempts) == []

    looked_at = [store / "STORE.json", store / "key" / "0.key", store / "u", user, folder, victim]
    assert as_user(STRANGER, lambda: readable(looked_at)) == []
    assert as_user(MEMBER, lambda: readable(looked_at)) == [str(path) for path in looked_at]
    assert as_user(STRANGER, attempts) == []


def _file(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "mine").write_bytes(b"x")
    return folder / "mine"


def test_what_a_member_plants_is_not_believed(store):
    (good,) = as_user(MEMBER, lambda: put(store, [1]))
    content = Path(good).read_bytes()
    namespace = Path(good).parent.name

    def plant() -> None:
        mine = store / "u" / str(os.getuid()) / "seg" / namespace
        mine.mkdir(parents=True)
        (mine / f"{1:032x}.h5").write_bytes(content)  # another's trailer
        (mine / f"{2:032x}.h5").symlink_to(good)
        os.mkfifo(mine / f"{3:032x}.h5")
        (mine / f"{4:032x}.h5").mkdir()
        (store / "u" / "61099").mkdir()  # somebody else's name
        Path(good).with_name("x")

    as_user(OTHER, plant)
    Path(good).unlink()
    assert as_user(OWNER, lambda: get(store, [1])) == [False]


def test_trust_self_reads_only_ones_own(tmp_path_factory, store):
    marker = store / "STORE.json"
    content = {**json.loads(marker.read_text()), "trust": "self"}
    marker.write_text(json.dumps(content))
    as_user(MEMBER, lambda: put(store, [1]))
    assert as_user(MEMBER, lambda: get(store, [1])) == [True]
    assert as_user(OTHER, lambda: get(store, [1])) == [False]


@pytest.mark.parametrize("spoil", ["no sticky bit", "marker writable", "another's key"])
def test_an_unsafe_store_is_refused(store, spoil):
    if spoil == "no sticky bit":
        (store / "u").chmod(0o2770)
    elif spoil == "marker writable":
        (store / "STORE.json").chmod(0o660)
    else:
        os.chown(store / "key" / "0.key", MEMBER, PROJECT)

    def refused() -> str:
        with pytest.raises(StoreError) as caught:
            get(store, [1])
        return str(caught.value)

    assert "\n" not in as_user(MEMBER, refused)


def test_a_group_that_the_owner_is_not_in_is_refused(tmp_path_factory):
    folder = reachable(tmp_path_factory.mktemp("shared"))
    os.chown(folder, STRANGER, 62002)

    def refused() -> str:
        with pytest.raises(AccessError) as caught:
            StoreRoot.create(folder / "kv", policy())
        return str(caught.value)

    assert "\n" not in as_user(STRANGER, refused)


def test_an_index_of_many_segments_serves_the_others_too(store):
    def many() -> None:
        for number in range(18):  # a segment each; from 16 on they are indexed
            put(store, [number])

    as_user(MEMBER, many)
    (index,) = store.glob(f"u/{MEMBER}/idx/*/*.idx")
    assert modes(index.parent, index) == [f"2750 {MEMBER} {PROJECT}", f"440 {MEMBER} {PROJECT}"]
    assert as_user(OTHER, lambda: get(store, range(19))) == [True] * 18 + [False]
    index.parent.chmod(0o700)  # as somebody might by hand: the segments are looked at instead
    assert as_user(OTHER, lambda: get(store, [0, 17])) == [True, True]
