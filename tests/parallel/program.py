"""What every rank runs under `mpiexec`: the cases of a JSON file, one after another, in whatever grid each asks for.

A case: {model, tp, pp, prompts, ...}; its result, written by rank 0 of the first replica, has the answers' tokens and cached
tokens, what each rank read, and if asked for every logit that a token was drawn from.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from hpckv.comm import ParallelConfig, World, enter
from hpckv.engine.config import EngineConfig
from hpckv.engine.engine import Engine
from hpckv.engine.executor import serve
from hpckv.engine.rank import Rank
from hpckv.engine.request import SamplingParams
from hpckv.kvcache import CacheConfig
from hpckv.model import ModelSettings
from hpckv.schema import convert
from hpckv.store import StoreConfig
from hpckv.store.segment import Segment


def note_logits(rank: Rank) -> list[np.ndarray]:
    """Every logit of the vocabulary that is drawn from, on the last stage's first rank; by a gather of its own."""
    seen: list[np.ndarray] = []
    plain, world = rank.runner.logits, rank.world

    def noting(x: torch.Tensor) -> torch.Tensor:
        own = plain(x)
        head = rank.runner.decoder.head
        width = -(-head.vocab_size // rank.dims.tp)
        padded = np.full((len(own), width), -np.inf, np.float32)
        padded[:, : own.shape[1]] = own.numpy()
        whole = np.zeros((rank.dims.tp, *padded.shape), np.float32)
        world.watch.wait(world.tensor.all_gather(padded, whole), "logits")
        seen.append(np.concatenate(list(whole), axis=1)[:, : head.vocab_size])
        return own

    rank.runner.logits = noting
    return seen


PAYLOAD_BYTES: dict[str, int] = {}
"""Read from segments since it was last asked."""


def count_reads() -> None:
    """Count what is read of blocks in files, whatever for."""
    plain = Segment._read_payload

    def counting(self: Segment, into: memoryview, offset: int) -> None:
        PAYLOAD_BYTES["read"] = PAYLOAD_BYTES.get("read", 0) + len(into)
        plain(self, into, offset)

    Segment._read_payload = counting


def answer(case: dict, world: World) -> dict:
    """Run one case on this rank; what rank 0 found, elsewhere nothing but logits."""
    parallel = ParallelConfig(tp=case["tp"], pp=case["pp"], **case.get("parallel", {}))
    given = {
        "store": convert(case["store"], StoreConfig, "case") if case.get("store") else None,
        "cache": CacheConfig(block_tokens=8, device_memory=case.get("memory", "4MiB")),
        "engine": EngineConfig(**case.get("engine", {})),
        "parallel": parallel,
        "world": world,
    }
    settings = ModelSettings(path=case["model"], dtype=case.get("dtype", "float32"))
    found: dict = {}
    if not world.is_root:
        rank = Rank(settings, **given)
        serving_logits = _serve(rank, case)
        read = rank.store.tiers[-1].stats.record if rank.store else {}
    else:
        engine = Engine(settings, **given)
        engine.load()
        serving_logits = note_logits(engine.rank) if case.get("logits") and engine.rank.dims.is_last_stage else []
        answers = list(engine.generate(case["prompts"], SamplingParams(**case.get("sampling", {}))))
        found = {
            "tokens": [a.token_ids for a in answers],
            "cached": [a.usage.cached for a in answers],
        }
        engine.close()
        rank, read = engine.rank, engine.store.tiers[-1].stats.record if engine.store else {}
    record = {
        "box": rank.pages.geometry.box,
        "owned": rank.pages.owned.box,
        "transport": rank.transport.kind,
        "misses": read.get("misses"),
        "payload_bytes": PAYLOAD_BYTES.pop("read", 0),
    }
    everybody = _gather(world, json.dumps(record))
    if case.get("logits") and serving_logits and rank.dims.tp_rank == 0 and world.everyone.rank < world.group.size:
        np.save(case["logits"], np.concatenate(serving_logits))
    return {**found, "ranks": everybody}


def _serve(rank: Rank, case: dict) -> list[np.ndarray]:
    seen: list[list[np.ndarray]] = []
    load = rank.load

    def loading(num_pages: int | None = None) -> None:
        load(num_pages)
        if case.get("logits") and rank.dims.is_last_stage:
            seen.append(note_logits(rank))

    rank.load = loading
    serve(rank)
    rank.close()
    return seen[0] if seen else []


def _gather(world: World, text: str) -> list[dict]:
    own = np.zeros(4096, np.uint8)
    own[: len(text)] = np.frombuffer(text.encode(), np.uint8)
    whole = np.zeros((world.group.size, 4096), np.uint8)
    world.watch.wait(world.group.all_gather(own, whole), "the other ranks' records")
    return [json.loads(row.tobytes().rstrip(b"\0")) for row in whole]


def main() -> None:
    cases_file, results_file = Path(sys.argv[1]), Path(sys.argv[2])
    cases = json.loads(cases_file.read_text())
    size = cases[0]["world"]
    base = enter(ParallelConfig(tp=size))
    torch.set_num_threads(1)
    count_reads()
    try:
        results = []
        for case in cases:
            world = base.shaped(case["tp"], case["pp"])
            if world.dims.replica == 0:  # surplus ranks look on
                results.append(answer(case, world))
        if base.everyone.rank == 0:
            results_file.write_text(json.dumps(results))
        base.leave(0)
    except BaseException as error:  # noqa: BLE001 - whatever it is, no rank waits for this one
        import traceback

        traceback.print_exc()
        base.give_up(error)


if __name__ == "__main__":
    main()
