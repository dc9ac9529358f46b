"""Quotas as `lfs quota` and `quota` print them, and what `hpckv doctor` says of them."""

import os
from pathlib import Path

import pytest

from hpckv.launch import doctor_quota
from hpckv.launch.doctor_quota import Quota, examine_quota, read_quotas
from hpckv.launch.finding import Clock, Verdict
from hpckv.store.local_disk import Mount

LUSTRE = Mount("/lustre", "lustre", "10.0.0.1@o2ib:/lfs")
NFS = Mount("/home", "nfs4", "server:/export/home")

LFS = """\
Disk quotas for grp gk77 (gid 1077):
     Filesystem  kbytes   quota   limit   grace   files   quota   limit   grace
        /lustre 943718400* 921600000 1073741824 6d23h59m  120000       0 1000000       -
"""
LFS_WRAPPED = """\
Disk quotas for grp 1077 (gid 1077):
     Filesystem  kbytes   quota   limit   grace   files   quota   limit   grace
/lustre/projects/gk77/with/a/long/name
                [1024]       0    4096       -      10       0       0       -
Some errors happened when getting quota info. Some devices may be not working or deactivated. The data in "[]" is inaccurate.
"""
QUOTA = """\
Disk quotas for group users (gid 100): none
Disk quotas for group chem (gid 2000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
/dev/sda1           40000   50000   60000            1200       0       0
server:/export/home
                     1000       0       0            9500    9000   10000   6days
"""


@pytest.mark.parametrize(
    ("text", "gid", "mount", "found"),
    [
        (LFS, 1077, LUSTRE, [Quota("group gk77", 943718400 * 1024, 921600000 * 1024, 120000, 1000000)]),
        (LFS_WRAPPED, 1077, LUSTRE, [Quota("group 1077", 1024 * 1024, 4096 * 1024, 10, 0)]),
        (QUOTA, 2000, NFS, [Quota("group chem", 1000 * 1024, 0, 9500, 9000)]),
        (QUOTA, 2000, Mount("/", "ext4", "/dev/sda1"), [Quota("group chem", 40000 * 1024, 50000 * 1024, 1200, 0)]),
        (QUOTA, 2000, Mount("/scratch", "xfs", "/dev/sdb"), []),
        (QUOTA, 100, NFS, []),  # of a group that the folder does not belong to
        ("lfs quota: cannot resolve group", 1077, LUSTRE, []),
    ],
)
def test_what_the_programs_print_is_read(text, gid, mount, found):
    assert read_quotas(text, gid, mount) == found


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A folder that is all of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def program(folder: Path, name: str, does: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{does}\n")
    (folder / name).chmod(0o755)


def test_a_nearly_used_quota_is_a_warning_that_says_whose(tmp_path, programs):
    program(programs, "lfs", f'echo "$*" >>{tmp_path}/asked; printf %s {LFS!r}'.replace("\\n", "'$'\\n''"))
    found = examine_quota(Path("/lustre/kv"), 1077, LUSTRE, Clock(10))
    assert (found.verdict, found.found.count("group gk77: 900GiB of 878.9GiB, 120,000 of 1,000,000 files")) == (
        Verdict.WARN,
        2,
    )
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["quota -g 1077 /lustre/kv", f"quota -u {os.geteuid()} /lustre/kv"]


def test_without_programs_it_says_that_nobody_was_asked(programs):
    assert examine_quota(Path("/"), 0, NFS, Clock(10)).found == "not asked: no lfs, no quota here"
    found = examine_quota(Path("/lustre"), 5, LUSTRE, Clock(10))
    assert (found.verdict, found.found) == (Verdict.WARN, "not asked: no lfs here")
    assert "lfs quota -g 5 /lustre" in found.remedy


def test_a_program_that_hangs_is_given_up(programs, monkeypatch):
    monkeypatch.setattr(doctor_quota, "_PROGRAM_S", 0.2)
    program(programs, "quota", "exec /bin/sleep 600")
    found = examine_quota(Path("/"), 0, NFS, Clock(10))
    assert (found.verdict, found.found) == (Verdict.WARN, "quota -gQ gives no answer")
