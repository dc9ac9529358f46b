"""`hpckv bench`: what can be measured or proved on this machine in a minute. No torch."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hpckv.cli.show import progress

bench_app = typer.Typer(help="Measure and prove on this machine.", no_args_is_help=True, rich_markup_mode=None)
EXIT_UNEXPECTED = 3


@bench_app.callback()
def _group() -> None:
    """Measure and prove on this machine."""


@bench_app.command()
def identity(*, as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """Change one thing at a time, and see that no stored block is used where its bytes would be wrong. Exit code 3: one was.

    Example: hpckv bench identity
    """
    from hpckv.store.identity_matrix import check_rows, rows

    with progress("changes", len(rows())) as step:
        found = []
        for row, outcome in check_rows():
            found.append((row.change, row.expected, outcome))
            step()
    unexpected = [change for change, wanted, outcome in found if outcome != wanted]
    if as_json:
        keys = ("change", "expected", "found")
        typer.echo(json.dumps([dict(zip(keys, row, strict=True)) for row in found], indent=2))
    else:
        table = Table("changed", "must be", "was", "", box=None)
        for change, wanted, outcome in found:
            table.add_row(change, wanted, outcome, "" if outcome == wanted else "<--")
        Console(highlight=False).print(table)
    raise typer.Exit(EXIT_UNEXPECTED if unexpected else 0)
