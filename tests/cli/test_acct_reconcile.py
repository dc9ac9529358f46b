"""`hpckv acct --reconcile` as a command, with programs in Slurm's place. What real Slurm says is in tests/cluster."""

import json
import os
import time
from pathlib import Path

import pytest

from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.usage.ledger import LedgerFile
from hpckv.usage.record import Counters, Record
from tests.cli.runs import hpckv

NOW = float(int(time.time()))
FIELDS = [
    *("JobIDRaw", "JobID", "JobName", "Cluster", "UID", "User", "Account", "Partition", "QOS", "State", "ExitCode"),
    *("Start", "End", "ElapsedRaw", "AllocTRES", "ConsumedEnergyRaw", "Comment"),
]
_SACCT = """#!{python}
import json, sys
arguments, rows = sys.argv[1:], json.load(open({rows!r}))
if "--helpformat" in arguments:
    print(" ".join({fields!r}))
    sys.exit()
json.dump([*json.load(open({calls!r})), arguments], open({calls!r}, "w"))
mark = next(a.partition("=")[2] for a in arguments if a.startswith("--delimiter="))
asked = arguments[arguments.index("-o") + 1].split(",")
for row in rows:
    print("".join(str(row.get(name, "")) + mark for name in asked))
"""


class Place:
    """A store with a job of ten minutes in its ledger, and a Slurm that says what it is told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = StoreRoot.create(folder / "store", StorePolicy.new())
        (folder / "bin").mkdir()
        (folder / "calls").write_text("[]")
        self.rows: list[dict] = []
        self.program("scontrol", "#!/bin/sh\necho 'ClusterName             = east'\n")

    def program(self, name: str, text: str) -> None:
        (self.folder / "bin" / name).write_text(text)
        (self.folder / "bin" / name).chmod(0o755)

    def work(self, job: str, *, t0: float = NOW - 570, t1: float = NOW - 10, **more) -> None:
        environ = {"SLURM_JOB_ID": job, "SLURM_CLUSTER_NAME": "east", "SLURM_JOB_ACCOUNT": "vision"}
        pattern = Record.of_this_process(environ=environ, gpu="NVIDIA H100", **more)
        make = lambda path: path.mkdir(parents=True, exist_ok=True)  # noqa: E731
        file = LedgerFile(self.store.layout.ledger(os.getuid()), pattern, make, now=t0)
        file.append(Counters(requests=1, prompt_tokens=8, computed_tokens=8, gpu_s=t1 - t0), now=t1)
        file.close()

    def job(self, job: str, *steps: str, **more) -> None:
        whole = {
            "JobIDRaw": job, "JobID": job, "JobName": "x", "Cluster": "east", "UID": os.getuid(), "User": "me",
            "Account": "vision", "State": "COMPLETED", "ExitCode": "0:0", "Start": int(NOW - 600), "End": int(NOW),
            "ElapsedRaw": 600, "AllocTRES": "billing=1,cpu=1,gres/gpu=1,gres/gpu:h100=1,node=1",
        }  # fmt: skip
        self.rows.append({**whole, **more})
        for number, step in enumerate(steps):
            self.rows.append({"JobIDRaw": f"{job}.{number}", "JobName": step, "UID": "", "Start": "Unknown"})

    def ask(self, *arguments, fields=FIELDS):
        (self.folder / "rows").write_text(json.dumps(self.rows))
        names = {"rows": str(self.folder / "rows"), "calls": str(self.folder / "calls"), "fields": list(fields)}
        if not (self.folder / "bin" / "sacct").exists():
            self.program("sacct", _SACCT.format(python="/usr/bin/env python3", **names))
        environ = {**os.environ, "PATH": f"{self.folder}/bin:{os.environ['PATH']}"}
        return hpckv(
            "acct", "--store", self.store.layout.root, "--reconcile", "-S", "now-1day", *arguments, env=environ
        )

    @property
    def calls(self) -> list[list[str]]:
        return json.loads((self.folder / "calls").read_text())


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def test_when_all_agrees_the_exit_code_is_0(place):
    place.work("7")
    place.job("7", "hpckv-run")
    place.job("8", "python")  # somebody's own
    done = place.ask()
    assert (done.returncode, done.stderr) == (0, "")
    header, _, line, unknown, last = done.stdout.splitlines()
    assert header.split() == [
        "JobID",
        "Start#",
        "User",
        "Account",
        "State",
        "Elapsed",
        "GPUs",
        "Alloc",
        "Used",
        "Idle%",
    ]
    assert line.split() == ["7", "0", "me", "vision", "COMPLETED", "00:10:00", "1", "00:10:00", "00:09:20", "6.7"]
    assert unknown == "not compared: 1 that have a model or a device whose largest speed is not known"
    assert last == "1 of 1 starts are in the ledger; 0 findings"


def test_what_does_not_agree_is_named_and_the_exit_code_is_3(place):
    place.work("9")
    place.job("7", "hpckv-run", State="NODE_FAIL")
    place.job("7", "hpckv-run", Start=int(NOW - 6000), End=int(NOW - 5000), State="CANCELLED by 0")
    done = place.ask()
    assert done.returncode == 3
    said = done.stdout.splitlines()[6:]
    assert said[0] == "7: start 1 ended NODE_FAIL"
    assert said[1].startswith("9: start 0, ")
    assert said[2] == "7: start 0, CANCELLED, 600 s, is in sacct and not in the ledger"
    assert said[3] == "7: start 1, NODE_FAIL, 600 s, is in sacct and not in the ledger"
    assert said[4] == "0 of 2 starts are in the ledger; 3 findings"
    found = json.loads(place.ask("--json").stdout)
    assert [(finding["kind"], finding["job_id"]) for finding in found["findings"]] == [
        ("not_in_sacct", "9"),
        ("not_in_ledger", "7"),
        ("not_in_ledger", "7"),
    ]
    assert [row["State"] for row in found["rows"]] == ["CANCELLED", "NODE_FAIL"]


@pytest.mark.parametrize(
    ("tres", "gpus"),
    [
        ("cpu=1,gres/gpu:a100=1,gres/gpu:h100=3,node=1", 4),  # tracked by kind alone
        ("cpu=1,gres/gpu:h100=1,gres/gpu=2,node=1", 2),  # of which kind the other is was not asked
        ("billing=1,cpu=1,gres/gpumem=80G,node=1", 0),
    ],
)
def test_gpus_are_counted_as_the_site_tracks_them(place, tres, gpus):
    place.work("7", num_gpus=max(1, gpus))
    place.job("7", "hpckv-run", AllocTRES=tres)
    done = place.ask("-o", "GPUs")
    assert (done.returncode, done.stdout.split()[2]) == (0, str(gpus))
    untracked = "not compared: 1 that used GPUs and have none in sacct: AccountingStorageTRES may lack gres/gpu\n"
    assert (untracked in done.stdout) == (gpus == 0)
    assert json.loads(place.ask("--json").stdout)["not_compared"]["gpus_untracked"] == (gpus == 0)


def test_slurm_is_asked_about_oneself_everybody_or_some_jobs(place):
    place.work("7")
    place.job("7", "hpckv")
    assert place.ask().returncode == 0
    assert place.ask("-a").returncode == 0
    assert place.ask("-j", "7").returncode == 0
    own, everybody, one = place.calls
    for call in (own, everybody):  # a private store is used by one: nobody else's jobs can be in its ledger
        assert call[call.index("-u") + 1] == str(os.getuid())
        assert "-a" not in call
    assert one[one.index("-j") + 1] == "7"
    assert "-S" not in one
    assert len({next(a for a in call if a.startswith("--delimiter")) for call in place.calls}) == 3


def test_a_slurm_that_counts_restarts_is_believed(place):
    place.job("7", "hpckv-run", Restarts=3)
    done = place.ask(fields=[*FIELDS, "Restarts"])
    assert "7: start 3, COMPLETED, 600 s, is in sacct and not in the ledger" in done.stdout


@pytest.mark.parametrize(
    ("program", "what"),
    [
        ("#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2; exit 1\n", "cannot be used: Slurm accounting"),
        ("#!/bin/sh\nexit 5\n", "cannot be used: exit code 5"),
    ],
)
def test_a_sacct_that_is_closed_is_one_sentence(place, program, what):
    place.work("7")
    place.program("sacct", program)
    done = place.ask()
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (69, "", 1)
    assert what in done.stderr


def test_a_run_directory_says_which_jobs_are_its_own(place):
    place.job("7", "python")
    assert place.ask().returncode == 0
    logs = place.folder / "run" / "logs"
    logs.mkdir(parents=True)
    start = {"time": NOW, "host": "a", "pid": 1, "requests": 1, "job": "7"}
    (logs / "starts.jsonl").write_text(json.dumps(start) + "\n")
    done = place.ask("--run", place.folder / "run")
    assert (done.returncode, "7: start 0, COMPLETED" in done.stdout) == (3, True)


def test_columns_and_machine_readable_forms(place):
    place.work("7")
    place.job("7", "hpckv-run", ConsumedEnergyRaw="90000")
    done = place.ask("-P", "-o", "jobid,before,after,nodeenergy,energy")
    assert done.stdout.splitlines() == ["JobID|Before|After|NodeEnergy|Energy", "7|00:00:30|00:00:10|90000|"]
    assert "1 of 1 starts are in the ledger" in done.stderr
    assert place.ask("-o", "nix").returncode == 64
    assert "AllocTRES" in hpckv("acct", "--reconcile", "-e").stdout


@pytest.mark.parametrize(
    "flags", [("--model", "m"), ("--project", "p"), ("--group-by", "user"), ("--disk",), ("--rollup",)]
)
def test_what_does_not_go_with_it_is_said(place, flags):
    done = place.ask(*flags)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (64, "", 1)
