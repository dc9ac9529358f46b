"""`hpckv store warm`: compute prefixes before they are wanted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from hpckv.cli.show import progress
from hpckv.errors import ConfigError
from hpckv.workload.runfile import load_run


def warm(
    path: Annotated[Path, typer.Argument(readable=False, metavar="DIR", help="The store.")],
    *,
    runfile: Annotated[
        Path,
        typer.Option(
            "--run", metavar="RUN.yaml", help="Model, cache and engine settings of the runs that will use it."
        ),
    ],
    batch_input: Annotated[
        str | None,
        typer.Option("--input", metavar="FILE", help="Prefixes as batch lines, instead of the run file's input."),
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="How long after their last use: like 7d, or pinned, until they are purged.")
    ] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one setting.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Precompute prefixes: system prompts, few-shot heads, documents. Full blocks that are there already are not computed again.

    Example: hpckv store warm /lustre/proj/kv --run eval.yaml --input documents.jsonl
    """
    config = load_run(runfile, flags={"input": batch_input}, sets=sets or (), environ=os.environ)
    from hpckv.engine import SamplingParams
    from hpckv.engine.engine import Engine
    from hpckv.store import StoreConfig
    from hpckv.workload.lines import read_batch

    lines = read_batch(Path(config.input), config.sampling)
    if lines.bad:
        raise ConfigError(f"{config.input}:{lines.bad[0].number}: {lines.bad[0].reason}")
    given = msgspec.structs.asdict(config.store) if config.store else {}
    store = StoreConfig(
        **{**given, "shared": str(path), "write": "all", "read": True, **({"keep": keep} if keep else {})}
    )
    prompts = [line.prompt for line in lines.lines]
    with Engine(config.model, store=store, cache=config.cache, engine=config.engine) as engine:
        with progress("prefixes", len(prompts)) as step:
            usages = []
            for answer in engine.generate(prompts, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)):
                usages.append(answer.usage)
                step()
        record = {
            "prefixes": len(usages),
            "prompt_tokens": sum(usage.prompt_tokens for usage in usages),
            "computed_tokens": sum(usage.computed_tokens for usage in usages),
        }
    if as_json:
        typer.echo(json.dumps(record))
    else:
        tokens, computed = record["prompt_tokens"], record["computed_tokens"]
        typer.echo(f"{record['prefixes']} prefixes of {tokens:,} tokens, {computed:,} of them computed now")
