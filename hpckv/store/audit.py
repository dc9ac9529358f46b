"""Sampled audits: a few requests compute their whole prefix themselves, and what others had stored of it is compared.

Digests prove that a block is what its writer wrote; only computing it again proves that the writer wrote the right thing. An
audit starts at token 0: a block recomputed on top of a wrong prefix would confirm it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from blake3 import blake3

from hpckv.store.bridge import to_float32
from hpckv.store.catalog import Catalog
from hpckv.store.durable import publish
from hpckv.store.fetch import DaemonPool
from hpckv.store.file_tier import FileTier
from hpckv.store.root import StoreRoot

_log = logging.getLogger(__name__)

TOLERANCE = {"float32": 1e-2, "float16": 3e-2, "bfloat16": 1e-1}
"""Largest ||stored - computed|| / ||computed|| of a block, by dtype: kernels, batches and GPUs differ, by far less."""


@dataclass
class AuditStats:
    """Counters that only grow."""

    requests: int = 0
    blocks: int = 0
    mismatches: int = 0
    worst_error: float = 0.0
    """Largest relative error of a block that was within tolerance."""


class Auditor:
    """Compares blocks of one shared tier with freshly computed ones, in a thread that nobody waits for long."""

    def __init__(
        self,
        tier: FileTier,
        root: StoreRoot,
        *,
        share: float,
        dtype: str,
        is_strict: bool,
        catalogs: Sequence[Catalog],
    ) -> None:
        """`share` of the requests are audited; in strict mode every bit must agree.

        Whoever is found out is not read through any of `catalogs` any more.
        """
        self._catalogs = catalogs
        self.stats = AuditStats()
        self._tier, self._root, self._share = tier, root, share
        self._dtype, self._tolerance = dtype, 0.0 if is_strict else TOLERANCE[dtype]
        self._pool = DaemonPool(1, "hpckv-audit")
        self._lock = threading.Lock()
        self._distrusted: set[int] = set()
        self._num_open = 0
        self._idle = threading.Condition(self._lock)

    def wants(self, request_id: str) -> bool:
        """Whether this request is one of the sample; by its id, so that a restart decides alike."""
        drawn = int.from_bytes(blake3(f"audit {request_id}".encode()).digest(8), "little")
        return drawn < self._share * 2.0**64

    def submit(self, keys: Sequence[bytes], computed: Sequence[memoryview]) -> None:
        """Compare these blocks of a prefix, computed from token 0 on, with what is stored under their keys."""
        with self._lock:
            self._num_open += 1
        self._pool.submit(partial(self._compare_all, list(keys), list(computed)))

    def take_distrusted(self) -> set[int]:
        """Writers that were found out since the last call."""
        with self._lock:
            found, self._distrusted = self._distrusted, set()
        return found

    def finish(self, patience_s: float) -> None:
        """Wait for comparisons under way, no longer than `patience_s` seconds."""
        with self._idle:
            self._idle.wait_for(lambda: self._num_open == 0, patience_s)

    def _compare_all(self, keys: Sequence[bytes], computed: Sequence[memoryview]) -> None:
        try:
            for number, (key, own) in enumerate(zip(keys, computed, strict=True)):
                if not self._compare(number, key, own):
                    break  # what follows was computed on top of it
            self.stats.requests += 1
        except Exception as error:  # noqa: BLE001 - an audit that cannot be made stops nobody
            _log.warning("store: an audit failed: %s", error)
        finally:
            with self._idle:
                self._num_open -= 1
                self._idle.notify_all()

    def _compare(self, number: int, key: bytes, own: memoryview) -> bool:
        found = self._tier.read_signed(key)
        if found is None:
            return True
        stored, writers = found
        self.stats.blocks += 1
        if stored == own:
            return True
        if not np.isfinite(to_float32(own, self._dtype)).all():
            return False  # a model that overflows can tell nothing about others
        error = relative_error(stored, own, self._dtype)
        if error <= self._tolerance:
            self.stats.worst_error = max(self.stats.worst_error, error)
            return True
        self.stats.mismatches += 1
        with self._lock:
            self._distrusted |= writers
        for uid in sorted(writers):
            for catalog in self._catalogs:
                catalog.distrust(uid)
            _log.error(
                "store %s: block %d of a prefix, written by uid %d, is not what the model computes (relative error %.2g, "
                "tolerance %.2g); nothing of that user's is used any more in this run. Tell the store's owner: "
                "hpckv store distrust %s %d",
                *(self._root.layout.root, number, uid, error, self._tolerance, self._root.layout.root, uid),
            )
            self._report(uid, number, error)
        return False

    def _report(self, uid: int, number: int, error: float) -> None:
        folder = self._root.layout.audits(os.getuid())
        record = {
            "v": 1,
            "time": time.time(),
            "writer": uid,
            "namespace": self._tier.catalog.own_folder(uid).name,
            "block": number,
            "relative_error": error,
            "tolerance": self._tolerance,
            "job": os.environ.get("SLURM_JOB_ID"),
        }
        try:
            self._root.make_own_folder(folder)
            publish(
                folder / f"{secrets.token_hex(16)}.json", [json.dumps(record).encode()], gid=self._root.policy.group
            )
        except OSError as trouble:
            _log.warning("store %s: the audit's report could not be written: %s", folder, trouble.strerror)

    @property
    def record(self) -> dict[str, Any]:
        """The counters as plain data."""
        return dict(vars(self.stats))


def relative_error(stored: memoryview, computed: memoryview, dtype: str) -> float:
    """||stored - computed|| / ||computed|| over a block's values; infinite where they are not comparable."""
    a, b = to_float32(stored, dtype).astype(np.float64), to_float32(computed, dtype).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        error = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))
    return error if np.isfinite(error) else float("inf")
