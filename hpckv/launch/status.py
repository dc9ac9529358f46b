"""Where a run stands, from what lies in its directory and what Slurm knows of its jobs. No torch."""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from hpckv.errors import MissingInputError
from hpckv.launch.folder import submitted_jobs, submitted_requests
from hpckv.launch.local_jobs import local_jobs
from hpckv.launch.slurm_jobs import JobState, job_states
from hpckv.workload.queue import open_parts
from hpckv.workload.starts import Start, read_starts

_RATE_S = 600
"""The rate is that of the answers of so many seconds before the last one."""


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    cache_read_input_tokens: int = 0


class _Body(msgspec.Struct):
    created: int
    usage: _Usage


class _Response(msgspec.Struct):
    body: _Body


class _Line(msgspec.Struct):
    custom_id: str
    response: _Response


@dataclass
class RunStatus:
    """For `hpckv status`."""

    directory: str
    state: str
    """`done`, `running`, `pending`, or `stopped` with requests left."""
    requests: int
    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    tokens_per_s: float = 0.0
    """Prompt and output tokens, lately."""
    seconds_left: float | None = None
    """By the rate at which answers came lately; only while it runs."""
    last_answer_s: float | None = None
    """Seconds since."""
    starts: int = 0
    jobs: list[JobState] = field(default_factory=list)

    @property
    def left(self) -> int:
        return max(0, self.requests - self.answered - self.failed)

    @property
    def hit_percent(self) -> float:
        return 100 * self.cached_tokens / max(1, self.prompt_tokens)


def read_status(directory: Path) -> RunStatus:
    """Raises `MissingInputError` if the folder is no run directory."""
    starts, submitted, here = read_starts(directory), submitted_jobs(directory), local_jobs(directory)
    if not (starts or submitted or here):
        raise MissingInputError(f"{directory}: no run directory (it has no logs/starts*.jsonl)")
    requests = starts[-1].requests if starts else submitted_requests(directory)
    status = RunStatus(str(directory), "stopped", requests, starts=len(starts))
    recent: deque[tuple[int, int]] = deque()
    for body in _answers(directory):
        usage = body.usage
        status.answered += 1
        status.prompt_tokens += usage.prompt_tokens
        status.output_tokens += usage.completion_tokens
        status.cached_tokens += usage.cache_read_input_tokens
        recent.append((body.created, usage.prompt_tokens + usage.completion_tokens))
        while recent[0][0] < body.created - _RATE_S:
            recent.popleft()
    errors = directory / "errors.jsonl"
    status.failed = errors.read_bytes().count(b"\n") if errors.exists() else 0
    status.jobs = job_states(_jobs(starts, submitted), with_tasks=True) + [job.state for job in here]
    status.state = _state(status, starts)
    if recent and starts:
        status.last_answer_s = max(0.0, time.time() - recent[-1][0])
        seconds = max(1.0, recent[-1][0] - max(recent[0][0], int(starts[-1].time)))
        status.tokens_per_s = sum(tokens for _, tokens in recent) / seconds
        if status.state == "running":
            status.seconds_left = status.left * seconds / len(recent)
    return status


def _jobs(starts: Sequence[Start], submitted: Sequence[str]) -> list[str]:
    """Those that began, and those that were submitted: of an array also tasks that have not begun."""
    return list(dict.fromkeys([*(start.job for start in starts if start.job), *submitted]))


def _state(status: RunStatus, starts: Sequence[Start]) -> str:
    if not status.left:
        return "done"
    states = [job.state for job in status.jobs if job.is_open]
    if any(not state.startswith(("PENDING", "REQUEUED")) for state in states) or any(map(_is_alive, starts[-1:])):
        return "running"
    return "pending" if states else "stopped"


def _is_alive(start: Start) -> bool:
    """Whether the process of a start is there, if this is its node."""
    if start.host != platform.node():
        return False
    try:
        return b"hpckv" in Path(f"/proc/{start.pid}/cmdline").read_bytes()
    except OSError:
        return False


def _answers(directory: Path) -> Iterator[_Body]:
    """One for each request, in order of time."""
    parts = open_parts(directory)
    if not parts:  # nothing to remember
        yield from (line.response.body for line in _lines(directory / "output.jsonl"))
        return
    found: dict[str, _Body] = {}
    for path in (directory / "output.jsonl", *parts):
        for line in _lines(path):
            found.setdefault(line.custom_id, line.response.body)
    yield from sorted(found.values(), key=lambda body: body.created)


def _lines(path: Path) -> Iterator[_Line]:
    decoder = msgspec.json.Decoder(_Line)
    if not path.exists():
        return
    with path.open("rb") as file:
        for raw in file:
            try:
                yield decoder.decode(raw)
            except msgspec.DecodeError:  # the last line may be torn, or is being written
                continue
