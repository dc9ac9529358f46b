"""What several commands print: facts, bars, names of users and groups."""

from __future__ import annotations

import contextlib
import grp
import pwd
import sys
import threading
from collections.abc import Callable, Iterator, Mapping

from hpckv.errors import ConfigError


def print_facts(facts: Mapping[str, object]) -> None:
    """A table of names and values, without lines."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    Console(highlight=False).print(table)


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal's stderr, nothing elsewhere; gives a function to call for each one done, from any thread."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    lock = threading.Lock()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)

        def step() -> None:
            with lock:
                bar.advance(task)

        yield step


def user_name(uid: int) -> str:
    """Its name, or the number where there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int | None) -> str:
    """Its name, the number where there is none, `nobody` for None."""
    if gid is None:
        return "nobody"
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def group_id(name: str, flag: str = "--group") -> int:
    """Of a group's name or number; raises `ConfigError`."""
    if name.isdecimal():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f"{flag} {name}: no such group; `id` lists yours") from None
