"""Linear layers split over tensor ranks; each loads only its own slice from the files.

Column-parallel layers split their outputs and need no exchange; row-parallel layers split their inputs and sum
their partial results, the bias added once. On CPUs the weight is laid out once in the order that oneDNN's
bfloat16 kernels want, which otherwise happens at every call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from hpckv.comm import Collectives, ParallelDims
from hpckv.model.weights import WeightSource


class Linear:
    """y = x W^T + b for weights that are already this rank's own."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._is_packed = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _can_pack()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._is_packed else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._is_packed:
            packed: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return packed
        return F.linear(x, self.weight, self.bias)


def _can_pack() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def column_parallel(
    source: WeightSource, parts: Sequence[tuple[str, int, slice]], in_features: int, *, bias: bool = False
) -> Linear:
    """One layer from several matrices side by side: `parts` are (name, whole number of rows, this rank's rows)."""
    weight = torch.cat([source.take(f"{n}.weight", (size, in_features), rows) for n, size, rows in parts])
    biases = [source.take(f"{n}.bias", (size,), rows) for n, size, rows in parts] if bias else []
    return Linear(weight, torch.cat(biases) if biases else None)


class RowParallel:
    """Takes this rank's share of the inputs, returns the whole sum on every rank."""

    def __init__(
        self,
        source: WeightSource,
        name: str,
        shape: tuple[int, int],
        columns: slice,
        dims: ParallelDims,
        collectives: Collectives,
        *,
        bias: bool = False,
    ) -> None:
        self.collectives = collectives
        weight = source.take(f"{name}.weight", shape, columns=columns)
        whole_bias = source.take(f"{name}.bias", shape[:1]) if bias else None
        self.linear = Linear(weight, whole_bias if dims.tp_rank == 0 else None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.collectives.all_reduce(self.linear(x))


class VocabularyParallel:
    """Token embedding and logits, each rank holding a range of the (padded) vocabulary."""

    def __init__(
        self, source: WeightSource, name: str, shape: tuple[int, int], dims: ParallelDims, collectives: Collectives
    ) -> None:
        self.collectives = collectives
        self.vocab_size = shape[0]
        share = -(-shape[0] // dims.tp)
        self.first = min(shape[0], dims.tp_rank * share)
        rows = slice(self.first, min(shape[0], self.first + share))
        weight = source.take(f"{name}.weight", shape, rows)
        if len(weight) < share:  # the last rank is padded, so that gathered logits are even
            weight = F.pad(weight, (0, 0, 0, share - len(weight)))
        self.weight = weight
        self.is_whole = dims.tp == 1
        self.linear = Linear(weight)

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        """(T, D); each rank looks up its own range, the sum is everybody's."""
        if self.is_whole:
            return F.embedding(ids_T, self.weight)
        own = ids_T - self.first
        is_own = (own >= 0) & (own < len(self.weight))
        found = F.embedding(own.clamp(0, len(self.weight) - 1), self.weight) * is_own[:, None]
        return self.collectives.all_reduce(found)

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """(T, V) on every rank."""
        return self.collectives.all_gather(self.linear(x_TD))[:, : self.vocab_size]
