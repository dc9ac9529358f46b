"""World rank <-> (replica, pp_rank, tp_rank), and which share of a model each rank owns. Pure arithmetic, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from hpckv.errors import ConfigError
from hpckv.schema import Config


class ParallelConfig(Config, frozen=True):
    """How one model is spread over ranks (`parallel:`)."""

    tp: int = 1
    """Tensor-parallel ranks: each layer's heads and columns are split over them."""
    pp: int = 1
    """Pipeline stages: contiguous groups of layers."""
    replicas: int = 1
    """Independent engines of tp x pp ranks, each with its own share of the run."""


@dataclass(frozen=True)
class ParallelDims:
    """One rank's place in the grid. Tensor ranks are neighbours, then stages, then replicas."""

    tp: int = 1
    pp: int = 1
    tp_rank: int = 0
    pp_rank: int = 0
    replica: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.tp_rank < self.tp
        assert 0 <= self.pp_rank < self.pp

    @classmethod
    def of_world_rank(cls, world_rank: int, *, tp: int, pp: int) -> ParallelDims:
        replica, inside = divmod(world_rank, tp * pp)
        pp_rank, tp_rank = divmod(inside, tp)
        return cls(tp=tp, pp=pp, tp_rank=tp_rank, pp_rank=pp_rank, replica=replica)

    @property
    def world_rank(self) -> int:
        return (self.replica * self.pp + self.pp_rank) * self.tp + self.tp_rank

    def columns(self, size: int, what: str = "dimension") -> slice:
        """This tensor rank's equal share of `size` columns; raises `ConfigError` if it does not divide."""
        if size % self.tp:
            raise ConfigError(f"parallel.tp: {self.tp} does not divide the model's {what} ({size})")
        share = size // self.tp
        return slice(self.tp_rank * share, (self.tp_rank + 1) * share)

    def kv_heads(self, num_kv_heads: int) -> slice:
        """KV heads this rank holds: an equal share, or one replicated head where there are more ranks than heads."""
        if num_kv_heads >= self.tp:
            return self.columns(num_kv_heads, "number of KV heads")
        if self.tp % num_kv_heads:
            raise ConfigError(f"parallel.tp: {self.tp} is no multiple of the model's {num_kv_heads} KV heads")
        head = self.tp_rank // (self.tp // num_kv_heads)
        return slice(head, head + 1)

    def layers(self, num_layers: int) -> range:
        """Layers of this stage: contiguous, the first stages one longer where it does not divide."""
        if self.pp > num_layers:
            raise ConfigError(f"parallel.pp: {self.pp} stages for {num_layers} layers")
        share, longer = divmod(num_layers, self.pp)
        start = self.pp_rank * share + min(self.pp_rank, longer)
        return range(start, start + share + (self.pp_rank < longer))
