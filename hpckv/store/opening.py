"""Opening a store for one model in one representation: which tiers there are, in which order, and what each may do."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread

from blake3 import blake3

from hpckv.errors import StoreError
from hpckv.log import warn_once
from hpckv.store import bridge
from hpckv.store.audit import TOLERANCE, Auditor
from hpckv.store.block import BlockGeometry, check_golden_vector
from hpckv.store.catalog import Catalog
from hpckv.store.config import StoreConfig
from hpckv.store.direct_io import BufferPool
from hpckv.store.durable import publish
from hpckv.store.fetch import within
from hpckv.store.file_tier import FileTier
from hpckv.store.host_tier import HostTier
from hpckv.store.identity import Namespace
from hpckv.store.layout import StoreLayout
from hpckv.store.local_disk import find_local_folder, left_folders, own_folder
from hpckv.store.node_folder import Budget, hold, sweep
from hpckv.store.node_index import NodeIndex
from hpckv.store.policy import Bridging, StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.store.segment import SegmentContext
from hpckv.store.throttle import RateLimit, ThrottledTier
from hpckv.store.tier import Tier
from hpckv.store.tiered_store import TieredStore

_log = logging.getLogger(__name__)

_LOCAL_SEGMENT_BYTES = 64 * 1024**2
_LOCAL_SEAL_S = 5.0
_NAME = "hpckv"
_SIBLING_REFRESH_S = 60.0


def open_store(
    config: StoreConfig,
    namespace: Namespace,
    geometry: BlockGeometry,
    *,
    owned: BlockGeometry | None = None,
    buffers: BufferPool | None = None,
) -> TieredStore:
    """Open the store of `config`; raises `StoreError` or `AccessError` if it is not usable. Blocks are read into `buffers`.

    `geometry` has the box that this process reads, `owned` the part of it that it writes: all of it if not given.
    Where there is none yet, a private one is made. One that can be read and not written is used for reading, said once.
    """
    check_golden_vector()
    path = Path(config.shared)
    try:
        opening = within(
            config.deadline_s,
            lambda: _look(config, path, namespace, geometry, owned, buffers or BufferPool(geometry.block_bytes)),
        )
    except TimeoutError as error:
        raise StoreError(f"store {path}: {error.strerror}") from None
    tiers: list[Tier] = []
    if config.host_size >= geometry.block_bytes:
        tiers.append(HostTier(geometry, budget_bytes=config.host_size))
    if opening.local is not None:
        tiers.append(opening.local_tier(opening.local))
    shared = opening.shared_tier()
    limit = RateLimit(config.read_rate) if config.read_rate else None
    tiers += [ThrottledTier(tier, limit) if limit else tier for tier in (shared, *opening.bridges())]
    return TieredStore(
        tiers,
        epoch_key=opening.context.epoch_key,
        identity=opening.namespace.identity.digest,
        reads=config.read,
        writes=config.write != "off",
        deadline_s=config.deadline_s,
        auditor=opening.auditor(shared),
        buffers=opening.buffers,
        on_closed=opening.held.close,
    )


def _look(
    config: StoreConfig,
    path: Path,
    namespace: Namespace,
    geometry: BlockGeometry,
    owned: BlockGeometry | None,
    buffers: BufferPool,
) -> _Opening:
    """The store, its key, and where this node keeps copies."""
    root = StoreRoot.open(path) if StoreRoot.exists(path) else StoreRoot.create(path, StorePolicy.new())
    if config.private:
        namespace = _salted(root, namespace)
    return _Opening(
        config, root, namespace, geometry, owned, find_local_folder(config.local, path, config.site_local), buffers
    )


class _Opening:
    """What the tiers of one store have in common."""

    def __init__(
        self,
        config: StoreConfig,
        root: StoreRoot,
        namespace: Namespace,
        geometry: BlockGeometry,
        owned: BlockGeometry | None,
        local: Path | None,
        buffers: BufferPool,
    ) -> None:
        self.config, self.root, self.namespace = config, root, namespace
        self.epoch_key = root.epoch_key()
        self.held = ExitStack()
        """What must stay on the node's own disk while the store is open."""
        self.local = None if local is None else _own_local_folder(local, root, self.held)
        """What is this user's of this store on the node's own disk."""
        if local is not None:
            Thread(target=_sweep, args=(local,), name="hpckv-sweep", daemon=True).start()
        self._catalogs: list[Catalog] = []
        self.context = self._context(namespace, geometry)
        self.buffers, self.owned = buffers, owned or geometry

    def shared_tier(self) -> FileTier:
        catalog = self._catalog(self.context)
        return FileTier(
            catalog,
            self.context,
            self._own_folder(catalog) if self.config.write != "off" and self.owned.num_kv_heads else None,
            segment_bytes=self.config.segment_size,
            seal_s=self.config.seal_s,
            keep_s=self.config.keep_s,
            gid=self.root.policy.group,
            root=self.root,
            buffers=self.buffers,
            owned=self.owned,
            patience_s=self.config.deadline_s,
            write_limit=RateLimit(self.config.write_rate) if self.config.write_rate else None,
        )

    def local_tier(self, layout: StoreLayout) -> FileTier:
        """Copies on this node's disk, shared by this user's processes here."""
        catalog = Catalog(layout, self.context, trusted_uids=frozenset({os.getuid()}))
        own = catalog.own_folder(os.getuid())
        own.mkdir(parents=True, exist_ok=True)
        return FileTier(
            catalog,
            self.context,
            own,
            name="local",
            buffers=self.buffers,
            segment_bytes=min(_LOCAL_SEGMENT_BYTES, self.config.segment_size),
            seal_s=_LOCAL_SEAL_S,
            budget=Budget(own, self.config.local_size),
            is_durable=False,
            keeps_copies_only=True,
            patience_s=self.config.deadline_s,
        )

    def bridges(self) -> list[Tier]:
        """The same model's blocks in other dtypes, as far as both the run and the store allow."""
        representation = self.namespace.representation
        target = str(representation.get("dtype"))
        if representation.get("numerics") == "strict":  # a converted block has other bits
            return []
        tiers: list[Tier] = []
        for source in bridge.sources(target, _least(self.config.bridging, self.root.policy.bridging)):
            namespace, geometry = bridge.sibling(self.namespace, self.context.geometry, source)
            context = self._context(namespace, geometry)
            tier = FileTier(
                self._catalog(context),
                context,
                None,
                refresh_s=_SIBLING_REFRESH_S,
                patience_s=self.config.deadline_s,
            )
            tiers.append(bridge.BridgeTier(tier, self.context.geometry, source=source, target=target))
        return tiers

    def auditor(self, shared: FileTier) -> Auditor | None:
        """Where others' blocks are read."""
        representation = self.namespace.representation
        if self.root.policy.group is None or self.config.private or not (self.config.audit and self.config.read):
            return None
        is_strict = representation.get("numerics") == "strict"
        dtype = str(representation.get("dtype"))
        if dtype not in TOLERANCE:
            return None
        return Auditor(
            shared,
            self.root,
            share=self.config.audit,
            dtype=dtype,
            is_strict=is_strict,
            catalogs=self._catalogs,
        )

    def _context(self, namespace: Namespace, geometry: BlockGeometry) -> SegmentContext:
        return SegmentContext(
            namespace=namespace.digest,
            namespace_json=json.dumps(namespace.record, sort_keys=True).encode(),
            geometry=geometry,
            epoch=self.root.policy.epoch,
            epoch_key=self.epoch_key,
        )

    def _catalog(self, context: SegmentContext) -> Catalog:
        trusted = frozenset({os.getuid()}) if self.config.private else self.root.trusted_uids()
        distrusted = self.root.policy.distrusted
        catalog = Catalog(
            self.root.layout, context, trusted_uids=trusted, distrusted_uids=distrusted, node=self._node(context)
        )
        self._catalogs.append(catalog)
        return catalog

    def _node(self, context: SegmentContext) -> NodeIndex | None:
        """What the processes of this node share of one namespace's index."""
        if self.local is None:
            return None
        folder = self.local.node_index(StoreLayout.namespace_name(context.namespace, context.epoch))
        try:
            return NodeIndex(folder)
        except OSError as error:
            warn_once(_log, f"{folder}: {error.strerror}; every process looks for itself")
            return None

    def _own_folder(self, catalog: Catalog) -> Path | None:
        """Where this user's segments go; None, said once, where the store can only be read."""
        own = catalog.own_folder(os.getuid())

        def make() -> None:
            for folder in (own, catalog.own_indexes(os.getuid())):
                self.root.make_own_folder(folder, is_private=self.config.private)
            _verify_identity(own / "identity.json", self.namespace, self.root.policy.group)

        try:
            within(self.config.deadline_s, make)
        except OSError as error:
            warn_once(_log, f"store {own}: {error.strerror}; reading only")
            return None
        return own


