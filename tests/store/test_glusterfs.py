"""Two clients of a real shared filesystem that know nothing of each other: never a wrong byte, nothing acknowledged lost.

On the stale mounts a client believes names, attributes and open files for a second after another has deleted them.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hpckv.cli.store import store_app
from hpckv.errors import AccessError, HpckvError, StoreError
from hpckv.store import catalog
from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from tests.cluster.glusterfs import STALE, STRICT, glusterfs
from tests.store.neighbours import Reader, block_of, count_errors, open_tiers
from tests.store.shared_store import get, put
from tests.store.users import MEMBER, OTHER, OWNER, PROJECT, STRANGER, as_user

pytestmark = [pytest.mark.root, pytest.mark.sharedfs]

KINDS = {"stale": STALE, "strict": STRICT}


@pytest.fixture(scope="module")
def system():
    """One brick, and two clients of each kind."""
    with glusterfs({f"{kind} {side}": client for kind, client in KINDS.items() for side in "ab"}) as found:
        yield found


@pytest.fixture
def stores(system) -> dict[str, dict[str, Path]]:
    """By kind: where a store is (to be) on the two clients `a` and `b`, and on the brick itself."""
    found = {}
    for kind in KINDS:
        name = f"{kind} {len(list(system.brick.iterdir()))}"
        folder = system.mounts[f"{kind} a"] / name
        folder.mkdir()
        os.chown(folder, OWNER, PROJECT)
        roots = {"a": system.mounts[f"{kind} a"], "b": system.mounts[f"{kind} b"], "brick": system.brick}
        found[kind] = {side: root / name / "kv" for side, root in roots.items()}
    return found


@pytest.fixture
def errors(monkeypatch):
    """The system's answers that are errors."""
    return count_errors(monkeypatch.setattr)


def reported(process: subprocess.Popen) -> dict:
    output, trouble = process.communicate()
    assert process.returncode == 0, trouble[-3000:]
    return json.loads(output)


