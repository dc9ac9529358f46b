#!/usr/bin/env python3
"""A warm restart beside a cold start: hpckv with its store, and vLLM with LMCache's server and its `fs` tier; alternating, medians.

    VLLM_PYTHON=/path/to/venv/bin/python python bench/restart.py --rounds 5 --dir /scratch/me

A round of an engine: an empty store; a process that answers the prompts and ends; the page cache dropped; a fresh process
that answers them again. Prompts share nothing, so that a cold start has all of it to compute: W4d:quarter is 8 of 1,088
tokens, W4d 32. Weights are loaded before the clock starts; it runs from the first request, loading of stored blocks
included, to the last answer. LMCache's server is a fresh process each time too, and has all the time it wants to write
before it is ended. CPU seconds are the engine's processes', LMCache's server not counted.

Answers of cold and warm are compared. In fast numerics a warm answer may differ where two tokens are nearly equal, for it
is computed in other chunks; so a first pair, not timed, runs in strict numerics, and there all must be equal.

The environment of VLLM_PYTHON (or `--peers-python`) is made as `bench/store_peers.py` says; without it vLLM is not measured.
A pair is rejected if one of its passes was disturbed, by the rule of `bench/store_peers.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import driver
import machine
import workloads

HERE = Path(__file__).parent
CHUNK_TOKENS = 256
"""LMCache's default."""
PASS_LIMIT_S = 900
_STORING_S = 8.0
"""So long no file may have come to LMCache's tier before its writing counts as done."""


def start_hpckv(args: argparse.Namespace) -> driver.Hpckv:
    """Loaded, and its store open; every full block is kept."""
    from hpckv.store import StoreConfig

    store = StoreConfig(shared=args.store, write="all")
    serving = driver.Hpckv(str(args.model), numerics=args.numerics, store=store)
    serving.engine.load()
    return serving


