"""A segment: one sealed, immutable file of many blocks. It is HDF5 followed by a trailer of our own.

libhdf5 never touches the shared file; readers parse only the trailer and the tables it points to, bounds-checked and
authenticated, and `pread` tiles at known offsets (`docs/store-format.md`, 3). The HDF5 part is there for people and
other programs: `h5dump`, `h5ls` and h5py open the file as it is.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3

from hpckv.store.block import DIGEST_BYTES, KEY_BYTES, BlockGeometry, Box, tile_digests
from hpckv.store.direct_io import aligned_buffer, open_direct, read_past_cache
from hpckv.store.foreign_file import UnusableFileError, open_trusted, read_into
from hpckv.store.hdf5_image import build_image
from hpckv.store.ownership import is_of_user

MAGIC = b"HPCKVSEG"
FORMAT_VERSION = 1
TRAILER_BYTES = 512
_FIELDS = struct.Struct("<8sIIQIIIIIIIIIIIIIIQQQQQQ32s32s")
_MAC_BYTES = 32
_UNKNOWN = -2
_TABLES = ("keys", "parents", "positions", "digests", "scales")


@dataclass(frozen=True)
class StoredBlock:
    """One block (or one rank's box of it) on its way into a segment."""

    key: bytes
    parent: bytes
    position: int
    payload: bytes | bytearray | memoryview


@dataclass(frozen=True)
class Seal:
    """What authenticates the files of one namespace in one key epoch."""

    namespace: bytes
    epoch: int
    epoch_key: bytes


@dataclass(frozen=True)
class SegmentContext(Seal):
    """What every segment that this process writes or uses has in common; `geometry` with the box that it owns."""

    namespace_json: bytes
    geometry: BlockGeometry


def build_segment(
    context: SegmentContext, blocks: Sequence[StoredBlock], *, keep_s: int = 0
) -> list[bytes | memoryview]:
    """The whole file as parts to write one after another; payloads are not copied.

    `keep_s` is how long its blocks should be kept after their last use, seconds; 0 leaves it to the project.
    """
    geometry, count = context.geometry, len(blocks)
    payloads = [memoryview(block.payload).cast("B") for block in blocks]
    tables = {
        "keys": np.frombuffer(b"".join(b.key for b in blocks), np.uint8).reshape(count, KEY_BYTES),
        "parents": np.frombuffer(b"".join(b.parent for b in blocks), np.uint8).reshape(count, KEY_BYTES),
        "positions": np.array([b.position for b in blocks], dtype="<u8"),
        "digests": np.frombuffer(
            b"".join(
                tile_digests(context.epoch_key, b.key, geometry.tiles, p) for b, p in zip(blocks, payloads, strict=True)
            ),
            np.uint8,
        ).reshape(count, len(geometry.tiles), DIGEST_BYTES),
        "scales": np.zeros((count, 0), dtype="<f4"),
    }
    whole = {"box": np.array(geometry.box, dtype="<u4")}
    attributes = {
        "format": "hpckv segment",
        "format_version": FORMAT_VERSION,
        "namespace": context.namespace_json.decode(),
        "kv_order": "kv_head, layer, key|value, token, dim",
        "kv_shape": [geometry.num_kv_heads, geometry.num_layers, 2, geometry.block_tokens, geometry.head_dim],
    }
    image = build_image({**whole, **tables}, "kv", (count, geometry.block_bytes), attributes)
    fields = _FIELDS.pack(
        MAGIC,
        FORMAT_VERSION,
        TRAILER_BYTES,
        image.num_bytes + TRAILER_BYTES,
        count,
        geometry.block_tokens,
        geometry.head_dim,
        geometry.item_bytes,
        geometry.layers_per_tile,
        *geometry.box,
        os.getuid(),
        context.epoch,
        keep_s,
        0,  # bytes of scales a block
        0,
        *(image.offsets[name] for name in (*_TABLES, "kv")),
        context.namespace,
        _tables_digest(context.epoch_key, (tables[name].tobytes() for name in _TABLES)),
    )
    body = fields.ljust(TRAILER_BYTES - _MAC_BYTES, b"\0")
    mac = blake3(body, key=context.epoch_key).digest()
    return [image.head, *payloads, image.tail, body, mac]


def _tables_digest(epoch_key: bytes, tables: Iterator[bytes]) -> bytes:
    hasher = blake3(key=epoch_key)
    for table in tables:
        hasher.update(table)
    return hasher.digest()


@dataclass(frozen=True)
class Trailer:
    """The trailer's fields, read and authenticated, not yet compared with anything."""

    file_bytes: int
    count: int
    geometry: BlockGeometry
    uid: int
    epoch: int
    keep_s: int
    scale_bytes: int
    offsets: dict[str, int]
    namespace: bytes
    tables_digest: bytes

    @classmethod
    def parse(cls, data: bytes, epoch_key: bytes) -> Trailer:
        """Raises `UnusableFileError`."""
        body, mac = data[:-_MAC_BYTES], data[-_MAC_BYTES:]
        if not body.startswith(MAGIC):
            raise UnusableFileError("no segment, or torn: its trailer is missing")
        _, version, _, file_bytes, count, tokens, dim, item, per_tile, h0, h1, l0, l1, *rest = _FIELDS.unpack_from(body)
        if version != FORMAT_VERSION:
            raise UnusableFileError(f"format version {version}, this program reads {FORMAT_VERSION}")
        if blake3(body, key=epoch_key).digest() != mac:
            raise UnusableFileError("its trailer does not verify with this store's key")
        uid, epoch, keep_s, scale_bytes, _, *offsets, namespace, tables_digest = rest
        return cls(
            file_bytes,
            count,
            BlockGeometry(h1 - h0, l1 - l0, tokens, dim, item, per_tile, h0, l0),
            uid,
            epoch,
            keep_s,
            scale_bytes,
            dict(zip((*_TABLES, "kv"), offsets, strict=True)),
            namespace,
            tables_digest,
        )


def read_trailer(path: Path, epoch_key: bytes, trusted_uids: frozenset[int] | None = None) -> Trailer:
    """A segment's trailer alone; raises `UnusableFileError` or `OSError`."""
    fd, status = open_trusted(path, trusted_uids)
    try:
        if status.st_size < TRAILER_BYTES:
            raise UnusableFileError("too short")
        data = bytearray(TRAILER_BYTES)
        read_into(fd, memoryview(data), status.st_size - TRAILER_BYTES)
        return Trailer.parse(bytes(data), epoch_key)
    finally:
        os.close(fd)


class Segment:
    """An open segment file, authenticated. Its tiles are verified one by one as they are read."""

    def __init__(self, path: Path, seal: Seal, trusted_uids: frozenset[int] | None = None) -> None:
        """Open and check; raises `UnusableFileError` or `OSError`. `trusted_uids` None trusts every owner.

        With a whole `SegmentContext` the blocks must have its shape, whatever their box.
        """
        self.path = path
        self._epoch_key = seal.epoch_key
        self._direct_fd = _UNKNOWN
        self._opening = threading.Lock()
        self._fd, status = open_trusted(path, trusted_uids)
        self.file_bytes, self.written_at = status.st_size, status.st_mtime
        try:
            trailer = self._read_tables(seal)
            # By its own word, too: in a user namespace the kernel does not tell colleagues apart.
            if not is_of_user(status, trailer.uid) or (trusted_uids is not None and trailer.uid not in trusted_uids):
                raise UnusableFileError(f"it says it is of uid {trailer.uid}, which it is not")
            self.owner = trailer.uid
        except BaseException:
            self.close()
            raise

    def _read_tables(self, seal: Seal) -> Trailer:
        if self.file_bytes < TRAILER_BYTES:
            raise UnusableFileError("too short")
        trailer = Trailer.parse(self._pread(TRAILER_BYTES, self.file_bytes - TRAILER_BYTES), self._epoch_key)
        if (trailer.file_bytes, trailer.namespace, trailer.epoch) != (self.file_bytes, seal.namespace, seal.epoch):
            raise UnusableFileError("its trailer does not belong to this file, namespace or epoch")
        self.geometry = geometry = trailer.geometry
        if isinstance(seal, SegmentContext) and geometry.with_box(*seal.geometry.box) != seal.geometry:
            raise UnusableFileError(f"its blocks have another shape ({geometry})")
        # Before anything is counted out: nobody's numbers may ask for more than the file holds.
        if min(trailer.count, geometry.num_kv_heads, geometry.num_layers) < 1:
            raise UnusableFileError("it holds nothing")
        if trailer.offsets["kv"] + geometry.block_bytes * trailer.count > self.file_bytes - TRAILER_BYTES:
            raise UnusableFileError("its trailer points outside the file")
        if trailer.scale_bytes:
            raise UnusableFileError("its blocks are quantised, which this version does not read")
        widths = {
            "keys": KEY_BYTES,
            "parents": KEY_BYTES,
            "positions": 8,
            "digests": len(geometry.tiles) * DIGEST_BYTES,
            "scales": trailer.scale_bytes,
        }
        for name, width in widths.items():
            if trailer.offsets[name] + width * trailer.count > self.file_bytes - TRAILER_BYTES:
                raise UnusableFileError("its trailer points outside the file")
        tables = {n: self._pread(w * trailer.count, trailer.offsets[n]) for n, w in widths.items()}
        if _tables_digest(self._epoch_key, (tables[name] for name in _TABLES)) != trailer.tables_digest:
            raise UnusableFileError("its key table does not verify")
        self.keep_s, self.count = trailer.keep_s, trailer.count
        self.keys = np.frombuffer(tables["keys"], np.uint8).reshape(-1, KEY_BYTES)
        self.parents = np.frombuffer(tables["parents"], np.uint8).reshape(-1, KEY_BYTES)
        self.positions = np.frombuffer(tables["positions"], "<u8")
        self._digests, self._kv_offset = tables["digests"], trailer.offsets["kv"]
        return trailer

    def key(self, row: int) -> bytes:
        return bytes(self.keys[row])

    def read(self, row: int, into: memoryview, wanted: BlockGeometry | None = None) -> Box:
        """Read what this file has of block `row` for the box `wanted` (this file's own by default), and verify it there.

        `into` is `wanted.block_bytes` long. Returns the box that was filled in: the wanted one if the file's covers it.
        Raises `UnusableFileError` or `OSError`.
        """
        own, wanted = self.geometry, wanted or self.geometry
        at = self._kv_offset + row * own.block_bytes
        h0, h1, l0, l1 = (f(a, b) for f, a, b in zip((max, min, max, min), own.box, wanted.box, strict=True))
        if own.box == wanted.box:
            self._read_payload(into, at)
            self._verify(row, range(len(own.tiles)), into)
        else:
            needed = [
                number
                for number, tile in enumerate(own.tiles)
                if h0 <= tile.head < h1 and tile.first_layer < l1 and l0 < tile.end_layer
            ]
            for run in _runs(needed):
                start = own.tiles[run[0]].span.start
                # Tiles are verified whole, also where the wanted box cuts them.
                data = aligned_buffer(own.tiles[run[-1]].span.stop - start)
                self._read_payload(data, at + start)
                self._verify(row, run, data)
                for tile in (own.tiles[number] for number in run):
                    first, end = max(l0, tile.first_layer), min(l1, tile.end_layer)
                    source = own.span(tile.head, first, end)
                    into[wanted.span(tile.head, first, end)] = data[source.start - start : source.stop - start]
        return h0, h1, l0, l1

    def _verify(self, row: int, numbers: range, data: memoryview) -> None:
        """Compare digests of the tiles `numbers`, whose bytes are `data`."""
        tiles = self.geometry.tiles
        found = tile_digests(self._epoch_key, self.key(row), tiles[numbers.start : numbers.stop], data)
        place = (row * len(tiles) + numbers.start) * DIGEST_BYTES
        if found != self._digests[place : place + len(found)]:
            raise UnusableFileError(f"block {row} does not verify")

    def close(self) -> None:
        """Give the descriptor back; idempotent."""
        # Given up whatever close() says: a second one could hit somebody else's.
        fds, self._fd, self._direct_fd = (self._fd, self._direct_fd), -1, -1
        for fd in fds:
            if fd >= 0:
                # Network filesystems may say ESTALE here for a file that another client has deleted. It was only read.
                with contextlib.suppress(OSError):
                    os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()

    def _read_payload(self, into: memoryview, offset: int) -> None:
        if self._direct_fd == _UNKNOWN:
            with self._opening:
                if self._direct_fd == _UNKNOWN:
                    self._direct_fd = open_direct(self._fd)
        read_past_cache(self._fd, self._direct_fd, into, offset)

    def _pread(self, size: int, offset: int) -> bytes:
        data = bytearray(size)
        read_into(self._fd, memoryview(data), offset)
        return bytes(data)


def _runs(numbers: Sequence[int]) -> Iterator[range]:
    """Consecutive numbers, together."""
    first = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield range(numbers[first], numbers[i - 1] + 1)
            first = i
