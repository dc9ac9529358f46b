"""From lines of the input to requests that can run, and what is said of the others. No torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpckv.engine.prompts import PromptReader
from hpckv.engine.request import Request
from hpckv.errors import CapacityError, ConfigError, InputError
from hpckv.workload.lines import BadLine, BatchInput, BatchLine
from hpckv.workload.output import request_ids_in
from hpckv.workload.plan import PlannedPrompt

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """What flags say beside the run file."""

    skips_bad_lines: bool = False
    allows_errors: bool = False
    joins: bool = False
    """Other jobs work on the same run."""
    is_quiet: bool = False


@dataclass(frozen=True)
class Work:
    """A line that is ready to run."""

    line: BatchLine
    prompt: PlannedPrompt

    @property
    def request(self) -> Request:
        """As it is, without its place in the plan."""
        return Request(self.line.custom_id, self.prompt.token_ids, self.line.params, 0, self.prompt.keys)


def prepare(
    lines: Iterable[BatchLine], prompts: PromptReader, check: Callable[[Request], None]
) -> tuple[list[Work], list[BadLine]]:
    """Token ids and block keys of every line, and the lines that `check` raises `CapacityError` for."""
    work, refused = [], []
    for line in lines:
        try:
            ids = prompts.ids_of(line.prompt)
            check(Request(line.custom_id, ids, line.params))
        except (InputError, CapacityError) as error:
            refused.append(BadLine(line.number, line.custom_id, str(error)))
            continue
        work.append(Work(line, PlannedPrompt(ids, prompts.keys_of(ids))))
    return work, refused


def refuse_changed_requests(lines: Sequence[BatchLine], output: Path, name: str) -> None:
    """Answers that are there must be of these requests: raise `ConfigError` that names the first which is another by now.

    Answers of requests that the input does not have are said.
    """
    answered = request_ids_in(output)
    for line in lines:
        if answered.pop(line.custom_id, "") not in ("", line.request_id):
            raise ConfigError(
                f"{name}:{line.number}: {line.custom_id!r} was answered in {output.parent} when its prompt or parameters were "
                "others; take another --output, or remove the folder"
            )
    if answered:
        _log.warning("%s: %d answers are of requests that %s does not have", output, len(answered), name)


def report_input(batch: BatchInput, name: str, options: RunOptions) -> None:
    """Say what has no effect; raises `InputError` for bad lines unless they are to be skipped."""
    for key, number in batch.unknown_keys.items():
        _log.warning("%s:%d: body key %r is not known and has no effect (said once)", name, number, key)
    stop_at_bad_lines(batch.bad, name, options)


def stop_at_bad_lines(bad: Sequence[BadLine], name: str, options: RunOptions) -> None:
    """Raise `InputError` that names the first, unless they are to be skipped."""
    if not bad or options.skips_bad_lines:
        return
    for line in bad[1:5]:
        _log.error("%s:%d: %s", name, line.number, line.reason)
    more = f" ({len(bad)} bad lines in all; --skip-bad-lines answers the rest)" if len(bad) > 1 else ""
    raise InputError(f"{name}:{bad[0].number}: {bad[0].reason}{more}")
