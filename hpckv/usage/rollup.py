"""Closed months as one Parquet file each: read in milliseconds, and there when users' folders are not any more."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hpckv.errors import AccessError
from hpckv.store.durable import publish
from hpckv.store.foreign_file import UnusableFileError
from hpckv.store.root import StoreRoot
from hpckv.usage.gather import Gathered, LedgerPath, read_file, repeat_oddities, store_files
from hpckv.usage.ledger import Oddity, month_of
from hpckv.usage.months import OtherVersionError, RolledUp, description, read_rolled_up
from hpckv.usage.table import connect, quoted

GRACE_S = 86400.0
"""A month is closed when it has been over for so long: the last records of its runs are there."""

_MONTH = re.compile(r"\d{4}-(0[1-9]|1[0-2])")
"""Members may make other folders."""


def closed_months(root: StoreRoot, now: float | None = None) -> list[str]:
    """YYYY-MM of which there are ledger files and which are over."""
    last = month_of((time.time() if now is None else now) - GRACE_S)
    files = store_files(root.layout, "0000-00", last, Gathered())  # what is odd is said when its month is rolled up
    return sorted({file.month for file in files if file.month < last and _MONTH.fullmatch(file.month)})


def roll_up(root: StoreRoot, month: str, on_file: Callable[[], None] = lambda: None) -> tuple[int, list[Oddity]]:
    """Write the month's file anew: how many records it has, and what was left out.

    What an earlier roll-up has of ledger files that are gone by now, or are not any more what they were, stays in it. One of
    another version stays as it is. Raises `AccessError` if this is not the store's owner, `OSError`.
    """
    layout = root.layout
    if layout.root.stat().st_uid != os.getuid():
        raise AccessError(f"{layout.root}: only the store's owner rolls months up")
    found, files = Gathered(), {}
    target = layout.rolled_up / f"{month}.parquet"
    try:
        earlier = _earlier(target, found)
    except OtherVersionError as error:
        return 0, [Oddity(target, f"left as it is: {error}")]
    for file in store_files(layout, month, month, found):
        valid = read_file(file, found, earlier.files.get(file.key, (0, "")))
        if valid is not None:
            files[file.key] = valid
        on_file()
    kept = earlier.files.keys() - files.keys()
    if kept:
        found.months.append(replace(earlier, stale=frozenset(earlier.files.keys() - kept)))
        files.update({key: earlier.files[key] for key in kept})
        repeat_oddities(earlier, kept, layout, found)
    keys = {LedgerPath.of_key(layout, month, key).path: key for key in files}
    odd = [(keys[oddity.path], oddity.what, oddity.num_bytes) for oddity in found.oddities if oddity.path in keys]
    con = connect(found)
    with tempfile.TemporaryDirectory(prefix="hpckv-rollup-") as folder:
        path = Path(folder) / "month.parquet"
        con.execute(
            f"COPY (SELECT * FROM records ORDER BY uid, writer, seq) TO {quoted(str(path))} "
            f"(FORMAT parquet, COMPRESSION zstd, KV_METADATA {{hpckv: {quoted(description(files, odd))}}})"
        )
        group = root.policy.group
        layout.rolled_up.mkdir(exist_ok=True)
        layout.rolled_up.chmod(0o700 if group is None else 0o2750)  # members read it whatever the umask is
        publish(target, [path.read_bytes()], mode=0o600 if group is None else 0o640, gid=group)
    ((count,),) = con.execute("SELECT count(*) FROM records").fetchall()
    return count, found.oddities


def _earlier(path: Path, found: Gathered) -> RolledUp:
    """The month's earlier roll-up, an empty one if there is none that can be used. Raises `OtherVersionError`."""
    try:
        return read_rolled_up(path, os.getuid()) if path.exists() else RolledUp(path, {})
    except OtherVersionError:
        raise
    except UnusableFileError as error:
        found.oddities.append(Oddity(path, f"made anew: {error}"))
        return RolledUp(path, {})
