"""The ledger beside Slurm's accounting: which starts of jobs are in one and not in the other, and which do not agree.

A start is a job's, or a task's of an array, from when Slurm gave it its nodes until it took them back; a job that is requeued has
several. A start of the ledger belongs to the one of `sacct` with the same number inside whose time it lies. The caller asks Slurm.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpckv.usage.bounds import most_tokens_per_s
from hpckv.usage.columns import JOB
from hpckv.usage.gather import Gathered
from hpckv.usage.table import connect
from hpckv.usage.timespec import format_time

SLACK_S = 5.0
"""`sacct` has whole seconds by the controller's clock, the ledger has the node's."""
MARGIN_S = 31 * 86400.0
"""A job may have begun so long before the window that is asked about."""
_ENDED_BEFORE_LOADING = frozenset({"64", "65", "66", "69", "73", "77", "78"})
"""Exit codes of runs that were refused before a model was loaded, so that there is no ledger."""
_NOT_OVER = ("PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "COMPLETING", "RESIZING")


@dataclass(frozen=True)
class SlurmStart:
    """A row of `sacct -D`."""

    cluster: str
    job: str
    """Slurm's number, each task's own."""
    job_id: str
    """Of an array's task as 7_3."""
    uid: int
    user: str
    account: str
    partition: str
    qos: str
    state: str
    exit_code: str
    """CODE:SIGNAL."""
    start: float | None
    end: float | None
    """Seconds since 1970; None if it has not begun, or goes on."""
    elapsed_s: int
    gpus: int
    """0 also where this Slurm tracks none."""
    energy_j: float | None
    """That Slurm read on the job's nodes: whole nodes, also for jobs that share them."""
    comment: str
    restarts: int | None
    """None where this version of Slurm does not say."""
    is_ours: bool
    """It has a step that was named for `hpckv run`."""

    @property
    def is_over(self) -> bool:
        return self.end is not None and not self.state.startswith(_NOT_OVER)


@dataclass
class Part:
    """What one writer recorded of a start."""

    gpu: str
    num_gpus: int
    model: str
    model_digest: str
    t0: float
    t1: float
    gpu_s: float
    tokens: int
    """Computed and generated."""
    energy_j: float | None


@dataclass
class LedgerStart:
    """What all replicas of one start of a job recorded."""

    cluster: str | None
    job: str
    job_id: str
    restart: int
    uid: int
    account: str | None
    partition: str | None
    is_in_window: bool = False
    parts: list[Part] = field(default_factory=list)

    @property
    def t0(self) -> float:
        return min(part.t0 for part in self.parts)

    @property
    def t1(self) -> float:
        return max(part.t1 for part in self.parts)

    @property
    def gpu_s(self) -> float:
        """Of GPUs, not of CPUs."""
        return sum(part.gpu_s for part in self.parts if part.gpu != "cpu")

    @property
    def gpus(self) -> int:
        """At once, at most."""
        ends = [(part.t1, -part.num_gpus) for part in self.parts if part.gpu != "cpu"]
        begins = [(part.t0, part.num_gpus) for part in self.parts if part.gpu != "cpu"]
        return max(itertools.accumulate(change for _, change in sorted(begins + ends)), default=0)


@dataclass(frozen=True)
class Finding:
    """Something that does not agree."""

    kind: str
    job_id: str
    uid: int | None
    what: str


@dataclass(frozen=True)
class Pair:
    """One start of Slurm's with what the ledger has of it."""

    slurm: SlurmStart
    restart: int
    ledger: tuple[LedgerStart, ...]

    @property
    def gpu_s(self) -> float:
        """GPU seconds that Slurm counts."""
        return self.slurm.gpus * self.slurm.elapsed_s

    @property
    def used_gpu_s(self) -> float:
        """Of these, those in which an engine had the GPUs, from its start to its end."""
        return sum(start.gpu_s for start in self.ledger)

    @property
    def idle_percent(self) -> float | None:
        return 100 * (1 - self.used_gpu_s / self.gpu_s) if self.gpu_s else None

    @property
    def energy_j(self) -> float | None:
        """The ledger's."""
        known = [p.energy_j for start in self.ledger for p in start.parts if p.energy_j is not None]
        return sum(known) if known else None


