"""`hpckv model`: what a model folder is and what it takes, and a copy of it on the node's disk. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from hpckv.cli.show import print_facts
from hpckv.device.gpus import GPU_CLASSES
from hpckv.model import ModelConfig, read_config
from hpckv.model.stage import stage_model
from hpckv.quantity import format_bytes
from hpckv.workload.runfile import site_local

model_app = typer.Typer(
    help="Inspect model folders, and copy them to a node's disk.", no_args_is_help=True, rich_markup_mode=None
)

KV_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
_USABLE_SHARE = 0.9
_WEIGHT_BYTES = 2


@model_app.callback()
def _group() -> None:
    """Inspect model folders, and copy them to a node's disk."""


@model_app.command()
def info(
    path: Annotated[Path, typer.Argument(readable=False, metavar="PATH", help="Hugging Face model folder.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Family, parameters, KV bytes a token, and what fits which GPU.

    Example: hpckv model info examples/recall-1m
    """
    record = describe(read_config(path))
    if as_json:
        typer.echo(json.dumps(record, indent=2))
        return
    console = Console(highlight=False)
    names = (
        "architecture",
        "parameters",
        "stored_dtype",
        "context_tokens",
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "tp",
        "pp",
    )
    print_facts({name.replace("_", " "): record[name] for name in names})
    sizes = Table("KV dtype", "bytes a token", title="KV cache", title_justify="left")
    for dtype, size in record["kv_bytes_per_token"].items():
        sizes.add_row(dtype, f"{size:,} ({format_bytes(size)})")
    console.print(sizes)
    fits = Table(
        "GPU",
        "weights in 16 bits",
        *(f"tokens in {d}" for d in ("float16", "fp8")),
        title="What fits one GPU",
        title_justify="left",
    )
    for gpu, tokens in record["tokens_that_fit"].items():
        row = [f"{tokens[d]:,}" if tokens else "-" for d in ("float16", "fp8")]
        fits.add_row(gpu, "fit" if tokens else "do not fit", *row)
    console.print(fits)


@model_app.command()
def stage(
    path: Annotated[Path, typer.Argument(readable=False, metavar="PATH", help="Hugging Face model folder.")],
    *,
    to: Annotated[
        str,
        typer.Option("--to", metavar="DIR", help="Of this node's disk; found by itself where PATH is on the network."),
    ] = "auto",
) -> None:
    """Copy a model onto this node's own disk, once, verified; prints the folder. `model.stage` in a run file does the same.

    Example: hpckv model stage /lustre/models/llama-3.1-8b --to $SLURM_TMPDIR
    """
    read_config(path)
    with Progress(
        TextColumn("copying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=Console(stderr=True)
    ) as bar:
        task = bar.add_task("copy", total=None, visible=False)
        copy = stage_model(
            path,
            to,
            lambda done, total: bar.update(task, completed=done, total=total, visible=True),
            site=site_local(os.environ),
        )
    typer.echo(str(copy))


def describe(config: ModelConfig) -> dict[str, Any]:
    """Everything `model info` prints. Memory: 90 % of a GPU, less 16-bit weights, is room for the KV cache."""
    per_token = {dtype: config.kv_values_per_token * size for dtype, size in KV_DTYPES.items()}
    weights = config.num_parameters * _WEIGHT_BYTES
    fits: dict[str, dict[str, int] | None] = {}
    for gpu in GPU_CLASSES:
        room = int(gpu.memory_gb * 1e9 * _USABLE_SHARE) - weights
        fits[gpu.name] = {dtype: room // size for dtype, size in per_token.items()} if room > 0 else None
    return {
        "architecture": config.architecture,
        "parameters": config.num_parameters,
        "stored_dtype": config.stored_dtype,
        "context_tokens": config.max_positions,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope": config.rope.kind,
        "windows": sorted({w for w in config.windows if w is not None}),
        "kv_bytes_per_token": per_token,
        "tokens_that_fit": fits,
        "tp": [n for n in (1, 2, 4, 8, 16) if _can_split(config, n)],
        "pp": [n for n in (1, 2, 4, 8) if n <= config.num_layers],
    }


def _can_split(config: ModelConfig, tp: int) -> bool:
    kv = config.num_kv_heads
    return config.num_heads % tp == 0 and config.intermediate_size % tp == 0 and (kv % tp == 0 or tp % kv == 0)
