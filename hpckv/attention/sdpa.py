"""The fast backend, on torch's own kernels: runs everywhere.

A step is cut into a few large problems, each one kernel call a layer:

    shared   rows of several sequences over prefix pages they share: read once for the group
    past     a prefill chunk over the pages before it, in full
    own      a prefill chunk over itself, causal
    tail     decode rows over what is left of their sequences, padded into one batch
    masked   a prefill chunk in a layer whose sliding window is shorter than what lies before it

A row's partial results are merged by log-sum-exp. Keys that lie in consecutive pages are read in place.

Shapes: T packed tokens, N heads, K KV heads, G = N / K, H head size, X pool slots, L keys, B problems, R rows.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hpckv.attention.backend import AttentionBackend, AttentionPlan, HeadShape, SequenceChunk
from hpckv.attention.decode_tails import DecodeTails, Tail, Update
from hpckv.attention.kernels import Merger, attend_with_lse
from hpckv.attention.sharing import MIN_SAVED_TOKENS, find_shared_runs

LONG_TAIL_TOKENS = 2048
"""The beginning of a decode row's keys, if it lies in consecutive pages and is at least this long, is attended in
place; the rest of all rows is gathered into one padded batch. (At 576 tokens and 8 rows one call a row made a step
28 % slower than gathering: 67 against 52 ms on two cores, interleaved.)"""

CPU = torch.device("cpu")
Rows = torch.Tensor | slice
Slots = torch.Tensor | slice


@dataclass(frozen=True)
class Full:
    """Every row attends every slot."""

    rows: Rows
    slots: Slots


@dataclass(frozen=True)
class Causal:
    """B equally long chunks, each over its own tokens."""

    rows: Rows
    slots: Slots
    num_chunks: int


@dataclass(frozen=True)
class Padded:
    """One row a problem, over its own slots; `mask_BL` is 0 or -inf."""

    rows_B: Rows
    slots_BL: torch.Tensor
    mask_BL: torch.Tensor


@dataclass(frozen=True)
class Masked:
    """Rows over slots with a mask (R, L) of 0 and -inf."""

    rows: Rows
    slots: Slots
    mask_RL: torch.Tensor


@dataclass(frozen=True)
class Kept:
    """One row a problem, over keys that are kept from step to step; `mask_BL` is 0 or -inf."""

    rows_B: Rows
    update: Update
    mask_BL: torch.Tensor


Problem = Full | Causal | Padded | Kept | Masked


@dataclass
class SdpaPlan:
    """The problems of a step for each sliding window; None is full attention."""

    num_rows: int
    problems: dict[int | None, list[Problem]] = field(default_factory=dict)


class SdpaBackend(AttentionBackend):
    """Throughput first; results do not depend on batch mates beyond rounding."""

    def __init__(
        self, *, block_tokens: int, device: torch.device, shares_prefixes: bool = True, kept_tail_tokens: int = 0
    ) -> None:
        self._tails = DecodeTails(kept_tail_tokens) if kept_tail_tokens else None
        self.block_tokens = block_tokens
        self.device = device
        self.shares_prefixes = shares_prefixes

    def plan(self, chunks: Sequence[SequenceChunk], windows: frozenset[int | None]) -> SdpaPlan:
        plan = SdpaPlan(num_rows=sum(c.num_tokens for c in chunks))
        longest = max(c.end for c in chunks)
        full = self._plan_full(chunks)
        for window in windows:
            binds = window is not None and longest > window
            plan.problems[window] = self._plan_window(chunks, window) if binds and window else full
        return plan

    def attend(
        self,
        q_TNH: torch.Tensor,
        keys_XKH: torch.Tensor,
        values_XKH: torch.Tensor,
        plan: AttentionPlan,
        shape: HeadShape,
    ) -> torch.Tensor:
        assert isinstance(plan, SdpaPlan)
        problems = plan.problems[shape.window]
        step = _Step(q_TNH, keys_XKH, values_XKH, shape, self._tails)
        if len(problems) == 1 and not (isinstance(problems[0], Kept) and isinstance(problems[0].rows_B, torch.Tensor)):
            return step.solve(problems[0])[1]  # it has every row, in order
        merger = Merger(q_TNH)
        for problem in problems:
            merger.add(*step.solve(problem))
        return merger.out_TNH.to(q_TNH.dtype)

    def _plan_full(self, chunks: Sequence[SequenceChunk]) -> list[Problem]:
        problems: list[Problem] = []
        first_rows = _first_rows(chunks)
        shortest_worth = MIN_SAVED_TOKENS if self.shares_prefixes else 1 << 62
        runs, covered = find_shared_runs(chunks, self.block_tokens, shortest_worth)
        for run in runs:
            rows = [r for m in run.members for r in range(first_rows[m], first_rows[m] + chunks[m].num_tokens)]
            slots = self._slots(
                chunks[run.members[0]].pages, run.first * self.block_tokens, run.last * self.block_tokens
            )
            problems.append(Full(self._as_rows(rows), slots))

        own: dict[int, list[int]] = defaultdict(list)
        tails: list[tuple[int, int, int]] = []
        for i, chunk in enumerate(chunks):
            first = covered[i] * self.block_tokens
            row = first_rows[i]
            if chunk.num_tokens == 1:
                tails.append((i, first, chunk.end))
                continue
            own[chunk.num_tokens].append(i)
            if first < chunk.start:
                problems.append(Full(slice(row, row + chunk.num_tokens), self._slots(chunk.pages, first, chunk.start)))
        for num_tokens, same in own.items():
            rows = [r for i in same for r in range(first_rows[i], first_rows[i] + num_tokens)]
            parts = [self._slots(chunks[i].pages, chunks[i].start, chunks[i].end) for i in same]
            slots = parts[0] if len(parts) == 1 else torch.cat([_as_index(p, self.device) for p in parts])
            problems.append(Causal(self._as_rows(rows), slots, len(same)))
        return problems + self._plan_tails(chunks, first_rows, tails, self._tails)

    def _plan_tails(
        self,
        chunks: Sequence[SequenceChunk],
        first_rows: Sequence[int],
        tails: Sequence[tuple[int, int, int]],
        keep: DecodeTails | None = None,
    ) -> list[Problem]:
        """Decode rows: (chunk, first position, end) of what each still has to attend."""
        problems: list[Problem] = []
        padded: list[Tail] = []
        for i, first, end in tails:
            row, pages = first_rows[i], chunks[i].pages
            split = self._end_of_run(pages, first, end)
            if split - first >= LONG_TAIL_TOKENS:
                problems.append(Full(slice(row, row + 1), self._slots(pages, first, split)))
                first = split
            if first < end:
                slots = _as_index(self._slots(pages, first, end, CPU), CPU)
                padded.append(Tail(row, chunks[i].owner, first, slots))
        if padded and keep and all(tail.owner for tail in padded) and (update := keep.plan(padded)):
            problems.append(Kept(self._as_index_of_rows(update.tails), update, self._mask(update.tails)))
        elif padded:
            # Put together in host memory: to a GPU it goes in one copy, not one a row.
            slots_BL = torch.nn.utils.rnn.pad_sequence([tail.slots for tail in padded], batch_first=True)
            rows = self._as_rows([tail.row for tail in padded])
            problems.append(Padded(rows, slots_BL.to(self.device), self._mask(padded)))
        return problems

    def _mask(self, tails: Sequence[Tail]) -> torch.Tensor:
        """(B, L): 0 where a tail has a key, minus infinity behind its end."""
        lengths = torch.tensor([tail.length for tail in tails], device=self.device)
        longest = max(tail.length for tail in tails)
        hidden = torch.arange(longest, device=self.device) >= lengths[:, None]
        return torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, -math.inf)

    def _as_index_of_rows(self, tails: Sequence[Tail]) -> Rows:
        rows = [tail.row for tail in tails]
        is_run = all(b - a == 1 for a, b in itertools.pairwise(rows))
        return slice(rows[0], rows[-1] + 1) if is_run else torch.tensor(rows, device=self.device)

    def _end_of_run(self, pages: Sequence[int], first: int, end: int) -> int:
        """The position up to which [first, end) lies in consecutive pages."""
        size = self.block_tokens
        last = first // size
        while (last + 1) * size < end and pages[last + 1] == pages[last] + 1:
            last += 1
        return min(end, (last + 1) * size)

    def _plan_window(self, chunks: Sequence[SequenceChunk], window: int) -> list[Problem]:
        problems: list[Problem] = []
        first_rows = _first_rows(chunks)
        tails = []
        for i, chunk in enumerate(chunks):
            first = max(0, chunk.start - window + 1)
            if chunk.num_tokens == 1:
                tails.append((i, first, chunk.end))
                continue
            query = torch.arange(chunk.start, chunk.end, device=self.device)[:, None]
            key = torch.arange(first, chunk.end, device=self.device)
            hidden = (key > query) | (key <= query - window)
            mask_RL = torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, -math.inf)
            rows = slice(first_rows[i], first_rows[i] + chunk.num_tokens)
            problems.append(Masked(rows, self._slots(chunk.pages, first, chunk.end), mask_RL))
        return problems + self._plan_tails(chunks, first_rows, tails)

    def _slots(self, pages: Sequence[int], first: int, end: int, device: torch.device | None = None) -> Slots:
        """Pool slots of positions [first, end): a slice where the pages are consecutive, else on `device` or the step's."""
        size = self.block_tokens
        low, high = first // size, -(-end // size)
        used = pages[low:high]
        if all(b - a == 1 for a, b in itertools.pairwise(used)):
            base = used[0] * size - low * size
            return slice(base + first, base + end)
        slots = torch.tensor(used)[:, None] * size + torch.arange(size)
        return slots.flatten()[first - low * size : end - low * size].to(device or self.device)

    def _as_rows(self, rows: list[int]) -> Rows:
        if rows[-1] - rows[0] + 1 == len(rows):
            return slice(rows[0], rows[-1] + 1)
        return torch.tensor(rows, device=self.device)


