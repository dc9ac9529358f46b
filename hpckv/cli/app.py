"""The verbs and global flags of `hpckv`. A verb's module is imported when the verb is called, or all verbs are listed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group

import hpckv
from hpckv import log
from hpckv.workload import drain

VERBS = {
    "run": "run:run",
    "submit": "submit:submit",
    "status": "status:status",
    "cancel": "status:cancel",
    "plan": "plan:plan",
    "lint": "lint:lint",
    "acct": "acct:acct",
    "doctor": "doctor:doctor",
    "model": "model:model_app",
    "store": "store:store_app",
    "bench": "bench:bench_app",
}
"""Each verb's module in this package, and what there it is: a function, or a `Typer` with verbs of its own."""


class _Commands(Mapping[str, Any]):
    """All verbs by name; one is built when it is taken out."""

    def __iter__(self) -> Iterator[str]:
        return iter(VERBS)

    def __len__(self) -> int:
        return len(VERBS)

    def __getitem__(self, verb: str) -> Any:
        return _build(verb)


@cache
def _build(verb: str) -> Any:
    module, _, attribute = VERBS[verb].partition(":")
    found = getattr(import_module(f"hpckv.cli.{module}"), attribute)
    home = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    if isinstance(found, typer.Typer):
        home.add_typer(found, name=verb)
        return get_group(home).commands[verb]
    home.command(verb)(found)
    return get_command(home)


class _Group(TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands: Any = _Commands()


app = typer.Typer(
    name="hpckv",
    cls=_Group,
    help="Batch inference that never computes the same prefix twice.\n\nExample: hpckv run examples/demo.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hpckv {hpckv.__version__}")
        raise typer.Exit


@app.callback()
def configure(
    context: typer.Context,
    *,
    verbose: Annotated[int, typer.Option("-v", "--verbose", count=True, help="Say more.")] = 0,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Warnings and errors only.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Batch inference that never computes the same prefix twice.

    Example: hpckv run examples/demo.yaml
    """
    log.setup(-1 if quiet else verbose)
    if context.invoked_subcommand != "run":  # only a run drains
        drain.unblock_signals()
