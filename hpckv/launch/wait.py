"""Watching a submitted run until it is over, whoever of its jobs ends it: for `hpckv submit --wait`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hpckv.errors import EXIT_DRAINED, EXIT_FAILED_REQUESTS, EXIT_OK
from hpckv.launch.folder import last_starts, newest_job, read_codes, read_end
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
    folder, run_folder = submitted.folder, submitted.prepared.script.run_folder
    indexes = array_indexes(submitted.prepared.script.slurm.array)
    ask_s, asked, said = _FIRST_ASK_S, time.monotonic(), ""
    while True:
        answered(count_answers(run_folder))
        ends = [end for path in last_starts(folder) if (end := read_end(path)) and end.is_last]
        if len(ends) == max(1, len(indexes)):
            return run_code([end.code for end in ends])
        if time.monotonic() - asked >= ask_s:
            newest = newest_job(folder) or submitted.job
            states = job_states([f"{newest}_{index}" for index in indexes] or [newest])
            asked, ask_s = time.monotonic(), min(_SELDOM_S, 1.5 * ask_s)
            text = ", ".join(f"{one.job}: {one.state} {one.reason}".strip() for one in states)
            if text != said:
                _log.info("job %s", text)
                said = text
            if all(map(_is_over, states)) and (newest_job(folder) or newest) == newest:
                return run_code([_code_of(state) for state in states])
        time.sleep(_LOOK_S)


def run_code(codes: Sequence[int]) -> int:
    """Of jobs that worked on one run: that of whoever finished it, else the gravest."""
    finished = [code for code in codes if code in (EXIT_OK, EXIT_FAILED_REQUESTS)]
    return max(finished or codes)


def count_answers(run_folder: Path) -> int:
    """Complete lines of the output, also of what jobs that work together have not merged yet."""
    paths = [run_folder / "output.jsonl", *run_folder.glob("queue/*/parts/*.jsonl")]
    return sum(path.read_bytes().count(b"\n") for path in paths if path.exists())


def _is_over(state: JobState) -> bool:
    return not state.is_open and state.state != "UNKNOWN"


def _code_of(state: JobState) -> int:
    """Of a job that could not say it itself: it was killed, or cancelled before it began."""
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
