"""Jobs of `hpckv submit --executor local`: processes of one machine, found by what their submit folders say."""

from __future__ import annotations

import os
import platform
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpckv.launch.folder import LOCAL_JOB, read_codes
from hpckv.launch.slurm_jobs import JobState


@dataclass(frozen=True)
class LocalJob:
    """The process of submitit that started the ranks and waits for them."""

    folder: Path
    """The submit folder."""
    host: str
    pid: int

    @property
    def name(self) -> str:
        return f"{self.host}:{self.pid}"

    @property
    def is_alive(self) -> bool:
        """Whether it is there, if this is its machine; its number may be another process's by now."""
        if self.host != platform.node():
            return False
        try:
            words = Path(f"/proc/{self.pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return any(word.endswith(b"/" + os.fsencode(self.folder.name)) for word in words)

    @property
    def state(self) -> JobState:
        """In Slurm's words."""
        if self.is_alive:
            return JobState(self.name, "RUNNING", reason=self.host)
        codes = read_codes(self.folder)
        if not codes:
            return JobState(self.name, "UNKNOWN", reason=f"ask on {self.host}" if self.host != platform.node() else "")
        return JobState(
            self.name, "FAILED" if max(codes) else "COMPLETED", exit_code=f"{max(codes)}:0", reason=self.host
        )

    def cancel(self) -> str:
        """Have its ranks drain; why not, if they cannot be told."""
        try:
            os.kill(self.pid, signal.SIGTERM)  # submitit hands it on to every rank
        except OSError as error:
            return error.strerror or type(error).__name__
        return ""


def note_local_job(folder: Path, pid: int) -> None:
    """For those who look into the submit folder; raises `OSError`."""
    (folder / LOCAL_JOB).write_text(f"{platform.node()} {pid}\n")


def local_jobs(directory: Path) -> list[LocalJob]:
    """All that were submitted for a run directory, oldest first."""
    found = []
    for path in sorted(directory.glob(f"submit/*/{LOCAL_JOB}")):
        with suppress(OSError, ValueError):  # another user's folder, a torn file
            host, pid = path.read_text().split()
            found.append(LocalJob(path.parent, host, int(pid)))
    return found
