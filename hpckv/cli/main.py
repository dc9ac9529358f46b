"""`hpckv`: the verbs, global flags, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import click
import typer

import hpckv
from hpckv import log
from hpckv.cli.model import model_app
from hpckv.cli.run import run
from hpckv.errors import ConfigError, HpckvError

app = typer.Typer(
    name="hpckv",
    help="Batch inference that never computes the same prefix twice.\n\nExample: hpckv run examples/demo.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(run)
app.add_typer(model_app, name="model")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hpckv {hpckv.__version__}")
        raise typer.Exit


@app.callback()
def configure(
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


def main() -> None:
    """Entry point: run a command, end with its exit code. An error the project knows is never a traceback."""
    try:
        status = app(standalone_mode=False)
    except click.exceptions.Abort:
        status = 130
    except click.ClickException as error:
        error.show()
        status = ConfigError.exit_code
    except HpckvError as error:
        sys.stderr.write("hpckv: " + " ".join(str(error).splitlines()) + "\n")
        status = error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
