"""`hpckv acct --reconcile`: the ledger beside `sacct`."""

from __future__ import annotations

import grp
import json
import logging
import os
import pwd
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hpckv.cli.acct_print import Form, print_answer
from hpckv.cli.show import user_name
from hpckv.errors import ConfigError, HpckvError
from hpckv.usage.columns import Column

if TYPE_CHECKING:
    from hpckv.usage.query import Question
    from hpckv.usage.reconcile import Pair, Reconciliation, SlurmStart

_log = logging.getLogger(__name__)

EXIT_DISAGREES = 3
_INTERRUPTED = ("REQUEUED", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "TIMEOUT", "OUT_OF_MEMORY")

_COLUMNS: dict[Column, Callable[[Pair], Any]] = {
    Column("JobID", "text", "", "Slurm's job, of an array's task as 7_3"): lambda p: p.slurm.job_id,
    Column("Start#", "count", "", "0 for the job's first start, 1 after it was requeued"): lambda p: p.restart,
    Column("User", "text", "", "whose job it is, by sacct"): lambda p: p.slurm.user,
    Column("Account", "text", "", "by sacct"): lambda p: p.slurm.account,
    Column("State", "text", "", "how the start ended, by sacct"): lambda p: p.slurm.state,
    Column("ExitCode", "text", "", "by sacct"): lambda p: p.slurm.exit_code,
    Column("Elapsed", "elapsed", "", "time that Slurm counts"): lambda p: p.slurm.elapsed_s,
    Column("Before", "elapsed", "", "of it, until an engine started: prologue, container, Python"): lambda p: _before(
        p
    ),
    Column("After", "elapsed", "", "of it, after the last record"): lambda p: _after(p),
    Column("GPUs", "count", "", "that Slurm gave it (AllocTRES)"): lambda p: p.slurm.gpus,
    Column("Alloc", "elapsed", "", "GPUs x Elapsed: what is paid for"): lambda p: p.gpu_s,
    Column("Used", "elapsed", "", "GPUs x time of engines in the ledger"): lambda p: p.used_gpu_s,
    Column("Idle%", "percent", "", "100 (1 - Used / Alloc)"): lambda p: p.idle_percent,
    Column("Energy", "number", "", "joules in the ledger"): lambda p: p.energy_j,
    Column("NodeEnergy", "number", "", "joules that Slurm read on its nodes, other jobs' there included"): (
        lambda p: p.slurm.energy_j
    ),
}
COLUMNS = {column.name.lower(): column for column in _COLUMNS}
DEFAULT = "JobID Start# User Account State Elapsed GPUs Alloc Used Idle%".split()  # noqa: SIM905


def reconcile_with_slurm(
    question: Question,
    stores: Sequence[Path],
    runs: Sequence[Path],
    wanted: Sequence[tuple[Column, int | None]],
    form: Form,
) -> int:
    """Print it all; the exit code. Raises `SlurmError`, `ConfigError`."""
    if question.models or question.projects or question.group != "job":
        raise ConfigError("--reconcile is of jobs: --model, --project and --group-by do not go with it")
    found = _reconcile(question, stores, runs)
    columns = [column for column, _ in wanted] or [COLUMNS[name.lower()] for name in DEFAULT]
    if form.is_json:
        _print_json(found)
    else:
        from hpckv.usage.query import Answer

        rows = [[_COLUMNS[column](pair) for column in columns] for pair in found.pairs]
        print_answer(Answer(columns, rows, _total(columns, found.pairs)), [width for _, width in wanted], form)
        _say(found, typer.echo if form.is_table else lambda line: _log.warning("%s", line))
    return EXIT_DISAGREES if found.findings else 0


def _reconcile(question: Question, stores: Sequence[Path], runs: Sequence[Path]) -> Reconciliation:
    from hpckv.launch.sacct import cluster_name, starts_between, starts_of
    from hpckv.usage.gather import gather
    from hpckv.usage.reconcile import MARGIN_S, Known, ledger_starts, reconcile
    from hpckv.workload.job_comment import NOTHING_LEFT
    from hpckv.workload.starts import read_starts

    start, end = question.start, question.end
    gathered = gather(stores, runs, start - MARGIN_S, time.time() + 1)
    for oddity in gathered.oddities:
        _log.warning("%s: %s", oddity.path, oddity.what)
    everything, without_slurm = ledger_starts(gathered, start, end)
    # Other projects' jobs are in other ledgers, and a site has many more of them.
    members = _members(stores) | {one.uid for one in everything} | {os.getuid()}
    uids = sorted(members if question.uids is None else question.uids)
    slurm = starts_of(question.jobs) if question.jobs else starts_between(start, end, uids)
    known = {row.job for row in slurm}
    ledger = [
        one
        for one in everything
        if (one.is_in_window or one.job in known)
        and _is_asked_about(question, one.uid, one.account, one.partition, one.job, one.job_id)
    ]
    slurm += starts_of(sorted({one.job for one in ledger} - known))  # they may have ended before the window
    in_ledger = {one.job for one in ledger}
    slurm = [
        row
        for row in dict.fromkeys(slurm)
        if row.job in in_ledger
        or (row.uid in uids and _is_asked_about(question, row.uid, row.account, row.partition, row.job, row.job_id))
    ]
    result = reconcile(
        ledger,
        slurm,
        Known(
            cluster=cluster_name() or next((row.cluster for row in slurm), None),
            own_uid=os.getuid(),
            named=frozenset(begun.job for run in runs for begun in read_starts(run) if begun.job),
            excused=NOTHING_LEFT,
            flops=_flops(stores),
            name_of=user_name,
        ),
    )
    result.without_slurm = without_slurm
    return result


