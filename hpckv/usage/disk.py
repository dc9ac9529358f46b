"""What a store's bytes cost: who keeps how much, for how long, at the site's price of disk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hpckv.store.inspect import NamespaceView
from hpckv.store.survey import Survey
from hpckv.usage.columns import Column

_TB_DAY = 1e12 * 86400.0


@dataclass
class DiskShare:
    """Files of one user in one namespace, as far as they are there now."""

    uid: int
    namespace: str
    """Empty for what is in none, the ledger and heat logs say."""
    num_bytes: int = 0
    num_files: int = 0
    byte_s: float = 0.0
    """Bytes times the seconds that each file was there within the window; what was deleted meanwhile is not known."""

    @property
    def tb_days(self) -> float:
        return self.byte_s / _TB_DAY


COLUMNS: dict[str, Column] = {
    column.name.lower(): column
    for column in (
        Column("User", "text", "", "whose files"),
        Column(
            "Namespace", "text", "", "beginning of the name of a model in one representation, as hpckv store ls has it"
        ),
        Column("Model", "text", "", "architecture and size"),
        Column("DType", "text", "", "dtype, tokens of a block and numerics"),
        Column("Size", "bytes", "", "bytes that are there now"),
        Column("Files", "count", "", "files that are there now"),
        Column(
            "TBDays",
            "number",
            "",
            "10^12 bytes x days that these files were there in the window; deleted ones are not known",
        ),
        Column("DiskPoints", "number", "", "TBDays at the site's points.disk_tb_day"),
        Column("PointsPerDay", "number", "", "Size at the same price: what the next day costs"),
    )
}
BY = {
    "user": ("User", "Size", "Files", "TBDays", "DiskPoints", "PointsPerDay"),
    "namespace": ("Namespace", "Model", "DType", "Size", "Files", "TBDays", "DiskPoints", "PointsPerDay"),
}
"""What may be grouped by, and the columns that are shown then."""


def shares(survey: Survey, start: float, end: float) -> list[DiskShare]:
    """Of a surveyed store in the window [start, end), seconds since 1970."""
    found: dict[tuple[int, str], DiskShare] = {}
    for file in survey.files.values():
        namespace = file.namespace if file.kind in ("segment", "index", "identity", "temporary") else ""
        share = found.setdefault((file.uid, namespace), DiskShare(file.uid, namespace))
        share.num_bytes += file.num_bytes
        share.num_files += 1
        share.byte_s += file.num_bytes * max(0.0, end - max(start, file.written_at))
    return list(found.values())


def disk_rows(
    found: Iterable[DiskShare],
    views: Mapping[str, NamespaceView],
    by: str,
    price: float,
    name_of: Callable[[int], str],
) -> list[dict[str, Any]]:
    """Rows of `COLUMNS`, largest first; `price` is that of a TB for a day."""
    groups: dict[Any, list[DiskShare]] = defaultdict(list)
    for share in found:
        groups[share.uid if by == "user" else share.namespace].append(share)
    rows = []
    for members in groups.values():
        size, tb_days = sum(one.num_bytes for one in members), sum(one.tb_days for one in members)
        view = views.get(members[0].namespace)
        rows.append(
            {
                "User": ", ".join(sorted({name_of(one.uid) for one in members})),
                "Namespace": members[0].namespace[:10] if by == "namespace" else "",
                "Model": view.model if view and by == "namespace" else "",
                "DType": view.representation if view and by == "namespace" else "",
                "Size": size,
                "Files": sum(one.num_files for one in members),
                "TBDays": tb_days,
                "DiskPoints": tb_days * price,
                "PointsPerDay": size / 1e12 * price,
            }
        )
    return sorted(rows, key=lambda row: -row["Size"])