@dataclass
class Reconciliation:
    """All of it."""

    pairs: list[Pair] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    without_slurm: int = 0
    """Starts in the ledger that were no jobs of Slurm's."""
    elsewhere: int = 0
    """Starts in the ledger on other clusters."""
    unbounded: int = 0
    """Replicas whose device or model is not known well enough to say how fast it can be."""

    untracked: int = 0
    """Starts that used GPUs and have none in `sacct`."""

    def add(self, kind: str, job_id: str, uid: int | None, what: str) -> None:
        self.findings.append(Finding(kind, job_id, uid, what))


def ledger_starts(found: Gathered, start: float, end: float) -> tuple[list[LedgerStart], int]:
    """Every start of a job that has records, in order; and how many there are without Slurm that have one in [start, end)."""
    sql = f"""
        SELECT writer, cluster, job, {JOB} AS job_id, restart, uid, account, partition, gpu, num_gpus, model, model_digest,
            min(t0), max(t1), sum(gpu_s), sum(computed_tokens + output_tokens), sum(energy_j),
            count(*) FILTER (t1 >= ? AND t1 < ?)
        FROM records GROUP BY ALL ORDER BY min(t0)
    """
    starts: dict[tuple[Any, ...], LedgerStart] = {}
    num_without = 0
    for row in connect(found).execute(sql, [start, end]).fetchall():
        _, cluster, job, job_id, restart, uid, account, partition, gpu, num_gpus, model, digest, *sums = row
        t0, t1, gpu_s, tokens, energy_j, num_in_window = sums
        if job is None:
            num_without += num_in_window > 0
            continue
        one = starts.setdefault(
            (uid, cluster, job, restart), LedgerStart(cluster, job, job_id, restart, uid, account, partition)
        )
        one.is_in_window |= num_in_window > 0
        one.parts.append(Part(gpu, num_gpus, model, digest, t0, t1, gpu_s, tokens, energy_j))
    return list(starts.values()), num_without


@dataclass(frozen=True)
class Known:
    """What is known beside the two books."""

    cluster: str | None = None
    """That Slurm's rows are of; None if it is not known."""
    own_uid: int | None = None
    """Of others Slurm may show nothing."""
    named: frozenset[str] = frozenset()
    """Jobs, as 7_3, that run directories say to be ours."""
    excused: str = ""
    """A job with this comment needs no ledger."""
    flops: Mapping[str, float] = field(default_factory=dict)
    """Operations a token by the digest of the weights."""
    name_of: Callable[[int], str] = str


def reconcile(ledger: Sequence[LedgerStart], slurm: Sequence[SlurmStart], known: Known) -> Reconciliation:
    """Set one beside the other: `ledger` are starts in the window, and those of jobs in `slurm`."""
    result = Reconciliation()
    rows: dict[str, list[SlurmStart]] = defaultdict(list)
    for row in slurm:
        rows[row.job].append(row)
    matched = _match_all(result, ledger, rows, known)
    for job_rows in rows.values():
        for number, row in enumerate(sorted(job_rows, key=lambda row: (row.start is None, row.start or 0.0))):
            of_ledger = matched.get(row, [])
            if of_ledger or row.is_ours or row.job_id in known.named or row.comment.startswith("hpckv "):
                restart = of_ledger[0].restart if of_ledger else number if row.restarts is None else row.restarts
                result.pairs.append(Pair(row, restart, tuple(of_ledger)))
    result.pairs.sort(key=lambda pair: (pair.slurm.start or 0.0, pair.slurm.job))
    for pair in result.pairs:
        _check(result, pair, known)
    return result


