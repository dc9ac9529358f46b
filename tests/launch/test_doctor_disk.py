"""What `hpckv doctor` finds of a filesystem: by trying, and without waiting for one that hangs."""

import errno
import fcntl
import os
import shutil
import stat
import threading
from pathlib import Path

import pytest

from hpckv.launch import doctor_disk, finding
from hpckv.launch.finding import Clock, Verdict
from hpckv.store.local_disk import Mount

EXT4 = Mount("/", "ext4", "/dev/sda1")


def disks(folder) -> dict[str, finding.Finding]:
    return {one.matter: one for one in doctor_disk.examine_disks(folder, Clock(30), 0o022)}


def guarantees(folder, mount=EXT4) -> finding.Finding:
    found = doctor_disk._guarantees(folder, mount, Clock(30))
    assert list(folder.iterdir()) == []
    assert bool(found.remedy) == (found.verdict is not Verdict.PASS)
    return found


def fails(number: int):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_folder_that_cannot_be_written_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "link", fails(errno.EPERM))
    found = disks(tmp_path)
    assert list(found) == ["filesystem"]
    assert found["filesystem"].verdict is Verdict.FAIL
    assert "Operation not permitted" in found["filesystem"].found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["hpckv.launch.doctor_disk.mount_of", "pathlib.Path.is_dir", "os.fsync", "os.stat"])
def test_a_filesystem_that_hangs_fails_whichever_look_at_it_hangs(monkeypatch, tmp_path, call):
    monkeypatch.setattr(finding, "PATIENCE_S", 0.2)
    forever = threading.Event()
    with monkeypatch.context() as hanging:
        hanging.setattr(call, lambda *_, **__: forever.wait())
        (found,) = doctor_disk.examine_disks(tmp_path, Clock(30), 0o022)
    forever.set()
    assert (found.matter, found.verdict, found.found) == (
        "filesystem",
        Verdict.FAIL,
        f"{tmp_path}: no answer in 0.2 s",
    )


@pytest.mark.parametrize(
    ("call", "matter"),
    [
        ("os.statvfs", "space"),
        ("hpckv.launch.doctor_disk.find_local_folder", "local disk"),
        ("fcntl.flock", "guarantees"),
    ],
)
def test_a_later_look_that_hangs_fails_alone(monkeypatch, tmp_path, call, matter):
    monkeypatch.setattr(finding, "PATIENCE_S", 5.0)
    forever = threading.Event()
    with monkeypatch.context() as hanging:
        hanging.setattr(call, lambda *_, **__: forever.wait())
        found = disks(tmp_path)
    forever.set()
    assert [one.matter for one in found.values() if one.verdict is Verdict.FAIL] == [matter]
    assert "no answer in" in found[matter].found


def test_a_mount_whose_server_is_gone_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "is_dir", fails(errno.ESTALE))
    assert disks(tmp_path)["filesystem"].found == f"{tmp_path}: Stale file handle"


def test_what_holds_here_holds(tmp_path):
    assert guarantees(tmp_path).verdict is Verdict.PASS


def test_without_locks_it_says_what_runs_do_then(monkeypatch, tmp_path):
    monkeypatch.setattr(fcntl, "flock", fails(errno.ENOSYS))
    found = guarantees(tmp_path)
    assert found.verdict is Verdict.WARN
    assert "no flock (Function not implemented): hpckv run says so and passes" in found.found


def test_locks_that_keep_nobody_out_are_found_by_another_process(monkeypatch, tmp_path):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    found = guarantees(tmp_path)
    assert found.verdict is Verdict.WARN
    assert "flock keeps no other process out" in found.found


def test_locks_of_one_node_are_known_by_the_mount(tmp_path):
    found = guarantees(tmp_path, Mount("/lustre", "lustre", "fs", frozenset({"rw", "localflock"})))
    assert found.verdict is Verdict.WARN
    assert "flock holds on this node only (localflock)" in found.found


def test_a_create_that_is_not_exclusive_fails(monkeypatch, tmp_path):
    create = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *mode, **at: create(path, flags & ~os.O_EXCL, *mode, **at))
    found = guarantees(tmp_path)
    assert (found.verdict, "O_EXCL: two starts could both begin a file" in found.found) == (Verdict.FAIL, True)


def test_a_rename_that_changes_the_open_file_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "rename", shutil.copyfile)
    found = guarantees(tmp_path)
    assert (found.verdict, "rename over an open file" in found.found) == (Verdict.FAIL, True)


def test_a_sync_that_is_refused_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "fsync", fails(errno.EINVAL))
    found = guarantees(tmp_path)
    assert (found.verdict, "fsync: runs end with 73" in found.found) == (Verdict.FAIL, True)


def test_a_umask_that_hides_files_from_the_group_is_said(tmp_path):
    tmp_path.chmod(0o2770)
    assert stat.S_IMODE(tmp_path.stat().st_mode) & 0o2000
    assert doctor_disk._group(tmp_path, 0o077).verdict is Verdict.WARN
    assert doctor_disk._group(tmp_path, 0o007).verdict is Verdict.PASS


def test_a_named_local_disk_that_is_not_there_fails(monkeypatch):
    monkeypatch.setenv("HPCKV_LOCAL", "/no/such/folder")
    found = doctor_disk._local_disk(Path("/"))
    assert found.verdict is Verdict.FAIL
    assert "/no/such/folder" in found.found


def test_a_local_disk_that_takes_nothing_fails(monkeypatch, tmp_path):
    monkeypatch.setenv("HPCKV_LOCAL", str(tmp_path))
    monkeypatch.setattr(os, "fsync", fails(errno.ENOSPC))
    found = doctor_disk._local_disk(Path("/"))
    assert found.verdict is Verdict.FAIL
    assert "No space left on device" in found.found
    assert list(tmp_path.iterdir()) == []
