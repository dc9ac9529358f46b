"""Fewer, fuller segments: a user's small ones are rewritten together, and blocks that lie twice are kept once.

Order: copy, publish, then delete. A crash in between leaves blocks twice, never none.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from hpckv.store.block import BlockGeometry
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
class _Kind:
    """A user's segments of one shape that are kept equally long."""

    holders: dict[bytes, StoredFile] = field(default_factory=dict)
    """The first segment that has each block."""
    sources: dict[StoredFile, Use] = field(default_factory=dict)
    """Segments worth rewriting."""
    has_duplicates: bool = False


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
        for (geometry, keep_s), kind in _kinds(root, own, uses, target_bytes, on_file).items():
            # One small segment alone gains nothing.
            if len(kind.sources) > 1 or kind.has_duplicates:
                _rewrite(root, _context(root, view, geometry), kind, keep_s, target_bytes, report)
    return report


def _kinds(
    root: StoreRoot,
    own: Sequence[StoredFile],
    uses: Mapping[Path, Use],
    target_bytes: int,
    on_file: Callable[[StoredFile], None],
) -> dict[tuple[BlockGeometry, int], _Kind]:
    """By shape and by how long they are kept. Segments are opened one at a time: there may be more than descriptors."""
    found: dict[tuple[BlockGeometry, int], _Kind] = defaultdict(_Kind)
    for file in own:
        try:
            segment = _open(root, file)
        except (OSError, UnusableFileError):
            continue
        finally:
            on_file(file)
        segment.close()
        kind = found[segment.geometry, segment.keep_s]
        new = {key: file for key in map(segment.key, range(segment.count)) if key not in kind.holders}
        kind.holders.update(new)
        if len(new) < segment.count or segment.count * segment.geometry.block_bytes < target_bytes // 2:
            kind.sources[file] = uses.get(file.path, Use())
            kind.has_duplicates |= len(new) < segment.count
    return found


def _open(root: StoreRoot, file: StoredFile) -> Segment:
    return Segment(file.path, seal_of(root, file), frozenset({file.uid}))


def _context(root: StoreRoot, view: NamespaceView, geometry: BlockGeometry) -> SegmentContext:
    seal = seal_of(root, view.segments[0])
    record = canonical_json(view.record) if view.record else b"{}"
    return SegmentContext(seal.namespace, seal.epoch, seal.epoch_key, record, geometry)


def _rewrite(
    root: StoreRoot, context: SegmentContext, kind: _Kind, keep_s: int, target_bytes: int, report: CompactReport
) -> None:
    batch: list[StoredBlock] = []
    written: list[Path] = []
    written_bytes = 0

    def seal() -> None:
        nonlocal written_bytes
        if batch:
            path = next(iter(kind.sources)).path.with_name(f"{secrets.token_hex(16)}.h5")
            parts = build_segment(context, batch, keep_s=keep_s)
            publish(path, parts, gid=root.policy.group)
            written.append(path)
            written_bytes += sum(map(len, parts))
            batch.clear()

    copied: set[bytes] = set()
    done: dict[StoredFile, Use] = {}
    for source, use in kind.sources.items():
        try:
            blocks, num_left_out = _blocks(root, source, kind, copied)
        except (OSError, UnusableFileError):
            continue
        batch += blocks
        copied.update(block.key for block in blocks)
        done[source] = use
        report.duplicate_blocks += num_left_out
        if len(batch) * context.geometry.block_bytes >= target_bytes:
            seal()
    seal()
    _pass_heat_on(root, written, list(done.values()), keep_s)
    for file in done:
        file.path.unlink(missing_ok=True)
    report.read_segments += len(done)
    report.written_segments += len(written)
    report.freed_bytes += sum(file.num_bytes for file in done) - written_bytes


def _blocks(root: StoreRoot, source: StoredFile, kind: _Kind, copied: Set[bytes]) -> tuple[list[StoredBlock], int]:
    """What must be copied of a segment, and how many blocks need not be: they are copied, or in a segment that stays."""
    with contextlib.closing(_open(root, source)) as segment:
        rows = {segment.key(row): row for row in range(segment.count)}
        elsewhere: dict[StoredFile, set[bytes]] = defaultdict(set)
        for key in rows.keys() - copied:
            if kind.holders.get(key, source) not in kind.sources:
                elsewhere[kind.holders[key]].add(key)
        stays = set().union(*(_verified(root, holder, keys) for holder, keys in elsewhere.items()))
        blocks = [
            StoredBlock(key, bytes(segment.parents[row]), int(segment.positions[row]), _payload(segment, row))
            for key, row in rows.items()
            if key not in copied and key not in stays
        ]
        return blocks, segment.count - len(blocks)


def _verified(root: StoreRoot, file: StoredFile, keys: Set[bytes]) -> set[bytes]:
    """Which of these blocks the segment really has, now and with the right digests."""
    found = set()
    with contextlib.suppress(OSError, UnusableFileError), contextlib.closing(_open(root, file)) as segment:
        for row in range(segment.count):
            if (key := segment.key(row)) in keys:
                _payload(segment, row)
                found.add(key)
    return found


def _payload(segment: Segment, row: int) -> bytearray:
    payload = bytearray(segment.geometry.block_bytes)
    segment.read(row, memoryview(payload))
    return payload


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
