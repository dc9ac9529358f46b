"""What lies in a run directory and in its submit folders, `RUN/submit/TIME-RANDOM/`, for whoever asks."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CONFIG, FLAGS = "config.yaml", "flags.json"
"""The resolved configuration, and flags of `hpckv run`."""
JOBS, REQUESTS = "jobs", "requests"
"""Numbers of its Slurm jobs, one a line; how many requests the run has."""
LOCAL_JOB = "local-job"
"""Host and number of the process that stands for them with `--executor local`."""


@dataclass(frozen=True)
class End:
    """What a start said when it ended."""

    code: int
    goes_on: str
    """`stop` if nothing goes on by itself, `requeue` or `chain`; `ended` from outside, and Slurm knows what comes then."""

    @property
    def is_last(self) -> bool:
        """Whether nothing goes on, whatever Slurm says."""
        return self.goes_on == "stop"


@dataclass(frozen=True)
class LastStart:
    """The newest start of an array task."""

    job: str
    """Its own number, which a task of an array has too."""
    end: End | None


def count_answers(run_folder: Path) -> int:
    """Complete lines of the output, also of what jobs that work together have not merged yet."""
    paths = [run_folder / "output.jsonl", *run_folder.glob("queue/*/parts/*.jsonl")]
    return sum(_count_lines(path) for path in paths if path.exists())


def submitted_jobs(directory: Path) -> list[str]:
    """Numbers of all Slurm jobs that were submitted for a run directory, oldest first."""
    found: list[str] = []
    for path in sorted(directory.glob(f"submit/*/{JOBS}")):
        with suppress(OSError):  # another user's folder
            found += path.read_text().split()
    return list(dict.fromkeys(found))


def submitted_requests(directory: Path) -> int:
    """How many requests the run has that was last submitted; 0 if none was."""
    for path in sorted(directory.glob(f"submit/*/{REQUESTS}"), reverse=True):
        with suppress(OSError):
            return int(path.read_text())
    return 0


def read_codes(folder: Path) -> list[int]:
    """Exit codes of the ranks of a local job, as far as they have ended."""
    return [int(text) for path in folder.glob("code-*") if (text := path.read_text().strip())]


def newest_job(folder: Path) -> str | None:
    """The last of a chain."""
    path = folder / JOBS
    jobs = path.read_text().split() if path.exists() else []
    return jobs[-1] if jobs else None


def last_starts(folder: Path) -> dict[int, LastStart]:
    """Of every array task that began; 0 is the task of a job that is no array."""
    newest: dict[int, Path] = {}
    for path in sorted((folder / "starts").glob("*")):
        newest[int(path.name.partition(".")[0])] = path
    return {index: LastStart(path.name.rpartition(".")[2], read_end(path)) for index, path in newest.items()}


def read_end(path: Path) -> End | None:
    """A start's last words; None while it goes on, or if it was killed."""
    words = path.read_text().splitlines()[-1:]
    parts = words[0].split() if words else []
    if len(parts) != 5 or parts[0] != "end":
        return None
    return End(int(parts[3]), parts[4])


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(part.count(b"\n") for part in iter(lambda: file.read(1 << 20), b""))
