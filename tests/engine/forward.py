"""Logits of an engine at every position of a prompt, not only at the last: for tests."""

import torch

from hpckv.engine.engine import Engine
from hpckv.engine.request import Request as EngineRequest
from hpckv.engine.request import RunningSequence, SamplingParams
from hpckv.engine.scheduler import ScheduledChunk, StepPlan
from hpckv.engine.step import rank_chunks


def logits_at_every_position(engine: Engine, prompt: list[int], *, chunk: int) -> torch.Tensor:
    """(len(prompt), V), computed in chunks of `chunk` tokens (0: at once), starting from an empty sequence."""
    seq = RunningSequence(EngineRequest("probe", prompt, SamplingParams()), 0, [], 0)
    engine.cache.grow(seq, len(prompt))
    rows = []
    for start in range(0, len(prompt), chunk or len(prompt)):
        count = min(chunk or len(prompt), len(prompt) - start)
        plan = StepPlan()
        plan.add(ScheduledChunk(seq, start, count, samples=False))
        with torch.inference_mode():
            rows.append(engine.runner.logits(engine.runner.forward(rank_chunks(plan))))
        seq.num_computed = start + count
    engine.cache.release(seq)
    return torch.cat(rows)
