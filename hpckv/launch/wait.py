"""Watching a submitted run until it is over, whoever of its jobs ends it: for `hpckv submit --wait`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpckv.errors import EXIT_DRAINED, EXIT_FAILED_REQUESTS, EXIT_OK
from hpckv.launch.folder import End, count_answers, last_starts, newest_job, read_codes
from hpckv.launch.script import array_indexes
from hpckv.launch.slurm_jobs import JobState, job_states
from hpckv.launch.submit import Submitted

_log = logging.getLogger(__name__)

_LOOK_S = 0.5
_FIRST_ASK_S, _SELDOM_S = 5.0, 60.0
"""Files say nearly everything; Slurm is asked more and more seldom: controllers do not like to be polled."""


def wait_for_run(submitted: Submitted, answered: Callable[[int], None]) -> int:
    """The run's exit code. `answered` is told how many complete answers there are, every now and then."""
    if submitted.local is not None:
        return _wait_here(submitted, answered)
    run_folder = submitted.prepared.script.run_folder
    ask_s, asked, said, ended = _FIRST_ASK_S, time.monotonic(), "", 0
    over: set[_Task] = set()
    """By Slurm's word, which it forgets."""
    while True:
        answered(count_answers(run_folder))
        tasks = _tasks(submitted)
        left = [task for task in tasks if not task.is_over]
        if not left:
            return run_code([task.end.code for task in tasks if task.end])
        ended, before = sum(task.is_ended for task in left), ended
        if ended > before:
            ask_s = _FIRST_ASK_S  # Slurm knows by now whether it starts again
        if time.monotonic() - asked >= ask_s:
            states = job_states([task.job for task in left])
            asked, ask_s = time.monotonic(), min(_SELDOM_S, 1.5 * ask_s)
            text = ", ".join(f"{one.job}: {one.state} {one.reason}".strip() for one in states)
            if text != said:
                _log.info("job %s", text)
                said = text
            over |= {task for task, state in zip(left, states, strict=True) if _is_over(state)}
            are_over = [_is_over(s) or (s.is_unknown and t in over) for t, s in zip(left, states, strict=True)]
            if all(are_over) and _tasks(submitted) == tasks:
                codes = [task.end.code for task in tasks if task.end and task.is_over]
                return run_code(codes + [_code_of(task, state) for task, state in zip(left, states, strict=True)])
        time.sleep(_LOOK_S)


def run_code(codes: Sequence[int]) -> int:
    """Of jobs that worked on one run: that of whoever finished it, else the gravest."""
    finished = [code for code in codes if code in (EXIT_OK, EXIT_FAILED_REQUESTS)]
    return max(finished or codes)


@dataclass(frozen=True)
class _Task:
    """One job of those that work on the run; of an array, one of its tasks."""

    job: str
    """In which it is now, or will be, as Slurm can be asked for it."""
    end: End | None

    @property
    def is_over(self) -> bool:
        return self.end is not None and self.end.is_last

    @property
    def is_ended(self) -> bool:
        return self.end is not None and self.end.goes_on == "ended"


def _tasks(submitted: Submitted) -> list[_Task]:
    indexes = array_indexes(submitted.prepared.script.slurm.array)
    starts, newest = last_starts(submitted.folder), newest_job(submitted.folder) or submitted.job
    found = []
    for index in indexes or [0]:
        start = starts.get(index)
        if start is None or (start.end is not None and start.end.goes_on == "chain"):
            job = f"{newest}_{index}" if indexes else newest
        else:
            job = start.job
        found.append(_Task(job, start.end if start else None))
    return found


def _is_over(state: JobState) -> bool:
    return not (state.is_open or state.is_unknown)


def _code_of(task: _Task, state: JobState) -> int:
    """By its own word; of a job that could not say it, by Slurm's: it was killed, or cancelled before it began."""
    if task.end is not None:
        return task.end.code
    code, _, signal = state.exit_code.partition(":")
    if signal.isdigit() and int(signal):
        return 128 + int(signal)
    if code.isdigit() and int(code):
        return int(code)
    return EXIT_OK if state.state.startswith("COMPLETED") else EXIT_DRAINED


def _wait_here(submitted: Submitted, answered: Callable[[int], None]) -> int:
    run_folder = submitted.prepared.script.run_folder
    while not submitted.local.done():
        answered(count_answers(run_folder))
        time.sleep(_LOOK_S)
    answered(count_answers(run_folder))
    codes = read_codes(submitted.folder)
    return run_code(codes) if codes else EXIT_DRAINED
