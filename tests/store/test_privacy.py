"""Who may read what, beyond one project: private runs, other projects, users that nobody trusts any more."""

import stat
from pathlib import Path

import pytest

from hpckv.errors import AccessError, StoreError
from hpckv.store.grant import share
from hpckv.store.root import StoreRoot
from tests.store.shared_store import get, put
from tests.store.users import MEMBER, OTHER, OUTSIDE, OWNER, STRANGER, as_user, readable, successes

pytestmark = pytest.mark.root


def test_a_private_runs_blocks_are_ones_own_and_ones_next_runs(store):
    def write() -> list[str]:
        return put(store, [1, 2], private=True)

    (segment,) = as_user(MEMBER, write)
    folder = Path(segment).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((store / "u" / str(MEMBER) / "private.salt").stat().st_mode) == 0o400
    assert as_user(MEMBER, lambda: get(store, [1, 2, 3], private=True)) == [True, True, False]
    assert as_user(MEMBER, lambda: get(store, [1])) == [False]
    assert as_user(OTHER, lambda: get(store, [1], private=True)) == [False]

    looked_at = [folder, Path(segment), folder / "identity.json", store / "u" / str(MEMBER) / "private.salt"]
    assert as_user(OTHER, lambda: readable(looked_at)) == []
    assert as_user(MEMBER, lambda: readable(looked_at)) == [str(path) for path in looked_at]
    as_user(OTHER, lambda: put(store, [1, 2], private=True))
    names = {path.name for path in store.glob("u/*/seg/*")}
    assert len(names) == 2, "one name for both would tell that they asked the same"


def test_a_private_run_reads_nobody_elses_blocks(store):
    as_user(OTHER, lambda: put(store, [1]))
    assert as_user(MEMBER, lambda: get(store, [1])) == [True]
    assert as_user(MEMBER, lambda: get(store, [1], private=True)) == [False]


def test_another_project_reads_what_was_granted_and_no_more(store):
    as_user(MEMBER, lambda: put(store, [1]))
    as_user(MEMBER, lambda: put(store, [7], private=True))
    as_user(OTHER, lambda: put(store, [2]))

    def refused() -> str:
        with pytest.raises((AccessError, StoreError)) as caught:
            get(store, [1])
        return str(caught.value)

    assert "\n" not in as_user(STRANGER, refused)
    grant = lambda: share(StoreRoot.open(store), OUTSIDE)  # noqa: E731
    as_user(OWNER, grant)
    as_user(MEMBER, grant)
    assert as_user(STRANGER, lambda: get(store, [1, 2, 7])) == [True, False, False], "OTHER granted nothing"
    as_user(MEMBER, lambda: put(store, [3]))  # after the grant: inherited
    assert as_user(STRANGER, lambda: get(store, [3])) == [True]
    assert as_user(STRANGER, lambda: put(store, [4])) == [], "reading only"
    assert as_user(OTHER, lambda: get(store, [1, 2, 3])) == [True, True, True]

    def attempts() -> list[str]:
        mine = store / "u" / str(MEMBER)
        segment = next(mine.glob("seg/*/*.h5"))
        return successes(
            {
                "write": lambda: segment.open("ab"),
                "unlink": segment.unlink,
                "make a folder": (store / "u" / str(STRANGER)).mkdir,
                "read the salt": (mine / "private.salt").read_bytes,
            }
        )

    assert as_user(STRANGER, attempts) == []
    assert as_user(OWNER, lambda: get(store, [1])) == [True], "the store is still safe in its owner's eyes"
    revoke = lambda: share(StoreRoot.open(store), OUTSIDE, revoke=True)  # noqa: E731
    as_user(OWNER, revoke)
    assert "\n" not in as_user(STRANGER, refused)


def test_a_distrusted_users_blocks_are_not_read(store):
    as_user(MEMBER, lambda: put(store, [1]))
    as_user(OTHER, lambda: put(store, [2]))

    def not_mine() -> str:
        with pytest.raises(AccessError) as caught:
            StoreRoot.open(store).distrust(OTHER)
        return str(caught.value)

    assert "only its owner" in as_user(MEMBER, not_mine)
    as_user(OWNER, lambda: StoreRoot.open(store).distrust(MEMBER) and None)
    assert as_user(OTHER, lambda: get(store, [1, 2])) == [False, True]
    as_user(OWNER, lambda: StoreRoot.open(store).distrust(MEMBER, is_trusted=True) and None)
    assert as_user(OTHER, lambda: get(store, [1, 2])) == [True, True]
