"""World rank <-> (replica, pp_rank, tp_rank), and which share of a model each rank owns. Pure arithmetic, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from hpckv.errors import ConfigError
from hpckv.schema import Config


class RoutingConfig(Config, frozen=True):
    """Which replica of a run computes what (`parallel.routing:`): weights of a score in prompt tokens."""

    device: float = 1.0
    """A token of the prefix that the replica holds in pages."""
    host: float = 0.9
    """One in its memory tier; most of computing it is saved."""
    local: float = 0.7
    """One on its node's SSD."""
    session: float = 0.2
    """A token of a conversation (`prompt_cache_key`) of which the replica was given a part before."""
    load: float = 1.0
    """Taken off: a token that is queued there and not yet computed."""


class ParallelConfig(Config, frozen=True):
    """How one model is spread over ranks (`parallel:`)."""

    tp: int = 1
    """Tensor-parallel ranks: each layer's heads and columns are split over them."""
    pp: int = 1
    """Pipeline stages: contiguous groups of layers."""
    replicas: int = 1
    """Independent engines of tp x pp ranks. A run is cut into whole subtrees of its prefix tree, which go where their prefix is."""
    routing: RoutingConfig = RoutingConfig()
    micro_batches: int = 0
    """Disjoint groups of sequences that are in the pipeline at once; 0 is twice the number of stages."""
    coordinator: Literal["auto", "mpi", "slurm", "torchrun", "single"] = "auto"
    """How ranks find each other; `auto` takes the first of MPI, Slurm's variables, torchrun's that is there."""
    transport: Literal["auto", "host", "device"] = "auto"
    """What carries tensors between ranks: `device` is NCCL between GPUs (gloo between CPUs), `host` goes through host memory and
    MPI; `auto` is `device` where every rank has a GPU of its own."""
    reduce: Literal["float32", "compute"] = "float32"
    """In what NCCL adds tensor ranks' sums: float32 rounds once, `compute` is the model's dtype and half the bytes. Through host
    memory, and in strict numerics, it is always float32."""
    allow_idle_nodes: bool = False
    """Run although no rank is on some node of the job; it is paid for."""
    silence_s: float = 10.0
    """A rank whose heartbeat is not heard for so long counts as lost: it hangs, or its node is gone."""
    deadline_s: float = 120.0
    """Longest wait for another rank in a step; a rank that died or hangs is noticed sooner by its missing heartbeat."""
    start_deadline_s: float = 1800.0
    """Longest wait for another rank while weights are read."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "replicas"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name}: {getattr(self, name)} is not at least 1")
        if self.micro_batches < 0:
            raise ConfigError(f"parallel.micro_batches: {self.micro_batches} is negative")
        for name in ("silence_s", "deadline_s", "start_deadline_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"parallel.{name}: {getattr(self, name)} is not positive")

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp * self.replicas

    @property
    def num_micro_batches(self) -> int:
        return self.micro_batches or (2 * self.pp if self.pp > 1 else 1)


@dataclass(frozen=True)
class HeadShare:
    """One tensor rank's attention heads: query heads [first, end), and the KV heads they attend.

    Where tensor ranks cut through the query heads of one KV head, a rank's groups are unequal. They are then padded to
    `group_size` with query heads that are zero; `queries` names the real head of every place, or -1.
    """

    queries: tuple[int, ...]
    kv: slice
    owned_kv: slice
    """KV heads that this rank writes to a store: of ranks that hold the same one, the lowest does."""

    @property
    def group_size(self) -> int:
        return len(self.queries) // int(self.kv.stop - self.kv.start)


@dataclass(frozen=True)
class ParallelDims:
    """One rank's place in the grid. Tensor ranks are neighbours, then stages, then replicas."""

    tp: int = 1
    pp: int = 1
    tp_rank: int = 0
    pp_rank: int = 0
    replica: int = 0
    stage_ends: tuple[int, ...] = ()
    """One past the last layer of each stage; empty is equal shares."""

    def __post_init__(self) -> None:
        assert 0 <= self.tp_rank < self.tp
        assert 0 <= self.pp_rank < self.pp
        assert len(self.stage_ends) in (0, self.pp)

    @classmethod
    def of_world_rank(cls, world_rank: int, *, tp: int, pp: int) -> ParallelDims:
        replica, inside = divmod(world_rank, tp * pp)
        pp_rank, tp_rank = divmod(inside, tp)
        return cls(tp=tp, pp=pp, tp_rank=tp_rank, pp_rank=pp_rank, replica=replica)

    @property
    def world_rank(self) -> int:
        return (self.replica * self.pp + self.pp_rank) * self.tp + self.tp_rank

    @cached_property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @cached_property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    def columns(self, size: int, what: str = "dimension") -> slice:
        """This tensor rank's equal share of `size` columns; raises `ConfigError` if it does not divide."""
        if size % self.tp:
            raise ConfigError(f"parallel.tp: {self.tp} does not divide the model's {what} ({size})")
        share = size // self.tp
        return slice(self.tp_rank * share, (self.tp_rank + 1) * share)

    def heads(self, num_heads: int, num_kv_heads: int) -> HeadShare:
        """This rank's attention heads; raises `ConfigError` if the query heads do not divide."""
        own, group = self.columns(num_heads, "number of heads"), num_heads // num_kv_heads
        kv = slice(own.start // group, -(-own.stop // group))
        before = -(-own.start // group)  # the rank before holds those up to here
        members = [
            [q for q in range(head * group, (head + 1) * group) if own.start <= q < own.stop]
            for head in range(kv.start, kv.stop)
        ]
        widest = max(map(len, members))
        queries = tuple(q for part in members for q in part + [-1] * (widest - len(part)))
        return HeadShare(queries, kv, slice(before, kv.stop))

    def layers(self, num_layers: int) -> range:
        """Layers of this stage: contiguous; equal shares, the first stages one longer, unless `stage_ends` says else."""
        if self.pp > num_layers:
            raise ConfigError(f"parallel.pp: {self.pp} stages for {num_layers} layers")
        if self.stage_ends:
            assert self.stage_ends[-1] == num_layers
            return range(self.stage_ends[self.pp_rank - 1] if self.pp_rank else 0, self.stage_ends[self.pp_rank])
        share, longer = divmod(num_layers, self.pp)
        start = self.pp_rank * share + min(self.pp_rank, longer)
        return range(start, start + share + (self.pp_rank < longer))


def balanced_stages(num_layers: int, pp: int, *, first: float = 0.0, last: float = 0.0) -> tuple[int, ...]:
    """Ends of `pp` stages of at least one layer each, the slowest as fast as possible.

    `first` and `last` are what the embedding and the head take, in layers' time.
    """
    if pp > num_layers:
        raise ConfigError(f"parallel.pp: {pp} stages for {num_layers} layers")

    def ends(limit: float) -> tuple[int, ...] | None:
        """As many layers to every stage, from the last one back, as the limit allows."""
        counts, left = [], num_layers
        for stage in reversed(range(pp)):
            extra = (first if stage == 0 else 0.0) + (last if stage == pp - 1 else 0.0)
            count = min(left - stage, int(limit - extra + 1e-9))
            if count < 1:
                return None
            counts.append(count)
            left -= count
        if left:
            return None
        return tuple(num_layers - sum(counts[:n]) for n in reversed(range(pp)))

    # The slowest stage takes a whole number of layers, plus perhaps an end's share.
    limits = sorted({n + extra for n in range(1, num_layers + 1) for extra in (0.0, first, last, first + last)})
    return next(found for limit in limits if (found := ends(limit)))