def let_neighbours_work(stores, seconds: float) -> dict[str, dict]:
    started = {}
    for kind, places in stores.items():
        arguments = [*(str(places[side]) for side in ("a", "b", "brick")), str(KINDS[kind].staleness_s)]
        started[kind] = subprocess.Popen(
            [sys.executable, "-m", "tests.store.neighbours", *arguments, str(seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
    return {kind: reported(process) for kind, process in started.items()}


def check_neighbours(stores, seconds: float) -> None:
    """By the clock a refresh may wait for a busy machine; so what must be seen is told by when one began."""
    for report in let_neighbours_work(stores, seconds).values():
        assert sum(one.get("wrong", 0) for one in report["saw"].values()) == 0, report
        assert (
            report["lost"] == report["late"] == report["findings"] == report["saw"]["reader on b"]["not_found"] == []
        ), report
        assert all(not one.get("given_up") for one in report["saw"].values()), report
        # And it was no idle afternoon.
        assert report["acknowledged"] > 50, report
        assert report["collected"] > 10, report
        assert report["saw"]["reader on b"]["hits"] > 100, report
        assert report["saw"]["tending on a"]["compacted"] + report["saw"]["tending on b"]["compacted"] > 0, report
        assert report["seconds_until_seen"], report


def test_neighbours_on_two_clients_lose_nothing_and_see_it_within_the_refresh_interval(stores):
    check_neighbours(stores, 5.0)


@pytest.mark.slow
def test_neighbours_on_two_clients_for_ten_minutes(stores):
    check_neighbours(stores, 600.0)


def segment_of(store: Path, number: int) -> Path:
    """The file that holds a block, on another client's mount than it was written through."""
    reader = Reader(store)
    ((path, _),) = reader.shared.catalog.places(block_of(number).key)
    reader.tiers.close()
    return path


def write(store: Path, numbers) -> bool:
    """Whether everything could be written."""
    tiers = open_tiers(store)
    for number in numbers:
        tiers.save(block_of(number))
        if number % 4 == 3:
            tiers.flush()
    tiers.close()
    return tiers.tiers[-1].stats.stored == len(numbers) and tiers.tiers[-1]._writer.is_writing


def test_what_another_client_deletes_is_a_miss_and_what_a_restarted_server_keeps_is_a_hit(
    system, stores, errors, monkeypatch
):
    monkeypatch.setattr(catalog, "_RETRY_S", 0.5)
    a, b = stores["stale"]["a"], stores["stale"]["b"]
    assert write(a, range(96))
    paths = [segment_of(a, number) for number in range(0, 48, 4)]
    readers = [Reader(b) for _ in range(4)]
    assert all(reader.load(number) for reader in readers for number in (0, 4, 48))

    # One more that knows of all and has opened none, through a client that believes in the names for another second.
    unprepared = Reader(b)
    errors.clear()
    for number, path in enumerate(paths):
        (b / path.relative_to(a)).stat()
        path.unlink()
        assert not unprepared.load(4 * number)
    assert unprepared.shared.stats.misses == {"gone": 12}
    assert errors["open ESTALE"] > 0, errors
    for reader in readers:
        reader.load(1)  # an open file may outlive its name
        assert reader.load(49)

    system.stop_brick()
    for number in (2, 6, 10, 50, 54, 60):  # from the client's memory, or a miss
        for reader in (*readers, unprepared):
            reader.load(number)
    assert any(name.endswith("ENOTCONN") for name in errors), errors
    with contextlib.suppress(StoreError, AccessError):
        assert not write(a, range(100, 104))
    system.start_brick()
    while not (system.is_back("stale a") and system.is_back("stale b")):
        time.sleep(0.1)
    time.sleep(STALE.staleness_s + catalog._RETRY_S)
    for reader in (*readers, unprepared):
        reader.shared.catalog.refresh()
        assert [n for n in range(96) if reader.load(n)] == [*range(48, 96)]
        assert reader.wrong == 0
        reader.tiers.close()
    assert write(a, range(104, 108))


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_opens_while_its_policy_is_being_replaced(stores, kind):
    root = StoreRoot.create(stores[kind]["a"], StorePolicy.new())
    is_over = threading.Event()

    def replace() -> None:
        while not is_over.is_set():
            root.distrust(1)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            StoreRoot.open(stores[kind]["b"])
    finally:
        is_over.set()
        thread.join()


def command(uid: int, *arguments: object) -> tuple[int, str]:
    """`hpckv store ARGUMENTS` as another user: its exit code and what it says."""

    def work() -> list:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            try:
                code = store_app([*map(str, arguments)], standalone_mode=False)
            except HpckvError as error:
                return [error.exit_code, str(error)]
        return [code or 0, said.getvalue()]

    code, text = as_user(uid, work)
    return code, text


def answer(uid: int, *arguments: object) -> object:
    code, text = command(uid, *arguments, "--json")
    assert code == 0, text
    return json.loads(text)


@pytest.fixture(scope="module")
def _all_imported(tmp_path_factory) -> None:
    """What the commands import late may lie where only root can read it: a Python in root's home."""
    store = str(tmp_path_factory.mktemp("imports") / "kv")
    for verb in ("init", "info", "du", "check", "gc"):
        with contextlib.redirect_stdout(io.StringIO()):
            store_app([verb, store, "--json"], standalone_mode=False)


@pytest.mark.usefixtures("_all_imported")
@pytest.mark.parametrize("kind", KINDS)
def test_real_users_share_and_tend_a_store_from_two_clients(stores, kind):
    a, b = stores[kind]["a"], stores[kind]["b"]
    answer(OWNER, "init", a, "--group", PROJECT, "--quota", "1GiB")
    (segment,) = as_user(MEMBER, lambda: put(a, range(8), local="none"))
    as_user(OTHER, lambda: put(b, range(8, 12), local="none"))
    for uid, store in ((OWNER, b), (MEMBER, b), (OTHER, a)):
        assert as_user(uid, lambda store=store: get(store, range(13), local="none")) == [True] * 12 + [False]
    with pytest.raises(AssertionError, match="AccessError"):
        as_user(STRANGER, lambda: get(b, [1], local="none"))

    for store in stores[kind].values():
        modes = {path: f"{path.stat().st_mode & 0o7777:o} {path.stat().st_uid}" for path in (store, store / "u")}
        assert modes == {store: f"2750 {OWNER}", store / "u": f"3770 {OWNER}"}
        seen = store / Path(segment).relative_to(a)
        folders = [folder for folder in seen.parents if folder.is_relative_to(store / "u" / str(MEMBER))]
        assert [f"{folder.stat().st_mode & 0o7777:o} {folder.stat().st_gid}" for folder in folders] == [
            f"2750 {PROJECT}"
        ] * 3
        assert f"{seen.stat().st_mode & 0o7777:o} {seen.stat().st_gid}" == f"440 {PROJECT}"

    def meddle() -> list[str]:
        done = []
        for store in (a, b):
            theirs = store / Path(segment).relative_to(a)
            for name, attempt in {
                "unlink": theirs.unlink,
                "rename": lambda theirs=theirs: theirs.rename(theirs.with_name("x.h5")),
                "write": lambda theirs=theirs: theirs.open("ab"),
                "replace folder": lambda store=store: (store / "u" / str(MEMBER)).rename(store / "u" / "x"),
            }.items():
                with contextlib.suppress(OSError):
                    attempt()
                    done.append(name)
        return done

    assert as_user(OTHER, meddle) == as_user(STRANGER, meddle) == []

    orphan = Path(segment).with_name(f".tmp-aa-{os.uname().nodename}-999999999")
    as_user(MEMBER, lambda: orphan.write_bytes(b"x") and None)
    time.sleep(KINDS[kind].staleness_s + 0.1)
    assert command(OTHER, "check", b)[0] == 3
    assert answer(OTHER, "gc", b) == {"files": 0, "bytes": 0}
    assert answer(MEMBER, "gc", b) == {"files": 1, "bytes": 1}
    assert [row["uid"] for row in answer(OWNER, "du", b)] == [MEMBER, OTHER]
    time.sleep(KINDS[kind].staleness_s + 0.1)
    assert answer(OTHER, "check", a)["blocks"] == 12
