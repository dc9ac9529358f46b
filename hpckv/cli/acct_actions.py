"""What else `hpckv acct` does than answer from the ledger: Prometheus, the store's disk, the site's balance."""

from __future__ import annotations

import json
import logging
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hpckv.cli.acct_print import Form, print_answer
from hpckv.cli.show import user_name
from hpckv.errors import AccessError, ConfigError, HpckvError, StoreError
from hpckv.usage.columns import Column

if TYPE_CHECKING:
    from hpckv.usage.points import PointsConfig
    from hpckv.usage.query import Answer, Question

_log = logging.getLogger(__name__)

_PATIENCE_S = 60.0
"""Sites' commands ask a database, or each other."""
_DISK_BY = {"job": "user", "user": "user", "model": "namespace", "namespace": "namespace"}


class BalanceError(HpckvError):
    """The site's command does not say what is left."""

    exit_code = 69


def write_prometheus(
    path: Path, question: Question, stores: Sequence[Path], runs: Sequence[Path], points: PointsConfig
) -> None:
    """Everybody's sums, in `path`. Raises `ConfigError`, `CannotWriteError`."""
    from hpckv.usage.gather import gather
    from hpckv.usage.prometheus import textfile, write_textfile

    found = gather(stores, runs, question.start, question.end)
    for oddity in found.oddities:
        _log.warning("%s: %s", oddity.path, oddity.what)
    write_textfile(path, textfile(found, points, user_name, question.start, question.end))
    _log.info("%s: %d ledger files", path, found.num_files)


def print_disk(
    question: Question,
    stores: Sequence[Path],
    points: PointsConfig,
    wanted: Sequence[tuple[Column, int | None]],
    form: Form,
) -> None:
    """Everybody's share of the stores' disks. Raises `ConfigError`, `AccessError`, `StoreError`."""
    from hpckv.store.inspect import NamespaceView, namespaces
    from hpckv.store.layout import StoreLayout
    from hpckv.store.survey import Survey
    from hpckv.usage.disk import BY, COLUMNS, DiskShare, disk_rows, shares
    from hpckv.usage.query import Answer

    by = _DISK_BY.get(question.group)
    if by is None:
        raise ConfigError(f"--disk --group-by {question.group}: expected user or namespace")
    columns = [column for column, _ in wanted] or [COLUMNS[name.lower()] for name in BY[by]]
    found: list[DiskShare] = []
    views: dict[str, NamespaceView] = {}
    for store in stores:
        survey = Survey(StoreLayout(store))
        try:
            survey.refresh()
        except PermissionError as error:
            raise AccessError(f"store {store}: {error.filename}: permission denied") from None
        except OSError as error:
            raise StoreError(f"store {store}: {error.strerror}") from None
        found += shares(survey, question.start, min(question.end, time.time()))
        views |= {view.name: view for view in namespaces(survey)}
    if not points.disk_tb_day:
        _log.warning("no points.disk_tb_day in the site file: disk costs 0 points")
    rows = disk_rows(found, views, by, points.disk_tb_day, user_name)
    total = [sum(row[c.name] for row in rows) if c.kind != "text" else "" for c in columns]
    print_answer(Answer(columns, [[row[c.name] for c in columns] for row in rows], total), [w for _, w in wanted], form)


def print_balance(question: Question, points: PointsConfig, answer: Answer, form: Form) -> None:
    """What the site's command says is left, beside what `answer` cost. Raises `ConfigError`, `BalanceError`."""
    if not points.balance:
        raise ConfigError("--balance: no points.balance in the site file, the command that says what is left")
    command = _words(points.balance)
    said = _ask(command)
    if form.is_json:
        rows = [dict(zip((c.name for c in answer.columns), row, strict=True)) for row in answer.rows]
        total = {c.name: value for c, value in zip(answer.columns, answer.total, strict=True) if value != ""}
        columns = {c.name: {"kind": c.kind, "definition": c.definition} for c in answer.columns}
        record: dict[str, Any] = {
            "command": command,
            "balance": said,
            "columns": columns,
            "rows": rows,
            "total": total,
        }
        typer.echo(json.dumps({**record, "start": question.start, "end": question.end}))
        return
    print_answer(answer, [], form)
    say: Callable[[str], object] = typer.echo if form.is_table else lambda line: _log.warning("%s", line)
    say(f"left, by {shlex.join(command)}:")
    for line in said.splitlines():
        say(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "?", line))  # a terminal must not obey it


def balance_question(question: Question) -> Question:
    """What the window's jobs cost, by user."""
    from hpckv.usage.columns import BY_WRITER, DEFAULT, GROUPS
    from hpckv.usage.query import columns_of

    group = "user" if question.group == "job" else question.group
    if group in BY_WRITER:
        raise ConfigError(f"--balance --group-by {group}: writers cost nothing; group by user, account or project")
    keys = [name for name in GROUPS[group][1] if name not in DEFAULT[5:]]
    names = [*keys, "GPUTime", "Points", "SavedPoints"]
    return replace(question, group=group, columns=question.columns or columns_of(names, group))


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"points.balance: {command!r}: {error}") from None
    if not words:
        raise ConfigError("points.balance: an empty command")
    return words


def _ask(command: Sequence[str]) -> str:
    """What it prints. No shell reads it."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BalanceError(f"points.balance: {command[0]} gives no answer in {_PATIENCE_S:g} s") from None
    except OSError as error:
        raise BalanceError(f"points.balance: {command[0]}: {error.strerror}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise BalanceError(f"points.balance: {command[0]} ends with {done.returncode}{f': {said[-1]}' if said else ''}")
    return done.stdout
