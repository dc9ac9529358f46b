"""The columns of `hpckv acct`: what each means, and how it is computed over records."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from hpckv.usage.points import CachePrices
from hpckv.usage.record import TIERS

Kind = Literal["text", "count", "bytes", "seconds", "elapsed", "time", "percent", "number"]

JOB = (
    "CASE WHEN array_job IS NOT NULL THEN array_job || '_' || array_task ELSE coalesce(job, "
    r"regexp_replace(writer, '(\.[^.]+){3}$', '')) END"
)
_HITS = " + ".join(f"cached_{tier}" for tier in TIERS)


@dataclass(frozen=True)
class Column:
    """One column: an aggregate over the records of a row."""

    name: str
    kind: Kind
    sql: str
    definition: str


def _same(expression: str) -> str:
    """A text that all records of a row share, or `several`."""
    return f"CASE WHEN min({expression}) = max({expression}) THEN min({expression}) WHEN count({expression}) > 0 THEN 'several' END"


def _sum(expression: str) -> str:
    return f"sum({expression})"  # 128 bits wide, so that no ledger makes it overflow


_ALL = (
    Column("JobID", "text", _same("job_id"), "Slurm's job, of an array's task as 7_3; without Slurm host and process"),
    Column("JobIDRaw", "text", _same("job"), "Slurm's number of the job, of each task of an array its own"),
    Column("Cluster", "text", _same("cluster"), "Slurm's name of the cluster"),
    Column("User", "text", _same("user_name"), "who owns the ledger file, by the kernel"),
    Column("UID", "text", _same("uid::VARCHAR"), "the same as a number"),
    Column("Account", "text", _same("account"), "Slurm's account of the job"),
    Column("Partition", "text", _same("partition"), "Slurm's partition of the job"),
    Column("QOS", "text", _same("qos"), "Slurm's quality of service of the job"),
    Column("Project", "text", _same("project"), "Unix group of the store"),
    Column("Run", "text", _same("run"), "name of the run directory"),
    Column("Model", "text", _same("model"), "name of the model's folder"),
    Column("ModelDigest", "text", _same("model_digest"), "digest of the model's weights"),
    Column("GPU", "text", _same("gpu"), "the device computed on, cpu without one"),
    Column("NGPUs", "count", "max(num_gpus)", "GPUs of a replica, at most; on CPUs processes"),
    Column("Restarts", "count", "max(restart)", "how often Slurm had started the job again"),
    Column("Start", "time", "min(t0)", "begin of the first interval"),
    Column("End", "time", "max(t1)", "end of the last interval"),
    Column("Elapsed", "elapsed", "max(t1) - min(t0)", "End - Start, also when it was not running in between"),
    Column("Requests", "count", _sum("requests"), "requests answered"),
    Column("Failed", "count", _sum("failed"), "requests that ended with an error"),
    Column("PromptTok", "count", _sum("prompt_tokens"), "tokens of the answered requests' prompts = HitTok + Computed"),
    Column(
        "HitTok", "count", _sum("hit_tokens"), "of these, found in a cache = DeviceTok + HostTok + LocalTok + SharedTok"
    ),
    Column("Hit%", "percent", "100.0 * sum(hit_tokens) / nullif(sum(prompt_tokens), 0)", "100 HitTok / PromptTok"),
    Column(
        "DeviceTok",
        "count",
        _sum("cached_device"),
        "hits in the GPU's memory: prefixes shared within a batch, or loaded before",
    ),
    Column("HostTok", "count", _sum("cached_host"), "hits in the process's host RAM"),
    Column("LocalTok", "count", _sum("cached_local"), "hits on the node's own disk"),
    Column("SharedTok", "count", _sum("cached_shared"), "hits in the shared store"),
    Column("Computed", "count", _sum("computed_tokens"), "prompt tokens computed"),
    Column("OutTok", "count", _sum("output_tokens"), "tokens generated"),
    Column(
        "WrittenTok", "count", _sum("written_tokens"), "tokens, of prompts and answers, kept in a store for later runs"
    ),
    Column(
        "PricedTok",
        "number",
        "sum(priced_tokens)",
        "Computed + read x HitTok + (write - 1) x WrittenTok, at the site's cache prices (0.1; 1.25, if kept for an hour 2.0)",
    ),
    Column("OwnTok", "count", _sum("own_tokens"), "hits in blocks that were loaded and that the same user had written"),
    Column(
        "OthersTok",
        "count",
        _sum("loaded_tokens - own_tokens"),
        "hits in blocks that were loaded and that others had written",
    ),
    Column("Read", "bytes", _sum("read_bytes_host + read_bytes_local + read_bytes_shared"), "bytes of blocks loaded"),
    Column(
        "Written",
        "bytes",
        _sum("written_bytes_host + written_bytes_local + written_bytes_shared"),
        "bytes of blocks kept",
    ),
    Column("StoreWritten", "bytes", _sum("written_bytes_shared"), "of these, in the shared store"),
    Column("Load", "elapsed", "sum(load_s)", "time in which all waited for stored blocks"),
    Column("Prefill", "elapsed", "sum(prefill_s)", "time of steps, as far as their tokens were prompts'"),
    Column("Decode", "elapsed", "sum(decode_s)", "time of steps, as far as their tokens were generated"),
    Column(
        "TokPerSec",
        "number",
        "sum(output_tokens) / nullif(sum(gpu_s / num_gpus), 0)",
        "OutTok a second of each replica",
    ),
    Column("GPUTime", "elapsed", "sum(gpu_s)", "GPUs x time, used or not"),
    Column(
        "SavedGPU",
        "elapsed",
        "sum(saved_gpu_s)",
        "GPUs x (HitTok / tokens prefilled a second, as measured in that run - Load); credited to the reader",
    ),
    Column(
        "Energy",
        "number",
        "sum(energy_j)",
        "joules of the GPUs, on CPUs of the node, in intervals in which they were measured and nobody else's; else empty",
    ),
    Column(
        "Points", "number", "sum(gpu_s / 3600 * price)", "GPUTime at the site's price of partition, QoS, GPU and date"
    ),
    Column("SavedPoints", "number", "sum(saved_gpu_s / 3600 * price)", "SavedGPU at the same price"),
    Column(
        "DiskPoints",
        "number",
        "sum(written_bytes_shared * disk_price)",
        "StoreWritten at the site's price of disk from when it was written to the window's end, as if none had been evicted",
    ),
    Column("Hour", "text", _same("hour"), "local hour of the interval's end"),
    Column("Day", "text", _same("day"), "local day of the interval's end"),
    Column("Week", "text", _same("week"), "Monday of that week"),
    Column("Month", "text", _same("month"), "month of that day"),
)
COLUMNS = {column.name.lower(): column for column in _ALL}
DEFAULT = "JobID User Account Model GPU Requests PromptTok HitTok Hit% Computed OutTok SavedGPU Points".split()  # noqa: SIM905

_OF_WRITERS = (
    Column("Writer", "text", "any_value(writer_name)", "who had computed and stored the blocks that others hit"),
    Column("LoadedTok", "count", _sum("tokens"), "tokens loaded from the writer's blocks"),
    Column("ByOthers", "count", _sum("CASE WHEN writer_uid <> uid THEN tokens ELSE 0 END"), "of these, by other users"),
    Column("Readers", "count", "count(DISTINCT uid)", "users who loaded them"),
    Column("Jobs", "count", "count(DISTINCT job_id)", "jobs that loaded them"),
    Column(
        "SavedGPU", "elapsed", "sum(share * saved_gpu_s)", "the readers' SavedGPU, by the writer's part of their HitTok"
    ),
    Column("SavedPoints", "number", "sum(share * saved_gpu_s / 3600 * price)", "the same in points"),
)
_OF_PAIRS = (
    Column("Reader", "text", _same("user_name"), "who loaded them"),
    Column("WriterUID", "text", _same("writer_uid::VARCHAR"), "the writer as a number"),
    Column("ReaderUID", "text", _same("uid::VARCHAR"), "the reader as a number"),
)
WRITER_COLUMNS = {column.name.lower(): column for column in (*_OF_WRITERS, *_OF_PAIRS)}
WRITER_DEFAULT = [column.name for column in _OF_WRITERS]

GROUPS = {
    "job": ("coalesce(cluster, ''), uid, job_id", DEFAULT),
    "user": ("uid", ["User", *DEFAULT[5:]]),
    "account": ("account", ["Account", *DEFAULT[5:]]),
    "project": ("project", ["Project", *DEFAULT[5:]]),
    "model": ("model, model_digest", ["Model", *DEFAULT[5:]]),
    "gpu": ("gpu", ["GPU", *DEFAULT[5:]]),
    "replica": ("gpu, num_gpus", ["GPU", "NGPUs", *DEFAULT[5:]]),
    "hour": ("hour", ["Hour", *DEFAULT[5:]]),
    "day": ("day", ["Day", *DEFAULT[5:]]),
    "week": ("week", ["Week", *DEFAULT[5:]]),
    "month": ("month", ["Month", *DEFAULT[5:]]),
    "writer": ("writer_uid", WRITER_DEFAULT),
    "pair": ("writer_uid, uid", ["Writer", "Reader", "LoadedTok", "Jobs", "SavedGPU", "SavedPoints"]),
}
"""What may be grouped by: its SQL, and the columns that are shown then."""
PERIODS = ("hour", "day", "week", "month")
"""Groups that follow each other in time."""
BY_WRITER = ("writer", "pair")
"""Groups of what is owed to whom."""

_SPELLED = {
    "job_id": JOB,
    "hit_tokens": _HITS,
    "user_name": "names.name",
    "hour": "days.hour",
    "day": "days.day",
    "week": "strftime(date_trunc('week', days.day::DATE), '%Y-%m-%d')",
    "month": "left(days.day, 7)",
    "loaded_tokens": "coalesce(list_sum(map_values(owed)), 0)",
    "own_tokens": "coalesce(owed[r.uid::VARCHAR], 0)",
    "priced_tokens": f"computed_tokens + {{read}} * ({_HITS}) + (CASE WHEN keep_s >= 3600 THEN {{long}} ELSE {{short}} END - 1) "
    "* written_tokens",
}
"""What columns are made of beside a record's fields; each costs something over a million records."""


