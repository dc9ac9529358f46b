"""A consolidated index: one immutable file that stands for the key tables of many segments.

Derived and disposable: without it readers look into the segments themselves. It only says where to look; what is
found there is verified as ever (`docs/store-format.md`, 5).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3

from hpckv.store.block import Box
from hpckv.store.block_index import Entries
from hpckv.store.foreign_file import UnusableFileError, open_trusted, read_into
from hpckv.store.ownership import is_of_user
from hpckv.store.segment import Seal

MAGIC = b"HPCKVIDX"
FORMAT_VERSION = 1
HEADER_BYTES = 256
_FIELDS = struct.Struct("<8sIIQIIQII32s32s")
_MAC_BYTES = 32
_SEGMENT = np.dtype([("name", "V16"), ("count", "<u4"), ("box", "<u4", 4), ("reserved", "<u4")])


@dataclass(frozen=True)
class IndexedSegment:
    """What an index file says of one segment."""

    name: bytes
    """16 bytes; in hexadecimal the name of the file."""
    count: int
    box: Box


@dataclass(frozen=True)
class IndexFile:
    """Entries of `segments`, whose numbers count from 0 in this file."""

    segments: Sequence[IndexedSegment]
    entries: Entries
    supersedes: Sequence[bytes] = ()
    """16-byte names of index files of the same owner that this one replaces."""

    def build(self, seal: Seal) -> list[bytes | memoryview]:
        """The file, as parts to write one after another."""
        table = np.array([(s.name, s.count, s.box, 0) for s in self.segments], dtype=_SEGMENT)
        body: list[bytes | memoryview] = [
            table.tobytes(),
            b"".join(self.supersedes),
            np.ascontiguousarray(self.entries.prefixes, "<u8").data.cast("B"),
            np.ascontiguousarray(self.entries.places, "<u8").data.cast("B"),
        ]
        fields = _FIELDS.pack(
            MAGIC,
            FORMAT_VERSION,
            HEADER_BYTES,
            HEADER_BYTES + sum(map(len, body)),
            len(self.segments),
            len(self.supersedes),
            len(self.entries),
            os.getuid(),
            seal.epoch,
            seal.namespace,
            _digest(seal.epoch_key, body),
        )
        header = fields.ljust(HEADER_BYTES - _MAC_BYTES, b"\0")
        return [header, blake3(header, key=seal.epoch_key).digest(), *body]

    @classmethod
    def read(cls, path: Path, seal: Seal, trusted_uids: frozenset[int] | None = None) -> IndexFile:
        """Read and verify; raises `UnusableFileError` or `OSError`."""
        fd, status = open_trusted(path, trusted_uids)
        try:
            data = memoryview(bytearray(status.st_size))
            read_into(fd, data, 0)
        finally:
            os.close(fd)
        return cls._parse(data, seal, status, trusted_uids)

    @classmethod
    def _parse(
        cls, data: memoryview, seal: Seal, status: os.stat_result, trusted_uids: frozenset[int] | None
    ) -> IndexFile:
        header, mac = bytes(data[: HEADER_BYTES - _MAC_BYTES]), bytes(data[HEADER_BYTES - _MAC_BYTES : HEADER_BYTES])
        if not header.startswith(MAGIC) or len(data) < HEADER_BYTES:
            raise UnusableFileError("no index file, or torn")
        _, version, _, size, num_segments, num_superseded, num_entries, uid, epoch, namespace, digest = (
            _FIELDS.unpack_from(header)
        )
        if version != FORMAT_VERSION:
            raise UnusableFileError(f"index version {version}, this program reads {FORMAT_VERSION}")
        if blake3(header, key=seal.epoch_key).digest() != mac:
            raise UnusableFileError("its header does not verify with this store's key")
        is_owners = is_of_user(status, uid) and (trusted_uids is None or uid in trusted_uids)
        if (size, epoch, namespace) != (len(data), seal.epoch, seal.namespace) or not is_owners:
            raise UnusableFileError("its header does not belong to this file, namespace or epoch")
        widths = [_SEGMENT.itemsize * num_segments, 16 * num_superseded, 8 * num_entries, 8 * num_entries]
        if sum(widths) + HEADER_BYTES != size:
            raise UnusableFileError("its header does not describe its length")
        parts, at = [], HEADER_BYTES
        for width in widths:
            parts.append(data[at : at + width])
            at += width
        if _digest(seal.epoch_key, parts) != digest:
            raise UnusableFileError("its tables do not verify")
        names = parts[1]
        file = cls(
            segments=[
                IndexedSegment(bytes(row["name"]), int(row["count"]), tuple(row["box"].tolist()))
                for row in np.frombuffer(parts[0], _SEGMENT)
            ],
            entries=Entries(np.frombuffer(parts[2], "<u8"), np.frombuffer(parts[3], "<u8")),
            supersedes=[bytes(names[i : i + 16]) for i in range(0, len(names), 16)],
        )
        if len(file.entries) and int(file.entries.segments.max()) >= num_segments:
            raise UnusableFileError("its entries name segments that it does not list")
        return file


def _digest(epoch_key: bytes, parts: Sequence[bytes | memoryview]) -> bytes:
    hasher = blake3(key=epoch_key, max_threads=blake3.AUTO)
    for part in parts:
        hasher.update(part)
    return hasher.digest()
