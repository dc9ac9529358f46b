"""Keys and values of decoding sequences, gathered from their pages once and kept from step to step.

A decode row needs keys that lie scattered over pages, in one padded batch with those of other rows. Gathering them anew for
every token is a third of a decode step on a CPU; here each step adds what is new. A row is kept for one *owner*: one admission of
one sequence, whose earlier keys never change. Nothing of another owner is ever taken for it, whatever pages it has.

Shapes: B rows, K KV heads, L keys, H head size, X pool slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_LENGTH_STEP = 256


@dataclass(frozen=True)
class Tail:
    """What a decode row still has to attend: positions [first, end) of one owner."""

    row: int
    """Of the step."""
    owner: int
    first: int
    slots: torch.Tensor
    """Pool slots of these positions."""

    @property
    def length(self) -> int:
        return len(self.slots)


@dataclass(frozen=True)
class Update:
    """What brings a layer's copy, if it has had every update before, up to date for one step."""

    number: int
    shape: tuple[int, int]
    """Rows and keys a row that there is room for."""
    tails: list[Tail]
    """All rows of the copy, in order."""
    moves: list[tuple[int, int]]
    """(from, to): rows that take the place of one that left."""
    fills: list[tuple[int, torch.Tensor]]
    """Rows that are gathered whole."""
    added_rows: torch.Tensor
    added_places: torch.Tensor
    added_slots: torch.Tensor
    """One more key for each of these rows."""

    @property
    def longest(self) -> int:
        return max(tail.length for tail in self.tails)


@dataclass
class _Kept:
    owner: int
    first: int
    length: int


@dataclass
class _Copy:
    keys_BKLH: torch.Tensor
    values_BKLH: torch.Tensor
    shape: tuple[int, int]
    number: int = -1
    """Of the last update it had."""


class DecodeTails:
    """The copies of all layers of one kind of attention."""

    def __init__(self, max_tokens: int) -> None:
        """Room for `max_tokens` keys in each layer, padding included."""
        self._max_tokens = max_tokens
        self._rows: list[_Kept] = []
        self._shape = (0, 0)
        self._layers: dict[int, _Copy] = {}
        self._number = 0

    def plan(self, tails: Sequence[Tail]) -> Update | None:
        """What is to be done for a step with these tails; None if they are too many to be kept."""
        longest = max(tail.length for tail in tails)
        shape = self._room_for(len(tails), longest)
        if shape[0] * shape[1] > self._max_tokens:
            self.forget()
            return None
        if shape != self._shape:
            self._shape, self._rows = shape, []
        by_owner = {tail.owner: tail for tail in tails}
        moves = self._drop({kept.owner for kept in self._rows} - by_owner.keys())
        fills: list[tuple[int, torch.Tensor]] = []
        added: list[tuple[int, int, torch.Tensor]] = []
        for number, kept in enumerate(self._rows):
            tail = by_owner.pop(kept.owner)
            if (tail.first, tail.length) == (kept.first, kept.length + 1):
                added.append((number, kept.length, tail.slots[-1]))
            else:
                fills.append((number, tail.slots))
            kept.first, kept.length = tail.first, tail.length
        for tail in by_owner.values():
            fills.append((len(self._rows), tail.slots))
            self._rows.append(_Kept(tail.owner, tail.first, tail.length))
        found = {tail.owner: tail for tail in tails}
        self._number += 1
        return Update(
            self._number,
            shape,
            [found[kept.owner] for kept in self._rows],
            moves,
            fills,
            torch.tensor([row for row, _, _ in added], dtype=torch.int64),
            torch.tensor([place for _, place, _ in added], dtype=torch.int64),
            torch.stack([slot for _, _, slot in added]) if added else torch.empty(0, dtype=torch.int64),
        )

    def forget(self) -> None:
        """Let go of all copies."""
        self._rows, self._shape = [], (0, 0)
        self._layers.clear()

    def take(
        self, keys_XKH: torch.Tensor, values_XKH: torch.Tensor, update: Update
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values, (B, K, L, H) each, brought up to date from its pool."""
        name, (num_rows, length) = keys_XKH.data_ptr(), update.shape
        copy, moves, fills = self._layers.get(name), update.moves, update.fills
        if copy is None or copy.shape != update.shape:
            _, heads, size = keys_XKH.shape
            kept = [keys_XKH.new_zeros(num_rows, heads, length, size) for _ in range(2)]
            copy = self._layers[name] = _Copy(kept[0], kept[1], update.shape)
        if copy.number != update.number - 1:  # new, or the layer took no part in a step between
            moves, fills = [], [(row, tail.slots) for row, tail in enumerate(update.tails)]
        for copy_BKLH, pool_XKH in ((copy.keys_BKLH, keys_XKH), (copy.values_BKLH, values_XKH)):
            for source, target in moves:
                copy_BKLH[target] = copy_BKLH[source]
            for row, slots in fills:
                copy_BKLH[row, :, : len(slots)] = pool_XKH.index_select(0, slots).transpose(0, 1)
            if len(update.added_rows):
                copy_BKLH[update.added_rows, :, update.added_places] = pool_XKH.index_select(0, update.added_slots)
        copy.number = update.number
        rows, longest = len(update.tails), update.longest
        return copy.keys_BKLH[:rows, :, :longest], copy.values_BKLH[:rows, :, :longest]

    def _room_for(self, num_rows: int, longest: int) -> tuple[int, int]:
        rows, length = self._shape
        if num_rows <= rows and longest <= length:
            return self._shape
        # Some room to grow, so that this is rare.
        return max(rows, num_rows + num_rows // 4), max(length, -(-(longest + 1) // _LENGTH_STEP) * _LENGTH_STEP)

    def _drop(self, owners: set[int]) -> list[tuple[int, int]]:
        """Take these out; the last rows move into their places."""
        moves = []
        for number in reversed(range(len(self._rows))):
            if self._rows[number].owner in owners:
                last = len(self._rows) - 1
                if number != last:
                    moves.append((last, number))
                    self._rows[number] = self._rows[last]
                self._rows.pop()
        return moves