def start_vllm(args: argparse.Namespace) -> driver.Vllm:
    """Connected to LMCache's server, whose port `args.store` is."""
    from vllm.config import KVTransferConfig

    extra = {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": int(args.store)}
    transfer = KVTransferConfig(
        kv_connector="LMCacheMPConnector", kv_role="kv_both", kv_connector_extra_config=extra
    )  # fmt: skip
    return driver.Vllm(str(args.model), kv_transfer_config=transfer)


def why_computed(engine, prompts: list[list[int]], cached: list[int]) -> dict:
    """Prompt tokens that were computed although a store was there, by reason."""
    size = engine.cache_config.block_tokens
    reasons = {
        "behind the last full block": 0,
        "last token of a prompt found whole, for its logits": 0,
        "not stored": 0,
    }
    for prompt, found in zip(prompts, cached, strict=True):
        tail = len(prompt) % size
        if found == len(prompt) - 1:
            reasons["last token of a prompt found whole, for its logits"] += 1
        else:
            reasons["behind the last full block"] += tail
            reasons["not stored"] += len(prompt) - tail - found
    policy, shared = engine.load_policy, engine.store.tiers[-1].stats
    if policy.num_recomputes or shared.misses:
        reasons[
            f"not loaded: {policy.num_recomputes} prefixes estimated faster to compute, misses {dict(shared.misses)}"
        ] = reasons.pop("not stored")
    return {name: count for name, count in reasons.items() if count}


def serve(args: argparse.Namespace) -> None:
    """One engine, once through the prompts; prints a JSON line."""
    serving = (start_hpckv if args.serve == "hpckv" else start_vllm)(args)
    workload = workloads.get(args.workloads)
    prompts, output = workload["prompts"], args.output or workload["output"]
    busy = machine.wait_for_quiet(args.patience)
    before, cpu, begun = machine.Ticks.now(), driver.cpu_seconds(), time.perf_counter()
    if args.serve == "hpckv":
        from hpckv import SamplingParams

        found = list(serving.engine.generate(prompts, SamplingParams(max_tokens=output, ignore_eos=True)))
        wall_s = time.perf_counter() - begun
        answers, cached = [a.token_ids for a in found], [a.usage.cached_tokens for a in found]
    else:
        answers, total = serving.serve(prompts, output)
        wall_s, cached = time.perf_counter() - begun, [total]
    row = {
        "wall_s": wall_s, "cpu_s": driver.cpu_seconds() - cpu, "busy_before_percent": busy,
        "steal_percent": machine.Ticks.now().percent_since("stolen", before), "answers": answers,
        "prompt_tokens": sum(map(len, prompts)), "loaded_tokens": sum(cached), "parts": serving.report(),
    }  # fmt: skip
    if args.serve == "hpckv":
        engine = serving.engine
        row["computed_because"] = why_computed(engine, prompts, cached)
        row["load_policy"] = engine.load_policy.record
        engine.close()  # what a run does at its end: the store's last segments become durable
    print("RESULT " + json.dumps(row), flush=True)
    if args.serve == "vllm":
        wait_for_files(Path(args.watch))


def wait_for_files(folder: Path) -> None:
    """Until nothing has come to LMCache's tier for a while: it writes behind, and ends without a flush."""
    last, seen = time.monotonic(), -1
    while time.monotonic() - last < _STORING_S:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if size != seen:
            last, seen = time.monotonic(), size
        time.sleep(0.5)


@contextlib.contextmanager
def lmcache_server(python: str, folder: Path, mode: str) -> Iterator[int]:
    """A fresh server whose second level is `folder`; its port."""
    folder.mkdir(exist_ok=True)
    port, http_port, metrics_port = (free_port() for _ in range(3))
    command = [
        str(Path(python).parent / "lmcache"), "server", "--host", "localhost", "--port", str(port), "--http-port", str(http_port),
        "--prometheus-port", str(metrics_port), "--chunk-size", str(CHUNK_TOKENS), "--l1-size-gb", "2", "--eviction-policy", "LRU",
        "--supported-transfer-mode", mode, "--l2-adapter", json.dumps({"type": "fs", "base_path": str(folder)}),
    ]  # fmt: skip
    environ = {**os.environ, "LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"}
    with folder.with_name("lmcache-server.log").open("a") as log:
        server = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while socket.socket().connect_ex(("localhost", port)):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"LMCache's server did not start, see {log.name}")
            time.sleep(0.5)
        yield port
    finally:
        server.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def run_process(args: argparse.Namespace, engine: str, store: str, workload: str, watch: Path, numerics: str) -> dict:
    """One fresh process; its row. Raises `RuntimeError` if it fails."""
    environ = {
        **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "LMCACHE_TRACK_USAGE": "false",
        "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
    }  # fmt: skip
    python = sys.executable if engine == "hpckv" else args.peers_python
    command = [
        python, str(HERE / "restart.py"), "--serve", engine, "--store", store, "--watch", str(watch), "--model", str(args.model),
        "--workloads", workload, "--output", str(args.output), "--patience", str(args.patience), "--numerics", numerics,
    ]  # fmt: skip
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, errors = process.communicate(timeout=PASS_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError(f"{engine}: no end within {PASS_LIMIT_S} s") from None
    for line in out.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line[7:])
    raise RuntimeError(f"{engine}: failed\n{errors[-3000:]}")


def pair(args: argparse.Namespace, engine: str, workload: str, numerics: str = "fast") -> list[dict]:
    """Cold, then warm, from an empty store."""
    rows = []
    folder = Path(tempfile.mkdtemp(prefix="restart-", dir=args.dir))
    try:
        for start in ("cold", "warm"):
            machine.drop_cache(folder)
            if engine == "hpckv":
                row = run_process(args, engine, str(folder / "kv"), workload, folder, numerics)
            else:
                with lmcache_server(args.peers_python, folder / "fs", args.lmcache_mode) as port:
                    row = run_process(args, "vllm", str(port), workload, folder / "fs", numerics)
            kept = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            rows.append({"engine": engine, "workload": workload, "start": start, "stored_bytes": kept, **row})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    same = sum(a == b for a, b in zip(rows[0]["answers"], rows[1]["answers"], strict=True))
    for row in rows:
        row["same_answers"], row["num_answers"] = same, len(row.pop("answers"))
    return rows


