"""Which boxes of a block together cover another."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from hpckv.store.block import Box


def covered(wanted: Box, found: dict[Box, np.ndarray], count: int) -> np.ndarray:
    """Where boxes that have a block cover the wanted one; `found` says for each box which of `count` blocks it has."""
    whole = np.zeros(count, dtype=bool)
    for box, has in found.items():
        if holds(box, wanted):
            whole |= has
    partial = {box: has for box, has in found.items() if overlap(box, wanted) and not holds(box, wanted)}
    if not partial or whole.all():
        return whole
    # Cells between the boxes' edges: each must be in some box that has the block.
    pieced = np.ones(count, dtype=bool)
    for h0, h1 in _cells(wanted[:2], [box[:2] for box in partial]):
        for l0, l1 in _cells(wanted[2:], [box[2:] for box in partial]):
            holders = [has for box, has in partial.items() if holds(box, (h0, h1, l0, l1))]
            pieced &= np.any(holders, axis=0) if holders else False
    return whole | pieced


def _cells(span: tuple[int, ...], cuts: Iterable[tuple[int, ...]]) -> list[tuple[int, int]]:
    edges = sorted({*span, *(edge for cut in cuts for edge in cut if span[0] < edge < span[1])})
    return list(itertools.pairwise(edges))


def holds(box: Box, inner: Box) -> bool:
    """Whether `inner` lies within `box`."""
    return box[0] <= inner[0] and inner[1] <= box[1] and box[2] <= inner[2] and inner[3] <= box[3]


def overlap(a: Box, b: Box) -> bool:
    """Whether they share a head of a layer."""
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]
