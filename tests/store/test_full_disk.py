"""A filesystem that is full, of bytes or of files, at any moment: nothing raises, writing turns off, what was acknowledged
is read back, and a run's answers are those of a run without a store. On tmpfs mounts with limits."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from hpckv.engine.engine import Engine
from hpckv.quantity import ByteSize
from hpckv.store import StoreConfig
from hpckv.store.compact import compact
from hpckv.store.inspect import check
from hpckv.store.root import StoreRoot
from hpckv.store.survey import Survey
from hpckv.store.tier import PutOutcome
from hpckv.testing.tier_suite import GEOMETRY, make_block
from tests.engine.test_store_trouble import CACHE, tokens
from tests.store.mounts import small_filesystem
from tests.store.test_faults import RefusedError, read, tiers, write

pytestmark = [pytest.mark.root, pytest.mark.filterwarnings("default")]

LIMITS = {"bytes": {"size": "256k"}, "files": {"nr_inodes": 40}}
PAGE = 4096


@pytest.fixture
def disk(tmp_path):
    with small_filesystem(tmp_path / "disk", size="512k", nr_inodes=200) as point:
        yield point


def fill(disk: Path, *, pages: int | None = None, files: int | None = None) -> None:
    """Leave so many pages or files free, and empty what an earlier call has left."""
    for path in disk.glob("filler*"):
        path.unlink()
    if pages is not None:
        os.posix_fallocate((fd := os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)), 0, free(disk) - pages * PAGE)
        os.close(fd)
    for number in range(os.statvfs(disk).f_ffree - files if files is not None else 0):
        (disk / f"filler{number}").touch()


def free(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bfree * found.f_frsize


def clean(store: Path) -> bool:
    """Whether every file under a final name verifies and no temporary one is left."""
    survey = Survey(StoreRoot.open(store).layout)
    survey.refresh()
    assert [f for f in survey.files.values() if f.kind == "temporary"] == []
    return check(StoreRoot.open(store), survey).findings == []


def segments(store: Path) -> set[Path]:
    return set(store.glob("u/*/seg/*/*.h5"))


@pytest.mark.parametrize("full_of", LIMITS)
def test_more_blocks_than_fit_turn_writing_off_and_the_rest_is_read_back(tmp_path, caplog, full_of):
    with small_filesystem(tmp_path / "disk", **LIMITS[full_of]) as disk:
        one, acknowledged = tiers(disk / "kv"), []
        shared = one.tiers[-1]
        for first in range(0, 300, 3):
            for number in range(first, first + 3):
                one.save(make_block(number))
            one.flush()
            part = range(first, first + 3)
            acknowledged += [n for n in part if shared.catalog.present([make_block(n).key])[0]]
        assert shared.put(make_block(999)) is PutOutcome.DROPPED
        assert not shared._writer.is_writing
        assert [record.message for record in caplog.records if "nothing more is written" in record.message] == [
            f"store {shared.catalog.own_folder(os.getuid())}: No space left on device; nothing more is written to it in this run"
        ]
        assert [n for n in range(300) if one.load(make_block(n))] == acknowledged
        one.close()
        assert 15 < len(acknowledged) < 200
        assert read(disk / "kv", range(300)) == acknowledged
        assert clean(disk / "kv")
        write(disk / "kv", range(300, 306))  # the next job meets a full disk at its start
        assert read(disk / "kv", range(306)) == acknowledged
        assert clean(disk / "kv")


@pytest.mark.parametrize(("what", "most"), [("pages", 12), ("files", 14)])
def test_a_store_is_made_or_refused_in_one_line(disk, what, most):
    said = []
    for left in range(most):
        fill(disk, **{what: left})
        try:
            tiers(disk / "kv").close()
            said.append("")
        except RefusedError as error:
            said.append(str(error))
        fill(disk)
        write(disk / "kv", range(6))
        assert read(disk / "kv", range(6)) == list(range(6))
        shutil.rmtree(disk / "kv")
    assert set(said) == {"", f"store {disk / 'kv'}: No space left on device"}
    assert said[0]
    assert not said[-1]


def spend(disk: Path, work, kept, *, most: int = 24) -> list[str]:
    """Do `work` with 0, 1, 2, ... pages left, then with 0, 1, 2, ... files; what it raised each time. Nothing of `kept` goes."""
    said = []
    for what in ("pages", "files"):
        for left in range(most):
            fill(disk, **{what: left})
            try:
                work()
                said.append("")
            except OSError as error:
                said.append(errno.errorcode[error.errno])
            fill(disk)
            assert read(disk / "kv", kept) == list(kept)
            assert clean(disk / "kv")
    return said


def test_the_disk_fills_at_any_page_of_a_write(disk):
    write(disk / "kv", range(100, 112))
    before = segments(disk / "kv")

    def work():
        write(disk / "kv", range(12))
        for path in segments(disk / "kv") - before:
            path.unlink()

    assert set(spend(disk, work, range(100, 112))) == {""}


def test_the_disk_fills_at_any_page_of_an_index(disk):
    write(disk / "kv", range(100, 130))
    one = tiers(disk / "kv")
    (old,) = (disk / "kv").glob("u/*/idx/*/*.idx")

    def work():
        one.tiers[-1].catalog.consolidate(os.getuid(), at_least=-1)

    one.tiers[-1].catalog._owners[os.getuid()].covered.clear()
    fill(disk, pages=0)
    with pytest.raises(OSError, match="No space left"):
        work()
    assert old.exists()
    fill(disk)
    said = spend(disk, work, range(100, 130), most=4)
    assert {"", "ENOSPC"} == set(said)
    one.close()


def test_the_disk_fills_at_the_heat_log_and_the_run_ends_well(disk):
    write(disk / "kv", range(100, 112))

    def work():
        one = tiers(disk / "kv")
        for number in range(100, 112):
            assert one.load(make_block(number))
        one.close()

    assert set(spend(disk, work, range(100, 112), most=6)) == {""}
    assert list((disk / "kv").glob("u/*/heat/*.json"))


def test_the_disk_fills_at_any_page_of_a_compaction(disk):
    write(disk / "kv", range(100, 124))

    def work():
        compact(StoreRoot.open(disk / "kv"), target_bytes=100 * GEOMETRY.block_bytes)

    assert len(segments(disk / "kv")) == 8
    said = spend(disk, work, range(100, 124))
    assert said[0] == "ENOSPC"
    assert len(segments(disk / "kv")) == 1
    assert said[-1] == ""


@pytest.mark.parametrize("limit", [{"size": "160k"}, {"size": "300k"}, {"nr_inodes": 20}])
def test_a_run_on_a_full_disk_gives_the_answers_of_a_run_without_a_store(checkpoint, tmp_path, caplog, limit):
    folder = checkpoint("llama")
    wanted = tokens(Engine(folder, cache=CACHE))
    with small_filesystem(tmp_path / "disk", **limit) as disk:
        config = StoreConfig(shared=str(disk / "kv"), write="all", host_size=ByteSize(0), segment_size=ByteSize(1))
        engine = Engine(folder, store=config, cache=CACHE)
        assert tokens(engine) == wanted
        assert not engine.store.tiers[0]._writer.is_writing
        assert caplog.text.count("nothing more is written") == 1
        engine = Engine(folder, store=config, cache=CACHE)
        assert tokens(engine) == wanted
        assert engine.cache.stats.onboarded.get("shared", 0) > 0
        assert clean(disk / "kv")
