"""Finding the processes that a job's tasks are, on whichever node: nodes are hosts, but their processes are this kernel's."""

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path


def workers(**environ: str) -> list[int]:
    """Pids of `hpckv run` that were started with these variables."""
    wanted = {f"{name}={value}".encode() for name, value in environ.items()}
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            is_run = b"python" in words[0] and b"run" in words
            if is_run and wanted <= set((path / "environ").read_bytes().split(b"\0")):
                found.append(int(path.name))
    return found


def send(pids: Sequence[int], number: signal.Signals) -> None:
    """A signal to each; there must be some."""
    assert pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def has_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal has been sent to it that it has not taken yet."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("ShdPnd:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False
