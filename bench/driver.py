#!/usr/bin/env python3
"""One engine in one process: start, then each workload cold and warm; one JSON line a pass.

    python bench/driver.py hpckv --model runs/bench/mid-bf16 --workloads W1:half,W3:half

Engines: hpckv, transformers (batched generate with its cache), transformers-prefix (a shared prefix cache, repeated over
the batch), vllm (prefix caching on), vllm-plain (off). `start_s` is from the process's start to its first generated token.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import workloads

STARTED = float(os.environ.get("BENCH_STARTED", time.time()))
WARM_UP = [list(range(400, 464))]
SMALL = {"max_batch_tokens": 2048, "max_requests": 64}


def steal() -> tuple[int, int]:
    """(stolen, all) ticks of this machine so far."""
    with open("/proc/stat", encoding="ascii") as file:
        ticks = [int(n) for n in file.readline().split()[1:9]]
    return ticks[7], sum(ticks)


def cpu_seconds() -> float:
    """User and system seconds of this process and its living children."""
    import psutil

    me = psutil.Process()
    return sum(t.user + t.system for t in (p.cpu_times() for p in [me, *me.children(recursive=True)]))


class Hpckv:
    """This project, in process."""

    def __init__(self, model: str, *, numerics: str = "fast", **options):
        """`options` go to the `Engine`."""
        import torch

        from hpckv import Engine
        from hpckv.engine import EngineConfig

        size = {"max_batch_tokens": 8192, "max_requests": 256} if torch.cuda.is_available() else SMALL
        config = EngineConfig(**size, numerics=numerics)
        self.engine = Engine(model, engine=config, **options)

    def serve(self, prompts: list[list[int]], output: int) -> tuple[list[list[int]], int]:
        from hpckv import SamplingParams

        params = SamplingParams(max_tokens=output, ignore_eos=True)
        found = list(self.engine.generate(prompts, params))
        return [a.token_ids for a in found], sum(a.usage.cached_tokens for a in found)

    def report(self) -> dict:
        """Where the steps' time went so far."""
        return dict(self.engine.times.__dict__)


class Transformers:
    """`generate` on the padded batch."""

    def __init__(self, model: str, *, shares_prefix: bool = False):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        found = AutoModelForCausalLM.from_pretrained(model, dtype="auto", attn_implementation="sdpa")
        self.model = found.eval().to(self.device)
        self.model.generation_config.eos_token_id = None
        self.shares_prefix = shares_prefix

    def serve(self, prompts: list[list[int]], output: int) -> tuple[list[list[int]], int]:
        import torch
        from transformers.cache_utils import DynamicCache

        longest = max(map(len, prompts))
        ids = torch.tensor([[3] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        shared = next((n for n, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1), longest - 1)
        cache, cached = None, 0
        with torch.inference_mode():
            if self.shares_prefix and len(prompts) > 1 and shared >= 16:
                cache = DynamicCache(config=self.model.config)
                self.model(
                    torch.tensor([prompts[0][:shared]], device=self.device), past_key_values=cache, logits_to_keep=1
                )
                cache.batch_repeat_interleave(len(prompts))
                cached = shared * (len(prompts) - 1)
            out = self.model.generate(
                ids, attention_mask=mask, past_key_values=cache, max_new_tokens=output, do_sample=False, pad_token_id=3
            )
        return [row[longest:].tolist() for row in out], cached

    def report(self) -> dict:
        return {}


class Vllm:
    """vLLM's CPU build."""

    def __init__(self, model: str, *, caches_prefixes: bool = True, **options):
        """`options` go to the `LLM`."""
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        self.llm = LLM(
            model=model, dtype="bfloat16", max_model_len=2048, enable_prefix_caching=caches_prefixes, enforce_eager=True,
            max_num_seqs=64, max_num_batched_tokens=2048, block_size=128,
            skip_tokenizer_init=True, **options,
        )  # fmt: skip

    def serve(self, prompts: list[list[int]], output: int) -> tuple[list[list[int]], int]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
        found = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in found], sum(o.num_cached_tokens or 0 for o in found)

    def report(self) -> dict:
        return {}


ENGINES = {
    "hpckv": Hpckv,
    "transformers": Transformers,
    "transformers-prefix": lambda model: Transformers(model, shares_prefix=True),
    "vllm": Vllm,
    "vllm-plain": lambda model: Vllm(model, caches_prefixes=False),
}


def main() -> None:
    """Start the engine, run the passes."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("engine", choices=ENGINES)
    ap.add_argument("--model", required=True)
    ap.add_argument("--workloads", default="W1:half,W3:half")
    args = ap.parse_args()
    engine = ENGINES[args.engine](args.model)
    engine.serve(WARM_UP, 1)
    start_s = time.time() - STARTED
    engine.serve(WARM_UP, 4)
    for name in args.workloads.split(","):
        workload = workloads.get(name)
        for temperature in ("cold", "warm"):
            stolen, ticks = steal()
            cpu, begun, before = cpu_seconds(), time.perf_counter(), engine.report()
            tokens, cached = engine.serve(workload["prompts"], workload["output"])
            wall = time.perf_counter() - begun
            stolen_after, ticks_after = steal()
            row = {
                "engine": args.engine, "workload": name, "cache": temperature, "start_s": start_s,
                "wall_s": wall, "cpu_s": cpu_seconds() - cpu,
                "steal_percent": 100 * (stolen_after - stolen) / max(1, ticks_after - ticks),
                "prompt_tokens": sum(map(len, workload["prompts"])), "output_tokens": sum(map(len, tokens)),
                "cached_tokens": cached,
                "parts": {k: v - before[k] for k, v in engine.report().items()},
            }  # fmt: skip
            print("RESULT " + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
