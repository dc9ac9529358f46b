"""The verbs and global flags of `hpckv`. No torch at import."""

from __future__ import annotations

from typing import Annotated

import typer

import hpckv
from hpckv import log
from hpckv.cli.acct import acct
from hpckv.cli.bench import bench_app
from hpckv.cli.doctor import doctor
from hpckv.cli.lint import lint
from hpckv.cli.model import model_app
from hpckv.cli.plan import plan
from hpckv.cli.run import run
from hpckv.cli.status import cancel, status
from hpckv.cli.store import store_app
from hpckv.cli.submit import submit
from hpckv.workload import drain

app = typer.Typer(
    name="hpckv",
    help="Batch inference that never computes the same prefix twice.\n\nExample: hpckv run examples/demo.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(run)
app.command()(submit)
app.command()(status)
app.command()(cancel)
app.command()(plan)
app.command()(lint)
app.command()(acct)
app.command()(doctor)
app.add_typer(model_app, name="model")
app.add_typer(store_app, name="store")
app.add_typer(bench_app, name="bench")


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
