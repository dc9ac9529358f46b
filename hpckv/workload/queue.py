"""The queue of a run that several jobs work on: files in the run directory, no server, no lock. No torch.

`docs/queue-format.md` has the files, what must hold of them, and why nothing is lost when a worker dies anywhere.
"""

from __future__ import annotations

import logging
import os
import platform
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from hpckv.errors import CannotWriteError
from hpckv.schema import Config
from hpckv.store.durable import mode_for, publish
from hpckv.workload.output import ids_in
from hpckv.workload.starts import job_of_this_process

_log = logging.getLogger(__name__)

MERGE = "merge"
"""The last item of a round: bringing all answers into one file."""
_LONG_GONE = 10
"""In leases."""


class QueueConfig(Config, frozen=True):
    """How jobs share a run (`queue:`); of effect with `hpckv run --join` only."""

    lease_s: float = 120.0
    """A job that shows no sign of life for so long has lost its work to the others. Longer than the filesystem remembers names
    (NFS: 60 s)."""
    items: int = 64
    """Parts that the run is cut into, at least, where its prefix tree allows it."""


class Item(msgspec.Struct, frozen=True):
    """Requests that stay together."""

    name: str
    ids: list[str]
    """In the plan's order."""
    costs: list[int]
    """Of each: tokens to compute."""
    tokens: int
    """The most that one of its requests holds at once."""
    shared: int = 0
    """Blocks with which it begins and the item before it ends."""
    of: str | None = None
    """The item that this was a part of."""


class QueuePlan(msgspec.Struct, frozen=True):
    """What a round is about."""

    digest: str
    """Of the input and of the settings that change answers."""
    max_tokens_in_use: int
    items: list[Item]
    bad: list[dict[str, Any]] = []
    """Lines that cannot be run, as `errors.jsonl` has them."""

    @property
    def ids(self) -> list[str]:
        return [custom_id for item in self.items for custom_id in item.ids]


class Worker(msgspec.Struct):
    """One start of `hpckv run --join`, as the others see it."""

    name: str
    host: str
    job: str | None
    restart: int
    tokens: int = 0
    """That its GPU holds at once."""
    beat: int = 0
    is_idle: bool = False
    has_left: bool = False

    @classmethod
    def of_this_process(cls) -> Worker:
        job, restart = job_of_this_process()
        place = job or f"{platform.node()}-{os.getpid()}"
        return cls(f"{place}.{restart}.{secrets.token_hex(4)}", platform.node(), job, restart)


@dataclass
class View:
    """The round as it was when it was looked at."""

    items: dict[str, Item]
    """In the plan's order, a piece after what it was a part of."""
    done: set[str]
    claims: dict[str, tuple[int, str]]
    """Of each claimed item: the highest generation, and its worker."""
    alive: dict[str, Worker] = field(default_factory=dict)
    is_stale: bool = False

    @property
    def is_over(self) -> bool:
        return MERGE in self.done

    @property
    def left(self) -> list[Item]:
        """Not done."""
        return [item for name, item in self.items.items() if name not in self.done]

    def is_free(self, name: str) -> bool:
        """Nobody computes it."""
        return name not in self.done and (name not in self.claims or self.claims[name][1] not in self.alive)