def report(pairs: list[list[dict]], *, keeps_all: bool) -> None:
    """Medians; the ratio is that of medians, and beside it the median of the pairs' own ratios."""
    kept = [p for p in pairs if keeps_all or all(map(machine.is_kept, p))]
    print(f"{len(pairs)} pairs, {len(pairs) - len(kept)} rejected as disturbed\n")
    columns = (
        "workload", "engine", "pairs", "cold s", "warm s", "warm/cold of medians", "median of pairs' ratios (min to max)",
        "CPU s cold, warm", "loaded of prompt tokens, warm", "equal answers",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    groups: dict[tuple[str, str], list[list[dict]]] = {}
    for found in kept:
        groups.setdefault((found[0]["workload"], found[0]["engine"]), []).append(found)
    for (workload, engine), group in sorted(groups.items()):
        cold, warm = (statistics.median(p[n]["wall_s"] for p in group) for n in (0, 1))
        cpu = [f"{statistics.median(p[n]['cpu_s'] for p in group):.1f}" for n in (0, 1)]
        ratios = [p[1]["wall_s"] / p[0]["wall_s"] for p in group]
        same, answers = sum(p[1]["same_answers"] for p in group), sum(p[1]["num_answers"] for p in group)
        loaded = statistics.median(p[1]["loaded_tokens"] for p in group)
        cells = (
            workload, engine, len(group), f"{cold:.2f}", f"{warm:.2f}", f"{warm / cold:.2f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", ", ".join(cpu),
            f"{loaded:,.0f} of {group[0][1]['prompt_tokens']:,}", f"{same} of {answers}",
        )  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |")
    for (workload, engine), group in sorted(groups.items()):
        if engine == "hpckv":
            explain(workload, group[-1][1])


def explain(workload: str, row: dict) -> None:
    """What a warm run of hpckv did and why."""
    times = ", ".join(f"{name} {seconds:.3f}" for name, seconds in row["parts"].items())
    reasons = "; ".join(f"{count:,} {reason}" for reason, count in row["computed_because"].items())
    print(
        f"\nhpckv, {workload}, warm (the last one): {row['loaded_tokens']:,} tokens loaded; computed: {reasons or 'none'}."
    )
    print(f"Its steps: {times}. Load or compute: {row['load_policy']}.")


def main() -> None:
    """Run the rounds, print the tables."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--workloads", default="W4d:quarter,W4d")
    ap.add_argument("--output", type=int, default=0, help="tokens of each answer instead of the workload's own number")
    ap.add_argument("--dir", type=Path, default=Path("runs"), help="on the disk or filesystem that holds the stores")
    ap.add_argument("--model", type=Path, default=HERE.parent / "runs" / "bench" / "mid-bf16")
    ap.add_argument(
        "--peers-python", default=os.environ.get("VLLM_PYTHON"), help="of an environment with vLLM and LMCache"
    )
    ap.add_argument("--lmcache-mode", default="auto", choices=("auto", "lmcache_driven", "engine_driven"))
    ap.add_argument("--no-check", action="store_true", help="leave the first pair, in strict numerics, out")
    ap.add_argument(
        "--patience", type=float, default=30.0, help="longest wait for a quiet machine before a pass, seconds"
    )
    ap.add_argument(
        "--keep-all", action="store_true", help="count disturbed passes too: for trying out, not for figures"
    )
    ap.add_argument("--out", type=Path, default=Path("runs/bench/restart.jsonl"), help="every pass is appended here")
    for name in ("--serve", "--store", "--watch", "--numerics"):  # of the processes that this one starts
        ap.add_argument(name, help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.serve:
        serve(args)
        return
    subprocess.run([sys.executable, str(HERE / "make_model.py"), str(args.model)], check=True)
    args.dir.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    engines = ["hpckv"]
    if args.peers_python:
        engines.append("vllm+lmcache")
    else:
        print("vLLM: not measured, VLLM_PYTHON names no environment that has it", file=sys.stderr)
    if not args.no_check:
        row = pair(args, "hpckv", "W4d:quarter", "strict")[1]
        same, answers = row["same_answers"], row["num_answers"]
        print(f"strict numerics: {same} of {answers} warm answers equal, {row['loaded_tokens']:,} tokens loaded\n")
        assert same == answers, "a warm answer differs from the cold one"
    pairs = []
    for number in range(args.rounds):
        for workload in args.workloads.split(","):
            for engine in engines if number % 2 == 0 else reversed(engines):
                try:
                    rows = pair(args, engine, workload)
                except RuntimeError as error:
                    print(f"round {number + 1}: {error}", file=sys.stderr)
                    continue
                pairs.append(rows)
                with args.out.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps({"round": number, **row}) + "\n" for row in rows)
                print(
                    f"round {number + 1}/{args.rounds} {workload} {engine}: "
                    + ", ".join(f"{r['start']} {r['wall_s']:.2f} s, {r['loaded_tokens']} loaded" for r in rows)
                    + f"; {rows[0]['same_answers']} of {rows[0]['num_answers']} answers equal",
                    file=sys.stderr,
                )
    report(pairs, keeps_all=args.keep_all)


if __name__ == "__main__":
    main()
