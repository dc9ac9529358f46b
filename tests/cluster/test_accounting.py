"""The books close on a real cluster: every answer's tokens, the ledger, `acct` and `sacct`'s jobs agree; what does not is found.

Three users of two projects: a run, a colleague's that hits its blocks, an array of which a task is requeued, a run that is killed.
"""

import grp
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import hpckv
from hpckv.usage.ledger import LedgerFile
from hpckv.usage.record import Counters, Record
from hpckv.workload.job_comment import NOTHING_LEFT
from tests.cli.runs import answers, chat_lines
from tests.cluster.books import (
    Books,
    a_run,
    can_be_read_by_others,
    count_lines,
    kill_run,
    link_or_copy,
    make_store,
    run_hpckv,
    submit,
    tell_that_time_is_up,
    until,
)
from tests.cluster.site import TOP, Site

pytestmark = [pytest.mark.root, pytest.mark.slurm, pytest.mark.sharedfs, pytest.mark.timeout(1200)]

PARTS = ("device", "host", "local", "shared", "computed")
COLUMNS = (
    "JobID,User,Requests,PromptTok,OutTok,DeviceTok,HostTok,LocalTok,SharedTok,Computed,OwnTok,OthersTok,Start,End"
)


@pytest.fixture(scope="module")
def home(site: Site) -> Path:
    """A checkout on the shared filesystem, with an interpreter that every user can run, and no image."""
    packages = [Path(path) for path in sys.path if path.endswith("site-packages")]
    for number, path in enumerate(packages):
        if not can_be_read_by_others(path):  # a checkout in a folder of root's own
            packages[number] = site.cluster.folder / f"packages-{number}"
            shutil.copytree(path, packages[number], symlinks=True, copy_function=link_or_copy)
    python = Path(sys.base_prefix)
    if not can_be_read_by_others(python):  # root's own
        copy = site.cluster.folder / "python"
        leave_out = shutil.ignore_patterns("test", "tests", "__pycache__", "site-packages", "*.a", "share", "include")
        shutil.copytree(python, copy, symlinks=True, ignore=leave_out)
        python = copy
    home = site.shared / "hpckv-accounting"
    shutil.copytree(site.home, home)
    shutil.copytree(Path(hpckv.__file__).parent, home / "hpckv", ignore=shutil.ignore_patterns("__pycache__"))
    (home / ".venv" / "bin").mkdir(parents=True)
    program = home / ".venv" / "bin" / "hpckv"
    path = ":".join(map(str, [home, *packages]))
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    program.write_text(
        f"#!/bin/sh\nexport PYTHONHOME={python} LD_LIBRARY_PATH={python}/lib PYTHONPATH={path} PYTHONDONTWRITEBYTECODE=1\n"
        "export XDG_CACHE_HOME=$HOME/books\n"  # homes are other tests' too
        f'exec {python}/bin/{name} -m hpckv.cli.main "$@"\n'
    )
    program.chmod(0o755)
    copies = [path for path in (home, python) if path.is_relative_to(site.cluster.folder)]
    subprocess.run(["chmod", "-R", "a+rX", *copies], check=True)
    return home


@pytest.fixture(scope="module")
def model(site: Site, checkpoint) -> Path:
    folder = site.shared / "models" / "accounting"
    shutil.copytree(checkpoint("llama", tokenizer=True, num_key_value_heads=2), folder)
    for path in (folder.parent, folder, *folder.iterdir()):
        path.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def books(site: Site, home: Path, model: Path) -> Books:
    """A morning at the centre."""
    done = Books()
    vision, nlp = make_store(site, home, "alice"), make_store(site, home, "carol")
    done.stores = {"vision": vision, "nlp": nlp}

    run_file = a_run(site, "alice", "first", model, chat_lines(24), vision)
    alone = submit(site, "alice", "single_a100.sh", run_file)
    done.add("alice", run_file, alone)

    killed_file = a_run(site, "carol", "killed", model, chat_lines(160), nlp, 24, engine={"max_requests": 2})
    killed_output = killed_file.parent / "out" / "output.jsonl"
    killed = submit(site, "carol", "single_a100.sh", killed_file)
    until(lambda: count_lines(killed_output) >= 4, site)
    kill_run(killed)
    ((state, _),) = site.wait(killed)
    assert state == "FAILED", site.logs()
    killed_count = count_lines(killed_output)
    again = submit(site, "carol", "single_a100.sh", killed_file, HPCKV_RUN_DIR=str(killed_output.parent))
    done.add("carol", killed_file, killed, again)
    until(lambda: count_lines(killed_output) >= killed_count + 8, site)
    tell_that_time_is_up(site, "carol", again)
    assert site.wait(alone) == {("COMPLETED", "0:0")}, site.logs()

    run_file = a_run(site, "bob", "colleague", model, chat_lines(24), vision)
    colleague = submit(site, "bob", "single_a100.sh", run_file, "--comment=work package 7")
    done.add("bob", run_file, colleague)

    array_file = a_run(
        site, "alice", "array", model, chat_lines(240, heads=4), vision, 24,
        queue={"lease_s": 6, "items": 24}, engine={"max_requests": 2},
    )  # fmt: skip
    array = submit(site, "alice", "array_replicas.sh", array_file, "--array=0-1", HPCKV_CONTINUE="requeue")
    parts = array_file.parent / "out" / "queue" / "1" / "parts"
    until(lambda: sum(count_lines(path) > 3 for path in parts.glob("*.jsonl")) >= 2, site)
    tell_that_time_is_up(site, "alice", f"{array}_1")
    done.add("alice", array_file, f"{array}_0", f"{array}_1")
    for job in (again, colleague, array):
        assert {state for state, _ in site.wait(job)} == {"COMPLETED"}, site.logs()
    return done


