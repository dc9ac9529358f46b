"""Fewer, fuller segments: a user's small ones are rewritten together, and blocks that lie twice are kept once.

Order: copy, publish, then delete. A crash in between leaves blocks twice, never none.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpckv.store.block import Box
from hpckv.store.durable import publish
from hpckv.store.foreign_file import UnusableFileError
from hpckv.store.identity import canonical_json
from hpckv.store.inspect import NamespaceView, namespaces, seal_of
from hpckv.store.root import StoreRoot
from hpckv.store.segment import Segment, SegmentContext, StoredBlock, build_segment
from hpckv.store.survey import StoredFile, Survey, Use, heat_record


@dataclass
class CompactReport:
    """What a compaction did."""

    read_segments: int = 0
    written_segments: int = 0
    duplicate_blocks: int = 0
    freed_bytes: int = 0


@dataclass
class _Source:
    """One segment to be rewritten, and its rows that are kept."""

    file: StoredFile
    segment: Segment
    rows: Sequence[int]


def compact(
    root: StoreRoot, *, target_bytes: int, on_file: Callable[[StoredFile], None] = lambda _: None
) -> CompactReport:
    """Rewrite this user's small segments and duplicates into segments of about `target_bytes`; raises `OSError`.

    A segment that does not verify is left alone (`check` finds it).
    """
    survey, report = Survey(root.layout), CompactReport()
    survey.refresh()
    uses = survey.uses()
    for view in namespaces(survey):
        own = sorted((f for f in view.segments if f.uid == os.getuid()), key=lambda f: f.written_at)
        for (box, _), sources in _sources(root, own, target_bytes, report, on_file).items():
            context = _context(root, view, sources[0].segment, box)
            _rewrite(root, context, sources, target_bytes, report, [uses.get(s.file.path, Use()) for s in sources])
    return report


def _sources(
    root: StoreRoot,
    own: Sequence[StoredFile],
    target_bytes: int,
    report: CompactReport,
    on_file: Callable[[StoredFile], None],
) -> dict[tuple[Box, int], list[_Source]]:
    """By box and by how long they are kept: segments worth rewriting."""
    seen: dict[tuple[Box, int], dict[bytes, tuple[StoredFile, int]]] = defaultdict(dict)
    found: dict[tuple[Box, int], list[_Source]] = defaultdict(list)
    for file in own:
        try:
            segment = Segment(file.path, seal_of(root, file), frozenset({file.uid}))
        except (OSError, UnusableFileError):
            continue
        finally:
            on_file(file)
        keys = [segment.key(row) for row in range(segment.count)]
        kind = segment.geometry.box, segment.keep_s
        known = seen[kind]
        # Of two copies one may be damaged: a block counts as a duplicate where the other was read.
        rows = [row for row, key in enumerate(keys) if key not in known or not _verifies(root, *known[key])]
        known.update((keys[row], (file, row)) for row in rows)
        if len(rows) < len(keys) or len(keys) * segment.geometry.block_bytes < target_bytes // 2:
            found[kind].append(_Source(file, segment, rows))
            report.duplicate_blocks += len(keys) - len(rows)
    # One small segment alone gains nothing.
    return {kind: s for kind, s in found.items() if len(s) > 1 or len(s[0].rows) < s[0].segment.count}


def _context(root: StoreRoot, view: NamespaceView, segment: Segment, box: Box) -> SegmentContext:
    seal = seal_of(root, view.segments[0])
    record = canonical_json(view.record) if view.record else b"{}"
    return SegmentContext(seal.namespace, seal.epoch, seal.epoch_key, record, segment.geometry.with_box(*box))


def _rewrite(
    root: StoreRoot,
    context: SegmentContext,
    sources: Sequence[_Source],
    target_bytes: int,
    report: CompactReport,
    uses: Sequence[Use],
) -> None:
    folder = sources[0].file.path.parent
    batch: list[StoredBlock] = []
    written: list[Path] = []
    written_bytes = 0

    def seal() -> None:
        nonlocal written_bytes
        if batch:
            path = folder / f"{secrets.token_hex(16)}.h5"
            parts = build_segment(context, batch, keep_s=sources[0].segment.keep_s)
            publish(path, parts, gid=root.policy.group)
            written.append(path)
            written_bytes += sum(map(len, parts))
            batch.clear()

    done: list[_Source] = []
    for source in sources:
        try:
            blocks = list(_blocks(source))
        except (OSError, UnusableFileError):
            continue
        batch += blocks
        done.append(source)
        if len(batch) * context.geometry.block_bytes >= target_bytes:
            seal()
    seal()
    _pass_heat_on(root, written, uses, sources[0].segment.keep_s)
    # What was left out of one may have been the copy in another that cannot be read any more.
    gone = [s.file for s in done if len(done) == len(sources) or len(s.rows) == s.segment.count]
    for file in gone:
        file.path.unlink(missing_ok=True)
    report.read_segments += len(done)
    report.written_segments += len(written)
    report.freed_bytes += sum(file.num_bytes for file in gone) - written_bytes


def _verifies(root: StoreRoot, file: StoredFile, row: int) -> bool:
    try:
        segment = Segment(file.path, seal_of(root, file), frozenset({file.uid}))
        segment.read(row, memoryview(bytearray(segment.geometry.block_bytes)))
    except (OSError, UnusableFileError):
        return False
    return True


def _blocks(source: _Source) -> Iterator[StoredBlock]:
    segment = source.segment
    for row in source.rows:
        payload = bytearray(segment.geometry.block_bytes)
        segment.read(row, memoryview(payload))
        yield StoredBlock(segment.key(row), bytes(segment.parents[row]), int(segment.positions[row]), payload)


def _pass_heat_on(root: StoreRoot, written: Sequence[Path], uses: Sequence[Use], keep_s: int) -> None:
    """The new segments are as warm as the old ones were together."""
    heat = sum((use for use in uses), Use()).heat / max(1, len(written))
    if heat or keep_s:
        folder = root.layout.heat(os.getuid())
        root.make_own_folder(folder)
        names = [str(path.relative_to(root.layout.users)) for path in written]
        reads, keeps = dict.fromkeys(names, heat) if heat else {}, dict.fromkeys(names, keep_s) if keep_s else {}
        record = heat_record(reads, time.time(), keeps)
        publish(folder / f"{secrets.token_hex(16)}.json", [record], gid=root.policy.group)
