"""A store shared from inside containers, where the kernel shows everybody else's files as nobody's."""

import os
from pathlib import Path

import pytest

from hpckv.store.ownership import is_of_group, is_of_user
from tests.store.shared_store import get, put
from tests.store.users import MEMBER, OTHER, OWNER, PROJECT, STRANGER, as_contained_user, as_user

pytestmark = pytest.mark.root


def test_the_kernel_does_not_tell_colleagues_apart_there(store):
    (segment,) = as_user(MEMBER, lambda: put(store, [1]))
    assert as_contained_user(OTHER, lambda: [os.stat(segment).st_uid, os.stat(segment).st_gid]) == [65534, 65534]
    assert as_contained_user(OTHER, lambda: is_of_user(os.stat(segment), MEMBER))
    assert as_contained_user(OTHER, lambda: is_of_group(os.stat(segment), PROJECT))
    assert not as_contained_user(OTHER, lambda: is_of_user(os.stat(segment), OTHER))
    assert not as_contained_user(MEMBER, lambda: is_of_user(os.stat(segment), OTHER))
    assert not as_user(OTHER, lambda: is_of_user(os.stat(segment), OTHER))


def test_blocks_go_both_ways_between_containers_and_hosts(store):
    as_user(MEMBER, lambda: put(store, [1, 2]))
    (inside,) = as_contained_user(OTHER, lambda: put(store, [3]))
    assert Path(inside).stat().st_uid == OTHER
    assert Path(inside).stat().st_gid == PROJECT
    for uid in (OWNER, MEMBER, OTHER):
        assert as_contained_user(uid, lambda: get(store, [1, 2, 3, 4])) == [True, True, True, False]
        assert as_user(uid, lambda: get(store, [1, 2, 3, 4])) == [True, True, True, False]


def test_a_stranger_in_a_container_reads_nothing(store):
    as_user(MEMBER, lambda: put(store, [1]))

    def names() -> list[str]:
        try:
            return os.listdir(store)
        except PermissionError:
            return ["refused"]

    assert as_contained_user(STRANGER, names) == ["refused"]


def test_what_a_member_plants_is_not_believed_there_either(store):
    (good,) = as_user(MEMBER, lambda: put(store, [1]))
    content, namespace = Path(good).read_bytes(), Path(good).parent.name

    def plant() -> None:
        mine = store / "u" / str(os.getuid()) / "seg" / namespace
        mine.mkdir(parents=True)
        (mine / f"{1:032x}.h5").write_bytes(content)  # another's trailer
        (mine / f"{1:032x}.h5").chmod(0o440)

    as_user(OTHER, plant)
    Path(good).unlink()
    assert as_contained_user(OWNER, lambda: get(store, [1])) == [False]
    assert as_user(OWNER, lambda: get(store, [1])) == [False]