def _match_all(
    result: Reconciliation, ledger: Sequence[LedgerStart], rows: Mapping[str, Sequence[SlurmStart]], known: Known
) -> Mapping[SlurmStart, list[LedgerStart]]:
    """Starts of the ledger by Slurm's; what has none there is a finding."""
    matched: dict[SlurmStart, list[LedgerStart]] = defaultdict(list)
    hidden: dict[int, int] = defaultdict(int)
    seen = {row.uid for job_rows in rows.values() for row in job_rows} | {known.own_uid}
    for one in ledger:
        of_job = rows.get(one.job, ())
        if known.cluster is not None and one.cluster not in (None, known.cluster):
            result.elsewhere += one.is_in_window
        elif (match := _match(one, of_job)) is not None:
            matched[match].append(one)
        elif one.is_in_window and one.uid not in seen:
            hidden[one.uid] += 1
        elif one.is_in_window:
            _say_unmatched(result, one, of_job)
    for uid, count in hidden.items():
        name = known.name_of(uid)
        what = (
            f"sacct shows no job of {name}, the ledger has {count} starts: PrivateData hides them, or none of them was"
        )
        result.add("not_in_sacct", "", uid, what)
    return matched


def _match(one: LedgerStart, rows: Sequence[SlurmStart]) -> SlurmStart | None:
    inside = (
        row
        for row in rows
        if row.start is not None and row.start - SLACK_S <= one.t0 and (row.end is None or one.t1 <= row.end + SLACK_S)
    )
    return next(inside, None)


def _say_unmatched(result: Reconciliation, one: LedgerStart, rows: Sequence[SlurmStart]) -> None:
    spans = [f"{format_time(row.start)} - {format_time(row.end) if row.end else 'now'}" for row in rows if row.start]
    if spans:
        what = f"the ledger has it from {format_time(one.t0)} to {format_time(one.t1)}, sacct {', '.join(spans)}"
        result.add("outside_the_job", one.job_id, one.uid, what)
    else:
        what = f"start {one.restart}, {format_time(one.t0)}, is in the ledger and not in sacct"
        result.add("not_in_sacct", one.job_id, one.uid, what)


def _check(result: Reconciliation, pair: Pair, known: Known) -> None:
    row = pair.slurm
    if not pair.ledger:
        code, _, signal = row.exit_code.partition(":")
        is_refused = signal in ("", "0") and code in _ENDED_BEFORE_LOADING
        if (
            row.is_over
            and row.start is not None
            and not is_refused
            and not (known.excused and row.comment == known.excused)
        ):
            what = f"start {pair.restart}, {row.state}, {row.elapsed_s} s, is in sacct and not in the ledger"
            result.add("not_in_ledger", row.job_id, row.uid, what)
        return
    for one in pair.ledger:
        if one.uid != row.uid:
            what = f"a ledger file of {known.name_of(one.uid)}, the job is of {row.user}"
            result.add("another_user", row.job_id, one.uid, what)
        if one.account and row.account and one.account != row.account:
            what = f"account {one.account} in the ledger, {row.account} in sacct"
            result.add("another_account", row.job_id, one.uid, what)
        for part in one.parts:
            _check_speed(result, row, one, part, known.flops.get(part.model_digest))
    used = sum(one.gpus for one in pair.ledger)
    if used < row.gpus:
        what = f"{row.gpus - used} of {row.gpus} GPUs were never used: {(row.gpus - used) * row.elapsed_s} GPU seconds"
        result.add("unused_gpus", row.job_id, row.uid, what)
    elif used > row.gpus > 0:
        result.add("more_gpus", row.job_id, row.uid, f"{used} GPUs in the ledger, {row.gpus} in sacct")
    elif used > row.gpus:
        result.untracked += 1


def _check_speed(result: Reconciliation, row: SlurmStart, one: LedgerStart, part: Part, flops: float | None) -> None:
    """Over all that a writer recorded: tokens count when their request is answered, maybe intervals later."""
    if not part.tokens:
        return
    most = most_tokens_per_s(part.gpu, part.num_gpus, flops)
    if most is None:
        result.unbounded += 1
    elif part.tokens > most * max(part.t1 - part.t0, 1e-3):
        what = (
            f"{part.tokens} tokens in {part.t1 - part.t0:.1f} s; {part.num_gpus} {part.gpu} with {part.model} "
            f"cannot exceed {most:.0f} a second"
        )
        result.add("too_fast", row.job_id, one.uid, what)
