"""`hpckv run`: answer a file of prompts here: in this process, or in all that `srun` or `mpiexec` started."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hpckv.launch.folder import count_answers
from hpckv.workload import drain
from hpckv.workload.runfile import load_run


def run(
    runfile: Annotated[Path, typer.Argument(readable=False, metavar="RUN.yaml", help="The run file.")],
    *,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one setting.")] = None,
    batch_input: Annotated[
        str | None, typer.Option("--input", metavar="FILE", help="Prompts, instead of the run file's.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="DIR", help="Run directory, instead of the run file's.")
    ] = None,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Answer the rest; bad lines go to errors.jsonl.")
    ] = False,
    join: Annotated[
        bool,
        typer.Option("--join", help="Work on it together with other jobs that do; each takes parts of what is left."),
    ] = False,
    allow_errors: Annotated[bool, typer.Option("--allow-errors", help="Exit 0 also when requests failed.")] = False,
) -> None:
    """Run a batch: every prompt is answered once, in DIR/output.jsonl. Started again, it goes on where it stopped.

    \b
    Example: hpckv run examples/demo.yaml --set engine.max_requests=64 --output runs/second
    Example: hpckv run RUN.yaml --join, in as many jobs as there are GPUs free
    Example: mpiexec -n 4 hpckv run RUN.yaml --set parallel.tp=2 --set parallel.pp=2

    Exit codes: 0 all answered; 3 some requests failed; 64 wrong flag or setting; 65 bad input line; 66 missing input;
    69 model or store unusable; 73 output cannot be written; 75 stopped by a signal, run again; 78 does not fit this machine.
    """
    # The signal thread comes before anything that starts threads of its own (torch does at import).
    watcher = drain.install()
    config = load_run(runfile, flags={"input": batch_input, "output": output}, sets=sets or (), environ=os.environ)
    from hpckv.comm.outcome import note_beginning
    from hpckv.workload.prepare import RunOptions
    from hpckv.workload.run import run_batch
    from hpckv.workload.together import together

    note_beginning(Path(config.output), count_answers)
    is_quiet = not logging.getLogger("hpckv").isEnabledFor(logging.INFO)
    options = RunOptions(skips_bad_lines=skip_bad_lines, allows_errors=allow_errors, joins=join, is_quiet=is_quiet)
    work = partial(run_batch, config, options, watcher)
    raise typer.Exit(together(config.parallel, work, Path(config.output)))
