"""The engine's side of audits: which requests compute everything themselves, and what follows when a stored block was wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hpckv.engine.request import RequestState, RunningSequence
from hpckv.engine.scheduler import Scheduler, StepPlan
from hpckv.kvcache.kv_pool import KVPool
from hpckv.store import TieredStore
from hpckv.store.audit import Auditor


class StepAudit:
    """Looks at every step of an engine whose store is audited."""

    def __init__(self, auditor: Auditor, store: TieredStore, pool: KVPool, scheduler: Scheduler) -> None:
        self._auditor, self._store, self._pool, self._scheduler = auditor, store, pool, scheduler

    def note_step(self, plan: StepPlan) -> None:
        """Hand over prompts that were computed for comparison. Call before anything of the step is released."""
        for chunk in plan.chunks:
            seq = chunk.seq
            if seq.is_audit and chunk.samples:
                seq.is_audit = False
                number = seq.num_prompt_tokens // self._pool.geometry.block_tokens
                self._auditor.submit(seq.keys[:number], [self._pool.read_block(page) for page in seq.pages[:number]])

    def restart_if_needed(self, states: Iterable[RequestState]) -> Sequence[RunningSequence]:
        """When a writer was found out, forget everything that was cached and let all unanswered requests begin again.

        Draws depend on seed and position only, so sequences that had used nothing wrong come to the same text.
        """
        if not self._auditor.take_distrusted():
            return []
        self._store.forget_copies()
        restarted = self._scheduler.restart_all()
        finished = [seq for state in states if not state.error for seq in state.sequences if seq.finish_reason]
        for seq in (*restarted, *finished):
            seq.begin_again()
        for seq in finished:  # beside unfinished ones of the same request
            self._scheduler.add(seq)
        return [*restarted, *finished]