@dataclass(frozen=True)
class _Step:
    """One layer's tensors while its problems are solved."""

    q_TNH: torch.Tensor
    keys_XKH: torch.Tensor
    values_XKH: torch.Tensor
    shape: HeadShape
    tails: DecodeTails | None = None

    def solve(self, problem: Problem) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        """(rows, their partial outputs (R, N, H), their log-sum-exps (R, N))."""
        match problem:
            case Full(rows, slots):
                return rows, *self._rows_over_slots(rows, slots, None)
            case Masked(rows, slots, mask_RL):
                return rows, *self._rows_over_slots(rows, slots, mask_RL)
            case Padded(rows_B, slots_BL, mask_BL):
                return rows_B, *self._padded(rows_B, slots_BL, mask_BL)
            case Kept(rows_B, update, mask_BL):
                assert self.tails is not None
                kept = self.tails.take(self.keys_XKH, self.values_XKH, update)
                return rows_B, *self._over_padded(rows_B, *kept, mask_BL)
            case Causal(rows):
                return rows, *self._causal(problem)

    def _rows_over_slots(
        self, rows: Rows, slots: Slots, mask_RL: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        s = self.shape
        # The G heads of a KV head become rows, so that its keys are read once.
        q_RKGH = self.q_TNH[rows].unflatten(1, (s.num_kv_heads, s.group_size))
        num_rows = q_RKGH.shape[0]
        q_KXH = q_RKGH.transpose(0, 1).reshape(1, s.num_kv_heads, num_rows * s.group_size, s.head_dim)
        if mask_RL is not None:
            mask_RL = mask_RL.to(q_KXH.dtype).repeat_interleave(s.group_size, dim=0)
        out, lse = attend_with_lse(
            q_KXH,
            self.keys_XKH[slots].transpose(0, 1)[None],
            self.values_XKH[slots].transpose(0, 1)[None],
            scale=s.scale,
            softcap=s.softcap,
            mask=mask_RL,
        )
        out_RNH = out[0].unflatten(1, (num_rows, s.group_size)).transpose(0, 1).flatten(1, 2)
        lse_RN = lse[0].unflatten(1, (num_rows, s.group_size)).transpose(0, 1).flatten(1, 2)
        return out_RNH, lse_RN

    def _padded(self, rows_B: Rows, slots_BL: torch.Tensor, mask_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (
            pool.index_select(0, slots_BL.flatten()).unflatten(0, slots_BL.shape).transpose(1, 2)
            for pool in (self.keys_XKH, self.values_XKH)
        )
        return self._over_padded(rows_B, keys, values, mask_BL)

    def _over_padded(
        self, rows_B: Rows, keys: torch.Tensor, values: torch.Tensor, mask_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        s = self.shape
        q_BKGH = self.q_TNH[rows_B].unflatten(1, (s.num_kv_heads, s.group_size))
        mask = mask_BL[:, None, None].to(q_BKGH.dtype)
        out, lse = attend_with_lse(q_BKGH, keys, values, scale=s.scale, softcap=s.softcap, mask=mask)
        return out.flatten(1, 2), lse.flatten(1, 2)

    def _causal(self, problem: Causal) -> tuple[torch.Tensor, torch.Tensor]:
        s = self.shape
        q_BRKGH = self.q_TNH[problem.rows].unflatten(0, (problem.num_chunks, -1)).unflatten(2, (s.num_kv_heads, -1))
        q_XGRH = q_BRKGH.permute(0, 2, 3, 1, 4).flatten(0, 1)  # X = B * K
        keys, values = (
            pool[problem.slots].unflatten(0, (problem.num_chunks, -1)).transpose(1, 2).flatten(0, 1)[:, None]
            for pool in (self.keys_XKH, self.values_XKH)
        )
        shape = q_XGRH.shape
        out, lse = attend_with_lse(
            q_XGRH, keys.expand(shape), values.expand(shape), scale=s.scale, softcap=s.softcap, is_causal=True
        )
        out_BRKGH = out.unflatten(0, (problem.num_chunks, -1)).permute(0, 3, 1, 2, 4)
        lse_BRKG = lse.unflatten(0, (problem.num_chunks, -1)).permute(0, 3, 1, 2)
        return out_BRKGH.reshape(-1, s.num_heads, s.head_dim), lse_BRKG.reshape(-1, s.num_heads)


def _first_rows(chunks: Sequence[SequenceChunk]) -> list[int]:
    rows, total = [], 0
    for chunk in chunks:
        rows.append(total)
        total += chunk.num_tokens
    return rows


def _as_index(slots: Slots, device: torch.device) -> torch.Tensor:
    return torch.arange(slots.start, slots.stop, device=device) if isinstance(slots, slice) else slots
