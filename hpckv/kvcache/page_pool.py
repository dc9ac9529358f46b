"""Which pages are free, held, or kept for reuse. Numbers only: no tensors, no tokens.

A page is in exactly one of these states:

    free      nothing of value in it
    held      one or more sequences use it (its reference count)
    kept      nobody uses it, and its block may be wanted again; evicted when pages run out

Kept pages whose block nobody in the run wants again go first, then the least recently used. Two pages are never
handed out: padding reads page 0, which stays zero, and what must not be kept is written to page 1.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

PADDING_PAGE = 0
TRASH_PAGE = 1
NUM_RESERVED = 2


class PagePool:
    """`num_pages` pages, the reserved ones included."""

    def __init__(self, num_pages: int, *, is_wanted: Callable[[bytes], bool] = lambda key: False) -> None:
        """`is_wanted` says of a block's key whether a request that has not started yet will use it."""
        assert num_pages > NUM_RESERVED
        self.num_pages = num_pages
        self.num_evicted = 0
        self._is_wanted = is_wanted
        self._free = deque(range(NUM_RESERVED, num_pages))
        self._references = [0] * num_pages
        self._key: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._wanted: OrderedDict[int, None] = OrderedDict()
        self._unwanted: OrderedDict[int, None] = OrderedDict()

    @property
    def num_usable(self) -> int:
        """Pages that can be had at all."""
        return self.num_pages - NUM_RESERVED

    @property
    def num_available(self) -> int:
        """Pages that could be allocated now, kept ones included."""
        return len(self._free) + len(self._unwanted) + len(self._wanted)

    @property
    def num_unwanted(self) -> int:
        """Pages that could be allocated without evicting a block that is wanted again."""
        return len(self._free) + len(self._unwanted)

    def allocate(self) -> int | None:
        """A page with one reference, or None if all are held."""
        if self._free:
            page = self._free.popleft()
        elif self._unwanted or self._wanted:
            page, _ = (self._unwanted or self._wanted).popitem(last=False)
            self._forget(page)
            self.num_evicted += 1
        else:
            return None
        self._references[page] = 1
        return page

    def find(self, key: bytes) -> int | None:
        """The page that holds this block."""
        return self._page_of.get(key)

    def retain(self, page: int) -> None:
        """One more sequence uses the page; it must be held or kept."""
        assert page >= NUM_RESERVED
        if self._references[page] == 0:
            self._wanted.pop(page, None)
            self._unwanted.pop(page, None)
        self._references[page] += 1

    def release(self, page: int) -> None:
        """One sequence less; the last one leaves the page kept if it has a key, else free."""
        assert self._references[page] > 0
        self._references[page] -= 1
        if self._references[page]:
            return
        key = self._key[page]
        if key is None:
            self._free.append(page)
        else:
            (self._wanted if self._is_wanted(key) else self._unwanted)[page] = None

    def register(self, page: int, key: bytes) -> bool:
        """The held page now has this whole block; False if another page already does (this one stays private)."""
        assert self._references[page] > 0
        if key in self._page_of:
            return False
        self._key[page] = key
        self._page_of[key] = page
        return True

    def disown(self) -> None:
        """Let nobody match any block that is there now: some of them were found to be wrong."""
        for page in (*self._unwanted, *self._wanted):
            self._free.append(page)
        self._unwanted.clear()
        self._wanted.clear()
        self._key = [None] * self.num_pages
        self._page_of.clear()

    def recheck(self, key: bytes) -> None:
        """The block's being wanted may have changed."""
        page = self._page_of.get(key)
        if page is not None and page in self._wanted and not self._is_wanted(key):
            del self._wanted[page]
            self._unwanted[page] = None

    def check_integrity(self) -> None:
        """Raise `AssertionError` if a page is in no state or in two, or an index disagrees with it."""
        free, kept = set(self._free), set(self._wanted) | set(self._unwanted)
        held = {p for p, count in enumerate(self._references) if count}
        assert len(free) == len(self._free)
        assert not set(self._wanted) & set(self._unwanted)
        assert not free & kept
        assert not held & (free | kept)
        assert free | kept | held == set(range(NUM_RESERVED, self.num_pages))
        assert all(self._key[p] is None for p in free)
        assert all(self._key[p] is not None for p in kept)
        assert self._page_of == {k: p for p, k in enumerate(self._key) if k is not None}

    def _forget(self, page: int) -> None:
        key = self._key[page]
        assert key is not None
        del self._page_of[key]
        self._key[page] = None
