"""What lies in a store, by namespace and user; and whether every byte of it is what was written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from hpckv.errors import AccessError, StoreError
from hpckv.store.collect import is_orphan
from hpckv.store.foreign_file import UnusableFileError, open_trusted
from hpckv.store.identity import canonical_json
from hpckv.store.index_file import IndexFile
from hpckv.store.ownership import is_of_group
from hpckv.store.root import StoreRoot
from hpckv.store.segment import Seal, Segment
from hpckv.store.survey import StoredFile, Survey, Use

_READERS = 4


@dataclass
class NamespaceView:
    """One namespace over all users."""

    name: str
    """The folder's name: digest.epoch."""
    record: dict[str, Any] = field(default_factory=dict)
    """identity.json; empty if none can be read."""
    files: list[StoredFile] = field(default_factory=list)
    use: Use = field(default_factory=Use)

    @property
    def segments(self) -> list[StoredFile]:
        return [file for file in self.files if file.kind == "segment"]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @property
    def users(self) -> list[int]:
        return sorted({file.uid for file in self.segments})

    @property
    def model(self) -> str:
        """Architecture and size, as far as the record tells."""
        config = self.record.get("identity", {}).get("config", {})
        architecture = (config.get("architectures") or ["?"])[0].removesuffix("ForCausalLM")
        return f"{architecture} {config.get('num_hidden_layers', '?')}x{config.get('hidden_size', '?')}"

    @property
    def representation(self) -> str:
        """dtype, block size and numerics, as far as the record tells."""
        given = self.record.get("representation", {})
        return f"{given.get('dtype', '?')} {given.get('block_tokens', '?')} {given.get('numerics', '?')}"


def namespaces(survey: Survey) -> list[NamespaceView]:
    """Every namespace of a surveyed store, largest first."""
    found: dict[str, NamespaceView] = {}
    uses = survey.uses()
    for file in survey.files.values():
        if file.kind not in ("segment", "index", "identity", "temporary"):
            continue
        view = found.setdefault(file.namespace, NamespaceView(file.namespace))
        view.files.append(file)
        view.use += uses.get(file.path, Use())
        if file.kind == "identity" and not view.record:
            view.record = _read_record(file)
    return sorted(found.values(), key=lambda view: (-view.num_bytes, view.name))


def audit_reports(survey: Survey) -> dict[int, list[int]]:
    """Writers whose blocks audits found to be wrong, each with the uids of those who say so."""
    found: dict[int, set[int]] = {}
    for file in survey.files.values():
        writer = _read_record(file).get("writer") if file.kind == "audit" else None
        if isinstance(writer, int):
            found.setdefault(writer, set()).add(file.uid)
    return {writer: sorted(auditors) for writer, auditors in sorted(found.items())}


def _read_record(file: StoredFile) -> dict[str, Any]:
    try:
        fd, _ = open_trusted(file.path, frozenset({file.uid}))
        with os.fdopen(fd, "rb") as stream:
            content = json.loads(stream.read())
    except (OSError, UnusableFileError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class Finding:
    """Something in a store that is not as it should be."""

    file: StoredFile
    what: str
    is_derived: bool = False
    """It can be made again from the rest: an index file, say."""


@dataclass
class CheckReport:
    """What `check` saw."""

    segments: int = 0
    blocks: int = 0
    num_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)


def check(root: StoreRoot, survey: Survey, on_file: Callable[[StoredFile], None] = lambda _: None) -> CheckReport:
    """Read and verify every file. `on_file` hears of each one that was done (from several threads)."""
    report = CheckReport()
    with ThreadPoolExecutor(_READERS) as pool:
        for file, result in pool.map(lambda file: (file, _check_file(root, file, on_file)), survey.files.values()):
            if isinstance(result, Finding):
                report.findings.append(result)
            elif file.kind == "segment":
                report.segments += 1
                report.blocks += result
            report.num_bytes += file.num_bytes
    return report


def _check_file(root: StoreRoot, file: StoredFile, on_file: Callable[[StoredFile], None]) -> Finding | int:
    """The number of blocks that verified, or what is wrong."""
    try:
        return _verify(root, file)
    except FileNotFoundError:
        return 0  # collected meanwhile
    except (UnusableFileError, StoreError, AccessError) as error:
        return Finding(file, str(error), is_derived=file.kind in ("index", "heat"))
    except OSError as error:
        return Finding(file, error.strerror or str(error))
    finally:
        on_file(file)


def _verify(root: StoreRoot, file: StoredFile) -> int:
    if file.kind == "segment":
        segment = Segment(file.path, seal_of(root, file), frozenset({file.uid}))
        buffer = memoryview(bytearray(segment.geometry.block_bytes))
        for row in range(segment.count):
            segment.read(row, buffer)
        segment.close()
        return segment.count
    if file.kind == "index":
        IndexFile.read(file.path, seal_of(root, file), frozenset({file.uid}))
    elif file.kind == "identity":
        digest, _, _ = file.namespace.partition(".")
        record = _read_record(file)
        if not record or blake3(canonical_json(record)).hexdigest() != digest:
            raise UnusableFileError("does not describe the namespace of its folder's name")
    elif file.kind == "temporary":
        if is_orphan(file):
            raise UnusableFileError("left over by a writer that is gone")
    elif file.kind == "other":
        raise UnusableFileError("nothing that belongs into a store")
    return 0


def seal_of(root: StoreRoot, file: StoredFile) -> Seal:
    """What the files of its folder are authenticated with; raises `UnusableFileError`, `StoreError`, `AccessError`."""
    digest, _, epoch = file.namespace.partition(".")
    try:
        return Seal(bytes.fromhex(digest), int(epoch), root.epoch_key(int(epoch)))
    except ValueError:
        raise UnusableFileError("lies in a folder whose name is no namespace") from None


def unsafe_folders(root: StoreRoot) -> Iterator[tuple[Path, str]]:
    """Folders of a shared store that do not have the modes they were made with."""
    layout = root.layout
    if root.policy.group is None:
        return
    for path, wanted in ((layout.root, 0o2750), (layout.keys, 0o2750), (layout.users, 0o3770)):
        status = path.stat()
        if status.st_mode & 0o7777 != wanted or not is_of_group(status, root.policy.group):
            yield (
                path,
                f"mode {status.st_mode & 0o7777:o}, group {status.st_gid}; should be {wanted:o}, {root.policy.group}",
            )
