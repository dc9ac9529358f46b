"""Closed months as one Parquet file each: read in milliseconds, and there when users' folders are not any more."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hpckv.errors import AccessError
from hpckv.store.durable import publish
from hpckv.store.root import StoreRoot
from hpckv.usage.gather import Gathered, read_file, read_rolled_up, store_files, valid_length
from hpckv.usage.ledger import Oddity, month_of
from hpckv.usage.table import connect

GRACE_S = 86400.0
"""A month is closed when it has been over for so long: the last records of its runs are there."""


def closed_months(root: StoreRoot, now: float | None = None) -> list[str]:
    """YYYY-MM of which there are ledger files and which are over."""
    last = month_of((time.time() if now is None else now) - GRACE_S)
    return sorted({file.month for file in store_files(root.layout, "0000-00", last) if file.month < last})


def roll_up(root: StoreRoot, month: str, on_file: Callable[[], None] = lambda: None) -> tuple[int, list[Oddity]]:
    """Write the month's file anew: how many records it has, and what was left out.

    Ledger files that are gone by now stay in it as far as an earlier roll-up had them. Raises `AccessError` if this is not the
    store's owner, `OSError`.
    """
    layout = root.layout
    if layout.root.stat().st_uid != os.getuid():
        raise AccessError(f"{layout.root}: only the store's owner rolls months up")
    found, files = Gathered(), {}
    for file in store_files(layout, month, month):
        length, last = valid_length(read_file(file, found))
        if length:
            files[file.key] = length, last
        on_file()
    before = layout.rolled_up / f"{month}.parquet"
    _keep_what_is_gone(before, files, found)
    con = connect(found)
    with tempfile.TemporaryDirectory(prefix="hpckv-rollup-") as folder:
        path = Path(folder) / "month.parquet"
        text = json.dumps({"v": 1, "files": files})
        con.execute(
            "COPY (SELECT * FROM records ORDER BY uid, writer, seq) TO '" + str(path).replace("'", "''") + "' "
            "(FORMAT parquet, COMPRESSION zstd, KV_METADATA {hpckv: '" + text.replace("'", "''") + "'})"
        )
        layout.rolled_up.mkdir(mode=0o750, exist_ok=True)
        group = root.policy.group
        publish(before, [path.read_bytes()], mode=0o600 if group is None else 0o640, gid=group)
    ((count,),) = con.execute("SELECT count(*) FROM records").fetchall()
    return count, found.oddities


def _keep_what_is_gone(before: Path, files: dict[str, tuple[int, str]], found: Gathered) -> None:
    """Of the month's earlier roll-up, the rows of files that are not there any more."""
    if not before.exists():
        return
    earlier = read_rolled_up(before, os.getuid(), found)
    if earlier is None:
        return
    gone = {key: value for key, value in earlier.files.items() if key not in files}
    if gone:
        found.months.append(replace(earlier, stale=frozenset(earlier.files.keys() - gone.keys())))
        files.update(gone)
