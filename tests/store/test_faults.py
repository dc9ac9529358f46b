"""Every single call on a store may fail, and the process may die at every one: no error comes out, nothing that was
acknowledged is lost, nothing wrong is served, and the next to come cleans up.

The work runs in forks of a small process (this module as a program), not of the one that runs all tests.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest

from hpckv.errors import AccessError, StoreError
from hpckv.quantity import ByteSize
from hpckv.store.collect import Collector
from hpckv.store.compact import compact
from hpckv.store.inspect import check
from hpckv.store.policy import Quota, StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.store.survey import Survey
from hpckv.testing.tier_suite import GEOMETRY, make_block
from tests.store.faults import KINDS, Faults
from tests.store.shared_store import found_in, small_tiers

OLD = range(100, 112)
REFUSED = 69


class RefusedError(Exception):
    """The store could not be opened, said in one line."""


def tiers(store: Path, **options):
    with refusing():
        return small_tiers(store, **options)


@contextlib.contextmanager
def refusing():
    try:
        yield
    except (StoreError, AccessError) as error:
        raise RefusedError(str(error)) from None


def write(store: Path, numbers, acknowledge=lambda numbers: None) -> None:
    """Save blocks segment by segment; acknowledged is what a flush has brought into the catalogue."""
    one = tiers(store)
    shared = one.tiers[-1]
    for first in range(0, len(numbers), 3):
        part = list(numbers[first : first + 3])
        for number in part:
            one.save(make_block(number))
        one.flush()
        acknowledge([n for n in part if shared.catalog.present([make_block(n).key])[0]])
    with contextlib.suppress(OSError):  # close() does the same from 16 segments on, and only warns
        shared.catalog.consolidate(os.getuid(), at_least=1)
    one.close()


def read(store: Path, numbers, **options) -> list[int]:
    return found_in(tiers(store, write="off", **options), numbers)


def do_write(store, acknowledge):
    write(store, range(7), acknowledge)


def do_read(store, acknowledge):
    read(store, OLD)
    one = tiers(store)  # and with a heat log
    one.load(make_block(100))
    one.close()


def do_collect(store, acknowledge):
    with refusing(), contextlib.suppress(OSError):  # `hpckv store gc` says so in one line
        Collector(StoreRoot.open(store)).collect()


def do_compact(store, acknowledge):
    with refusing(), contextlib.suppress(OSError):
        compact(StoreRoot.open(store), target_bytes=100 * GEOMETRY.block_bytes)


WORK = {"write": do_write, "read": do_read, "collect": do_collect, "compact": do_compact}


def make_template(store: Path) -> Path:
    """A store with 12 blocks in 4 segments, an index, a heat log and an orphan."""
    write(store, OLD)
    one = tiers(store)
    one.load(make_block(100))
    one.close()
    folder = next(store.glob("u/*/seg/*"))
    (folder / f".tmp-aa-{os.uname().nodename}-999999999").write_bytes(b"x" * 1000)
    return store


def attempt(store: Path, work: str, nth: int, kind: str) -> tuple[dict, int]:
    """Run `work` in a child with one fault; what it reported, and its exit status."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read_end)
            faults = Faults(store, nth, kind)
            acknowledged: list[int] = []

            def acknowledge(numbers):
                os.fdopen(os.dup(write_end), "w").write(json.dumps({"acknowledged": numbers}) + "\n")
                acknowledged.extend(numbers)

            faults.install()
            try:
                WORK[work](store, acknowledge)
            finally:
                report = {"calls": faults.count, "spoiled": faults.spoiled}
                os.fdopen(write_end, "w").write(json.dumps(report) + "\n")
            status = 0
        except RefusedError as error:
            status = REFUSED if "\n" not in str(error) else 1
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write_end)
    report: dict = {"acknowledged": [], "calls": 0, "spoiled": ""}
    with os.fdopen(read_end) as pipe:
        for line in pipe:
            record = json.loads(line)
            report["acknowledged"] += record.pop("acknowledged", [])
            report.update(record)
    return report, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fail_every_call(folder: Path, work: str, kind: str) -> dict:
    """Once for each call that `work` makes on the store, spoil that one."""
    template, refused = make_template(folder / "template"), 0
    baseline, status = attempt(shutil.copytree(template, folder / "count"), work, 0, kind)
    assert status == 0
    for nth in range(1, baseline["calls"] + 1):
        store = shutil.copytree(template, folder / "kv")
        report, status = attempt(store, work, nth, kind)
        where = f"{kind} at call {nth} ({report['spoiled']})"
        # A store that cannot be opened is refused in one line; whatever comes later is survived.
        assert status in ({137} if kind == "kill" else {0, REFUSED}), where
        refused += status == REFUSED
        kept = [*OLD, *report["acknowledged"]]
        assert read(store, kept) == kept, where
        read(store, range(7))
        root = StoreRoot.open(store)
        Collector(root).collect()
        survey = Survey(root.layout)
        survey.refresh()
        assert [(f.file.path.name, f.what) for f in check(root, survey).findings] == [], where
        shutil.rmtree(store)
    return {"calls": baseline["calls"], "refused": refused}


def kill_again_and_again(store: Path, kills: int) -> int:
    """Writers, collectors and compactors killed at random moments; returns how many blocks were acknowledged."""
    StoreRoot.create(store, StorePolicy.new(quota=Quota(bytes=ByteSize(2**20))))
    rng = random.Random(5)
    begun = time.monotonic()
    write(store, range(6))
    do_compact(store, None)
    longest = 3 * (time.monotonic() - begun)
    acknowledged, number = 0, 6
    for _ in range(kills):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read_end)

            def acknowledge(numbers, write_end=write_end):
                os.write(write_end, b"".join(n.to_bytes(4, "little") for n in numbers))

            while True:
                number += 6
                write(store, range(number, number + 6), acknowledge)
                do_compact(store, acknowledge)
        os.close(write_end)
        time.sleep(rng.random() * longest)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(read_end, "rb") as pipe:
            data = pipe.read()
        numbers = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data) - 3, 4)]
        number = max(numbers, default=number) + 6
        acknowledged += len(numbers)
        # The quota lets the newest stay; what was acknowledged last is what a kill could have torn.
        newest = numbers[-6:]
        assert read(store, newest) == newest
    root = StoreRoot.open(store)
    Collector(root).collect()
    survey = Survey(root.layout)
    survey.refresh()
    assert check(root, survey).findings == []
    return acknowledged


def in_a_small_process(*arguments: object) -> dict:
    """Run this module as a program, its stores in memory where there is such a folder."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        command = [sys.executable, "-m", __spec__.name, folder, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_may_fail(work, kind):
    report = in_a_small_process(work, kind)
    assert report["calls"] > 5
    assert report["refused"] <= 40, "only opening refuses"


def test_killed_writers_collectors_and_compactors_lose_nothing():
    assert in_a_small_process("kills", 150)["acknowledged"] > 50


@pytest.mark.slow
def test_ten_thousand_kills():
    assert in_a_small_process("kills", 10_000)["acknowledged"] > 5_000


if __name__ == "__main__":
    folder, what, value = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    if what == "kills":
        answer = {"acknowledged": kill_again_and_again(folder / "kv", int(value))}
    else:
        answer = fail_every_call(folder, what, value)
    print(json.dumps(answer))
