"""Load a stored prefix, or compute it? Both measured on this node, for one model and one store, before a run has to find out."""

from __future__ import annotations

import datetime
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hpckv.comm import ParallelConfig, World
from hpckv.engine.config import EngineConfig
from hpckv.engine.engine import Engine
from hpckv.engine.executor import serve
from hpckv.engine.rank import Rank
from hpckv.engine.request import Request, SamplingParams
from hpckv.errors import CapabilityError
from hpckv.kvcache import CacheConfig
from hpckv.kvcache.load_policy import LoadPolicy
from hpckv.model import ModelSettings
from hpckv.store import StoreConfig
from hpckv.store.read_bench import TierReads, read_tiers

_LONGEST_S = 60.0
"""A longer prefix is not computed once one took so long."""
_DECODE_REQUESTS, _DECODE_PROMPT, _DECODE_TOKENS = 64, 64, 32
_LONG_REQUESTS, _LONG_PROMPT = 16, 2048
"""Of the decode steps that show what contexts cost."""


@dataclass(frozen=True)
class LoadBench:
    """What was measured, and what follows."""

    gpu: str
    model: str
    dtype: str
    block_tokens: int
    block_bytes: int
    """Of this rank's part of a block."""
    prefill_s: dict[int, float]
    """By tokens of the prefix."""
    tiers: list[TierReads]
    full_step_tokens_per_s: float
    """Prompt tokens a second in forwards of `engine.max_batch_tokens`, or of as many as were measured."""
    decode_step_s: float
    """What a decode step takes beside its sequences."""
    decode_token_s: float
    """What each of its sequences adds beside its context."""
    decode_attended_s: float
    """What each token before its last one adds."""
    decode_requests: int
    """That were measured together, beside one alone."""
    start_s: float
    """From the start of the process until the weights were loaded, and what a first batch takes longer than the next."""
    num_gpus: int
    """Of the replica."""
    read_rate: int | None = None
    """`store.read_rate`: reads of the shared store are no faster in a run."""
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())

    @property
    def lengths(self) -> list[int]:
        return list(self.prefill_s)

    def load_s(self, reads: TierReads, tokens: int) -> float:
        """Seconds to load a prefix in a run."""
        count = tokens // self.block_tokens
        slowest = count * self.block_bytes / self.read_rate if self.read_rate and reads.tier == "shared" else 0.0
        return max(reads.seconds[count], slowest)

    def loads(self, reads: TierReads, tokens: int) -> bool:
        """What a run does that has measured just this: asked of the policy itself."""
        policy, num_bytes = LoadPolicy(), tokens // self.block_tokens * self.block_bytes
        policy.note_prefill(tokens, self.prefill_s[tokens])
        policy.note_load(num_bytes, self.load_s(reads, tokens))
        return policy.should_load(tokens, num_bytes)

    def crossover(self, reads: TierReads) -> int | None:
        """From how many tokens on loading wins, of those measured; None if not even for the longest prefix."""
        won = None
        for tokens in reversed(self.lengths):
            if not self.loads(reads, tokens):
                break
            won = tokens
        return won

    def bytes_per_s(self, reads: TierReads) -> float | None:
        """Of the longest prefix that was read."""
        measured = [tokens for tokens in self.lengths if tokens // self.block_tokens in reads.seconds]
        if not measured:
            return None
        return measured[-1] // self.block_tokens * self.block_bytes / max(1e-9, self.load_s(reads, measured[-1]))

    @property
    def decode_tokens_per_s(self) -> float:
        """Of `decode_requests` together, with short contexts."""
        return self.decode_requests / (self.decode_step_s + self.decode_requests * self.decode_token_s)

    @property
    def prefill_times(self) -> tuple[float, float]:
        """Seconds of a prompt token, and of each token before it that it attends: a line through seconds a token by length."""
        lengths = np.array(self.lengths, float)
        seconds = np.array(list(self.prefill_s.values()))
        if len(lengths) > 1:
            # n tokens have n (n - 1) / 2 pairs. Short prompts take long for other reasons: each counts by its length.
            slope, level = np.polyfit((lengths - 1) / 2, seconds / lengths, 1, w=np.sqrt(lengths))
            if slope > 0 and level > 0:
                return float(level), float(slope)
        return 1 / self.full_step_tokens_per_s, 0.0

    @property
    def rate(self) -> dict[str, object]:
        """For the site file's `rates:` (`hpckv.usage.rates`)."""
        token_s, pair_s = self.prefill_times
        shared = next(
            (self.bytes_per_s(reads) for reads in self.tiers if reads.tier == "shared" and not reads.trouble), None
        )
        return {
            "gpu": self.gpu,
            "model": self.model,
            "num_gpus": self.num_gpus,
            "prefill_tokens_per_s": round(1 / token_s, 1),
            **({"attended_tokens_per_s": round(1 / pair_s)} if pair_s else {}),
            "decode_tokens_per_s": round(1 / self.decode_token_s, 1),
            "decode_step_s": round(self.decode_step_s, 6),
            **({"decode_attended_tokens_per_s": round(1 / self.decode_attended_s)} if self.decode_attended_s else {}),
            "start_s": round(self.start_s, 1),
            **({"load_bytes_per_s": round(shared)} if shared else {}),
            "date": self.date,
        }


def measure(
    settings: ModelSettings,
    store: StoreConfig,
    *,
    cache: CacheConfig,
    engine: EngineConfig,
    parallel: ParallelConfig,
    world: World,
    lengths: Sequence[int],
    most_bytes: int,
    started: float,
    step: Callable[[], None] = lambda: None,
) -> LoadBench | None:
    """On rank 0 the measurements; on the others nothing. Every rank must call it.

    `lengths` are cut to whole blocks; those that the model or its pages do not hold are left out, and those whose blocks are
    more than `most_bytes`. The process began at `started`, seconds since 1970. Raises `ModelError`, `CapabilityError`,
    `StoreError`, `AccessError`.
    """
    if not world.is_root:
        serve(Rank(settings, store=None, cache=cache, engine=engine, parallel=parallel, world=world))
        return None
    with Engine(settings, cache=cache, engine=engine, parallel=parallel, world=world) as one:
        geometry, size = one.pages.geometry, cache.block_tokens
        room = min(one.model_config.max_positions - 1, one.pages.num_usable * size - size)
        whole = sorted({tokens // size * size for tokens in lengths})
        fitting = [n for n in whole if 0 < n <= room and n // size * geometry.block_bytes <= most_bytes]
        if not fitting:
            raise CapabilityError(
                f"none of these lengths can be measured: a block has {size} tokens, {room} fit the model and its pages"
            )
        # The other ranks wait in load() meanwhile.
        apart = time.time()
        tiers = read_tiers(store, geometry, [n // size for n in fitting], step)
        apart -= time.time()
        one.load()
        start_s = time.time() - started + apart
        requests = max(
            1, min(_DECODE_REQUESTS, engine.max_requests, one.pages.num_usable * size // (2 * _DECODE_PROMPT))
        )
        first, later = (_answer(one, _prompts(one, requests, _short_prompt(one)), 2) for _ in range(2))
        prefill_s = _prefill(one, fitting, step)
        step_s, token_s, attended_s = _decode_times(one, requests)
        step()
        steps = [n for n in prefill_s if n <= engine.max_batch_tokens] or [min(prefill_s)]
        return LoadBench(
            gpu=one.rank.capability.label,
            model=Path(settings.path).resolve().name,
            dtype=one.rank.dtype_name,
            block_tokens=size,
            block_bytes=geometry.block_bytes,
            prefill_s=prefill_s,
            tiers=tiers,
            full_step_tokens_per_s=steps[-1] / prefill_s[steps[-1]],
            decode_step_s=step_s,
            decode_token_s=token_s,
            decode_attended_s=attended_s,
            decode_requests=requests,
            start_s=start_s + max(0.0, first - later),
            num_gpus=world.group.size,
            read_rate=store.read_rate,
        )


def _prefill(engine: Engine, lengths: Sequence[int], step: Callable[[], None]) -> dict[int, float]:
    """Seconds to compute a prompt of each length, the better of two."""
    found: dict[int, float] = {}
    for tokens in lengths:
        found[tokens] = min(_answer(engine, _prompts(engine, 1, tokens), 1) for _ in range(2))
        step()
        if found[tokens] > _LONGEST_S:
            break
    return found


def _decode_times(engine: Engine, requests: int) -> tuple[float, float, float]:
    """Seconds of a decode step beside its sequences, of each of them, and of each token before its last.

    From one sequence and from so many with short contexts, and from a few with long ones.
    """
    short, tokens = _short_prompt(engine), min(_DECODE_TOKENS, engine.model_config.max_positions // 4)
    few = min(_LONG_REQUESTS, requests)
    # Whole pages for each, and one more that the scheduler keeps free for each that runs.
    held = ((engine.pages.num_usable - 1) // few - 1) * engine.cache_config.block_tokens
    long = min(_LONG_PROMPT, engine.model_config.max_positions // 2, held - tokens)

    def step_s(count: int, length: int) -> float:
        prompts = _prompts(engine, count, length)
        _answer(engine, prompts, 2)  # from now on they are in the cache, and take no time
        first = _answer(engine, prompts, 1)
        return max(1e-9, _answer(engine, prompts, tokens) - first) / (tokens - 1)

    alone, together = step_s(1, short), step_s(requests, short)
    each = max(1e-9, (together - alone) / (requests - 1)) if requests > 1 else alone
    step = max(0.0, alone - each)
    if long < 2 * short:
        return step, each, 0.0
    attended = max(0.0, (step_s(few, long) - step) / few - each) / (long - short)
    return step, max(1e-9, each - attended * (short + tokens / 2)), attended


def _short_prompt(engine: Engine) -> int:
    """Tokens."""
    return min(_DECODE_PROMPT, engine.model_config.max_positions // 4)


def _prompts(engine: Engine, count: int, tokens: int) -> list[list[int]]:
    """That share nothing."""
    chance = random.Random()
    return [chance.choices(range(engine.model_config.vocab_size), k=tokens) for _ in range(count)]


def _answer(engine: Engine, prompts: Sequence[list[int]], output_tokens: int) -> float:
    """Seconds."""
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add(Request(str(number), prompt, params, number))
    begun = time.perf_counter()
    while engine.num_unfinished:
        engine.step()
    return time.perf_counter() - begun
