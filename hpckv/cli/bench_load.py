"""`hpckv bench load`: load a stored prefix or compute it, measured for a run's model, store and GPU. No torch at import."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from hpckv.cli.show import print_facts, progress
from hpckv.errors import ConfigError
from hpckv.quantity import ByteSize, format_bytes
from hpckv.workload.runfile import load_run

if TYPE_CHECKING:
    from hpckv.engine.load_bench import LoadBench
    from hpckv.store.read_bench import TierReads


def load(
    runfile: Annotated[
        Path, typer.Argument(readable=False, metavar="RUN.yaml", help="The run file: its model, store and machine.")
    ],
    *,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one setting.")] = None,
    lengths: Annotated[
        str, typer.Option(metavar="N,N,...", help="Prefixes, in tokens; those that do not fit are left out.")
    ] = "128,256,512,1024,2048,4096,8192,16384,32768",
    size: Annotated[
        str, typer.Option(metavar="SIZE", help="Most to write into each tier; removed afterwards.")
    ] = "2GiB",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    site_fragment: Annotated[
        bool, typer.Option("--site-fragment", help="Print the lines for the site file's `rates:` only.")
    ] = False,
) -> None:
    """Load a stored prefix, or compute it? Prefill, decode and read rates of each tier, and from which length on loading wins.

    \b
    Example: srun --gpus=1 hpckv bench load RUN.yaml --lengths 1024,8192
    Example: hpckv bench load RUN.yaml --site-fragment >rates.yaml

    As many ranks as `parallel:` has for one replica must be started. Prompts are random tokens; blocks have the model's real size.
    """
    import msgspec

    config = load_run(runfile, sets=sets or (), environ=os.environ)
    store = config.store
    if store is None:
        raise ConfigError(f"{runfile}: store: is not there; without one there is nothing to load")
    tokens, most = _lengths(lengths), ByteSize.parse(size)
    from hpckv.comm import World
    from hpckv.workload.starting import process_start
    from hpckv.workload.together import together

    parallel = msgspec.structs.replace(config.parallel, replicas=1)

    def work(world: World) -> int:
        from hpckv.engine.load_bench import measure

        with progress("measurements", len(tokens) * (1 + 3)) as step:
            found = measure(
                config.model,
                store,
                cache=config.cache,
                engine=config.engine,
                parallel=parallel,
                world=world,
                lengths=tokens,
                most_bytes=most,
                started=process_start(),
                step=step,
            )
        if found:
            _print(found, as_json=as_json, site_fragment=site_fragment)
        return 0

    raise typer.Exit(together(parallel, work))


def _lengths(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ConfigError(f"--lengths {text}: expected numbers of tokens, for example 1024,8192")
    return found


def _print(found: LoadBench, *, as_json: bool, site_fragment: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_record(found)))
    elif site_fragment:
        typer.echo(_fragment(found))
    else:
        _print_table(found)


def _fragment(found: LoadBench) -> str:
    return yaml.safe_dump({"rates": [found.rate]}, sort_keys=False, allow_unicode=True).rstrip()


def _record(found: LoadBench) -> dict[str, Any]:
    tiers = {}
    for reads in found.tiers:
        measured = [n for n in found.lengths if n // found.block_tokens in reads.seconds]
        tiers[reads.tier] = {
            "place": reads.place,
            "trouble": reads.trouble,
            "load_s": {n: found.load_s(reads, n) for n in measured},
            "bytes_per_s": found.bytes_per_s(reads),
            "loads": {n: found.loads(reads, n) for n in measured},
            "crossover_tokens": None if reads.trouble else found.crossover(reads),
        }
    return {
        **found.rate,
        "dtype": found.dtype,
        "block_tokens": found.block_tokens,
        "block_bytes": found.block_bytes,
        "prefill_s": found.prefill_s,
        "decode_requests": found.decode_requests,
        "tiers": tiers,
    }


def _print_table(found: LoadBench) -> None:
    tiers = [reads for reads in found.tiers if not reads.trouble]
    table = Table("prefix", "compute", *(f"from {reads.tier}" for reads in tiers), box=None)
    for column in table.columns:
        column.justify = "right"
    for tokens, compute_s in found.prefill_s.items():
        cells = []
        for reads in tiers:
            load_s = found.load_s(reads, tokens)
            cells.append(f"{load_s:.4f} s {'load' if found.loads(reads, tokens) else 'compute'}")
        table.add_row(f"{tokens:,}", f"{compute_s:.4f} s", *cells)
    Console(highlight=False).print(table)
    facts: dict[str, object] = {
        "model": f"{found.model} in {found.dtype}, {format_bytes(found.block_bytes / found.block_tokens)} a token",
        "GPU": found.gpu,
        "prefill": f"{found.full_step_tokens_per_s:,.0f} tokens/s",
        "decode": f"{found.decode_tokens_per_s:,.0f} tokens/s, {found.decode_requests} requests together",
    }
    for reads in found.tiers:
        where = f" ({reads.place})" if reads.place else ""
        facts[f"{reads.tier}{where}"] = (
            reads.trouble or f"{format_bytes(found.bytes_per_s(reads) or 0)}/s; {_verdict(found, reads)}"
        )
    print_facts(facts)
    typer.echo(f"\nfor the site file:\n{_fragment(found)}")


def _verdict(found: LoadBench, reads: TierReads) -> str:
    first = found.crossover(reads)
    if first is None:
        return f"a prefix of {found.lengths[-1]:,} tokens is computed sooner than loaded"
    if first == found.lengths[0]:
        return f"loading is faster at every length from {first:,} tokens on"
    return f"loading is faster from {first:,} tokens on"
