"""A filesystem that stops answering, whatever it was asked: it costs its deadline, changes no answer, and holds up no exit.

A real FUSE mount on which chosen calls hang in the kernel, or all of them. Times are compared with the deadline, generously.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpckv.engine.engine import Engine
from hpckv.quantity import ByteSize
from hpckv.store import StoreConfig
from hpckv.store.inspect import check
from hpckv.store.root import StoreRoot
from hpckv.store.survey import Survey
from hpckv.testing.tier_suite import make_block
from tests.engine.test_store_trouble import CACHE, PARAMS, prompts
from tests.store.hanging_fs import EVERYTHING, HangingFilesystem
from tests.store.test_faults import RefusedError, read, tiers, write

pytestmark = [pytest.mark.root, pytest.mark.filterwarnings("default")]

DEADLINE_S = 1.0
GENEROUS = 5


@pytest.fixture
def fs(tmp_path):
    found = HangingFilesystem(tmp_path)
    yield found
    found.close()


@contextmanager
def in_time(fs: HangingFilesystem, *, besides_s: float = 0.0) -> Iterator[None]:
    """What is done here waits for no more than the deadline; then the filesystem answers again."""
    start = time.monotonic()
    try:
        yield
        took = time.monotonic() - start
        print(f"{took:.2f} s, of which {besides_s:.2f} s without a store")
        assert took < GENEROUS * (DEADLINE_S + besides_s)
    finally:
        fs.answer()


def whole(store: Path) -> bool:
    """Whether everything in the store verifies, once what hung is through."""
    time.sleep(0.5)
    survey = Survey(StoreRoot.open(store).layout)
    survey.refresh()
    return check(StoreRoot.open(store), survey).findings == []


def run(engine: Engine, chosen: list[list[int]]) -> list[list[int]]:
    found = [answer.token_ids for answer in engine.generate(chosen, PARAMS)]
    engine.cache.check_integrity(engine.scheduler.running)
    engine.close()
    return found


@pytest.mark.parametrize("calls", [("read",), ("open",), ("write",), ("fsync", "rename"), (EVERYTHING,)])
def test_a_run_costs_the_deadline_and_its_answers_are_right(checkpoint, fs, calls):
    folder = checkpoint("llama")
    start = time.monotonic()
    wanted = run(Engine(folder, cache=CACHE), prompts())
    without_s = time.monotonic() - start
    settings = {"shared": str(fs.point / "kv"), "write": "all", "host_size": ByteSize(0)}
    run(
        Engine(folder, store=StoreConfig(**settings), cache=CACHE), prompts()[:5]
    )  # half is there, half will be written
    engine = Engine(folder, store=StoreConfig(deadline_s=DEADLINE_S, **settings), cache=CACHE)
    engine.load()
    fs.hang(*calls)
    with in_time(fs, besides_s=without_s):
        assert run(engine, prompts()) == wanted
    assert whole(fs.point / "kv")


@pytest.mark.parametrize("is_new", [False, True], ids=["old store", "new store"])
@pytest.mark.parametrize("calls", [("getattr",), ("read",), ("readdir",), ("create", "mkdir"), (EVERYTHING,)])
def test_opening_costs_the_deadline(fs, calls, is_new):
    store, one, said = fs.point / "kv", None, []
    if not is_new:
        write(store, range(12))
    fs.hang(*calls)
    with in_time(fs):
        try:
            one = tiers(store, deadline_s=DEADLINE_S)
        except RefusedError as error:
            said.append(str(error))
    assert said in ([], [f"store {store}: no answer in 1 s"])
    if one is not None and not is_new:  # what hung at the first look is seen as soon as there is an answer
        end = time.monotonic() + 30
        while len(one.tiers[-1].catalog) < 12 and time.monotonic() < end:
            time.sleep(0.05)
        assert all(one.load(make_block(n)) for n in range(12))
    if one is not None:
        one.close()
    write(store, range(12, 18))
    assert read(store, range(12, 18)) == list(range(12, 18))
    assert whole(store)


@pytest.mark.parametrize("calls", [("create",), ("write",), ("rename",), ("readdir",), (EVERYTHING,)])
def test_flushing_and_closing_cost_the_deadline(fs, calls):
    write(fs.point / "kv", range(60))  # with an index that is due
    one = tiers(fs.point / "kv", deadline_s=DEADLINE_S)
    for number in (*range(60), *range(100, 106)):
        one.load(make_block(number))
        one.save(make_block(number))
    fs.hang(*calls)
    with in_time(fs):
        one.flush()
        one.close()
        one.close()
    assert whole(fs.point / "kv")
    assert read(fs.point / "kv", range(60)) == list(range(60))


def reads_writes_and_ends(store: Path) -> None:
    """A process whose store dies under it: it says when to begin, and then only wants to end."""
    one = tiers(store, deadline_s=DEADLINE_S)
    print("ready", flush=True)
    sys.stdin.readline()
    fetch = one.fetch([make_block(n).key for n in range(12)])
    while not fetch.is_done:
        fetch.arrival.wait(0.05)
    for number in range(100, 106):
        one.save(make_block(number))
    one.close()
    print("found", len(fetch.loaded), flush=True)


def test_a_process_ends_although_its_threads_hang(fs):
    write(fs.point / "kv", range(12))
    command = [sys.executable, "-m", __spec__.name, str(fs.point / "kv")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        fs.hang(EVERYTHING)
        with in_time(fs):
            said, _ = process.communicate("go\n")
    assert (said, process.returncode) == ("found 0\n", 0)
    assert whole(fs.point / "kv")


if __name__ == "__main__":
    reads_writes_and_ends(Path(sys.argv[1]))