def served(*folders: Path) -> Counter:
    usages = [body["usage"] for folder in folders for body in answers(folder).values()]
    for usage in usages:
        assert usage["prompt_tokens"] == sum(usage["hpckv"][part] for part in PARTS)
    sums = Counter({"Requests": len(usages)})
    for usage in usages:
        tokens = {
            "PromptTok": usage["prompt_tokens"],
            "OutTok": usage["completion_tokens"],
            "Computed": usage["hpckv"]["computed"],
        }
        sums.update(tokens | {f"{part.capitalize()}Tok": usage["hpckv"][part] for part in PARTS[:-1]})
    return +sums


def acct(site: Site, home: Path, who: str, store: Path, *arguments: object) -> list[dict]:
    done = run_hpckv(site, home, who, "acct", "--store", store, "-S", "now-1day", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["oddities"] == []
    return found["rows"]


def counted(rows: list[dict]) -> Counter:
    sums = Counter()
    for row in rows:
        sums.update({name: row[name] for name in served_names() if row.get(name)})
    return +sums


def served_names() -> tuple[str, ...]:
    return ("Requests", "PromptTok", "OutTok", "Computed", "DeviceTok", "HostTok", "LocalTok", "SharedTok")


def test_tokens_agree_by_job_by_user_and_in_all(site: Site, home, books: Books):
    for who, folders in books.runs.items():
        store = books.stores[site.people[who].project]
        rows = acct(site, home, who, store, "-o", COLUMNS)
        assert {row["User"] for row in rows} == {site.people[who].name}
        assert counted(rows) == served(*folders)
        for folder in folders:
            of_run = [row for row in rows if row["JobID"] in books.jobs[folder]]
            assert {row["JobID"] for row in of_run} == set(books.jobs[folder])
            assert counted(of_run) == served(folder)
            for row in of_run:
                assert row["PromptTok"] == sum(
                    row[name] for name in ("DeviceTok", "HostTok", "LocalTok", "SharedTok", "Computed")
                )
    everybody = acct(site, home, "bob", books.stores["vision"], "--group-by", "project", "-o", COLUMNS[11:])
    assert counted(everybody) == served(*books.runs["alice"], *books.runs["bob"])


def test_who_is_owed_is_who_wrote(site: Site, home, books: Books):
    """Bob asked what alice had asked: all that he loaded lies in segments that alice owns."""
    (row,) = acct(site, home, "bob", books.stores["vision"], "-o", COLUMNS)
    assert row["SharedTok"] == row["OthersTok"] > 0
    assert row["OwnTok"] == 0
    segments = books.stores["vision"].glob("u/*/seg/*/*.h5")
    assert {path.owner() for path in segments} == {site.people["alice"].name}
    owed = acct(site, home, "bob", books.stores["vision"], "--group-by", "writer")
    others = {row["Writer"]: row["ByOthers"] for row in owed if row["ByOthers"]}
    assert others == {site.people["alice"].name: row["SharedTok"]}
    bobs = acct(
        site, home, "bob", books.stores["vision"], "--group-by", "user", "-o", "User,OwnTok,OthersTok,SharedTok"
    )
    assert all(row["OwnTok"] + row["OthersTok"] == row["SharedTok"] for row in bobs)


def reconcile(site: Site, home: Path, who: str, store: Path, *arguments: object) -> tuple[int, dict]:
    done = run_hpckv(site, home, who, "acct", "--store", store, "--reconcile", "-S", "now-1day", "--json", *arguments)
    assert done.returncode in (0, 3), done.stderr + site.logs()
    return done.returncode, json.loads(done.stdout)


def kinds(found: dict) -> Counter:
    return Counter((finding["kind"], finding["job_id"]) for finding in found["findings"])


def test_jobs_agree_with_sacct_to_the_second(site: Site, home, books: Books):
    """Slurm's time of a start is the time before its engine, the ledger's, and the time after it."""
    for who, folders in books.runs.items():
        store = books.stores[site.people[who].project]
        jobs = {job for folder in folders for job in books.jobs[folder]}
        _, found = reconcile(site, home, who, store)
        starts = {(row["JobID"], row["Start#"]): row for row in found["rows"]}
        assert {job for job, _ in starts} == jobs
        ledger = {row["JobID"]: row for row in acct(site, home, who, store, "-o", COLUMNS)}
        for (job, start), row in starts.items():
            assert row["End"] - row["Start"] == row["Elapsed"]
            if row["Comment"] == NOTHING_LEFT:  # its neighbour had answered the rest
                assert (job, start) == (books.jobs[books.runs["alice"][1]][1], 1)
                continue
            assert row["Before"] >= 0
            assert row["After"] > -1  # sacct leaves the fraction of a second away
            if (job, start + 1) not in starts and start == 0:
                of_ledger = ledger[job]["End"] - ledger[job]["Start"]
                assert row["Before"] + of_ledger + row["After"] == pytest.approx(row["Elapsed"], abs=1e-3)
        # A GPU each, and these runs compute on CPUs: that is all there is to say of these jobs.
        unused = Counter(("unused_gpus", job) for (job, _), row in starts.items() if row["Comment"] != NOTHING_LEFT)
        assert kinds(found) == unused
        assert all(row["Alloc"] == row["Elapsed"] for row in starts.values())


def test_a_requeued_task_has_two_starts_and_its_neighbour_one(site: Site, home, books: Books):
    _, found = reconcile(site, home, "alice", books.stores["vision"])
    array = books.jobs[books.runs["alice"][1]]
    starts = {job: [row for row in found["rows"] if row["JobID"] == job] for job in array}
    assert [len(rows) for rows in starts.values()] == [1, 2]
    assert [(row["Start#"], row["State"]) for row in starts[array[1]]] == [(0, "REQUEUED"), (1, "COMPLETED")]
    _, again = books.jobs[books.runs["carol"][0]]
    _, found = reconcile(site, home, "carol", books.stores["nlp"])
    rows = [row for row in found["rows"] if row["JobID"] == again]
    assert [(row["Start#"], row["State"]) for row in rows] == [(0, "REQUEUED"), (1, "COMPLETED")]
    assert all(row["Before"] is not None for row in rows)  # each has its ledger


def test_plain_sacct_shows_what_each_start_did(site: Site, home, books: Books):
    def comments(who: str, job: str) -> list[str]:
        done = site.run(who, "sacct", "-D", "-X", "-n", "-P", "-j", job, "-o", "Comment")
        return [line for line in done.stdout.splitlines() if line]

    (first,) = books.jobs[books.runs["alice"][0]]
    sums = served(books.runs["alice"][0])
    hits = sums["PromptTok"] - sums["Computed"]
    (said,) = comments("alice", first)
    assert f"hit={100 * hits / sums['PromptTok']:.1f}% hits={hits} computed={sums['Computed']} saved=" in said
    assert said.startswith("hpckv ")
    (colleague,) = books.jobs[books.runs["bob"][0]]
    assert comments("bob", colleague) == ["work package 7"]
    array = books.runs["alice"][1]
    each = [line for job in books.jobs[array] for line in comments("alice", job)]
    assert len(each) == 3
    parts = [dict(word.partition("=")[::2] for word in line.split()[1:]) for line in each if line != NOTHING_LEFT]
    total = served(array)
    assert sum(int(part["computed"]) for part in parts) == total["Computed"]
    assert sum(int(part["hits"]) for part in parts) == total["PromptTok"] - total["Computed"]
    killed, again = books.jobs[books.runs["carol"][0]]
    assert comments("carol", killed) == []
    each = [line for line in comments("carol", again) if line.startswith("hpckv hit=")]
    assert len(each) == 2
    assert each[0] != each[1]


def test_what_is_in_one_book_only_is_found(site: Site, home, books: Books):
    alice, store = site.people["alice"], books.stores["vision"]
    _, before = reconcile(site, home, "alice", store)
    command = ["srun", "--account=vision", "--partition=all", "--mem=100M", "--job-name=hpckv-run", "sleep", "1"]
    assert site.run("alice", *command).returncode == 0
    refused = [
        "srun",
        "--account=vision",
        "--partition=all",
        "--mem=100M",
        "--job-name=hpckv-run",
        "sh",
        "-c",
        "exit 66",
    ]
    assert site.run("alice", *refused).returncode == 66
    planted = store / "u" / str(alice.home.stat().st_uid) / "ledger"
    pattern = Record.of_this_process(environ={"SLURM_JOB_ID": "999999", "SLURM_CLUSTER_NAME": "hpckv"})
    pattern.uid, pattern.user = planted.stat().st_uid, alice.name
    file = LedgerFile(planted, pattern, lambda path: path.mkdir(exist_ok=True))
    file.append(Counters(requests=1, prompt_tokens=8, computed_tokens=8))
    file.close()
    shutil.chown(file.path, alice.name, alice.group)
    new: Counter = Counter()

    def is_found() -> bool:
        nonlocal new
        code, found = reconcile(site, home, "alice", store)
        new = kinds(found) - kinds(before)
        return code == 3 and len(new) >= 2

    until(is_found, site, 60)
    assert new.pop(("not_in_sacct", "999999")) == 1
    assert [kind for kind, _ in new] == ["not_in_ledger"]
    done = run_hpckv(site, home, "alice", "acct", "--store", store, "--reconcile", "-S", "now-1day")
    assert done.returncode == 3
    assert "999999: start 0, " in done.stdout
    assert "COMPLETED, 1 s, is in sacct and not in the ledger" in done.stdout or "COMPLETED, 2 s, is in" in done.stdout
    file.path.unlink()


def test_a_member_sees_the_project_and_another_project_nothing(site: Site, home, books: Books):
    store = books.stores["vision"]
    own = acct(site, home, "bob", store)
    assert {row["User"] for row in own} == {site.people["bob"].name}
    everybody = acct(site, home, "bob", store, "-a")
    assert {row["User"] for row in everybody} == {site.people[who].name for who in ("alice", "bob")}
    for flags in (("-a",), (), ("--group-by", "user"), ("--reconcile",), ("--disk",), ("--prom", "x.prom")):
        asked = run_hpckv(site, home, "carol", "acct", "--store", store, "-S", "now-1day", *flags)
        assert (asked.returncode, asked.stdout) == (77, ""), (flags, asked.stderr)
    assert grp.getgrnam(site.people["alice"].group).gr_mem


def test_everybody_s_jobs_agree_for_the_project_s_owner(site: Site, home, books: Books):
    """Carol's are hpckv's too, and sacct shows them: her project has another ledger."""
    _, found = reconcile(site, home, "alice", books.stores["vision"], "-a")
    assert {row["User"] for row in found["rows"]} == {site.people[who].name for who in ("alice", "bob")}
    assert "not_in_sacct" not in {finding["kind"] for finding in found["findings"]}


def test_where_sacct_is_closed_it_is_one_sentence(site: Site, home, books: Books):
    store = books.stores["vision"]
    asked = [home / ".venv" / "bin" / "hpckv", "acct", "--store", store, "--reconcile"]
    conf = (site.cluster.folder / "slurm.conf").read_text()
    without = site.cluster.folder / "without-accounting.conf"
    without.write_text(conf.replace("accounting_storage/slurmdbd", "accounting_storage/none"))
    for setting in ("PATH=/nowhere", f"SLURM_CONF={without}"):
        done = site.run("alice", "env", setting, *asked)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (69, "", 1), done.stderr
        assert done.stderr.startswith("hpckv: sacct")


def test_names_and_comments_are_read_whatever_is_in_them(site: Site):
    hostile = "a|b\n1|2|3\x1f\nhpckv-run|COMPLETED"
    command = [
        "srun",
        "--account=vision",
        "--partition=all",
        "--mem=100M",
        f"--comment={hostile}",
        f"--job-name={hostile}",
        "true",
    ]
    assert site.run("alice", *command).returncode == 0
    window, uid = f"{time.time() - 600}, {time.time() + 60}", site.people["alice"].home.stat().st_uid
    program = (
        "import json; from hpckv.launch.sacct import starts_between, cluster_name; "
        f"print(json.dumps([cluster_name(), [vars(start) for start in starts_between({window}, [{uid}])]]))"
    )

    def rows() -> list[dict]:
        done = site.cluster.run(sys.executable, "-c", program, cwd=TOP)
        assert done.returncode == 0, done.stderr
        cluster, found = json.loads(done.stdout)
        assert cluster == "hpckv"
        return found

    until(lambda: any(row["comment"] == hostile for row in rows()), site, 60)
    (row,) = [row for row in rows() if row["comment"] == hostile]
    assert row["job"].isdecimal()
    assert (row["cluster"], row["user"], row["is_ours"]) == ("hpckv", site.people["alice"].name, False)
