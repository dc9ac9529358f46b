"""`hpckv bench`: what can be measured or proved on this machine in a minute or two. No torch at import."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hpckv.cli.bench_load import load
from hpckv.cli.show import print_facts, progress

bench_app = typer.Typer(help="Measure and prove on this machine.", no_args_is_help=True, rich_markup_mode=None)
bench_app.command()(load)
EXIT_UNEXPECTED = 3


@bench_app.callback()
def _group() -> None:
    """Measure and prove on this machine."""


@bench_app.command()
def parallel(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder.")],
    *,
    tp: Annotated[int, typer.Option(help="Tensor ranks.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    micro_batches: Annotated[int, typer.Option(help="In the pipeline at once; 0 is twice the stages.")] = 0,
    prompts: Annotated[int, typer.Option(help="Prompts, which share nothing.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 64,
    output_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Where a step's time goes when a model is spread over ranks: computing, exchanging, waiting, scheduling.

    Example: mpiexec -n 4 hpckv bench parallel models/llama-3.1-8b --tp 2 --pp 2
    """
    from hpckv.comm import ParallelConfig, World
    from hpckv.workload.together import together

    config = ParallelConfig(tp=tp, pp=pp, micro_batches=micro_batches)

    def work(world: World) -> int:
        from hpckv.engine.parallel_bench import Load, measure
        from hpckv.model import ModelSettings

        found = measure(ModelSettings(path=model), config, Load(prompts, prompt_tokens, output_tokens), world)
        if found:
            typer.echo(json.dumps(found)) if as_json else _print_parallel(found)
        return 0

    raise typer.Exit(together(config, work))


def _print_parallel(found: dict[str, Any]) -> None:
    table = Table("ms a step", "compute", "of it tensor ranks", "stage before", "rank 0", box=None)
    for number, rank in enumerate(found["ranks"]):
        steps = max(1, rank["steps"])
        parts = (rank[name] * 1e3 / steps for name in ("compute_s", "tensor_s", "stage_s", "message_s"))
        table.add_row(f"rank {number}", *(f"{part:.2f}" for part in parts))
    Console(highlight=False).print(table)
    print_facts(
        {
            "steps": int(found["steps"]),
            "output tokens/s": f"{found['output_tokens_per_s']:.1f}",
            "bubble": f"{100 * found['bubble']:.1f} % of all ranks' time",
            "scheduling": f"{found['schedule_s'] * 1e3 / max(1, found['steps']):.3f} ms a step",
            "told each rank": f"{found['message_bytes'] / max(1, found['steps']):.0f} bytes a step",
        }
    )


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
