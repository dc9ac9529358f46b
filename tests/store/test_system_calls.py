"""What the shared filesystem's servers feel of a reader: nothing when it looks up, a few calls a user when it refreshes."""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.store import lookups
from tests.store.shared_store import put
from tests.store.users import MEMBER, OTHER, OWNER, as_user


def traced(folder: Path, store: Path) -> dict[str, list[str]]:
    """By phase: the reader's system calls, of all its threads, that name the store or a descriptor of something in it."""
    trace = folder / "trace"
    # All calls that take a path or a descriptor; -y names what each descriptor stands for.
    strace = ["strace", "-f", "-y", "--seccomp-bpf", "-e", "trace=%file,%desc", "-o", str(trace)]
    command = [*strace, sys.executable, "-m", lookups.__spec__.name, str(store)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    calls, phase = defaultdict[str, list[str]](list), "opening"
    for line in trace.read_text(errors="replace").splitlines():
        if found := re.search(re.escape(lookups.MARK) + r'([^"]*)', line):
            phase = found[1]
        elif str(store) in line and "resumed>" not in line:
            calls[phase].append(line)
    return calls


def make_store(store: Path, num_segments: int) -> None:
    size = 100 // num_segments
    for first in range(0, 100, size):
        put(store, range(first, first + size), local="none")


@pytest.mark.parametrize("num_segments", [2, 10])
def test_a_look_up_makes_no_system_call_on_the_store_and_a_refresh_a_few(tmp_path, num_segments):
    make_store(tmp_path / "kv", num_segments)
    calls = traced(tmp_path, tmp_path / "kv")
    assert calls["hits"] == []
    assert calls["misses"] == []
    assert len(calls["end"]) > 3, "or nothing was seen"
    # The list of users, and of this one the folder and its segments' folder.
    for phase in ("refresh", "refresh again"):
        assert len(calls[phase]) <= 10, calls[phase]
    assert len(calls["refresh again"]) == len(calls["refresh"])


@pytest.mark.root
def test_a_refresh_costs_two_calls_more_for_each_user(store, tmp_path):
    counts = []
    for users in ([OWNER], [MEMBER, OTHER]):
        for uid in users:
            as_user(
                uid, lambda uid=uid: put(store, range(1000 * (uid - OWNER), 1000 * (uid - OWNER) + 100), local="none")
            )
        counts.append(len(traced(tmp_path, store)["refresh again"]))
    assert counts[1] - counts[0] == 2 * 2, counts
