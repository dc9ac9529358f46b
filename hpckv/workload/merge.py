"""What makes the parts of several workers one run: the digest they agree on, their answers and counters in one place. No torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from hpckv.errors import CannotWriteError
from hpckv.schema import to_plain
from hpckv.workload.output import gather_lines, write_file
from hpckv.workload.queue import MERGE, WorkQueue
from hpckv.workload.runfile import RunConfig


def merge_parts(directory: Path, queue: WorkQueue) -> list[str]:
    """Put all answers of a round into `output.jsonl` and end the round; ids that are in no part, and then it is not over.

    Can be done again, and by two workers at once: lines that are there already stay. Raises `CannotWriteError`.
    """
    assert queue.plan
    target, answers = directory / "output.jsonl", queue.parts
    try:
        done, _, _ = gather_lines([target] * target.exists() + answers, target)
    except OSError as error:
        raise CannotWriteError(f"{target}: {error.strerror}; the parts are safe, run again to go on") from None
    failed: dict[str, dict[str, Any]] = {}
    for path in sorted((queue.folder / "parts").glob("*.errors.jsonl")):
        for raw in path.read_bytes().splitlines():
            record = json.loads(raw)
            failed.setdefault(record["custom_id"], record)
    if lost := [custom_id for custom_id in queue.plan.ids if custom_id not in done and custom_id not in failed]:
        return lost
    records = [*queue.plan.bad, *(record for custom_id, record in failed.items() if custom_id not in done)]
    if records or (directory / "errors.jsonl").exists():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_file(directory / "errors.jsonl", text)
    queue.finish(MERGE)
    queue.clean()
    return []


def run_digest(config: RunConfig) -> str:
    """Of the input file and of what decides its answers."""
    hasher = blake3()
    hasher.update_mmap(config.input)
    plain = to_plain(config)
    settings = [plain["model"], plain["sampling"], plain["engine"].get("numerics"), plain["engine"].get("seed")]
    hasher.update(msgspec.json.encode([*settings, config.cache.block_tokens], order="deterministic"))
    return hasher.hexdigest()


def add_up(records: dict[str, dict[str, Any]], last: Collection[str]) -> dict[str, Any]:
    """Workers' counters as one run's; what failed is what did in the `last` round: it was tried again there."""
    cached = Counter[str]()
    for record in records.values():
        cached.update(record["cached"])
    names = ("requests", "prompt_tokens", "computed_tokens", "output_tokens")
    sums: dict[str, Any] = {name: sum(record[name] for record in records.values()) for name in names}
    sums["failed"] = sum(records[name]["failed"] for name in last)
    sums["cached"] = dict(cached)
    sums["hit_percent"] = round(100 * cached.total() / max(1, sums["prompt_tokens"]), 2)
    return {**sums, "workers": records}
