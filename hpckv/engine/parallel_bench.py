"""Where the time of a step goes when a model is spread over ranks: measured by answering made-up prompts."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from typing import Any

from hpckv.comm import ParallelConfig, World
from hpckv.engine.config import EngineConfig
from hpckv.engine.engine import Engine
from hpckv.engine.executor import Coordinator, serve
from hpckv.engine.rank import Rank
from hpckv.engine.request import Request, SamplingParams
from hpckv.engine.station import Times
from hpckv.kvcache import CacheConfig
from hpckv.model import ModelSettings


@dataclass(frozen=True)
class Load:
    """What is computed: prompts that share nothing."""

    num_prompts: int = 16
    prompt_tokens: int = 64
    output_tokens: int = 64


def measure(settings: ModelSettings, parallel: ParallelConfig, load: Load, world: World) -> dict[str, Any]:
    """On rank 0 what a step's time is made of; on the others nothing. Every rank must call it.

    Per rank, in seconds a step: `compute`, `tensor` (exchange between tensor ranks), `stage` (waiting for the stage before),
    `message` (for rank 0's step, on rank 0 for the tokens). `bubble` is the share of all ranks' wall time in which they did not
    compute; `schedule` is rank 0's, `message_bytes` what it sent to each rank, both a step.
    """
    cache = CacheConfig(block_tokens=64)
    if not world.is_root:
        rank = Rank(settings, store=None, cache=cache, engine=EngineConfig(), parallel=parallel, world=world)
        serve(rank)
        return {}
    engine = Engine(settings, cache=cache, parallel=parallel, world=world)
    engine.load()
    rng = random.Random(0)
    params = SamplingParams(max_tokens=load.output_tokens, ignore_eos=True)
    for number in range(load.num_prompts):
        prompt = rng.choices(range(engine.model_config.vocab_size), k=load.prompt_tokens)
        engine.add(Request(str(number), prompt, params, number))
    begun, tokens = time.perf_counter(), 0
    while engine.num_unfinished:
        tokens += sum(answer.usage.completion_tokens for answer in engine.step())
    wall_s = time.perf_counter() - begun
    executor = engine.executor
    engine.close()
    steps = engine.scheduler.stats.steps
    coordinator = executor if isinstance(executor, Coordinator) else None
    ranks = coordinator.rank_times if coordinator else [Times(compute_s=engine.times.forward_s, steps=steps)]
    busy = sum(found.compute_s - found.tensor_s for found in ranks)
    return {
        "tp": parallel.tp,
        "pp": parallel.pp,
        "micro_batches": parallel.num_micro_batches,
        "wall_s": wall_s,
        "steps": steps,
        "output_tokens_per_s": tokens / wall_s,
        "bubble": 1 - busy / (len(ranks) * wall_s),
        "schedule_s": engine.times.schedule_s,
        "message_bytes": coordinator.message_bytes if coordinator else 0,
        "ranks": [asdict(found) for found in ranks],
    }
