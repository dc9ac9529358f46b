"""A model's folder on this node's own disk: copied once for all its processes, verified, and there for later starts. No torch.

Ranks that each read the weights over the network read them as many times; a copy is read from the node's page cache by all but
the first. Where there is no such disk, or no room, the folder itself is used: staging makes a start faster or changes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from blake3 import blake3

from hpckv.errors import AccessError
from hpckv.model.files import weight_files
from hpckv.quantity import format_bytes
from hpckv.store.durable import publish
from hpckv.store.local_disk import find_local_folder, own_folder
from hpckv.store.node_folder import hold, room_in, sweep

_log = logging.getLogger(__name__)

_PIECE_BYTES = 16 * 1024**2
_SMALL_BYTES = 64 * 1024**2
"""Of files that are not weights: tokenizer, configuration."""
_MARKER = ".complete"

Note = Callable[[int, int], None]
"""Told of bytes copied so far, and of all."""


def stage_model(
    folder: Path, setting: str = "auto", note: Note = lambda done, total: None, *, site: str | None = None
) -> Path:
    """The folder of the copy, made if it is not there; `folder` where that brings nothing or is not possible.

    `setting` is a node-local folder, or `auto`: as `store.local` finds it, where the model is on a network filesystem; `site` is
    the site file's.
    Raises `ModelError` for a folder without weights, `AccessError`.
    """
    room = find_local_folder(setting, folder, site)
    if room is None:
        return folder
    try:
        base = own_folder(room, "hpckv-models")
        files = _files(folder)
        copy = base / _name(folder, files)
        with hold(copy, fcntl.LOCK_SH):  # those who use it hold it so, for as long as they run
            if (copy / _MARKER).exists():
                os.utime(copy / _MARKER)
                return copy
        with hold(copy, fcntl.LOCK_EX):
            if not (copy / _MARKER).exists():
                size = sum(file.stat().st_size for file in files)
                if not _make_room(base, size, copy):
                    free = format_bytes(shutil.disk_usage(base).free)
                    _log.warning(
                        "%s: %s free, the model has %s; it is read from where it is", base, free, format_bytes(size)
                    )
                    return folder
                _copy(files, copy, size, note)
            os.utime(copy / _MARKER)
    except OSError as error:
        _log.warning("%s: %s; the model is read from where it is", error.filename or room, error.strerror)
        return folder
    return copy


@contextlib.contextmanager
def staged_model(folder: Path, *, site: str | None = None) -> Iterator[Path]:
    """What `stage_model` gives, which no other process removes until the end."""
    with contextlib.ExitStack() as held:
        copy = stage_model(folder, site=site)
        if copy != folder:
            try:
                held.enter_context(hold(copy, fcntl.LOCK_SH))
                is_there = (copy / _MARKER).exists()
            except OSError as error:
                _log.warning("%s: %s; the model is read from where it is", copy, error.strerror)
                is_there = False
            if not is_there:  # another process was faster to remove it
                held.close()
                copy = folder
        yield copy


def _files(folder: Path) -> list[Path]:
    """Weights in the one format that is read, and whatever is small."""
    weights = weight_files(folder)
    try:
        others = [file for file in folder.iterdir() if file.is_file() and file.stat().st_size <= _SMALL_BYTES]
    except OSError as error:
        raise AccessError(f"{folder}: {error.strerror}") from None
    return sorted({*weights, *others})


def _name(folder: Path, files: list[Path]) -> str:
    """Says which state of the folder this is."""
    digest = blake3(os.fsencode(folder.resolve()))
    for file in files:
        status = file.stat()
        digest.update(f"\0{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest(16)


def _make_room(base: Path, size: int, own: Path) -> bool:
    """Remove what was broken off, what nobody has used for a week, and then the oldest; whether there is room now."""
    shutil.rmtree(own, ignore_errors=True)

    def is_roomy() -> bool:
        return room_in(base) > size

    sweep(base, _used, is_roomy)
    return is_roomy()


def _used(folder: Path) -> float:
    try:
        return (folder / _MARKER).stat().st_mtime
    except OSError:
        return 0.0


def _copy(files: list[Path], target: Path, size: int, note: Note) -> None:
    """Raises `OSError`, also when what was written is read back as something else."""
    begun, done = time.monotonic(), 0
    target.mkdir(mode=0o700)
    for file in files:
        written = blake3()
        with file.open("rb") as source, (target / file.name).open("wb", buffering=0) as copy:
            while piece := source.read(_PIECE_BYTES):
                written.update(piece)
                view = memoryview(piece)
                while view:
                    view = view[copy.write(view) :]
                done += len(piece)
                note(done, size)
            os.fsync(copy.fileno())
            os.posix_fadvise(copy.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that the disk is read
        found = blake3(max_threads=blake3.AUTO)
        if (target / file.name).stat().st_size:
            found.update_mmap(target / file.name)
        if found.digest() != written.digest():
            raise OSError(5, "what was copied is read back as something else", str(target / file.name))
    publish(target / _MARKER, [])
    seconds = max(1e-6, time.monotonic() - begun)
    _log.info(
        "model copied to %s: %s in %.1f s, %s/s", target, format_bytes(size), seconds, format_bytes(size / seconds)
    )
