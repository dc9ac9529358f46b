"""Folders of copies on a node's own disk: what they take, and that what nobody uses goes and what somebody uses stays."""

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple

import pytest

from hpckv.quantity import ByteSize
from hpckv.store import node_folder
from hpckv.store.local_disk import left_folders
from hpckv.store.node_folder import UNUSED_S, Budget, hold, remove, room_in, sweep
from hpckv.testing.tier_suite import make_block
from tests.store.shared_store import found_in, small_tiers

Usage = namedtuple("Usage", "total used free")


def copies(disk) -> int:
    """Bytes of this user's copies."""
    return sum(path.stat().st_size for path in disk.glob("hpckv-*/*/u/*/seg/*/*"))


def copy(store, disk, numbers, **options) -> None:
    """Read blocks of a store, so that they are copied to the disk."""
    tiers = small_tiers(store, local=str(disk), **options)
    for number in numbers:
        assert tiers.load(make_block(number))
        tiers.flush()
    tiers.close()


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.fixture
def store(tmp_path):
    """A store of 30 blocks."""
    tiers = small_tiers(tmp_path / "kv", local="none")
    for number in range(30):
        tiers.save(make_block(number))
        tiers.flush()
    tiers.close()
    return tmp_path / "kv"


def test_a_twentieth_of_the_disk_stays_free(disk, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000, 800, 200))
    assert room_in(disk) == 150
    assert Budget(disk, 10**6).excess(100) == -50
    assert Budget(disk, 10**6).excess(200) == 50


def test_what_any_process_left_counts(disk):
    (disk / "another.h5").write_bytes(bytes(700))
    (disk / ".tmp-being-written").write_bytes(bytes(200))
    assert Budget(disk, 1000).excess(50) == -50
    assert Budget(disk, 1000).excess(150) == 50


def test_copies_never_take_more_than_their_budget(store, disk, monkeypatch):
    most, seen = 64 * 1024, []
    publish = os.rename
    monkeypatch.setattr(os, "rename", lambda *names: (publish(*names), seen.append(copies(disk))))
    copy(store, disk, range(30), local_size=ByteSize(most))
    assert most // 2 < max(seen) <= most
    # A job with less room than the one before it.
    copy(store, disk, range(3), local_size=ByteSize(most // 2))
    assert 0 < copies(disk) <= most // 2


def test_on_a_disk_that_others_have_filled_there_are_no_copies_and_all_is_read(store, disk, monkeypatch, caplog):
    monkeypatch.setattr(node_folder.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 0))
    tiers = small_tiers(store, local=str(disk))
    assert found_in(tiers, range(30)) == list(range(30))
    assert copies(disk) == 0
    assert "no room for more copies" in caplog.text


def leave(base, name: str, age_s: float):
    """A folder as a process leaves it that ceased to use it so long ago."""
    folder = base / name
    (folder / "u" / "1").mkdir(parents=True)
    (folder / "u" / "1" / "copy").write_bytes(bytes(10))
    with hold(folder, fcntl.LOCK_SH):
        pass
    age(base, name, age_s)
    return folder


def age(base, name: str, age_s: float) -> None:
    os.utime(base / f"{name}.lock", times=(time.time() - age_s,) * 2)


OLD = UNUSED_S + 60


def test_what_nobody_used_for_a_week_goes_with_its_lock_and_the_rest_stays(disk):
    old, young = leave(disk, "old", OLD), leave(disk, "young", UNUSED_S - 60)
    sweep(disk)
    assert sorted(path.name for path in disk.iterdir()) == ["young", "young.lock"]
    assert (not old.exists(), (young / "u" / "1" / "copy").exists()) == (True, True)


def test_without_a_lock_the_folders_own_age_counts(disk):
    for name in ("old", "young"):
        (disk / name).mkdir()
    os.utime(disk / "old", times=(1, 1))
    sweep(disk)
    assert [path.name for path in disk.iterdir()] == ["young"]


def test_without_room_the_oldest_go_until_there_is(disk):
    for name, age_s in (("a", 10), ("b", 30), ("c", 20)):
        leave(disk, name, age_s)
    sweep(disk, is_roomy=lambda: not (disk / "c").exists())
    assert sorted(path.name for path in disk.iterdir()) == ["a", "a.lock"]


def test_what_another_process_holds_stays_until_it_has_ended(disk):
    folder = leave(disk, "used", OLD)
    code = "import fcntl, sys, pathlib; from hpckv.store.node_folder import hold\n"
    code += "with hold(pathlib.Path(sys.argv[1]), fcntl.LOCK_SH): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        age(disk, "used", OLD)
        sweep(disk)
        assert folder.exists()
        process.kill()  # the kernel gives its lock back
    sweep(disk)
    assert not folder.exists()


def test_what_was_broken_off_while_it_was_removed_goes(disk):
    leave(disk, "0123.gone", 0)
    sweep(disk)
    assert not (disk / "0123.gone").exists()


def test_who_comes_while_a_folder_is_removed_has_a_new_one(disk):
    folder = disk / "folder"
    errors = []

    def use() -> None:
        try:
            for _ in range(200):
                with hold(folder, fcntl.LOCK_SH):
                    folder.mkdir(exist_ok=True)
                    mine = folder / f"{threading.get_ident()}"
                    mine.write_text("x")
                    assert mine.read_text() == "x"
        except (OSError, AssertionError) as error:
            errors.append(error)

    users = [threading.Thread(target=use) for _ in range(3)]
    for user in users:
        user.start()
    while any(user.is_alive() for user in users):
        remove(folder)
    assert errors == []


def test_opening_a_store_sweeps_what_other_stores_left_and_holds_its_own(store, disk):
    copy(store, disk, range(3))
    (base,) = disk.iterdir()
    (own,) = (path for path in base.iterdir() if path.is_dir())
    age(base, own.name, OLD)
    other = leave(base, "other", OLD)
    tiers = small_tiers(store, local=str(disk))
    while other.exists():
        time.sleep(0.01)
    assert found_in(tiers, range(3)) == [0, 1, 2]
    assert copies(disk) > 0
    tiers = small_tiers(store, local=str(disk))
    age(base, own.name, OLD)
    sweep(base)
    assert own.exists(), "it is open"
    tiers.close()
    age(base, own.name, OLD)
    sweep(base)
    assert not own.exists()


def test_folders_that_other_jobs_left_are_this_users_and_nobody_elses(tmp_path, monkeypatch):
    name = f"hpckv-{os.getuid()}"
    for place, mode in (("job.17", 0o700), ("job.16", 0o700), ("job.15", 0o777), ("work", 0o700)):
        (tmp_path / place / name).mkdir(parents=True)
        (tmp_path / place / name).chmod(mode)
    (tmp_path / "job.14").mkdir()
    (tmp_path / "job.14" / name).symlink_to(tmp_path / "work" / name)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert set(left_folders(tmp_path / "job.17", "hpckv")) == {tmp_path / "job.17" / name, tmp_path / "job.16" / name}
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert list(left_folders(tmp_path / "job.17", "hpckv")) == [tmp_path / "job.17" / name]


@pytest.mark.root
def test_folders_of_another_user_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    for place in ("17", "16", "15"):
        (tmp_path / place / f"hpckv-{os.getuid()}").mkdir(parents=True, mode=0o700)
    os.chown(tmp_path / "16", 12345, -1)
    os.chown(tmp_path / "15" / f"hpckv-{os.getuid()}", 12345, -1)
    assert list(left_folders(tmp_path / "17", "hpckv")) == [tmp_path / "17" / f"hpckv-{os.getuid()}"]
