"""One sequence's tokens and where their keys and values are. No torch."""

from __future__ import annotations

from collections import Counter

from hpckv.store.fetch import Fetch

HIT_TIERS = ("device", "host", "local", "shared")
"""Where a cached token can have come from, near to far."""


class CachedSequence:
    """Tokens of a sequence, the keys of its full blocks, its pages, and how far they are computed.

    Invariant: positions [0, num_computed) have their keys and values in `pages`.
    """

    def __init__(self, tokens: list[int], keys: list[bytes]) -> None:
        """`keys` are those of all full blocks of `tokens`."""
        self.tokens = tokens
        self.keys = keys
        self.pages: list[int] = []
        self.admission = 0
        """Which of all admissions so far gave it its pages; 0 before the first."""
        self.num_computed = 0
        self.num_registered = 0
        """Leading blocks that are known to the pool under their key."""
        self.cached: Counter[str] | None = None
        """Tokens found at first admission, by tier."""
        self.by_writer: Counter[int] = Counter()
        """Those of them that were loaded from a store, by the uid of who had written them."""
        self.fetch: Fetch | None = None
        """Stored blocks on their way, from number `fetch_first` on."""
        self.fetch_first = 0
        self.is_audit = False
        """It computes everything itself, to compare the store with."""
        self.skips_store = False
        """It is faster to compute than to load what the store has of it."""

    @property
    def num_left(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.tokens) - self.num_computed
