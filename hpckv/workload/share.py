"""What one worker holds of a run that several work on: which items, and which of their requests are still to come. No torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from hpckv.workload.queue import Item, View, WorkQueue

_log = logging.getLogger(__name__)


class Computes(Protocol):
    """What computes the requests: an engine."""

    @property
    def num_unfinished(self) -> int:
        """Requests it has."""

    @property
    def unstarted(self) -> Sequence[str]:
        """Ids of those of which nothing has been computed, in the order in which they will be."""

    def withdraw(self, request_ids: Iterable[str]) -> None:
        """Forget requests that are `unstarted`."""


class Share:
    """Items of one worker. A request can be in two of them: in one whose holder was taken for dead, and in the piece of it that
    the holder, alive after all, gave back; it is computed once, and counts for both."""

    def __init__(self, queue: WorkQueue, computes: Computes, start: Callable[[str], None]) -> None:
        """`start` has a request, by its id, computed."""
        self._queue, self._computes, self._start = queue, computes, start
        self._items: dict[str, Item] = {}
        self._to_come: dict[str, set[str]] = {}
        """By item."""
        self._here: set[str] = set()
        """Requests that are being computed, also of items that were lost meanwhile."""

    def fill(self, view: View, most: int) -> bool:
        """Take items until `most` requests are here; whether one was taken. If another worker was faster, `view` is stale."""
        took = False
        while self._computes.num_unfinished < most and (name := self._queue.next_free(view)) is not None:
            item = self._queue.claim(name, view)
            if item is None:
                view.claims[name] = 0, self._queue.worker.name  # somebody's, at least until the next look
                view.is_stale = True
                continue
            took = True
            self._items[name], self._to_come[name] = item, set(item.ids)
            for custom_id in item.ids:
                if custom_id not in self._here:
                    self._here.add(custom_id)
                    self._start(custom_id)
        return took

    def answered(self, custom_id: str) -> None:
        """It has its answer, or its failure."""
        self._here.discard(custom_id)
        self._forget([custom_id])

    def finish(self, sync: Callable[[], None]) -> set[str]:
        """Items of which nothing is to come are done, once `sync` has brought the answers to the disk; their names."""
        over = {name for name, ids in self._to_come.items() if not ids}
        if over:
            sync()
        for name in over:
            self._queue.finish(name)
            del self._items[name], self._to_come[name]
        return over

    def drop_what_others_do(self, view: View) -> None:
        """Of items that are done, or that others have taken over, only what has been started is gone on with."""
        own = self._queue.worker.name
        lost = [name for name in self._items if name in view.done or view.claims.get(name, (0, own))[1] != own]
        unstarted = self._computes.unstarted if lost else ()
        for name in lost:
            _log.warning("item %s is another job's now: this one was taken for dead", name)
            del self._items[name]
            others = self._to_come.pop(name)
            self._withdraw(
                [i for i in unstarted if i in others and not any(i in ids for ids in self._to_come.values())]
            )

    def give(self, view: View) -> None:
        """If another worker has nothing to do and nothing is free: the last half of what has not been started."""
        own = self._queue.worker.name
        hungry = [worker for name, worker in view.alive.items() if name != own and worker.is_idle]
        if not hungry or any(view.is_free(name) for name in view.items):
            return
        most = max(worker.tokens for worker in hungry)
        item_of = {i: name for name, ids in self._to_come.items() if self._items[name].tokens <= most for i in ids}
        unstarted = [i for i in self._computes.unstarted if i in item_of]
        given: dict[str, list[str]] = {}
        for custom_id in unstarted[len(unstarted) // 2 :]:
            given.setdefault(item_of[custom_id], []).append(custom_id)
        for name, ids in given.items():
            self._queue.give(self._items[name], ids)
            self._forget(ids)
            self._withdraw(ids)
            _log.info("gave %d requests of item %s back for %s", len(ids), name, hungry[0].name)

    def _withdraw(self, ids: Sequence[str]) -> None:
        self._computes.withdraw(ids)
        self._here.difference_update(ids)

    def _forget(self, ids: Sequence[str]) -> None:
        for to_come in self._to_come.values():
            to_come.difference_update(ids)