def _sweep(local: Path) -> None:
    """Remove what other stores and jobs of this user left on the node's disk, beside the work: it may be much."""
    with suppress(OSError):
        for base in left_folders(local, _NAME):
            with suppress(OSError):
                sweep(base)


def _own_local_folder(local: Path, root: StoreRoot, held: ExitStack) -> StoreLayout | None:
    """This user's part of the node's disk for one store, which is then held; None, said once, where it is not this user's alone.

    Whoever is not trusted any more may have left copies in it: another folder then.
    """
    try:
        base = own_folder(local, _NAME)
        listed = json.dumps(root.policy.distrusted).encode()
        folder = base / (root.policy.uuid + (f"-{blake3(listed).hexdigest(8)}" if root.policy.distrusted else ""))
        held.enter_context(hold(folder, fcntl.LOCK_SH))
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        warn_once(_log, f"{error.filename or local}: {error.strerror}; nothing is copied to this node's disk")
        return None
    return StoreLayout(folder)


def _salted(root: StoreRoot, namespace: Namespace) -> Namespace:
    """The namespace of this user's private runs: nobody without the salt can tell its keys, nor its name."""
    try:
        salt = root.own_salt()
    except OSError as error:
        raise StoreError(
            f"store {root.layout.root}: {error.strerror}; a private run needs a folder of its own there"
        ) from None
    return Namespace(replace(namespace.identity, salt=salt), namespace.representation)


def _least(*allowed: Bridging) -> Bridging:
    order: list[Bridging] = ["off", "exact", "any"]
    return min(allowed, key=order.index)


def _verify_identity(path: Path, namespace: Namespace, gid: int | None) -> None:
    text = json.dumps(namespace.record, sort_keys=True, indent=2).encode()
    try:
        publish(path, [text], replace=False, gid=gid)
    except FileExistsError:
        if path.read_bytes() != text:
            raise StoreError(
                f"{path}: does not describe the model and settings of its folder's name; move the folder away"
            ) from None
