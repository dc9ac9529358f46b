"""Load a stored prefix, or compute it again? Two measured rates decide for each request. No torch.

Seconds to load: blocks' bytes over the rate at which fetches have been arriving. Seconds to compute: tokens over the
prefill rate of this model on this device. Until both are known, loading is tried.
"""

from __future__ import annotations

from dataclasses import dataclass

_WEIGHT = 0.2
"""Of the newest measurement in a running mean."""
_TRY_EVERY = 32
"""So often a load is tried although it seems slower: rates change."""


@dataclass
class LoadPolicy:
    """Rates so far, and what was decided with which estimates."""

    prefill_tokens_per_s: float = 0.0
    load_bytes_per_s: float = 0.0
    num_loads: int = 0
    num_recomputes: int = 0
    """Prefixes that were there and were computed again because that was estimated to be faster."""
    recomputed_tokens: int = 0
    """Of those."""
    declined_load_estimate_s: float = 0.0
    """Estimated seconds of loading what was computed again."""
    declined_recompute_estimate_s: float = 0.0
    """Estimated seconds of computing it."""
    load_estimate_s: float = 0.0
    """Estimated seconds of all loads that were decided on."""
    recompute_estimate_s: float = 0.0
    """Estimated seconds of computing the same tokens."""
    _num_declined_in_a_row: int = 0

    def note_prefill(self, num_tokens: int, seconds: float) -> None:
        """A step that computed prompt tokens."""
        self.prefill_tokens_per_s = _mean(self.prefill_tokens_per_s, num_tokens / max(seconds, 1e-9))

    def note_load(self, num_bytes: int, seconds: float) -> None:
        """A fetch, from its start to its last block."""
        self.load_bytes_per_s = _mean(self.load_bytes_per_s, num_bytes / max(seconds, 1e-9))

    def should_load(self, num_tokens: int, num_bytes: int) -> bool:
        """Whether to load a stored prefix of so many tokens and bytes."""
        load_s = num_bytes / self.load_bytes_per_s if self.load_bytes_per_s else 0.0
        compute_s = num_tokens / self.prefill_tokens_per_s if self.prefill_tokens_per_s else load_s
        if load_s > compute_s and self._num_declined_in_a_row < _TRY_EVERY:
            self.num_recomputes += 1
            self.recomputed_tokens += num_tokens
            self.declined_load_estimate_s += load_s
            self.declined_recompute_estimate_s += compute_s
            self._num_declined_in_a_row += 1
            return False
        self._num_declined_in_a_row = 0
        self.num_loads += 1
        self.load_estimate_s += load_s
        self.recompute_estimate_s += compute_s
        return True

    @property
    def record(self) -> dict[str, float]:
        """Plain data for a run's record."""
        return {name: round(value, 4) for name, value in vars(self).items() if not name.startswith("_")}


def _mean(before: float, new: float) -> float:
    return new if not before else (1 - _WEIGHT) * before + _WEIGHT * new
