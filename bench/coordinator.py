#!/usr/bin/env python3
"""What rank 0 spends on a step beside computing: scheduling and the message to the other ranks, with many requests alive.

    python bench/coordinator.py --requests 10000 --steps 400

No torch and no model: every step's tokens are made up. 10,000 requests of 1,000 tokens, 600 of them shared by fifty each, are
queued; 256 run at a time. The message is the same for every rank, so its size does not depend on how many there are; how long
another rank takes to read it is given beside it. Goals: 2 ms a step, 64 KiB a message.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from rich.console import Console
from rich.table import Table

from hpckv.engine.config import EngineConfig
from hpckv.engine.request import Request, RunningSequence, SamplingParams
from hpckv.engine.scheduler import Scheduler
from hpckv.engine.step_message import FIRST_INTS, MessageReader, MessageWriter
from hpckv.kvcache import CacheManager
from hpckv.store import ROOT_KEY, block_key, prefix_keys

BLOCK, KEY, IDENTITY = 64, bytes(32), bytes(32)
PROMPT_TOKENS, SHARED_TOKENS, MATES = 1000, 600, 50


def queue(count: int, num_pages: int) -> Scheduler:
    """A scheduler with so many requests waiting, in plan order."""
    cache = CacheManager(num_pages, BLOCK, lambda parent, tokens: block_key(KEY, IDENTITY, parent or ROOT_KEY, tokens))
    scheduler = Scheduler(EngineConfig(), cache)
    rng = random.Random(0)
    params = SamplingParams(max_tokens=10_000)
    for number in range(count):
        if number % MATES == 0:
            shared = rng.choices(range(128_000), k=SHARED_TOKENS)
        prompt = shared + rng.choices(range(128_000), k=PROMPT_TOKENS - SHARED_TOKENS)
        keys = prefix_keys(KEY, IDENTITY, prompt, BLOCK)
        cache.expect(keys)
        scheduler.add(RunningSequence(Request(str(number), prompt, params, number), 0, keys, number))
    return scheduler


def main() -> None:
    """Both phases: while prompts come in, and when all that may run is decoding."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--requests", type=int, default=10_000)
    ap.add_argument("--steps", type=int, default=400)
    args = ap.parse_args()
    scheduler = queue(args.requests, 20_000)
    writer, reader, rng = MessageWriter(), MessageReader(), random.Random(1)
    rows: dict[str, list[tuple[float, float, float, int]]] = {"prefill": [], "decode": []}
    for number in range(args.steps):
        begun = time.perf_counter()
        plan = scheduler.next_step()
        planned = time.perf_counter()
        array = writer.encode(number, plan)
        written = time.perf_counter()
        reader.decode(array)
        read = time.perf_counter()
        scheduler.complete(plan)
        completed = time.perf_counter()
        for chunk in plan.chunks:
            if chunk.samples:
                chunk.seq.tokens.append(rng.randrange(128_000))
        # Each request ends after about 200 tokens, so that others take their place.
        ended = [c.seq for c in plan.chunks if c.samples and rng.random() < 1 / 200]
        ending = time.perf_counter()
        for seq in ended:
            scheduler.finish(seq)
        ending = time.perf_counter() - ending
        kind = "decode" if plan.num_tokens == len(plan.chunks) else "prefill"
        size = 4 * max(FIRST_INTS, len(array))
        rows[kind].append((planned - begun + completed - read + ending, written - planned, read - written, size))
    table = Table(
        "steps", "count", "scheduling ms", "message ms", "reading it ms", "message KiB, median", "most", box=None
    )
    for kind, found in rows.items():
        times = [f"{statistics.median(column) * 1e3:.2f}" for column in list(zip(*found, strict=True))[:3]]
        sizes = [row[3] / 1024 for row in found]
        table.add_row(kind, str(len(found)), *times, f"{statistics.median(sizes):.1f}", f"{max(sizes):.1f}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
