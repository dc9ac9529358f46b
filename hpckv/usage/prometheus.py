"""The ledger's sums as a file that node_exporter's textfile collector reads: the Prometheus text format, version 0.0.4.

Counters are sums over the whole ledger, so they only grow; rates are Prometheus's to compute. What may fall is a gauge: saved
seconds are corrected by later measurements, points by another price.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpckv.errors import CannotWriteError, ConfigError
from hpckv.store.durable import publish
from hpckv.usage.gather import Gathered
from hpckv.usage.points import PointsConfig
from hpckv.usage.record import TIERS
from hpckv.usage.table import connect

LABELS = ("user", "account", "project", "model", "gpu")
"""Of every sum; tokens and bytes of a tier have `tier` as well."""


@dataclass(frozen=True)
class Metric:
    """One name, over all its labels."""

    name: str
    kind: str
    help: str
    sql: str = ""
    """The sum, or with `{tier}` in it one for each of `tiers`."""
    tiers: Sequence[str] = ()


METRICS = (
    Metric("hpckv_requests_total", "counter", "Requests answered.", "sum(requests)"),
    Metric("hpckv_failed_requests_total", "counter", "Requests that ended with an error.", "sum(failed)"),
    Metric("hpckv_prompt_tokens_total", "counter", "Tokens of the answered requests' prompts.", "sum(prompt_tokens)"),
    Metric("hpckv_cached_tokens_total", "counter", "Of these, found in a cache.", "sum(cached_{tier})", TIERS),
    Metric("hpckv_computed_tokens_total", "counter", "Of these, computed.", "sum(computed_tokens)"),
    Metric("hpckv_output_tokens_total", "counter", "Tokens generated.", "sum(output_tokens)"),
    Metric("hpckv_written_tokens_total", "counter", "Tokens kept in a store.", "sum(written_tokens)"),
    Metric("hpckv_read_bytes_total", "counter", "Bytes of blocks loaded.", "sum(read_bytes_{tier})", TIERS[1:]),
    Metric("hpckv_written_bytes_total", "counter", "Bytes of blocks kept.", "sum(written_bytes_{tier})", TIERS[1:]),
    Metric("hpckv_load_seconds_total", "counter", "Time in which all waited for stored blocks.", "sum(load_s)"),
    Metric("hpckv_gpu_seconds_total", "counter", "GPUs times time, used or not.", "sum(gpu_s)"),
    Metric("hpckv_energy_joules_total", "counter", "Joules, as far as they were measured.", "sum(energy_j)"),
    Metric("hpckv_saved_gpu_seconds", "gauge", "GPU time that cached tokens saved.", "sum(saved_gpu_s)"),
    Metric("hpckv_points", "gauge", "Cost at the site's prices.", "sum(gpu_s / 3600 * price)"),
    Metric("hpckv_saved_points", "gauge", "What cached tokens saved, at the same.", "sum(saved_gpu_s / 3600 * price)"),
    Metric("hpckv_last_record_timestamp_seconds", "gauge", "End of the latest record.", "max(t1)"),
)
_ODDITIES = Metric("hpckv_ledger_oddities", "gauge", "Files and lines of the ledger that do not count.")


def write_textfile(path: Path, lines: Iterable[str]) -> None:
    """Whole, so that nobody reads half of it. Raises `ConfigError` for a name that is not read, `CannotWriteError`."""
    if path.suffix != ".prom":
        raise ConfigError(f"--prom {path}: node_exporter reads files whose names end in .prom")
    try:
        publish(path, ["".join(f"{line}\n" for line in lines).encode()], mode=0o644, is_durable=False)
    except OSError as error:
        raise CannotWriteError(f"{path}: {error.strerror}") from None


def textfile(
    found: Gathered, points: PointsConfig, name_of: Callable[[int], str], start: float, end: float
) -> Iterator[str]:
    """Lines of all metrics, over records that ended in [start, end); one that nothing is known of has none."""
    con = connect(found)
    price, values = points.price_sql
    con.execute(
        f"CREATE TEMP TABLE priced AS SELECT *, {price} AS price FROM records WHERE t1 >= ? AND t1 < ?",
        [*values, start, end],
    )
    for metric in METRICS:
        tiers = metric.tiers or ("",)
        sums = ", ".join(metric.sql.format(tier=tier) for tier in tiers)
        query = f"SELECT uid, account, project, model, gpu, {sums} FROM priced GROUP BY ALL ORDER BY ALL"
        samples: dict[str, float] = {}
        for uid, *labels, rest in ((*row[:5], row[5:]) for row in con.execute(query).fetchall()):
            named = dict(zip(LABELS, (name_of(uid), *labels), strict=True))
            for tier, value in zip(tiers, rest, strict=True):
                if value is not None:  # what differs in characters that no label has is one series
                    series = _series(metric.name, {**named, "tier": tier} if tier else named)
                    before = samples.get(series)
                    is_sum = metric.sql.startswith("sum(")
                    samples[series] = value if before is None else before + value if is_sum else max(before, value)
        if samples:
            yield from (*_head(metric), *(f"{series} {value!r}" for series, value in samples.items()))
    yield from (*_head(_ODDITIES), f"{_ODDITIES.name} {len(found.oddities)}")


def _head(metric: Metric) -> tuple[str, str]:
    return f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"


def _series(name: str, labels: dict[str, Any]) -> str:
    given = ",".join(f'{label}="{_escaped(text or "")}"' for label, text in labels.items())
    return f"{name}{{{given}}}"


def _escaped(text: str) -> str:
    """A label's value. Names are whatever their users wrote; control characters say nothing to anybody."""
    plain = re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]", "?", text)
    return plain.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
