"""What decides the keys and values of given tokens, and how they are written down: identity, representation, namespace.

A block may be used only where both are equal, so both are complete: the weights' content, the whole model
configuration as it was read (an unknown field gives a new identity, never a silent hit), and every choice of this
program that changes a bit of the result.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from hpckv.store.durable import publish
from hpckv.store.foreign_file import UnusableFileError, open_trusted

SCHEMA_VERSION = 1
LAYOUT_VERSION = 1
_SETTLED_NS = 2_000_000_000

# Fields of config.json that name things and enter no computation.
_NAMES_ONLY = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"})


def canonical_json(record: Mapping[str, Any]) -> bytes:
    """Sorted keys, no spaces, no NaN, ASCII: equal records give equal bytes."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def weights_digest(files: Iterable[Path], *, memory: Path | None = None) -> str:
    """BLAKE3 of the content of the weight files in name order: not of a name, a path or a date.

    Reading hundreds of GB at every start would cost minutes, so digests are remembered in the file `memory` beside each
    weight file's path, inode, size, and times of change; whatever of these differs, the content is read again.
    """
    remembered = _read_memory(memory)
    whole, is_new = blake3(), False
    for file in sorted(files):
        status = file.stat()
        signature = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        known = remembered.get(str(file.resolve()))
        if not (isinstance(known, dict) and known.get("signature") == signature):
            hasher = blake3(max_threads=blake3.AUTO)
            hasher.update_mmap(file)
            known = {"signature": signature, "digest": hasher.hexdigest()}
            # A file that was written just now may change again within the clock's tick.
            if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS:
                remembered[str(file.resolve())] = known
                is_new = True
        whole.update(bytes.fromhex(known["digest"]))
    if memory is not None and is_new:
        with contextlib.suppress(OSError):  # only speed is lost
            memory.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
            publish(memory, [json.dumps(remembered).encode()], mode=0o600, is_durable=False)
    return whole.hexdigest()


def default_memory() -> Path | None:
    """Where digests are remembered: $XDG_CACHE_HOME or ~/.cache, if there is one."""
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("HOME") and f"{os.environ['HOME']}/.cache")
    return Path(base) / "hpckv" / "weights.json" if base else None


def _read_memory(path: Path | None) -> dict[str, Any]:
    """What this user remembered; nobody else's word counts."""
    if path is None:
        return {}
    try:
        fd, _ = open_trusted(path, frozenset({os.getuid()}))
        with os.fdopen(fd, "rb") as file:
            content = json.loads(file.read())
    except (OSError, UnusableFileError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class Identity:
    """Everything that decides the K/V values of given tokens."""

    weights: str
    """`weights_digest` of the model's files."""
    config: Mapping[str, Any]
    """`config.json`, every field kept."""
    quantization: str = "none"
    adapter: str = "none"
    salt: str = ""
    """Of a private run: a secret of its user, so that keys and names tell others nothing."""

    @property
    def record(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA_VERSION,
            "weights": self.weights,
            "config": {k: v for k, v in self.config.items() if k not in _NAMES_ONLY},
            "quantization": self.quantization,
            "adapter": self.adapter,
            **({"salt": self.salt} if self.salt else {}),
        }

    @property
    def digest(self) -> bytes:
        return blake3(canonical_json(self.record)).digest()


@dataclass(frozen=True)
class Namespace:
    """One identity in one representation: one directory of the store."""

    identity: Identity
    representation: Mapping[str, Any]
    """dtype, block_tokens, tile grid, numerics mode and what it depends on, layout version."""

    @property
    def record(self) -> dict[str, Any]:
        representation = {"layout": LAYOUT_VERSION, **self.representation}
        return {"identity": self.identity.record, "representation": representation}

    @property
    def digest(self) -> bytes:
        return blake3(canonical_json(self.record)).digest()

    @property
    def name(self) -> str:
        """Directory name: the full digest in hexadecimal."""
        return self.digest.hex()
