"""Where everything lies in a store (`docs/store-format.md`, 4). Paths only, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StoreLayout:
    """The folders and files of the store at `root`."""

    root: Path

    @property
    def marker(self) -> Path:
        return self.root / "STORE.json"

    @property
    def keys(self) -> Path:
        return self.root / "key"

    def key(self, epoch: int) -> Path:
        return self.keys / f"{epoch}.key"

    @property
    def plan(self) -> Path:
        return self.root / "plan"

    @property
    def users(self) -> Path:
        return self.root / "u"

    def user(self, uid: int) -> Path:
        return self.users / str(uid)

    def segments(self, uid: int, namespace: str) -> Path:
        return self.user(uid) / "seg" / namespace

    def indexes(self, uid: int, namespace: str) -> Path:
        return self.user(uid) / "idx" / namespace

    def salt(self, uid: int) -> Path:
        """The secret of a user's private runs."""
        return self.user(uid) / "private.salt"

    def audits(self, uid: int) -> Path:
        """What a user's audits found of others' blocks."""
        return self.user(uid) / "audit"

    def heat(self, uid: int) -> Path:
        return self.user(uid) / "heat"

    def ledger(self, uid: int) -> Path:
        """What a user's runs computed and hit (`docs/ledger-format.md`)."""
        return self.user(uid) / "ledger"

    @property
    def rolled_up(self) -> Path:
        """Closed months of all ledgers."""
        return self.plan / "ledger"

    def node_index(self, namespace: str) -> Path:
        """Node-local: what one process saw, for the others."""
        return self.root / "node" / namespace

    @staticmethod
    def namespace_name(digest: bytes, epoch: int) -> str:
        """A namespace's folder: its full digest, and the key epoch that its block keys belong to."""
        return f"{digest.hex()}.{epoch}"
