"""One line about this start for its job's comment in Slurm. The batch script tells Slurm: in a container there is no `scontrol`."""

from __future__ import annotations

from hpckv.comm.outcome import tell
from hpckv.usage.timespec import format_elapsed
from hpckv.workload.summary import Summary

NOTHING_LEFT = "hpckv nothing was left to answer"
"""`hpckv acct --reconcile` then misses no ledger."""


def comment(summary: Summary) -> str:
    """Hits in percent and tokens, tokens computed, GPU time saved; in the terms of `hpckv acct`."""
    hits, saved_s = summary.cached_tokens, sum(record.get("saved_gpu_s", 0.0) for record in summary.replicas)
    return (
        f"hpckv hit={summary.hit_percent:.1f}% hits={hits} computed={summary.prompt_tokens - hits} "
        f"saved={format_elapsed(saved_s)}"
    )


def leave_comment(line: str) -> None:
    """Into the file that the batch script made for it."""
    tell("HPCKV_COMMENT", f"{line}\n".encode)