def derived(prices: CachePrices, asked: str) -> str:
    """SQL of the records in `priced` with what the SQL `asked` needs."""
    needed = {name: text for name, text in _SPELLED.items() if re.search(rf"\b{name}\b", asked)}
    of = {"read": prices.read, "short": prices.write_short, "long": prices.write_long}
    given = {name: f"{price!r}::DOUBLE" for name, price in of.items()}
    extra = "".join(
        f", {text.format(**given) if '{read}' in text else text} AS {name}" for name, text in needed.items()
    )
    owed = (
        "CAST(by_writer::JSON AS MAP(VARCHAR, BIGINT)) AS owed"
        if re.search("owed|loaded_tokens|own_tokens", asked)
        else "1"
    )
    joined = " LEFT JOIN names ON names.uid = r.uid" if "user_name" in needed else ""
    joined += " ASOF LEFT JOIN days ON r.t1 >= days.start" if needed.keys() & set(PERIODS) else ""
    return f"SELECT r.*{extra} FROM (SELECT *, {owed} FROM priced) AS r{joined}"


OF_WRITERS = """
SELECT r.*, debt.key::BIGINT AS writer_uid, debt.value AS tokens, names.name AS writer_name,
    debt.value / greatest(hit_tokens, 1) AS share
FROM (SELECT *, unnest(map_entries(owed)) AS debt FROM rows) AS r LEFT JOIN names ON names.uid = r.debt.key::BIGINT
"""
"""A row for each writer that a record owes to."""
