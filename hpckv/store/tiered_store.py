"""The tiers of one namespace behind one door: look up, load towards the device, keep what was computed.

Tiers are ordered from near to far. A block loaded from a far tier is put into the nearer ones on its way.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpckv.errors import AccessError, StoreError
from hpckv.log import warn_once
from hpckv.store.block import BlockGeometry, check_golden_vector
from hpckv.store.config import StoreConfig
from hpckv.store.durable import publish
from hpckv.store.file_tier import FileTier
from hpckv.store.host_tier import HostTier
from hpckv.store.identity import Namespace
from hpckv.store.segment import SegmentContext, StoredBlock
from hpckv.store.tier import PutOutcome, Tier

_log = logging.getLogger(__name__)

FORMAT = "hpckv store"
FORMAT_VERSION = 1


class TieredStore:
    """Blocks of one namespace over its tiers."""

    def __init__(self, tiers: Sequence[Tier], *, epoch_key: bytes, reads: bool = True, writes: bool = True) -> None:
        self.tiers = list(tiers)
        self.epoch_key = epoch_key
        self.reads, self.writes = reads, writes

    def contains(self, key: bytes) -> bool:
        """Whether some tier believes it has the block."""
        return self.reads and any(tier.contains(key) for tier in self.tiers)

    def load(self, block: StoredBlock, into: memoryview) -> str | None:
        """Read and verify a block from the nearest tier that has it, and keep it in the nearer ones.

        Returns that tier's name, or None for a miss; the block's own payload is not looked at.
        """
        if not self.reads:
            return None
        for number, tier in enumerate(self.tiers):
            if tier.contains(block.key) and tier.get(block.key, into):
                for nearer in self.tiers[:number]:
                    nearer.put(StoredBlock(block.key, block.parent, block.position, into))
                return tier.name
        return None

    def save(self, block: StoredBlock) -> bool:
        """Offer a computed block to every tier; whether any keeps it."""
        if not self.writes:
            return False
        outcomes = [tier.put(block) for tier in self.tiers]
        return any(outcome is not PutOutcome.DROPPED for outcome in outcomes)

    def flush(self) -> None:
        for tier in self.tiers:
            tier.flush()

    def close(self) -> None:
        for tier in self.tiers:
            tier.close()


def open_store(config: StoreConfig, namespace: Namespace, geometry: BlockGeometry) -> TieredStore:
    """Open (or on first use make) the store of `config`; raises `StoreError` or `AccessError` if it is not usable.

    A store that can be read and not written is used for reading, said once.
    """
    check_golden_vector()
    root = Path(config.shared)
    if config.local not in ("auto", "none"):
        warn_once(_log, f"store.local: {config.local} is not used, this version keeps no node-local copies")
    wants_write = config.write != "off"
    try:
        _make_store(root)
        epoch_key = _read_key(root)
    except PermissionError as error:
        raise AccessError(f"store {root}: {error.filename}: permission denied") from None
    except OSError as error:
        raise StoreError(f"store {root}: {error.strerror}") from None
    own = root / "u" / str(os.getuid()) / "seg" / namespace.name
    if wants_write:
        try:
            own.mkdir(parents=True, exist_ok=True)
            _verify_identity(own / "identity.json", namespace)
        except OSError as error:
            warn_once(_log, f"store {own}: {error.strerror}; reading only")
            wants_write = False
    context = SegmentContext(
        namespace=namespace.digest,
        namespace_json=json.dumps(namespace.record, sort_keys=True).encode(),
        geometry=geometry,
        epoch=0,
        epoch_key=epoch_key,
    )
    tiers: list[Tier] = []
    if config.host_size >= geometry.block_bytes:
        tiers.append(HostTier(geometry, budget_bytes=config.host_size))
    tiers.append(
        FileTier(
            root / "u",
            own,
            context,
            segment_bytes=config.segment_size,
            seal_s=config.seal_s,
            is_read_only=not wants_write,
        )
    )
    return TieredStore(tiers, epoch_key=epoch_key, reads=config.read, writes=config.write != "off")


def _make_store(root: Path) -> None:
    marker = root / "STORE.json"
    if not marker.exists():
        if root.is_dir() and any(root.iterdir()) and not (root / "key").is_dir():
            raise StoreError(f"store {root}: the folder is neither empty nor an hpckv store")
        for part in (root, root / "key", root / "u"):
            part.mkdir(parents=True, exist_ok=True)
        _publish_once(root / "key" / "0.key", secrets.token_bytes(32), mode=0o640)
        description = {"format": FORMAT, "version": FORMAT_VERSION, "uuid": secrets.token_hex(16), "epoch": 0}
        _publish_once(marker, json.dumps(description, indent=2).encode(), mode=0o640)
    found = _read_marker(marker)
    if found.get("format") != FORMAT:
        raise StoreError(f"{marker}: not an hpckv store")
    if found.get("version") != FORMAT_VERSION:
        raise StoreError(f"{marker}: store version {found.get('version')}, this program reads {FORMAT_VERSION}")


def _read_marker(marker: Path) -> Mapping[str, object]:
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError:
        raise StoreError(f"{marker}: damaged, not readable as JSON") from None
    return content if isinstance(content, dict) else {}


def _read_key(root: Path) -> bytes:
    key = (root / "key" / "0.key").read_bytes()
    if len(key) != 32:
        raise StoreError(f"store {root}: key/0.key is damaged ({len(key)} bytes, not 32)")
    return key


def _publish_once(path: Path, content: bytes, *, mode: int) -> None:
    with contextlib.suppress(FileExistsError):  # another process made the store in the same moment; its file holds
        publish(path, [content], mode=mode, replace=False)


def _verify_identity(path: Path, namespace: Namespace) -> None:
    text = json.dumps(namespace.record, sort_keys=True, indent=2).encode()
    _publish_once(path, text, mode=0o440)
    if path.read_bytes() != text:
        raise StoreError(f"{path}: does not describe the model and settings of its folder's name; move the folder away")
