"""Which tokens the next forward computes. Pure bookkeeping without torch: a day of traffic replays in a test.

Each step: every running sequence first (one token in decode, a chunk in prefill), then waiting ones in plan order,
until the token budget is used. A sequence whose next block another one is computing is held until that block is there;
one whose blocks are in the store waits aside until they are in memory, while others run.
When pages run out the sequence that comes last in plan order is preempted: its pages go, its tokens are computed
again later (mostly found in the cache).
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hpckv.engine.config import EngineConfig
from hpckv.engine.request import RunningSequence
from hpckv.kvcache import CacheManager
from hpckv.kvcache.cache_manager import Admission

_READ_AHEAD = 32
"""Sequences whose stored blocks are fetched at once, ahead of their turn."""


class ScheduledChunk(NamedTuple):
    """Tokens [start, end) of a sequence; `samples` if the next token follows from them."""

    seq: RunningSequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @classmethod
    def next_of(cls, seq: RunningSequence, limit: int) -> ScheduledChunk:
        """As much of what is left of `seq` as `limit` allows."""
        start, end = seq.num_computed, len(seq.tokens)
        count = min(end - start, limit)
        return cls(seq, start, count, start + count == end)


@dataclass
class StepPlan:
    """One forward's work, in row order."""

    chunks: list[ScheduledChunk] = field(default_factory=list)
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    """Of chunks of more than one."""
    left: list[RunningSequence] = field(default_factory=list)
    """Sequences that stopped running since the plan before: finished, or preempted."""

    def add(self, chunk: ScheduledChunk) -> None:
        self.chunks.append(chunk)
        self.num_tokens += chunk.num_tokens
        if chunk.num_tokens > 1:
            self.num_prompt_tokens += chunk.num_tokens


@dataclass
class SchedulerStats:
    """Append-only counters, in tokens unless said."""

    steps: int = 0
    prefill_tokens: int = 0
    """Prompt tokens computed, each prefix once."""
    decode_tokens: int = 0
    recomputed_tokens: int = 0
    """Tokens computed again after a preemption."""
    preemptions: int = 0
    """Sequences."""