def _is_asked_about(
    question: Question, uid: int, account: str | None, partition: str | None, job: str, job_id: str
) -> bool:
    return (
        (question.uids is None or uid in question.uids)
        and (not question.accounts or account in question.accounts)
        and (not question.partitions or partition in question.partitions)
        and (not question.jobs or not {job, job_id, job_id.partition("_")[0]}.isdisjoint(question.jobs))
    )


def _members(stores: Sequence[Path]) -> set[int]:
    """Who uses these stores, or may."""
    from hpckv.store.layout import StoreLayout
    from hpckv.store.root import StoreRoot
    from hpckv.store.survey import users

    found: set[int] = set()
    for store in stores:
        found |= {uid for uid, _ in users(StoreLayout(store))}
        group = StoreRoot.open(store).policy.group
        if group is None:
            continue
        found |= {entry.pw_uid for entry in pwd.getpwall() if entry.pw_gid == group}
        names: list[str] = []
        with suppress(KeyError):
            names = grp.getgrgid(group).gr_mem
        for name in names:
            with suppress(KeyError):  # somebody who has left
                found.add(pwd.getpwnam(name).pw_uid)
    return found


def _flops(stores: Sequence[Path]) -> dict[str, float]:
    """Of the models that the stores have blocks of."""
    from hpckv.store.inspect import namespaces
    from hpckv.store.layout import StoreLayout
    from hpckv.store.survey import Survey
    from hpckv.usage.bounds import models_in

    found: dict[str, float] = {}
    for store in stores:
        survey = Survey(StoreLayout(store))
        with suppress(OSError, HpckvError):
            survey.refresh()
            found |= models_in(namespaces(survey))
    return found


def _before(pair: Pair) -> float | None:
    return min(s.t0 for s in pair.ledger) - pair.slurm.start if pair.ledger and pair.slurm.start else None


def _after(pair: Pair) -> float | None:
    return pair.slurm.end - max(s.t1 for s in pair.ledger) if pair.ledger and pair.slurm.end else None


def _total(columns: Sequence[Column], pairs: Sequence[Pair]) -> list[Any]:
    alloc, used = sum(pair.gpu_s for pair in pairs), sum(pair.used_gpu_s for pair in pairs)
    found: list[Any] = []
    for column in columns:
        if column.name == "Idle%":
            found.append(100 * (1 - used / alloc) if alloc else None)
        elif column.kind in ("elapsed", "number"):
            values = [value for pair in pairs if (value := _COLUMNS[column](pair)) is not None]
            found.append(sum(values) if values else None)
        else:
            found.append("")
    return found


def _say(found: Reconciliation, say: Callable[[str], Any]) -> None:
    for pair in found.pairs:
        row = pair.slurm
        if row.state in _INTERRUPTED or pair.restart:
            say(
                f"{row.job_id}: start {pair.restart} ended {row.state}{f' after {row.restarts} restarts' if row.restarts else ''}"
            )
    for finding in found.findings:
        say(f"{finding.job_id + ': ' if finding.job_id else ''}{finding.what}")
    aside = {
        "were on other clusters": found.elsewhere,
        "were no jobs of Slurm's": found.without_slurm,
        "have a model or a device whose largest speed is not known": found.unbounded,
        "used GPUs and have none in sacct: AccountingStorageTRES may lack gres/gpu": found.untracked,
    }
    for what, count in aside.items():
        if count:
            say(f"not compared: {count} that {what}")
    num_recorded = sum(bool(pair.ledger) for pair in found.pairs)
    say(f"{num_recorded} of {len(found.pairs)} starts are in the ledger; {len(found.findings)} findings")


def _print_json(found: Reconciliation) -> None:
    record = {
        "columns": {c.name: {"kind": c.kind, "definition": c.definition} for c in _COLUMNS},
        "rows": [
            {column.name: get(pair) for column, get in _COLUMNS.items()} | _more(pair.slurm) for pair in found.pairs
        ],
        "findings": [vars(finding) for finding in found.findings],
        "not_compared": {
            "other_clusters": found.elsewhere,
            "without_slurm": found.without_slurm,
            "speed_unknown": found.unbounded,
            "gpus_untracked": found.untracked,
        },
    }
    typer.echo(json.dumps(record))


def _more(row: SlurmStart) -> dict[str, Any]:
    return {
        "Cluster": row.cluster,
        "JobIDRaw": row.job,
        "Partition": row.partition,
        "QOS": row.qos,
        "Start": row.start,
        "End": row.end,
        "Restarts": row.restarts,
        "Comment": row.comment,
    }
