"""Counters of a run: what an engine did, what all replicas did together, and the last lines of the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpckv.engine.request import Answer
from hpckv.quantity import format_bytes, format_count
from hpckv.workload.forecast import Forecast
from hpckv.workload.plan import RunPlan

if TYPE_CHECKING:
    from hpckv.engine.engine import Engine

_CAUSES = {
    "gone": "collected meanwhile",
    "io": "not readable",
    "damaged": "not verified",
    "partial": "not there in whole",
    "overflow": "out of this dtype's range",
    "throttled": "beyond store.read_rate",
    "timeout": "not in time",
}


def engine_record(engine: Engine) -> dict[str, Any]:
    """One replica's counters as plain data, for `summary.json`."""
    record: dict[str, Any] = {}
    if engine.is_loaded:
        size = engine.cache_config.block_tokens
        record["scheduler"] = engine.scheduler.stats.__dict__
        record["step_seconds"] = {k: round(v, 4) for k, v in engine.times.__dict__.items()}
        record["pages"] = {"total": engine.pages.num_usable, "evicted": engine.cache.pool.num_evicted}
        record["saved_gpu_s"] = round(engine.saved_gpu_s, 3)
        record["loaded_tokens"] = {tier: n * size for tier, n in engine.cache.stats.onboarded.items()}
    if engine.store:
        tiers = engine.store.tiers
        keepers = [tier.stats for tier in tiers if not tier.keeps_copies_only and tier.survives_process]
        size = engine.cache_config.block_tokens
        record["store"] = {tier.label: tier.stats.record for tier in tiers}
        record["kept_tokens"] = sum(stats.stored for stats in keepers) * size
        record["not_kept_tokens"] = sum(stats.dropped for stats in keepers) * size
        record["load_or_recompute"] = engine.load_policy.record
        record["bridged_blocks"] = engine.bridged_blocks
        record["bridged_tokens"] = engine.bridged_blocks * size
        record["turned_off"] = sum(breaker.num_trips for breaker in engine.store.breakers)
        record["audits"] = engine.store.auditor.record if engine.store.auditor else None
    return record


def describe_store(replicas: Sequence[dict[str, Any]]) -> list[str]:
    """What a run had from its store, what it computed all the same, and why: a few lines for people.

    `replicas` are their `engine_record`s. No lines for a run without a store, or one that had nothing to compute.
    """
    records = [record for record in replicas if "store" in record and "scheduler" in record]
    lines = []
    loaded, missed, policy = Counter[str](), Counter[str](), Counter[str]()
    for record in records:
        loaded.update(record["loaded_tokens"])
        policy.update(record["load_or_recompute"])
        for tier in record["store"].values():
            missed.update({cause: count for cause, count in tier["misses"].items() if cause in _CAUSES})
    if loaded:
        tokens = ", ".join(f"{format_count(count)} from {tier}" for tier, count in loaded.items())
        rate = f" at {format_bytes(policy['load_bytes_per_s'])}/s" if policy["load_bytes_per_s"] else ""
        lines.append(f"store: {tokens} tokens loaded{rate}{_bridged(_sum(records, 'bridged_tokens'))}")
    if policy["num_recomputes"]:
        lines.append(
            f"store: {format_count(policy['recomputed_tokens'])} stored tokens in {policy['num_recomputes']} prefixes "
            f"computed again: {policy['declined_recompute_estimate_s']:.2f} s by estimate, "
            f"loading {policy['declined_load_estimate_s']:.2f} s"
        )
    if missed:
        why = ", ".join(f"{count} {_CAUSES[cause]}" for cause, count in missed.most_common())
        lines.append(f"store: {missed.total()} blocks could not be had and were computed: {why}")
    if trips := _sum(records, "turned_off"):
        lines.append(f"store: turned off for a while {trips} times, because it did not answer")
    kept, lost = _sum(records, "kept_tokens"), _sum(records, "not_kept_tokens")
    if kept or lost:
        more = f"; {format_count(lost)} could not be kept" if lost else ""
        lines.append(f"store: {format_count(kept)} tokens kept for later runs{more}")
    return lines


