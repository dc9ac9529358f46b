"""`hpckv acct --report` and `--png`: the accounting as a page, and as pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hpckv.errors import CannotWriteError, CapabilityError, ConfigError

if TYPE_CHECKING:
    from hpckv.usage.gather import Gathered
    from hpckv.usage.query import Accounts, Question


@dataclass(frozen=True)
class Destination:
    """Where a report is to go, found to be possible."""

    page: Path | None
    pictures: Path | None

    @classmethod
    def of(cls, page: str | None, pictures: str | None, others: Mapping[str, object]) -> Destination | None:
        """None if neither is asked for. `others` are flags of the printed table and their values.

        Raises `ConfigError`, `CapabilityError`, `CannotWriteError`.
        """
        if page is None and pictures is None:
            return None
        flag = "--report" if page is not None else "--png"
        if given := [name for name, value in others.items() if value]:
            raise ConfigError(f"{flag} shows what it shows; {', '.join(given)} is for the printed table")
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            remedy = "pip install 'hpckv[report]'"
            raise CapabilityError(
                f"{flag} draws with matplotlib, which cannot be imported ({error}): {remedy}"
            ) from None
        if page is not None:
            if Path(page).is_dir():
                raise ConfigError(
                    f"--report {page}: is a folder; name the page, for example {Path(page) / 'acct.html'}"
                )
            _check_folder(Path(page).absolute().parent, f"--report {page}")
        if pictures is not None:
            if Path(pictures).exists() and not Path(pictures).is_dir():
                raise ConfigError(f"--png {pictures}: is a file; name a folder")
            made = Path(pictures).absolute()
            _check_folder(made if made.exists() else made.parent, f"--png {pictures}")
        return cls(Path(page).absolute() if page else None, Path(pictures).absolute() if pictures else None)


def write_report(
    to: Destination,
    accounts: Accounts,
    question: Question,
    found: Gathered,
    *,
    stores: Sequence[Path],
    runs: Sequence[Path],
    site: Path | None,
) -> None:
    """Write what is asked for and say where; raises `CannotWriteError`."""
    from hpckv import __version__
    from hpckv.usage.report.page import render_page, render_pngs
    from hpckv.usage.report.sections import make_report

    # In whole seconds, as times are spelled: what the page says to ask asks about the same records.
    question = replace(question, start=math.floor(question.start), end=math.ceil(question.end))
    report = make_report(accounts, question, stores=stores, runs=runs, site=site)
    try:
        if to.page is not None:
            _put(to.page, render_page(report, found, version=__version__).encode())
        if to.pictures is not None:
            to.pictures.mkdir(exist_ok=True)
            for name, content in render_pngs(report):
                _put(to.pictures / name, content)
    except OSError as error:
        raise CannotWriteError(f"{error.filename or to.page}: {error.strerror}") from None
    if not report.sections:
        typer.echo("no records in this window", err=True)


def _put(path: Path, content: bytes) -> None:
    from hpckv.store.durable import mode_for, publish

    publish(path, [content], mode=mode_for(path))
    typer.echo(path)


def _check_folder(folder: Path, flag: str) -> None:
    if not folder.is_dir():
        raise CannotWriteError(f"{flag}: no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CannotWriteError(f"{flag}: {folder} cannot be written to")
