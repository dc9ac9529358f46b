"""What a run had from its store, what it computed all the same, and why: for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from hpckv.quantity import format_bytes, format_count

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


def describe_store(engine: Engine) -> list[str]:
    """A few lines; none for a run without a store, or one that had nothing to compute."""
    if engine.store is None or not engine.is_loaded:
        return []
    policy, stats = engine.load_policy, engine.cache.stats
    size = engine.cache_config.block_tokens
    lines = []
    if stats.onboarded:
        tokens = ", ".join(f"{format_count(count * size)} from {tier}" for tier, count in stats.onboarded.items())
        rate = f" at {format_bytes(policy.load_bytes_per_s)}/s" if policy.load_bytes_per_s else ""
        lines.append(f"store: {tokens} tokens loaded{rate}{_bridged(stats.bridged * size)}")
    if policy.num_recomputes:
        lines.append(
            f"store: {format_count(policy.recomputed_tokens)} stored tokens in {policy.num_recomputes} prefixes computed again: "
            f"{policy.declined_recompute_estimate_s:.2f} s by estimate, loading {policy.declined_load_estimate_s:.2f} s"
        )
    missed: Counter[str] = Counter()
    for tier in engine.store.tiers:
        missed.update({cause: count for cause, count in tier.stats.misses.items() if cause in _CAUSES})
    if missed:
        why = ", ".join(f"{count} {_CAUSES[cause]}" for cause, count in missed.most_common())
        lines.append(f"store: {missed.total()} blocks could not be had and were computed: {why}")
    trips = sum(breaker.num_trips for breaker in engine.store.breakers)
    if trips:
        lines.append(f"store: turned off for a while {trips} times, because it did not answer")
    keepers = [tier.stats for tier in engine.store.tiers if not tier.keeps_copies_only and tier.survives_process]
    stored, dropped = sum(stats.stored for stats in keepers), sum(stats.dropped for stats in keepers)
    if stored or dropped:
        lost = f"; {format_count(dropped * size)} could not be kept" if dropped else ""
        lines.append(f"store: {format_count(stored * size)} tokens kept for later runs{lost}")
    return lines


def _bridged(tokens: int) -> str:
    return f", {format_count(tokens)} of them converted from another dtype" if tokens else ""
