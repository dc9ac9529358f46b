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


Span = slice | int
"""A run of rows or columns of a whole matrix; a number stands for so many zeros."""


def spans_of(heads: Sequence[int], size: int) -> list[Span]:
    """Rows of these heads of `size` rows each; -1 is a head of zeros."""
    spans: list[Span] = []
    for head in heads:
        start, last = head * size, spans[-1] if spans else None
        if head < 0:
            spans.append(size)
        elif isinstance(last, slice) and last.stop == start:
            spans[-1] = slice(last.start, start + size)
        else:
            spans.append(slice(start, start + size))
    return spans


def _take(source: WeightSource, name: str, shape: tuple[int, ...], spans: Sequence[Span], dim: int = 0) -> torch.Tensor:
    """The spans of one tensor side by side along `dim`."""
    parts = []
    for span in spans:
        if isinstance(span, int):
            sizes = [span if axis == dim else whole for axis, whole in enumerate(shape)]
            parts.append(torch.zeros(sizes, dtype=source.dtype, device=source.device))
        else:
            parts.append(source.take(name, shape, *((span,) if dim == 0 else (None, span))))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def column_parallel(
    source: WeightSource, parts: Sequence[tuple[str, int, Sequence[Span]]], in_features: int, *, bias: bool = False
) -> Linear:
    """One layer from several matrices side by side: `parts` are (name, whole number of rows, this rank's rows)."""
    weight = torch.cat([_take(source, f"{n}.weight", (size, in_features), rows) for n, size, rows in parts])
    biases = [_take(source, f"{n}.bias", (size,), rows) for n, size, rows in parts] if bias else []
    return Linear(weight, torch.cat(biases) if biases else None)


class RowParallel:
    """Takes this rank's share of the inputs, returns the whole sum on every rank."""

    def __init__(
        self,
        source: WeightSource,
        name: str,
        shape: tuple[int, int],
        columns: Sequence[Span],
        dims: ParallelDims,
        collectives: Collectives,
        *,
        bias: bool = False,
    ) -> None:
        self.collectives = collectives
        weight = _take(source, f"{name}.weight", shape, columns, dim=1)
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
        self.num_own = len(weight)
        if len(weight) < share:  # all ranks' matrices are of one size
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
        """(T, about V / tp): this rank's range of the vocabulary, from `first` on."""
        return self.linear(x_TD)[:, : self.num_own]
