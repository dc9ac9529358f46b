"""Who is shown what by `hpckv acct`, with real user ids: own jobs, everybody's sums and jobs - and outside of the group nothing."""

import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path

import pytest

from hpckv.cli.main import main
from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.usage.ledger import LedgerFile, month_of
from hpckv.usage.record import Counters, Record
from hpckv.usage.rollup import roll_up
from tests.store.users import GROUPS, MEMBER, OTHER, OWNER, PROJECT, STRANGER, as_user, reachable

pytestmark = pytest.mark.root

TOKENS = {OWNER: 1, MEMBER: 10, OTHER: 100}


def acct(uid: int, store: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `hpckv acct` as that user."""

    def ask() -> object:
        said, wrong = io.StringIO(), io.StringIO()
        sys.argv = ["hpckv", "acct", "--store", store, "-S", "now-1day", *arguments]
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong), pytest.raises(SystemExit) as ended:
            main()
        return [ended.value.code or 0, said.getvalue(), wrong.getvalue()]

    code, said, wrong = ask() if uid == 0 else as_user(uid, ask)
    return code, said, wrong


@pytest.fixture
def store(tmp_path) -> str:
    """Of a project, with a job of each member."""
    folder = reachable(tmp_path) / "shared"
    folder.mkdir()
    os.chown(folder, OWNER, PROJECT)
    folder.chmod(0o2770)

    def make() -> None:
        StoreRoot.create(folder / "store", StorePolicy.new(group=PROJECT))

    as_user(OWNER, make)
    for uid, tokens in TOKENS.items():
        as_user(uid, lambda uid=uid, tokens=tokens: work(folder / "store", uid, tokens))
    acct(0, str(folder / "store"), "-a", "-j", "1")  # users cannot read the interpreter: all modules are there now
    acct(0, str(folder / "store"), "--group-by", "user", "-o", "User,PromptTok")
    return str(folder / "store")


def work(store, uid: int, tokens: int) -> None:
    root = StoreRoot.open(store)
    folder = root.layout.ledger(os.getuid())
    root.make_own_folder(folder)
    pattern = Record.of_this_process(environ={"SLURM_JOB_ID": str(uid)}, project="vision")
    file = LedgerFile(folder, pattern, root.make_own_folder)
    file.append(Counters(requests=1, prompt_tokens=tokens, computed_tokens=tokens))
    file.close()


def rows(uid: int, store: str, *arguments: str) -> list[dict]:
    code, said, wrong = acct(uid, store, "--json", *arguments)
    assert (code, wrong) == (0, "")
    return json.loads(said)["rows"]


@pytest.mark.parametrize("uid", TOKENS)
def test_a_member_sees_own_jobs_and_everybody_s_if_asked(store, uid):
    assert [(row["JobID"], row["PromptTok"]) for row in rows(uid, store)] == [(str(uid), TOKENS[uid])]
    assert {row["JobID"]: row["PromptTok"] for row in rows(uid, store, "-a")} == {str(u): n for u, n in TOKENS.items()}


@pytest.mark.parametrize("uid", TOKENS)
def test_sums_are_everybody_s(store, uid):
    by_user = {row["PromptTok"] for row in rows(uid, store, "--group-by", "user", "-o", "User,PromptTok")}
    assert by_user == {1, 10, 100}
    assert rows(uid, store, "--group-by", "project", "-o", "Project,PromptTok") == [
        {"Project": "vision", "PromptTok": 111}
    ]


@pytest.mark.parametrize(
    "flags", [(), ("-a",), ("-u", str(MEMBER)), ("--group-by", "user"), ("--disk",), ("--prom", "x.prom")]
)
def test_outside_of_the_group_there_is_nothing(store, flags):
    code, said, wrong = acct(STRANGER, store, *flags)
    assert (code, said) == (77, "")
    assert wrong.count("\n") == 1


def test_who_has_left_the_group_sees_not_even_own_jobs(store, monkeypatch):
    monkeypatch.setitem(GROUPS, MEMBER, [62002])
    assert acct(MEMBER, store)[:2] == (77, "")
    assert acct(MEMBER, store, "-a")[:2] == (77, "")


def test_months_rolled_up_under_the_strictest_umask_are_everybody_s(store):
    month = month_of(time.time())

    def roll() -> object:
        return roll_up(StoreRoot.open(Path(store)), month)[0]

    assert as_user(OWNER, roll) == 3
    layout = StoreRoot.open(Path(store)).layout
    assert layout.rolled_up.stat().st_mode & 0o7777 == 0o2750
    layout.ledger(OTHER).rename(layout.user(OTHER) / "gone")
    by_user = rows(MEMBER, store, "--group-by", "user", "-o", "User,PromptTok")
    assert {row["PromptTok"] for row in by_user} == {1, 10, 100}


def test_of_one_s_own_jobs_nobody_else_s_ledger_is_read(store):
    (Path(store) / "u" / str(OTHER) / "ledger").chmod(0o700)
    assert [(row["JobID"], row["PromptTok"]) for row in rows(MEMBER, store)] == [(str(MEMBER), 10)]


@pytest.mark.parametrize("closed", ["", "ledger", "ledger/MONTH"])
def test_who_closes_the_own_folder_is_named_and_left_out(store, closed):
    folder = Path(store) / "u" / str(OTHER) / closed.replace("MONTH", month_of(time.time()))
    folder.chmod(0o700)
    code, said, wrong = acct(MEMBER, store, "--json", "--group-by", "user", "-o", "User,PromptTok")
    found = json.loads(said)
    assert code == 0
    assert {row["PromptTok"] for row in found["rows"]} == {1, 10}
    inside = folder if closed else folder / "ledger"
    assert found["oddities"] == [{"file": str(inside), "what": "left out: Permission denied"}]
    assert f"{inside}: left out: Permission denied" in wrong


def test_a_roll_up_that_members_may_not_see_is_named_and_its_month_s_files_are_read(store):
    as_user(OWNER, lambda: roll_up(StoreRoot.open(Path(store)), month_of(time.time()))[0])
    (Path(store) / "plan" / "ledger").chmod(0o700)
    code, said, _ = acct(MEMBER, store, "--json", "--group-by", "user", "-o", "User,PromptTok")
    found = json.loads(said)
    assert (code, {row["PromptTok"] for row in found["rows"]}) == (0, {1, 10, 100})
    assert [oddity["what"] for oddity in found["oddities"]] == ["left out: Permission denied"]


def test_a_private_store_s_ledger_is_its_owner_s(tmp_path):
    folder = reachable(tmp_path) / "own"
    folder.mkdir()
    os.chown(folder, MEMBER, PROJECT)

    def make() -> None:
        StoreRoot.create(folder / "store", StorePolicy.new())
        work(folder / "store", MEMBER, 5)

    as_user(MEMBER, make)
    acct(0, str(folder / "store"), "-a")
    assert [row["PromptTok"] for row in rows(MEMBER, str(folder / "store"))] == [5]
    assert acct(OTHER, str(folder / "store"), "-a")[:2] == (77, "")
