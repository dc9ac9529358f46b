"""A copy of the input with all safe repairs, and what they changed. Lines that need none are copied byte for byte."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from difflib import unified_diff
from itertools import groupby
from pathlib import Path
from typing import Any

from hpckv.errors import AccessError, CannotWriteError, ConfigError
from hpckv.store.durable import publish
from hpckv.workload.lint.prompts import Prompt, shown, units
from hpckv.workload.lint.report import SafeRepairs

_EXAMPLES = 2
"""Requests of each kind whose difference is shown."""
_DIFF_LINES = 3
"""Consecutive ones that are taken away or put in, at most."""
_DIFF_WIDTH = 100


def difference_lines(fix: SafeRepairs) -> Iterator[str]:
    """For people: how many requests of each kind change, and unified differences of the first ones."""
    for kind, pairs in fix.changes.items():
        yield f"{kind}: {len(pairs):,} requests changed"
        for before, after in pairs[:_EXAMPLES]:
            yield from _difference(before, after)


def check_target(source: Path, target: Path) -> None:
    """Refuse what a copy must not be written to; raises `ConfigError` or `CannotWriteError`."""
    if not source.is_file():
        raise ConfigError(f"--fix: {source} is no regular file, so it cannot be read a second time for the copy")
    if target.exists() or target.is_symlink():
        is_input = target.exists() and target.samefile(source)
        raise CannotWriteError(
            f"--fix {target}: {'is the input' if is_input else 'exists'}; give a file that is not there yet"
        )


def copy_repaired(source: Path, target: Path, prompts: Sequence[Prompt], fix: SafeRepairs) -> None:
    """Write `target`: `source`, whose requests are `prompts`, with safe repairs and its permission bits.

    Raises `CannotWriteError` also if `target` exists, and if `source` is no longer what was read.
    """
    changed = {before.number: after for before, after in zip(prompts, fix.prompts, strict=True) if after != before}
    by_number = {prompt.number: prompt for prompt in prompts}
    parts: list[bytes] = []
    with source.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
        for number, raw in enumerate(file, start=1):
            if number in changed:
                raw = _rewritten(raw, by_number[number], changed[number], source)
            parts.append(raw)
    try:
        publish(target, parts, mode=mode, replace=False)
    except FileExistsError:
        raise CannotWriteError(f"--fix {target}: exists; give a file that is not there yet") from None
    except PermissionError:
        raise AccessError(f"--fix {target}: permission denied") from None
    except OSError as error:
        raise CannotWriteError(f"--fix {target}: {error.strerror}") from None


def _rewritten(raw: bytes, before: Prompt, after: Prompt, source: Path) -> bytes:
    try:
        record: dict[str, Any] = json.loads(raw)
    except ValueError:
        record = {}
    if record.get("custom_id") != before.custom_id:
        raise CannotWriteError(f"{source}:{before.number}: has changed while it was read; nothing is written")
    if after.messages[0].role:
        record["body"]["messages"] = [message.plain for message in after.messages]
    else:
        record["body"]["prompt"] = after.messages[0].text
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _difference(before: Prompt, after: Prompt) -> Iterator[str]:
    """A unified difference by sentences, escaped: what differs may not be seen otherwise."""
    name = f"line {before.number} ({before.custom_id})"
    old, new = ([shown(unit, _DIFF_WIDTH) for unit in units(prompt) if unit] for prompt in (before, after))
    lines = unified_diff(old, new, name, f"{name}, fixed", n=0, lineterm="")
    for sign, group in groupby(lines, lambda line: line[0]):
        same = list(group)
        yield from same[:_DIFF_LINES]
        if len(same) > _DIFF_LINES:
            yield f"{sign}... {len(same) - _DIFF_LINES} more"
