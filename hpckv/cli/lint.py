"""`hpckv lint`: what in a file of prompts breaks prefix reuse, and the tokens each costs. No torch."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from hpckv.cli.show import print_facts, progress
from hpckv.errors import EXIT_OK, ConfigError
from hpckv.kvcache.config import CacheConfig
from hpckv.workload.runfile import load_run

if TYPE_CHECKING:
    from hpckv.workload.lint import PrefixCosts, Report

EXIT_FOUND = 3


def lint(
    batch_input: Annotated[Path, typer.Argument(readable=False, metavar="INPUT.jsonl", help="OpenAI Batch lines.")],
    *,
    model: Annotated[
        Path | None,
        typer.Option(readable=False, metavar="PATH", help="Count with this model's tokenizer and chat template."),
    ] = None,
    runfile: Annotated[
        Path | None, typer.Option("--run", metavar="RUN.yaml", help="Model and block size of this run.", readable=False)
    ] = None,
    block_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens in a block; the run's, or 64.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    fix: Annotated[
        Path | None,
        typer.Option(metavar="OUT.jsonl", help="Write a copy with what is safe to repair; answers may change."),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option("--points-per-million-tokens", metavar="X", help="Say costs in points too.", show_default=False),
    ] = None,
) -> None:
    """Find what breaks prefix reuse in a file of prompts, and the tokens each costs: measured by repairing it and planning again.

    \b
    Example: hpckv lint prompts.jsonl --run run.yaml
    Example: hpckv lint prompts.jsonl --fix fixed.jsonl

    Without --model or --run tokens are an estimate: four bytes of UTF-8 are one. --fix repairs white space, JSON and the order of
    paragraphs, shows what it changes, and leaves the rest to you; models may answer a changed text differently.

    Exit codes: 0 nothing found; 3 something found; 64 wrong flag; 65 bad input line; 66 missing input; 69 no tokenizer;
    73 the copy cannot be written.
    """
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"--points-per-million-tokens: {price:g} is no price")
    from hpckv.workload.lint import check_target, copy_repaired, lint, read_prompts

    costs = _costs(model, runfile, block_tokens)
    if fix:
        check_target(batch_input, fix)
    prompts = read_prompts(batch_input)
    report = lint(prompts, costs, progress)
    if fix:
        copy_repaired(batch_input, fix, prompts, report.fix)
    if as_json:
        typer.echo(json.dumps(_record(report, price, is_fixed=fix is not None), indent=2))
    else:
        _print(report, price)
        if fix:
            _print_fixed(fix, report)
    raise typer.Exit(EXIT_FOUND if report.findings else EXIT_OK)


def _costs(model: Path | None, runfile: Path | None, block_tokens: int | None) -> PrefixCosts:
    if model and runfile:
        raise ConfigError("--model and --run: give one of them; a run file names its model")
    from hpckv.model.tokenizer import Tokenizer
    from hpckv.workload.lint import PrefixCosts

    cache = CacheConfig()
    if runfile:
        config = load_run(runfile, environ=os.environ)
        model, cache = Path(config.model.path), config.cache
    if block_tokens is not None:
        cache = CacheConfig(block_tokens=block_tokens)
    return PrefixCosts(cache.block_tokens, Tokenizer(model) if model else None)


def _points(tokens: int, price: float) -> float:
    return round(tokens * price / 1e6, 3)


def _record(report: Report, price: float | None, *, is_fixed: bool) -> dict[str, Any]:
    record = report.record
    if price is not None:
        for finding in record["findings"]:
            finding["points"] = _points(finding["tokens"], price)
        saved = report.distinct_tokens - report.distinct_tokens_repaired
        record["points"] = {
            "now": _points(report.distinct_tokens, price),
            "saved_by_all_repairs": _points(saved, price),
        }
    if is_fixed:
        record["fixed"] = {
            "requests": report.fix.num_requests,
            "by_kind": {kind: len(pairs) for kind, pairs in report.fix.changes.items()},
        }
    return record


def _print(report: Report, price: float | None) -> None:
    def cost(tokens: int) -> str:
        points = f" ({_points(tokens, price):,g} points)" if price is not None else ""
        return f"{tokens:,} tokens{points}"

    about = ", estimated: 4 bytes of UTF-8 each" if report.is_estimate else ""
    console = Console(highlight=False, soft_wrap=True)
    for finding in report.findings:
        in_turn = ""
        if finding.tokens_in_turn != finding.tokens:
            in_turn = f" alone, {cost(finding.tokens_in_turn)} in turn"
        console.print(
            f"[bold]{finding.kind}[/]: {cost(finding.tokens)}{in_turn}, {finding.requests:,} requests\n"
            f"  {escape(finding.sentence)}\n  {escape(finding.remedy)}"
        )
    if not report.findings:
        console.print("nothing found that breaks prefix reuse")
    print_facts(
        {
            "requests": report.requests,
            "in prompts": f"{cost(report.prompt_tokens)}{about}",
            "distinct prefixes now": cost(report.distinct_tokens),
            "after --fix": cost(report.distinct_tokens_fixed),
            "after all repairs": cost(report.distinct_tokens_repaired),
        }
    )


def _print_fixed(target: Path, report: Report) -> None:
    from hpckv.workload.lint import difference_lines

    console = Console(highlight=False, soft_wrap=True)
    for line in difference_lines(report.fix):
        console.print(escape(line))
    changed = f"{report.fix.num_requests:,} of {report.requests:,} requests differ"
    console.print(escape(f"{target}: {changed}; models may answer them differently"))
    if by_hand := [finding.kind for finding in report.findings if not finding.is_safe]:
        console.print(f"not repaired, by hand: {'; '.join(by_hand)}")
