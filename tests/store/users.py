"""Real users for tests: run a function in a child process under another uid, gid and groups."""

import ctypes
import encodings.unicode_escape  # noqa: F401 - users cannot read an interpreter that is root's, so nothing may be missing
import json
import os
import traceback
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

PROJECT, OUTSIDE = 62001, 62002
OWNER, MEMBER, OTHER, STRANGER = 61001, 61002, 61003, 61004
_CLONE_NEWUSER, _PR_SET_DUMPABLE = 0x10000000, 4
GROUPS = {OWNER: [PROJECT], MEMBER: [PROJECT], OTHER: [PROJECT], STRANGER: [OUTSIDE]}


def as_user(uid: int, work: Callable[[], object]) -> object:
    """What `work()` returns (as JSON) in a process of user `uid`; raises `AssertionError` with its traceback."""
    return start_as(uid, work)()


def as_contained_user(uid: int, work: Callable[[], object]) -> object:
    """The same where Apptainer runs without setuid: a user namespace that knows this user and a group of their own, nobody else."""

    def inside() -> object:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_DUMPABLE, 1)  # who has changed their uid may not write to /proc/self otherwise
        if libc.unshare(_CLONE_NEWUSER):
            raise OSError(ctypes.get_errno(), "no user namespaces")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/gid_map").write_text(f"{uid} {uid} 1")
        return work()

    return start_as(uid, inside, gid=uid)()


def start_as(uid: int, work: Callable[[], object], *, gid: int | None = None) -> Callable[[], object]:
    """The same, at once: returns a function that waits for the answer. `gid` is another first group than the project's."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read_end)
            os.setgroups(GROUPS[uid])
            os.setgid(GROUPS[uid][0] if gid is None else gid)
            os.setuid(uid)
            os.umask(0o077)  # the strictest a user may have
            answer = {"value": work()}
        except BaseException:  # noqa: BLE001 - told to the parent
            answer = {"error": traceback.format_exc()}
        with os.fdopen(write_end, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(write_end)

    def wait() -> object:
        with os.fdopen(read_end) as pipe:
            answer = json.load(pipe)
        os.waitpid(child, 0)
        assert "error" not in answer, answer["error"]
        return answer["value"]

    return wait


def reachable(folder: Path) -> Path:
    """Let every user pass through a temporary folder's parents."""
    for part in (folder, *folder.parents):
        if part.is_relative_to("/tmp") and part != Path("/tmp"):
            part.chmod(part.stat().st_mode | 0o011)
    return folder


def successes(attempts: Mapping[str, Callable[[], object]]) -> list[str]:
    """The names of those attempts that the system does not refuse."""
    done = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except OSError:
            continue
        done.append(name)
    return done


def readable(paths: Iterable[Path]) -> list[str]:
    """Those of the files and folders that can be looked into."""

    def look(path: Path) -> object:
        return os.scandir(path) if path.is_dir() else path.read_bytes()

    return successes({str(path): partial(look, path) for path in paths})
