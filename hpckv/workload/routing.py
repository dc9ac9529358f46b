"""Which replica computes what: a run is cut into whole subtrees of its prefix tree, and each goes where its prefix is.

Pure arithmetic on the plan. All scores are in prompt tokens: what a replica would not have to compute, less what is
queued there before.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpckv.comm.parallel_dims import RoutingConfig
from hpckv.workload.plan import PlannedPrompt

PLACES = ("device", "host", "local")
"""Where a replica may hold blocks that others do not; the shared filesystem is equally near to all."""
_PIECES = 8
"""Subtrees a replica, at least, where the tree allows it: with fewer more of a prefix stays together, more are more even."""


@dataclass(frozen=True)
class Subtree:
    """Prompts that stay together."""

    prompts: tuple[int, ...]
    """Indices, in the plan's order."""
    prefix: tuple[bytes, ...]
    """Keys of the blocks with which all of them begin."""
    costs: tuple[int, ...]
    """Of each prompt: the tokens that those before it have not computed, and its answer's."""


def cut_subtrees(
    prompts: Sequence[PlannedPrompt], order: Sequence[int], outputs: Sequence[int], block_tokens: int, replicas: int
) -> list[Subtree]:
    """The plan as subtrees, in its order: as few as even shares allow.

    `outputs` are tokens each answer may have. A subtree that is more than an eighth of a replica's share is cut into its
    children, each of which computes the prefix above once more where it goes to another replica.
    """
    blocks = [prompts[n].keys for n in order]
    shared = np.array([0] + [num_common(a, b) for a, b in itertools.pairwise(blocks)], np.int64)
    lengths = np.array([len(prompts[n].token_ids) for n in order], np.int64)
    costs = lengths - shared * block_tokens + np.array([outputs[n] for n in order], np.int64)
    if replicas == 1 or not blocks:
        bounds = [(0, len(blocks))] if blocks else []
    else:
        bounds = list(_cut(shared, costs, int(costs.sum()) // (_PIECES * replicas)))
    return [
        Subtree(
            tuple(order[start:end]),
            tuple(blocks[start][: _depth(shared, start, end, len(blocks[start]))]),
            tuple(costs[start:end].tolist()),
        )
        for start, end in bounds
    ]


def _cut(shared: npt.NDArray[np.int64], costs: npt.NDArray[np.int64], limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of the plan's order."""
    sums = np.concatenate([[0], np.cumsum(costs)])
    todo = [(0, len(costs))]
    while todo:
        start, end = todo.pop()
        if end - start == 1 or sums[end] - sums[start] <= limit:
            yield start, end
            continue
        inner = shared[start + 1 : end]
        edges = [start, *(start + 1 + np.flatnonzero(inner == inner.min())).tolist(), end]
        children: list[tuple[int, int]] = []
        for child in itertools.pairwise(edges):
            if children and sums[child[1]] - sums[children[-1][0]] <= limit:  # small neighbours stay together
                children[-1] = children[-1][0], child[1]
            else:
                children.append(child)
        todo.extend(reversed(children))


def num_common(a: Sequence[bytes], b: Sequence[bytes]) -> int:
    """Keys are chained: where one differs, all that follow do."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[middle - 1] == b[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def _depth(shared: npt.NDArray[np.int64], start: int, end: int, own: int) -> int:
    return int(shared[start + 1 : end].min()) if end - start > 1 else own


class Placement:
    """Chooses the next subtree of a replica."""

    def __init__(
        self,
        subtrees: Sequence[Subtree],
        sessions: Sequence[str | None],
        num_replicas: int,
        weights: RoutingConfig,
        block_tokens: int,
    ) -> None:
        """`sessions` names the conversation of each prompt, if it is part of one."""
        self._subtrees, self._weights, self._block_tokens = subtrees, weights, block_tokens
        self._held = np.zeros((num_replicas, len(subtrees), len(PLACES)), np.int64)
        self._queued = np.zeros(num_replicas, np.int64)
        self.given = [0] * num_replicas
        """Cost of what each replica was given so far."""
        self.even_share = -(-sum(sum(subtree.costs) for subtree in subtrees) // num_replicas)
        self._left = list(range(len(subtrees)))
        self._in_session = np.zeros((num_replicas, len(subtrees)), np.int64)
        """Tokens of conversations that the replica knows."""
        self._parts: dict[str, dict[int, int]] = defaultdict(dict)
        """Of each conversation: its tokens by subtree."""
        for number, subtree in enumerate(subtrees):
            for prompt, cost in zip(subtree.prompts, subtree.costs, strict=True):
                if name := sessions[prompt]:
                    self._parts[name][number] = self._parts[name].get(number, 0) + cost
        self._sessions: list[list[str]] = [[] for _ in subtrees]
        for name, parts in self._parts.items():
            for number in parts:
                self._sessions[number].append(name)
        self._known: list[set[str]] = [set() for _ in range(num_replicas)]

    @property
    def num_left(self) -> int:
        """Subtrees that no replica has."""
        return len(self._left)

    def note_held(self, replica: int, blocks: Sequence[Sequence[int]]) -> None:
        """Of each subtree's prefix, how many blocks the replica holds at each of `PLACES` and at none before it."""
        self._held[replica] = blocks

    def note_done(self, replica: int, cost: int) -> None:
        """An answer has come."""
        self._queued[replica] -= cost

    def scores(self) -> npt.NDArray[np.float64]:
        """(replicas, subtrees left): what is saved by computing it there, less what is queued there."""
        weights = self._weights
        places = np.array([getattr(weights, place) for place in PLACES])
        saved = self._held[:, self._left] @ places * self._block_tokens
        found = saved + weights.session * self._in_session[:, self._left] - weights.load * self._queued[:, None]
        return np.asarray(found, np.float64)

    def take(self, replica: int) -> int:
        """The subtree that is better here than anywhere else, by most; of equals the first. It is the replica's now."""
        scores = self.scores()
        others = np.delete(scores, replica, axis=0)
        best = scores[replica] - (others.max(axis=0) if len(others) else 0)
        number = self._left.pop(int(np.argmax(best)))
        cost = sum(self._subtrees[number].costs)
        self._queued[replica] += cost
        self.given[replica] += cost
        for name in self._sessions[number]:
            if name not in self._known[replica]:
                self._known[replica].add(name)
                for other, tokens in self._parts[name].items():
                    self._in_session[replica, other] += tokens
        return number

    def by_queue(self) -> list[int]:
        """Replicas, the least busy first."""
        return [int(n) for n in np.argsort(self._queued, kind="stable")]