class Scheduler:
    """Owns waiting, held and running sequences.

    Several plans may be computed at once, over disjoint sequences: what `next_step` chose is in flight until `complete`.
    """

    def __init__(
        self,
        config: EngineConfig,
        cache: CacheManager,
        *,
        num_micro_batches: int = 1,
        read_ahead_tokens: int = 4096,
    ) -> None:
        """Each plan takes about one `num_micro_batches`-th of the running sequences.

        Stored blocks are fetched ahead for no more sequences than have `read_ahead_tokens` together, and always for one: that
        bounds the memory they take.
        """
        self.config = config
        self.cache = cache
        self.stats = SchedulerStats()
        self.running: dict[RunningSequence, None] = {}
        """An ordered set."""
        self._waiting: list[tuple[tuple[int, int], int, RunningSequence]] = []
        self._arrivals = itertools.count(1)
        self._held: dict[bytes, list[RunningSequence]] = defaultdict(list)
        self._loading: list[RunningSequence] = []
        self._chunk = config.chunk_tokens or config.max_batch_tokens
        self._num_micro_batches, self._read_ahead_tokens = num_micro_batches, read_ahead_tokens
        self._in_flight: set[RunningSequence] = set()
        self._left: list[RunningSequence] = []

    @property
    def num_unfinished(self) -> int:
        return len(self.running) + len(self._waiting) + len(self._loading) + sum(map(len, self._held.values()))

    @property
    def loading(self) -> list[RunningSequence]:
        """Sequences whose stored blocks are on their way."""
        return list(self._loading)

    @property
    def unstarted(self) -> list[RunningSequence]:
        """Sequences that have never run and whose blocks nobody fetches."""
        waiting = [seq for *_, seq in self._waiting] + [seq for held in self._held.values() for seq in held]
        return [seq for seq in waiting if not seq.was_admitted]

    def add(self, seq: RunningSequence) -> None:
        seq.arrival = seq.arrival or next(self._arrivals)
        heapq.heappush(self._waiting, (*_place(seq), seq))

    def next_step(self) -> StepPlan:
        """Choose the next forward's tokens and take their pages. Empty only when nothing is left but what is loading."""
        plan = StepPlan()
        self._collect_loaded()
        preempted = self.stats.preemptions
        self._schedule_running(plan)
        if self.stats.preemptions == preempted:  # else a newcomer would take the pages that were just missing
            self._schedule_waiting(plan)
        self.stats.steps += 1
        self._in_flight.update(chunk.seq for chunk in plan.chunks)
        plan.left, self._left = self._left, []
        return plan

    def is_in_flight(self, seq: RunningSequence) -> bool:
        """Whether a plan with it has not been completed yet."""
        return seq in self._in_flight

    def complete(self, plan: StepPlan) -> None:
        """The step was computed: its blocks may be shared now. Call before sampled tokens are appended."""
        for chunk in plan.chunks:
            self._in_flight.discard(chunk.seq)
            self._count(chunk)
            if completed := self.cache.commit(chunk.seq, chunk.end):
                self._wake(completed)

    def finish(self, seq: RunningSequence) -> None:
        """A running sequence is done; its complete blocks stay for others."""
        self._stop(seq)

    def remove(self, sequences: Sequence[RunningSequence]) -> None:
        """Take sequences out wherever they are; none may be in flight."""
        for seq in sequences:
            if seq in self.running:
                self.finish(seq)
                continue
            self._give_up_uses(seq)
            self._loading = [other for other in self._loading if other is not seq]
            self._waiting = [entry for entry in self._waiting if entry[-1] is not seq]
            heapq.heapify(self._waiting)
            for held in self._held.values():
                held[:] = [other for other in held if other is not seq]

    def drop_unstarted(self) -> list[RunningSequence]:
        """Forget everything that is not running (a drain); returns it."""
        dropped = [seq for *_, seq in self._waiting] + [seq for held in self._held.values() for seq in held]
        dropped += self._loading
        self._loading.clear()
        self._waiting.clear()
        self._held.clear()
        for seq in dropped:
            self._give_up_uses(seq)
        return dropped

    def restart_all(self) -> list[RunningSequence]:
        """Nothing that is cached or loaded may be used any more: all that is unfinished is to be computed again.

        Nothing may be in flight.
        """
        for seq in list(self.running):
            self._preempt(seq)
        restarted = [seq for *_, seq in self._waiting] + [seq for held in self._held.values() for seq in held]
        restarted += self._loading
        for seq in restarted:
            self.cache.give_up(seq)
        self.cache.disown()
        return restarted

    def _give_up_uses(self, seq: RunningSequence) -> None:
        self.cache.give_up(seq)
        if not seq.was_admitted:
            seq.was_admitted = True
            self.cache.forget_use(seq.keys)

    def _schedule_running(self, plan: StepPlan) -> None:
        share = -(-len(self.running) // self._num_micro_batches)
        ready = sorted((seq for seq in self.running if seq not in self._in_flight), key=_place)
        left = self.config.max_batch_tokens
        for seq in ready[:share]:
            if seq not in self.running:  # it has just been preempted, and so has all behind it
                return
            chunk = ScheduledChunk.next_of(seq, min(self._chunk, left))
            # The victim comes last in order, so it has no chunk in this step yet: at worst it is `seq` itself.
            while not self.cache.grow(seq, chunk.end):
                self._preempt(max((s for s in self.running if s not in self._in_flight), key=_place))
                if seq not in self.running:
                    return
            plan.add(chunk)
            left -= chunk.num_tokens
            if left == 0:
                return

    def _schedule_waiting(self, plan: StepPlan) -> None:
        while self._waiting and len(self.running) < self.config.max_requests:
            limit = min(self._chunk, self.config.max_batch_tokens - plan.num_tokens)
            if limit <= 0:
                return
            seq = self._waiting[0][-1]
            # While something runs, a newcomer must not push out blocks that requests behind it still want.
            outcome = self.cache.admit(
                seq,
                may_evict_wanted=not self.running,
                reserve=len(self.running),
                may_fetch=self._may_fetch,
            )
            if outcome in (Admission.NO_PAGES, Admission.BUSY):
                return
            heapq.heappop(self._waiting)
            if outcome is Admission.LOADING:
                self._loading.append(seq)
                continue
            if isinstance(outcome, bytes):
                self._held[outcome].append(seq)
                continue
            if not seq.was_admitted:
                seq.was_admitted = True
                self.cache.forget_use(seq.keys)
            self.running[seq] = None
            plan.add(ScheduledChunk.next_of(seq, limit))
            self._wake(self.cache.take_arrived())

    @property
    def _may_fetch(self) -> bool:
        ahead = sum(len(seq.tokens) for seq in self._loading)
        return len(self._loading) < _READ_AHEAD and ahead < self._read_ahead_tokens

    def _collect_loaded(self) -> None:
        """Sequences whose blocks came (or will not) may ask for admission again."""
        loading, self._loading = self._loading, []
        for seq in loading:
            if seq.fetch is None or seq.fetch.is_done:
                self.add(seq)
            else:
                self._loading.append(seq)
        self._wake(self.cache.take_arrived())

    def _stop(self, seq: RunningSequence) -> None:
        del self.running[seq]
        self._left.append(seq)
        self._wake(self.cache.release(seq))

    def _preempt(self, seq: RunningSequence) -> None:
        self._stop(seq)
        self.stats.preemptions += 1
        self.add(seq)

    def _wake(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            for seq in self._held.pop(key, ()):
                self.add(seq)

    def _count(self, chunk: ScheduledChunk) -> None:
        seq = chunk.seq
        if chunk.start >= seq.highest_computed and chunk.start >= seq.num_prompt_tokens:
            self.stats.decode_tokens += chunk.num_tokens
            seq.highest_computed = chunk.start + chunk.num_tokens
            return
        fresh = max(chunk.start, min(chunk.end, seq.highest_computed))
        in_prompt = max(0, min(chunk.end, seq.num_prompt_tokens) - fresh)
        self.stats.recomputed_tokens += fresh - chunk.start
        self.stats.prefill_tokens += in_prompt
        self.stats.decode_tokens += chunk.end - fresh - in_prompt
        seq.highest_computed = max(seq.highest_computed, chunk.end)


def _place(seq: RunningSequence) -> tuple[tuple[int, int], int]:
    return seq.order, seq.arrival
