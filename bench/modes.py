#!/usr/bin/env python3
"""What hpckv's own switches cost and save: shared-prefix attention on and off, fast and strict; interleaved, medians.

python bench/modes.py --rounds 3
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import workloads
from rich.console import Console
from rich.table import Table

TOP = Path(__file__).parent.parent
# `unshared`: a shared prefix is attended by each of its sequences, not once for all.
MODES = {
    "fast": {},
    "unshared": {"share_prefix_attention": False},
    "strict": {"numerics": "strict"},
}


def main() -> None:
    """Run every mode in this process, alternating."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--workloads", default="W1:half,W3:quarter")
    ap.add_argument("--modes", default=",".join(MODES))
    ap.add_argument("--model", type=Path, default=TOP / "runs" / "bench" / "mid-bf16")
    args = ap.parse_args()
    subprocess.run([sys.executable, str(Path(__file__).parent / "make_model.py"), str(args.model)], check=True)

    from hpckv import Engine, SamplingParams
    from hpckv.engine import EngineConfig

    engines = {
        name: Engine(args.model, engine=EngineConfig(max_batch_tokens=2048, max_requests=64, **MODES[name]))
        for name in args.modes.split(",")
    }
    walls: dict[tuple[str, str, str], list[float]] = {}
    for round_ in range(args.rounds + 1):  # the first warms up
        for name, engine in engines.items():
            for workload in args.workloads.split(","):
                given = workloads.get(workload)
                # Other token ids each round: cold is cold.
                prompts = [[(token + 13 * round_) % 31000 for token in prompt] for prompt in given["prompts"]]
                params = SamplingParams(max_tokens=given["output"], ignore_eos=True)
                for cache in ("cold", "warm"):
                    begun = time.perf_counter()
                    list(engine.generate(prompts, params))
                    if round_:
                        walls.setdefault((workload, cache, name), []).append(time.perf_counter() - begun)
    table = Table("workload", "cache", "mode", "median s", "all s", "times the first")
    for (workload, cache, name), found in sorted(walls.items()):
        fast = statistics.median(walls[workload, cache, next(iter(engines))])
        middle = statistics.median(found)
        table.add_row(
            workload, cache, name, f"{middle:.2f}", " ".join(f"{s:.2f}" for s in found), f"{middle / fast:.2f}"
        )
    Console(width=150, highlight=False).print(table)


if __name__ == "__main__":
    main()
