"""`hpckv plan`: what a run will take, before it is submitted. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from hpckv.cli.show import print_facts, progress
from hpckv.errors import EXIT_OK
from hpckv.quantity import format_bytes
from hpckv.usage.timespec import format_elapsed
from hpckv.workload.runfile import load_run

if TYPE_CHECKING:
    from hpckv.workload.lines import BatchLine
    from hpckv.workload.outlook import Cost, Outlook

EXIT_BEYOND_BUDGET = 77
EXIT_DOES_NOT_FIT = 78


def plan(
    runfile: Annotated[Path, typer.Argument(readable=False, metavar="RUN.yaml", help="The run file.")],
    *,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one setting.")] = None,
    batch_input: Annotated[
        str | None, typer.Option("--input", metavar="FILE", help="Prompts, instead of the run file's.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="DIR", help="Run directory, instead of the run file's.")
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option("--gpu", metavar="NAME", help="This kind only, such as A100; else those that slurm: asks for."),
    ] = None,
    output_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Tokens of an answer as you expect them; max_tokens, the most, else."),
    ] = None,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Plan without them, as `hpckv run --skip-bad-lines`.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """What a run will compute, find in the store, take and cost on each kind of GPU - before it is submitted.

    Example: hpckv plan run.yaml --gpu A100 --gpu H100 --output-tokens 100

    Rates are the site file's `rates:`, else those of earlier runs of the model over this store (ledger), else an estimate from
    data sheets, which is marked so and may be off by a factor of three.

    Without --gpu the kinds are those that the run file's slurm.gpus_per_node, slurm.gres or slurm.constraint name; if they name
    none that is known, those of site file and ledger, else of the data sheets.

    Exit codes: 0; 64 wrong flag or setting; 65 bad input line; 66 missing input; 69 model or store unusable;
    77 the run costs more than slurm.max_points; 78 it fits none of these kinds of GPU.
    """
    config = load_run(runfile, flags={"input": batch_input, "output": output}, sets=sets or (), environ=os.environ)
    from hpckv.workload.outlook import look_ahead
    from hpckv.workload.prepare import RunOptions

    options = RunOptions(skips_bad_lines=skip_bad_lines)
    found = look_ahead(config, options, gpus=gpu or (), output_tokens=output_tokens, stepping=_stepping)
    if as_json:
        typer.echo(json.dumps(found.record, indent=2))
    else:
        _print(found, is_expected=output_tokens is not None)
    if beyond := found.beyond_budget:
        typer.echo(f"hpckv: {', '.join(beyond)}: more than slurm.max_points: {found.max_points:g}", err=True)
    if found.is_beyond_budget:
        raise typer.Exit(EXIT_BEYOND_BUDGET)
    raise typer.Exit(EXIT_OK if found.costs else EXIT_DOES_NOT_FIT)


def _stepping(lines: Sequence[BatchLine]) -> Iterator[BatchLine]:
    with progress("prompts", len(lines)) as step:
        for line in lines:
            yield line
            step()


def _print(found: Outlook, *, is_expected: bool) -> None:
    answered = f", {found.answered:,} of them answered" if found.answered else ""
    bad = f", {found.bad_lines:,} lines that cannot be run" if found.bad_lines else ""
    facts: dict[str, object] = {
        "requests": f"{found.requests:,}{answered}{bad}",
        "prompt tokens": found.prompt_tokens,
        "of these distinct": found.distinct_tokens,
        "answer tokens": f"{found.output_tokens:,} {'as expected' if is_expected else 'at most'}",
    }
    dtypes = {cost.dtype: cost for cost in found.costs}
    for dtype, cost in dtypes.items():  # what a store has may differ
        facts |= _facts(cost, f" in {dtype}" if len(dtypes) > 1 else "")
    print_facts(facts)
    console = Console(highlight=False, soft_wrap=True)
    if found.costs:
        _print_costs(found.costs, console)
    for name, why in found.unfit.items():
        console.print(f"{name}: {why}")


def _facts(cost: Cost, suffix: str) -> dict[str, object]:
    expected = cost.forecast
    within = expected.cached["device"]
    return {
        f"to be computed{suffix}": expected.computed_tokens,
        f"shared in the batch{suffix}": within,
        f"from the store{suffix}": expected.cached_tokens - within,
        f"hit %{suffix}": f"{expected.hit_percent:.1f}",
        f"store grows by{suffix}": f"{format_bytes(cost.growth_bytes)} at most",
    }


def _print_costs(costs: Sequence[Cost], console: Console) -> None:
    has_points = any(cost.points is not None for cost in costs)
    heads = ["GPU", "dtype", "time", "GPU time", "-t", *(["points"] if has_points else []), "rates"]
    table = Table(*heads, box=None)
    for cost in costs:
        times = (format_elapsed(seconds) for seconds in (cost.seconds, cost.seconds * cost.num_gpus))
        points = ["-" if cost.points is None else f"{cost.points:.4g}"] if has_points else []
        table.add_row(cost.kind.gpu, cost.dtype, *times, cost.time, *points, cost.kind.source)
    console.print(table)