class WorkQueue:
    """One round, seen by one worker."""

    def __init__(self, folder: Path, worker: Worker, lease_s: float) -> None:
        self.folder, self.worker, self._lease_s = folder, worker, lease_s
        self._plan: QueuePlan | None = None
        self._pieces: dict[str, Item] = {}
        self._holders: dict[str, str] = {}
        """By the claim's file name, which is written once."""
        self._seen: dict[str, tuple[int, float]] = {}
        """Of each other worker: its last beat, and when that was first seen."""
        self._last = ""

    @property
    def part(self) -> Path:
        """Where this worker's answers go."""
        return self.folder / "parts" / f"{self.worker.name}.jsonl"

    @property
    def parts(self) -> list[Path]:
        """Everybody's answers."""
        return _parts(self.folder)

    @property
    def failures(self) -> Path:
        """Where this worker's failed requests go."""
        return self.part.with_suffix(".errors.jsonl")

    @property
    def plan(self) -> QueuePlan | None:
        """None until somebody has made it."""
        if self._plan is None and (raw := _read(self.folder / "plan.json")) is not None:
            self._plan = msgspec.json.decode(raw, type=QueuePlan)
        return self._plan

    def publish_plan(self, plan: QueuePlan) -> QueuePlan:
        """Make it everybody's, unless another worker was first; the one that counts."""
        for name in ("items", "claims", "done", "workers", "parts"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._link(self.folder / "plan.json", msgspec.json.encode(plan), is_durable=True)
        if self.plan is None:
            raise CannotWriteError(f"{self.folder / 'plan.json'}: cannot be read")
        return self.plan

    def look(self) -> View:
        """Read the round: four folders, and what is new in them."""
        assert self.plan
        done = set(self._names("done"))
        for name in self._names("items"):
            if (stem := name.removesuffix(".json")) not in self._pieces and (
                raw := _read(self.folder / "items" / name)
            ):
                self._pieces[stem] = msgspec.json.decode(raw, type=Item)
        highest: dict[str, int] = {}
        for claim in self._names("claims"):
            name, _, generation = claim.rpartition(".")
            highest[name] = max(int(generation), highest.get(name, 0))
        claims = {name: (generation, self._holder(name, generation)) for name, generation in highest.items()}
        return View(self._in_order(), done, claims, self._alive())

    def claim(self, name: str, view: View) -> Item | None:
        """Take an item that is free: what is left of it to compute; None if another worker was first."""
        generation = view.claims[name][0] + 1 if name in view.claims else 0
        if not self._link(self.folder / "claims" / f"{name}.{generation}", self.worker.name.encode()):
            return None
        view.claims[name] = generation, self.worker.name
        if name == MERGE:
            return Item(MERGE, [], [], 0)
        self._last = name
        item = view.items[name]
        gone: set[str] = set()
        for earlier in range(generation):
            part = self.folder / "parts" / f"{self._holder(name, earlier)}.jsonl"
            gone |= ids_in(part) | ids_in(part.with_suffix(".errors.jsonl"))
        if generation:
            _log.warning("taking over item %s from %s", name, self._holder(name, generation - 1))
            for piece in self._names("items"):  # one may have come since the look
                if (raw := _read(self.folder / "items" / piece)) is not None:
                    found = msgspec.json.decode(raw, type=Item)
                    gone |= set(found.ids) if found.of == name else set()
        return _without(item, gone)

    def next_free(self, view: View) -> str | None:
        """The item to take next: the one after the last, else one about the middle of the longest free stretch, where little is
        shared with the item before."""
        names = list(view.items)
        free = [
            view.is_free(name) and (item.tokens <= self.worker.tokens or not self.worker.tokens)
            for name, item in view.items.items()
        ]
        if self._last in view.items:
            after = names.index(self._last) + 1
            if after < len(names) and free[after]:
                return names[after]
        longest, start = range(0), 0
        for end in range(len(names) + 1):
            if end < len(names) and free[end]:
                continue
            longest, start = max(longest, range(start, end), key=len), end + 1
        if not longest:
            return None
        if longest.start == 0:  # nobody comes from before it
            return names[0]
        margin = len(longest) // 4
        middle = longest[margin : len(longest) - margin]
        centre = (longest.start + longest.stop) // 2
        return names[min(middle, key=lambda n: (view.items[names[n]].shared, abs(n - centre)))]

    def give(self, item: Item, ids: Sequence[str]) -> None:
        """Give back `ids` of an item that this worker holds, as a piece that anybody may take."""
        given = set(ids)
        piece = _without(item, set(item.ids) - given)
        name = f"{item.name}-{secrets.token_hex(4)}"
        piece = msgspec.structs.replace(piece, name=name, of=item.name)
        self._put(self.folder / "items" / f"{name}.json", msgspec.json.encode(piece), is_durable=True)

    def give_again(self, ids: Sequence[str]) -> None:
        """Requests whose answers are nowhere although their items are done become an item again."""
        wanted = set(ids)
        assert self.plan
        for item in self.plan.items:
            if lost := [custom_id for custom_id in item.ids if custom_id in wanted]:
                self.give(item, lost)

    def finish(self, name: str) -> None:
        """All of an item that was not given back has its answer in a part that is on the disk."""
        self._put(self.folder / "done" / name, self.worker.name.encode(), is_durable=True)

    def show(self) -> None:
        """Bring this worker's file up to date; raises `CannotWriteError`."""
        self.worker.beat += 1
        self._put(self.folder / "workers" / f"{self.worker.name}.json", msgspec.json.encode(self.worker))

    def clean(self) -> None:
        """The round is over: what only served it goes."""
        for name in ("claims", "items", "parts"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _in_order(self) -> dict[str, Item]:
        assert self.plan
        pieces: dict[str, list[Item]] = {}
        for item in self._pieces.values():
            pieces.setdefault(item.of or "", []).append(item)
        ordered: dict[str, Item] = {}

        def add(item: Item) -> None:
            ordered[item.name] = item
            for piece in pieces.get(item.name, ()):
                add(piece)

        for item in self.plan.items:
            add(item)
        return ordered

    def _holder(self, name: str, generation: int) -> str:
        claim = f"{name}.{generation}"
        if claim not in self._holders:
            raw = _read(self.folder / "claims" / claim)
            if raw is None:
                return ""
            self._holders[claim] = raw.decode()
        return self._holders[claim]

    def _alive(self) -> dict[str, Worker]:
        now, found = time.monotonic(), {self.worker.name: self.worker}
        for file in self._names("workers"):
            name = file.removesuffix(".json")
            path = self.folder / "workers" / file
            if name == self.worker.name or file.endswith(".summary.json") or (raw := _read(path)) is None:
                continue
            other = msgspec.json.decode(raw, type=Worker)
            if name not in self._seen and self._is_long_gone(path):
                self._seen[name] = other.beat, now - 2 * self._lease_s
            beat, since = self._seen.get(name, (-1, now))
            if other.beat != beat:
                self._seen[name], since = (other.beat, now), now
            if not other.has_left and now - since < self._lease_s:
                found[name] = other
        latest: dict[str, int] = {}
        for other in found.values():
            if other.job:
                latest[other.job] = max(other.restart, latest.get(other.job, 0))
        # An earlier start of a job that has been started again is dead, whatever it still writes.
        return {name: w for name, w in found.items() if not w.job or w.restart == latest[w.job]}

    def _is_long_gone(self, path: Path) -> bool:
        """By the file server's clock alone: it has set both times."""
        try:
            own = os.stat(self.folder / "workers" / f"{self.worker.name}.json").st_mtime
            return own - os.stat(path).st_mtime > _LONG_GONE * self._lease_s
        except OSError:
            return False

    def _names(self, folder: str) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.folder / folder) if not name.startswith("."))
        except FileNotFoundError:
            return []

    def _link(self, path: Path, content: bytes, *, is_durable: bool = False) -> bool:
        """Whether this was the first to write it."""
        try:
            publish(path, [content], mode=mode_for(path), replace=False, is_durable=is_durable)
        except FileExistsError:
            return False
        except FileNotFoundError:  # the round is over, its folders are gone
            return False
        except OSError as error:
            raise CannotWriteError(f"{path}: {error.strerror}") from None
        return True

    def _put(self, path: Path, content: bytes, *, is_durable: bool = False) -> None:
        try:
            publish(path, [content], mode=mode_for(path), is_durable=is_durable)
        except OSError as error:
            raise CannotWriteError(f"{path}: {error.strerror}") from None


def newest_round(directory: Path) -> Path:
    """The folder of the round that is under way, or of the next one."""
    rounds = [int(path.name) for path in (directory / "queue").glob("*") if path.name.isdigit()]
    number = max(rounds, default=1)
    over = directory / "queue" / str(number) / "done" / MERGE
    return directory / "queue" / str(number + over.exists())


def open_parts(directory: Path) -> list[Path]:
    """Parts of a round that is not over: answers that `output.jsonl` does not have yet."""
    return _parts(newest_round(directory))


def _parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("parts/*.jsonl") if path.suffixes[-2:] != [".errors", ".jsonl"])


def _without(item: Item, gone: set[str]) -> Item:
    kept = [(i, cost) for i, cost in zip(item.ids, item.costs, strict=True) if i not in gone]
    return msgspec.structs.replace(item, ids=[i for i, _ in kept], costs=[cost for _, cost in kept])


def _read(path: Path) -> bytes | None:
    """None if it is not there, or was replaced while it was being opened (ESTALE): the next look will tell."""
    try:
        return path.read_bytes()
    except OSError:
        return None
