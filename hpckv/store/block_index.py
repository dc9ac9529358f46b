"""Where every stored block lies, in memory: sorted arrays of key prefixes, 16 bytes a block, no system call a lookup.

An entry holds the first 8 bytes of a key. That is a hint only: whoever reads the block verifies digests that are bound
to the whole key, so two keys with one prefix (1 in 4e5 among ten million blocks) could cost a miss, never a wrong block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PREFIX_BYTES = 8
_EMPTY = np.empty(0, dtype="<u8")


@dataclass(frozen=True)
class Entries:
    """Blocks in order of their key's prefix. `places` are segment number << 32 | row in the segment."""

    prefixes: np.ndarray
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.prefixes)

    @classmethod
    def of_segment(cls, number: int, keys: np.ndarray) -> Entries:
        """All rows of one segment; `keys` is (n, 32) u8."""
        prefixes = np.ascontiguousarray(keys[:, :PREFIX_BYTES]).view("<u8").ravel()
        return cls(prefixes, (np.uint64(number) << np.uint64(32)) | np.arange(len(keys), dtype="<u8")).sort()

    @classmethod
    def merge(cls, parts: Sequence[Entries]) -> Entries:
        """All of several; the input order decides between equal prefixes."""
        parts = [part for part in parts if len(part)] or [cls(_EMPTY, _EMPTY)]
        if len(parts) == 1:
            return parts[0]
        return cls(np.concatenate([p.prefixes for p in parts]), np.concatenate([p.places for p in parts])).sort()

    def sort(self) -> Entries:
        order = np.argsort(self.prefixes, kind="stable")
        return Entries(self.prefixes[order], self.places[order])

    def select(self, keep: np.ndarray, numbers: np.ndarray) -> Entries:
        """Those where `keep`, under the segment numbers `numbers`: both one for each entry."""
        row_mask = np.uint64(0xFFFFFFFF)
        places = (numbers[keep].astype("<u8") << np.uint64(32)) | (self.places[keep] & row_mask)
        return Entries(self.prefixes[keep], places)

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Segment numbers in ascending order, and the entries of each."""
        counts = np.bincount(self.segments)
        numbers = np.flatnonzero(counts)
        return numbers, counts[numbers]

    @property
    def segments(self) -> np.ndarray:
        return (self.places >> np.uint64(32)).astype(np.int64)


class BlockIndex:
    """Key -> (segment number, row). Not thread-safe; the owner holds a lock.

    Two levels: a large one, and a small one for what came since, so that a new segment costs a small merge. Segments
    are removed by number at once and swept out of the arrays at the next large merge.
    """

    def __init__(self) -> None:
        self._large = self._small = Entries(_EMPTY, _EMPTY)
        self._added: list[Entries] = []
        self._is_alive = np.zeros(0, dtype=bool)
        self._counts: dict[int, int] = {}

    @classmethod
    def of(cls, entries: Entries) -> BlockIndex:
        """Over arrays that somebody else keeps; they are not copied."""
        index = cls()
        numbers, counts = entries.counts()
        if len(numbers):
            index._is_alive = np.zeros(int(numbers[-1]) + 1, dtype=bool)
            index._is_alive[numbers] = True
            index._counts.update(zip(numbers.tolist(), counts.tolist(), strict=True))
            index._large = entries
        return index

    def __len__(self) -> int:
        """Entries of segments that are there; a block in two segments counts twice."""
        return sum(self._counts.values())

    @property
    def num_bytes(self) -> int:
        """Memory the arrays take."""
        return sum(p.prefixes.nbytes + p.places.nbytes for p in (self._large, self._small, *self._added))

    def add(self, entries: Entries) -> None:
        """Add entries of segments that were not there before."""
        numbers, counts = entries.counts()
        if not len(numbers):
            return
        if (short := int(numbers[-1]) + 1 - len(self._is_alive)) > 0:
            self._is_alive = np.concatenate((self._is_alive, np.zeros(max(short, len(self._is_alive)), dtype=bool)))
        self._is_alive[numbers] = True
        self._counts.update(zip(numbers.tolist(), counts.tolist(), strict=True))
        self._added.append(entries)

    def remove(self, number: int) -> None:
        """Forget a segment's blocks; a segment that is not there is ignored."""
        if self._counts.pop(number, None) is not None:
            self._is_alive[number] = False

    def present(self, keys: Sequence[bytes]) -> np.ndarray:
        """Whether each key has an entry: (n,) bool."""
        self._settle()
        wanted = _prefixes(keys)
        found = np.zeros(len(keys), dtype=bool)
        for level in (self._small, self._large):
            if not len(level) or found.all():
                continue
            at = np.minimum(np.searchsorted(level.prefixes, wanted), len(level) - 1)
            is_equal = level.prefixes[at] == wanted
            is_alive = is_equal & self._is_alive[(level.places[at] >> np.uint64(32)).astype(np.int64)]
            # The first of several equal prefixes may be of a removed segment and the next not.
            for n in np.flatnonzero(is_equal & ~is_alive & ~found):
                is_alive[n] = bool(self._alive_in(level, wanted[n]))
            found |= is_alive
        return found

    def places(self, key: bytes) -> list[tuple[int, int]]:
        """All (segment number, row) that may hold the key, newest level first."""
        self._settle()
        (wanted,) = _prefixes([key])
        return [place for level in (self._small, self._large) for place in self._alive_in(level, wanted)]

    def entries(self) -> Entries:
        """Everything that is there, merged: what an index file keeps."""
        self._settle()
        return self._alive(Entries.merge([self._large, self._small]))

    def _alive_in(self, level: Entries, wanted: np.uint64) -> list[tuple[int, int]]:
        first, last = np.searchsorted(level.prefixes, wanted), np.searchsorted(level.prefixes, wanted, side="right")
        split = ((int(p) >> 32, int(p) & 0xFFFFFFFF) for p in level.places[first:last])
        return [(number, row) for number, row in split if self._is_alive[number]]

    def _alive(self, entries: Entries) -> Entries:
        keep = self._is_alive[entries.segments]
        return entries if keep.all() else Entries(entries.prefixes[keep], entries.places[keep])

    def _settle(self) -> None:
        if not self._added:
            return
        self._small = Entries.merge([self._small, *self._added])
        self._added = []
        if len(self._small) > max(4096, len(self._large) // 8):
            self._large = self._alive(Entries.merge([self._large, self._small]))
            self._small = Entries(_EMPTY, _EMPTY)


def _prefixes(keys: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(key[:PREFIX_BYTES] for key in keys), dtype="<u8")
