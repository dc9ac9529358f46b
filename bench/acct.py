"""How long `hpckv acct` takes over a large ledger: ten months, rolled up but for the last, and not. Twenty users' if root makes it.

.venv/bin/python bench/acct.py --records 1000000
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.usage.ledger import digest, encode, month_of
from hpckv.usage.record import Counters, Record
from hpckv.usage.rollup import roll_up

START = datetime(2026, 1, 2, tzinfo=UTC).timestamp()
MONTH_S = 30.4 * 86400
JOB_RECORDS = 500
UIDS = range(2001, 2021) if os.getuid() == 0 else [os.getuid()]
OF_ONE = ("-u", str(UIDS[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hpckv-bench-") as folder:
        store = StoreRoot.create(Path(folder) / "store", StorePolicy.new())
        small = StoreRoot.create(Path(folder) / "small", StorePolicy.new())
        make_ledger(small, 2 * JOB_RECORDS)
        months = make_ledger(store, given.records)
        last = f"{months[-1]}-01", "2026-12-01"
        whole, one = ("-S", "2026-01-01", "-E", "2026-12-01"), ("-S", last[0], "-E", last[1])
        found = {"two jobs, not rolled up": ask(small, whole, given.rounds)}
        found["no month rolled up, all"] = ask(store, whole, 1)
        begun, cpu_begun = time.perf_counter(), time.process_time()
        for month in months[:-1]:
            roll_up(store, month)
        found["rolling nine months up"] = time.perf_counter() - begun, time.process_time() - cpu_begun
        found["nine months rolled up, all"] = ask(store, whole, given.rounds)
        found["nine months rolled up, the last month"] = ask(store, one, given.rounds)
        day = "-S", f"{months[-1]}-21", "-E", f"{months[-1]}-22"
        found["nine rolled up, the tenth's 21st"] = ask(store, day, given.rounds)
        found["nine rolled up, the tenth, one user's"] = ask(store, one, given.rounds, *OF_ONE)
        found["nine rolled up, its 21st, one user's"] = ask(store, day, given.rounds, *OF_ONE)
        roll_up(store, months[-1])
        found["ten months rolled up, all"] = ask(store, whole, given.rounds)
        found["ten months rolled up, one month"] = ask(store, one, given.rounds)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    for name, (wall_s, cpu_s) in found.items():
        print(f"{name:<40} {wall_s:6.2f} s, CPU {cpu_s:6.2f} s")
    print(f"{given.records:,} records; at most {peak:,.0f} MiB, with no month rolled up")


def make_ledger(store: StoreRoot, count: int) -> list[str]:
    """Jobs of some hours each, a record a minute; the months."""
    rng, months = random.Random(0), set()
    num_jobs = count // JOB_RECORDS
    for job in range(num_jobs):
        pattern = Record.of_this_process(
            environ={"SLURM_JOB_ID": str(job)}, model=f"m{job % 5}", gpu="NVIDIA H100", project="p"
        )
        pattern.uid = UIDS[job % len(UIDS)]
        month_start = START + (job * 10 // num_jobs) * MONTH_S
        t, prev, lines = month_start + rng.random() * 20 * 86400, "", []
        for seq in range(JOB_RECORDS):
            hit, computed = rng.randrange(100_000), rng.randrange(10_000)
            counters = Counters(
                requests=100,
                prompt_tokens=hit + computed,
                cached={"device": hit // 2, "shared": hit - hit // 2},
                computed_tokens=computed,
                output_tokens=1000,
                gpu_s=60.0,
                saved_gpu_s=10.0,
                by_writer={"0": hit - hit // 2},
            )
            line = encode(pattern.with_counters(counters, seq=seq, t0=t, t1=t + 60, prev=prev))
            prev, t = digest(line[:-1]), t + 60
            lines.append(line)
        folder = store.layout.ledger(pattern.uid) / month_of(t)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{pattern.writer}.jsonl"
        path.write_bytes(b"".join(lines))
        os.utime(path, (t, t))
        for part in (path, store.layout.user(pattern.uid)):
            os.chown(part, pattern.uid, -1)
        months.add(folder.name)
    return sorted(months)


def ask(store: StoreRoot, window: tuple[str, ...], rounds: int, *about: str) -> tuple[float, float]:
    """Median seconds of the whole command, and its CPU seconds."""
    command = [
        sys.executable,
        "-m",
        "hpckv.cli.main",
        "acct",
        "--store",
        str(store.layout.root),
        *(about or ("--group-by", "model")),
        *window,
    ]
    taken, cpu = [], []
    for _ in range(rounds):
        begun, cpu_begun = time.perf_counter(), children_cpu_s()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - begun)
        cpu.append(children_cpu_s() - cpu_begun)
    return statistics.median(taken), statistics.median(cpu)


def children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