def _sum(records: Sequence[dict[str, Any]], name: str) -> int:
    return sum(record[name] for record in records)


def _bridged(tokens: int) -> str:
    return f", {format_count(tokens)} of them converted from another dtype" if tokens else ""


class Summary:
    """What this start of a run has answered so far, for `summary.json` and the last line of the log."""

    def __init__(self, already: int) -> None:
        """`already` are the answers of earlier starts."""
        self.already = already
        self.answered = 0
        self.prompt_tokens = self.output_tokens = 0
        self.cached: Counter[str] = Counter()
        self.failed: list[dict[str, Any]] = []
        self.loaded_s = self.first_answer_s = self.answering_s = self.seconds = 0.0
        self.process_s = 0.0
        """Seconds since this process began, imports included: what plans speak of."""
        self.times: dict[str, float] = {}
        """Moments of the start (`Starting`)."""
        self.replicas: list[dict[str, Any]] = []
        """Their `engine_record`s."""
        self.expected: Forecast | None = None
        """What the plan expected of this start."""
        self.expected_s: float | None = None
        """Seconds that the site file's rates expected of it."""

    def add(self, answer: Answer) -> None:
        self.answered += 1
        self.prompt_tokens += answer.usage.prompt_tokens
        self.output_tokens += answer.usage.completion_tokens
        self.cached.update(answer.usage.cached)

    @property
    def cached_tokens(self) -> int:
        return sum(self.cached.values())

    @property
    def hit_percent(self) -> float:
        return 100 * self.cached_tokens / max(1, self.prompt_tokens)

    def line(self, output: str) -> str:
        return (
            f"{self.answered} answers ({self.already} were there) in {self.seconds:.1f} s; {self.prompt_tokens:,} prompt tokens, "
            f"{self.hit_percent:.1f} % from cache; {self.output_tokens:,} output tokens: {Path(output) / 'output.jsonl'}"
        )

    @property
    def beside_the_plan(self) -> str:
        """What was expected, and what it was; of a start that answered all it was to answer."""
        if self.expected is None or self.expected.prompt_tokens != self.prompt_tokens:
            return ""
        stored = self.expected.cached_tokens - self.expected.cached["device"]
        found = self.cached_tokens - self.cached["device"]
        computed = self.prompt_tokens - self.cached_tokens
        seconds = "" if self.expected_s is None else f"; {self.expected_s:.1f} s ({self.process_s:.1f} s)"
        return (
            f"expected (and found): {self.expected.computed_tokens:,} ({computed:,}) prompt tokens to compute, "
            f"{stored:,} ({found:,}) from the store{seconds}"
        )

    @property
    def sums(self) -> dict[str, Any]:
        """This start's own counters as plain data."""
        return {
            "requests": self.answered,
            "requests_before": self.already,
            "failed": len(self.failed),
            "prompt_tokens": self.prompt_tokens,
            "cached": dict(self.cached),
            "computed_tokens": self.prompt_tokens - self.cached_tokens,
            "output_tokens": self.output_tokens,
            "hit_percent": round(self.hit_percent, 2),
            "seconds": round(self.seconds, 3),
            "process_seconds": round(self.process_s, 3),
            "load_seconds": round(self.loaded_s, 3),
            "first_answer_seconds": round(self.first_answer_s, 3),
            "answering_seconds": round(self.answering_s, 3),
            "expected": self.expected.record if self.expected else None,
            "expected_seconds": self.expected_s,
        }

    def record(self, plan: RunPlan) -> dict[str, Any]:
        """All of it as plain data; with one replica its counters stand beside the run's."""
        times = self.times
        if self.answered and "loaded" in times:
            times = {**times, "first_answer": round(times["loaded"] + self.first_answer_s, 3)}
        sums = {**self.sums, "least_prefill_tokens": plan.least_prefill_tokens, "times": times}
        if len(self.replicas) == 1:
            return {**sums, **self.replicas[0]}
        return {**sums, "replicas": self.replicas}
