"""What `hpckv doctor` finds, here and, by tables, on machines that are not here."""

import json
import os
import stat
from pathlib import Path

import pytest

from hpckv.launch import doctor
from hpckv.launch.doctor import Verdict, judge_torch
from tests.cli.runs import hpckv

CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("gpus", "architectures", "has_driver", "built_for", "verdict", "said"),
    [
        ([["V100", 7, 0]], CU126, True, "12.6", Verdict.PASS, "1 x V100 (sm_70)"),
        ([["V100", 7, 0]], CU130, True, "13.0", Verdict.FAIL, "has no code for sm_70"),
        ([["A100", 8, 0]] * 4, CU130, True, "13.0", Verdict.PASS, "4 x A100 (sm_80)"),
        ([["H100", 9, 0]], ["sm_90a"], True, "13.0", Verdict.PASS, "H100"),
        ([["L40", 8, 9]], ["sm_80"], True, "13.0", Verdict.PASS, "L40"),  # of its generation
        ([["new", 13, 0]], CU130, True, "13.0", Verdict.PASS, "new"),  # compiled by the driver
        ([["A100", 8, 0]], ["sm_86"], True, "13.0", Verdict.FAIL, "sm_80"),
        ([], [], True, "13.0", Verdict.FAIL, "sees no GPU, though there is a driver"),
        ([], [], True, None, Verdict.FAIL, "sees no GPU"),
        ([], [], False, None, Verdict.WARN, "no GPU on this machine"),
    ],
)
def test_gpus_are_judged_by_what_torch_was_built_for(gpus, architectures, has_driver, built_for, verdict, said):
    seen = {"version": "2.13.0", "built_for": built_for, "architectures": architectures, "gpus": gpus}
    found = judge_torch(seen, has_driver)
    assert found.verdict is verdict
    assert said in found.found
    assert bool(found.remedy) == (verdict is not Verdict.PASS)


def test_here_nothing_fails_and_nothing_is_left_behind(tmp_path):
    done = hpckv("doctor", tmp_path / "not" / "yet" / "there", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {one["matter"]: one for one in json.loads(done.stdout)}
    assert found["MPI"]["verdict"] == "PASS"
    assert str(tmp_path) in found["filesystem"]["found"]
    assert all(one["remedy"] for one in found.values() if one["verdict"] != "PASS")
    assert list(tmp_path.iterdir()) == []
    table = hpckv("doctor", tmp_path).stdout
    assert "PASS  MPI" in table


def test_a_folder_that_cannot_be_written_fails(monkeypatch, tmp_path):
    def no_links(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    (found,) = doctor._filesystem(tmp_path)
    assert found.verdict is Verdict.FAIL
    assert "Operation not permitted" in found.found
    assert list(tmp_path.iterdir()) == []


def test_a_filesystem_that_hangs_is_given_up(monkeypatch, tmp_path):
    import threading

    monkeypatch.setattr(doctor, "PATIENCE_S", 0.2)
    forever = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda fd: forever.wait())
    (found,) = doctor._filesystem(tmp_path)
    forever.set()
    assert (found.verdict, "no answer in 0.2 s" in found.found) == (Verdict.FAIL, True)


def test_a_umask_that_hides_files_from_the_group_is_said(tmp_path):
    tmp_path.chmod(0o2770)
    assert stat.S_IMODE(tmp_path.stat().st_mode) & 0o2000
    before = os.umask(0o077)
    try:
        assert doctor._group(tmp_path).verdict is Verdict.WARN
        os.umask(0o007)
        assert doctor._group(tmp_path).verdict is Verdict.PASS
    finally:
        os.umask(before)


def test_a_named_local_disk_that_is_not_there_fails(monkeypatch):
    monkeypatch.setenv("HPCKV_LOCAL", "/no/such/folder")
    found = doctor._local_disk(Path("/"))
    assert found.verdict is Verdict.FAIL
    assert "/no/such/folder" in found.found
