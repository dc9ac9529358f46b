"""The tokens of answers whose ledger record was lost with their process: `output.jsonl` still has them."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import msgspec

from hpckv.usage.afterwards import Served, record_afterwards

_log = logging.getLogger(__name__)


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    hpckv: dict[str, int]


class _Body(msgspec.Struct):
    usage: _Usage
    created: int


class _Response(msgspec.Struct):
    body: _Body


class _Line(msgspec.Struct):
    response: _Response


def account_for_earlier_starts(directory: Path) -> None:
    """Record what earlier starts of this run answered and did not come to record. Trouble with it is only said."""
    _account(directory, directory / "output.jsonl", "")


def account_for_lost_worker(directory: Path, part: Path) -> None:
    """The same of one of several that work on a run, by the part of the answers that is its own."""
    job_and_restart = part.stem.rpartition(".")[0]  # as its ledger's name begins
    _account(directory, part, f"{job_and_restart}.")


def _account(directory: Path, output: Path, beginning: str) -> None:
    notes = (directory / "logs" / "ledgers").glob("*")
    try:
        ledgers = [path.read_text().strip() for path in notes if path.name.startswith(beginning)]
        if ledgers and all(ledgers):  # else nobody knows whose start the rest was
            record_afterwards([directory / ledger for ledger in ledgers], _served_in(output))
    except (OSError, ValueError) as error:
        _log.warning("%s: the ledger may lack the last minute of an earlier start: %s", directory, error)


def _served_in(output: Path) -> Served:
    found, parts = Served(), Counter[str]()
    decode = msgspec.json.Decoder(_Line).decode
    with output.open("rb") as file:
        for line in file:
            try:
                body = decode(line).response.body
            except msgspec.DecodeError:  # torn
                continue
            usage = body.usage
            found.requests += 1
            found.until = max(found.until, float(body.created))
            found.prompt_tokens += usage.prompt_tokens
            found.output_tokens += usage.completion_tokens
            parts.update(usage.hpckv)
    found.computed_tokens = parts.pop("computed", 0)
    found.cached = dict(parts)
    return found
