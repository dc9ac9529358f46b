"""A ledger as a project would have written it, with the truth about it. By itself it makes the page of docs/accounting.md:

.venv/bin/python -m tests.usage.made_up_past FOLDER
"""

import math
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from hpckv import __version__
from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.usage.gather import gather
from hpckv.usage.ledger import digest, encode, month_of
from hpckv.usage.points import PointsConfig, Price
from hpckv.usage.query import Accounts, Question
from hpckv.usage.record import TIERS, Counters, Record

NAMES = {
    2001: "alice",
    2002: "bkowalski",
    2003: "chen.wei",
    2004: "d_okafor",
    2005: "emilia",
    2006: "fatima",
    2007: "guest07",
}
MODELS = {"llama-3.1-8b": 131072, "qwen3-32b": 262144, "mistral-7b-instruct-v0.3": 131072}
"""Bytes of a token's keys and values."""
RECORD_S = 600.0
POINTS = PointsConfig(prices=[Price(gpu="H100", per_gpu_hour=0.23)], disk_tb_day=0.02)


@dataclass
class Truth:
    """What was done, added up by whoever did it."""

    by_user: dict[int, Counter] = field(default_factory=dict)
    by_model: dict[str, Counter] = field(default_factory=dict)
    by_day: dict[str, Counter] = field(default_factory=dict)
    by_pair: Counter = field(default_factory=Counter)
    total: Counter = field(default_factory=Counter)

    def add(self, record: Record) -> None:
        counts = Counter(PromptTok=record.prompt_tokens, Computed=record.computed_tokens, Requests=record.requests)
        counts.update({f"{tier.capitalize()}Tok": record.cached.get(tier, 0) for tier in TIERS})
        counts["HitTok"] = sum(record.cached.values())
        counts["StoreWritten"] = record.written_bytes.get("shared", 0)
        day = f"{datetime.fromtimestamp(record.t1):%F}"
        for sums, key in ((self.by_user, record.uid), (self.by_model, record.model), (self.by_day, day)):
            sums.setdefault(key, Counter()).update(counts)
        self.total.update(counts)
        self.by_pair.update({(int(writer), record.uid): tokens for writer, tokens in record.by_writer.items()})


def make_past(
    store: StoreRoot,
    *,
    end: float,
    num_days: float = 40,
    uids=tuple(NAMES),
    models=tuple(MODELS),
    jobs_a_day: float = 6,
    seed: int = 0,
) -> Truth:
    """Jobs of some hours each in the `num_days` before `end`; fewer at weekends, with more found as the store fills."""
    rng, truth = random.Random(seed), Truth()
    weights = [1 / (1 + n) for n in range(len(uids))]
    for job in range(max(1, round(num_days * jobs_a_day))):
        begun = end - num_days * 86400 * (1 - rng.random()) - 60
        if datetime.fromtimestamp(begun).weekday() >= 5 and rng.random() < 0.7:
            continue
        (uid,) = rng.choices(uids, weights)
        model, gpus = rng.choice(models), rng.choice((1, 2, 4))
        environ = {"SLURM_JOB_ID": str(41000 + job), "SLURM_JOB_ACCOUNT": "gk77", "SLURM_JOB_PARTITION": "gpu"}
        pattern = Record.of_this_process(
            environ=environ, model=model, gpu="NVIDIA H100 80GB HBM3", project="nlp", num_gpus=gpus
        )
        pattern.uid, pattern.model_digest = uid, digest(model.encode())
        warmth = 0.35 + 0.55 * (1 - math.exp(-(1 - (end - begun) / (num_days * 86400)) * 3))
        lines, prev, t = [], "", begun
        for seq in range(rng.randint(1, 24)):
            if t + RECORD_S >= end or month_of(t + RECORD_S) != month_of(begun):
                break
            counters = _counters(
                rng,
                uids,
                weights,
                warmth=warmth * rng.uniform(0.7, 1.05),
                gpus=gpus,
                token_bytes=MODELS.get(model, 131072),
            )
            record = pattern.with_counters(counters, seq=seq, t0=t, t1=t + RECORD_S, prev=prev)
            lines.append(encode(record))
            truth.add(record)
            prev, t = digest(lines[-1][:-1]), t + RECORD_S
        if lines:
            folder = store.layout.ledger(uid) / month_of(t)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{pattern.writer}.jsonl").write_bytes(b"".join(lines))
    give_to_their_owners(store)
    return truth


def _counters(rng, uids, weights, *, warmth, gpus, token_bytes) -> Counters:
    prompt = rng.randrange(1_500_000, 4_500_000) * gpus
    hits = int(prompt * min(0.97, warmth))
    device, host, local = (
        int(hits * rng.uniform(0.4, 0.6)),
        int(hits * rng.uniform(0, 0.1)),
        int(hits * rng.uniform(0, 0.15)),
    )
    cached = {"device": device, "host": host, "local": local, "shared": hits - device - host - local}
    by_writer, left = Counter(), hits - device
    for writer in rng.choices(uids, weights, k=2):
        part = int(left * rng.random())
        by_writer[str(writer)] += part
        left -= part
    by_writer[str(uids[0])] += left
    written = int((prompt - hits) * 0.03)
    load_s = (hits - device) * token_bytes / gpus / 20e9
    return Counters(
        requests=prompt // 4000,
        prompt_tokens=prompt,
        cached=cached,
        computed_tokens=prompt - hits,
        output_tokens=prompt // 20,
        written_tokens=written,
        written_bytes={"shared": written * token_bytes, "local": written * token_bytes // 2},
        load_s=load_s,
        gpu_s=gpus * RECORD_S,
        saved_gpu_s=gpus * (hits / (9_000 * gpus) - load_s),
        by_writer={uid: tokens for uid, tokens in by_writer.items() if tokens},
    )


def give_to_their_owners(store: StoreRoot) -> None:
    for folder in store.layout.users.iterdir():
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, int(folder.name), -1)


def report_of(
    store: StoreRoot, start: float, end: float, *, points=POINTS, name_of=lambda uid: NAMES.get(uid, f"u{uid}"), **more
):
    """The report and what it was gathered from."""
    from hpckv.usage.report.sections import make_report

    found = gather([store.layout.root], [], start, end)
    accounts = Accounts(found, points, name_of)
    return make_report(accounts, Question(start, end, **more), stores=[store.layout.root], runs=[], site=None), found


def main() -> None:
    from hpckv.usage.report.page import render_page, render_pngs

    folder, end = Path(sys.argv[1]), datetime(2026, 11, 15).timestamp()
    store = StoreRoot.create(folder / "kv", StorePolicy.new())
    make_past(store, end=end)
    report, found = report_of(store, end - 40 * 86400, end)
    (folder / "report.html").write_text(render_page(report, found, version=__version__, now=end))
    for name, content in render_pngs(report):
        (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
