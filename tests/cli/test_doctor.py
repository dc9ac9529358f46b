"""What `hpckv doctor` finds, here and, by tables, on machines that are not here."""

import json
import shutil
import socket
import subprocess
import sys
import threading

import pytest

from hpckv.launch import doctor
from hpckv.launch.doctor import judge_torch
from hpckv.launch.finding import Verdict
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
    assert done.stdout.count("\n") == 1, "several nodes' rows stay apart"
    rows = json.loads(done.stdout)
    host = socket.gethostname().partition(".")[0]
    assert {row["host"] for row in rows} == {host}
    found = {row["matter"]: row for row in rows}
    assert found["MPI"]["verdict"] == "PASS"
    assert str(tmp_path) in found["filesystem"]["found"]
    assert {"guarantees", "space", "quota", "group", "local disk"} < found.keys()
    assert all(one["remedy"] for one in found.values() if one["verdict"] != "PASS")
    assert list(tmp_path.iterdir()) == []
    table = hpckv("doctor", tmp_path).stdout
    assert "PASS  MPI" in table
    assert all(line.startswith(f"{host}  ") for line in table.splitlines()), "also a remedy tells its node"


def test_programs_that_all_hang_hold_nothing_up_and_are_ended(monkeypatch, tmp_path):
    for name in ("python", "mpiexec", "sbatch", "srun", "sinfo", "sacct", "apptainer", "quota"):
        (tmp_path / name).write_text(f"#!/bin/bash\necho $$ >>{tmp_path}/pids\n/bin/sleep 600\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    found = {one.matter: one for one in doctor.examine(tmp_path, limit_s=2.0)}
    for matter in ("GPU", "MPI", "srun's MPI", "Slurm", "sacct", "container", "quota"):
        assert "no answer" in found[matter].found
        assert found[matter].remedy
    assert found["filesystem"].verdict is Verdict.PASS
    for pid in (tmp_path / "pids").read_text().split():
        left = subprocess.run(["/bin/ps", "-g", pid, "-o", "args="], capture_output=True, text=True)
        assert "sleep 600" not in left.stdout


def test_a_look_that_hangs_in_the_kernel_is_a_finding_at_the_limit(monkeypatch, tmp_path):
    forever = threading.Event()
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: forever.wait() and None if name == "srun" else which(name))
    monkeypatch.setattr(doctor, "_GRACE_S", 0.0)
    found = {one.matter: one for one in doctor.examine(tmp_path, limit_s=1.0)}
    forever.set()
    assert (found["srun's MPI"].verdict, found["srun's MPI"].found) == (Verdict.FAIL, "no answer in 1 s")
    assert doctor.LIMIT_S < 60


def test_a_mistake_of_its_own_is_not_hidden(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_limits", lambda: [1 / 0])
    with pytest.raises(ZeroDivisionError):
        list(doctor.examine(tmp_path, limit_s=0.0))
