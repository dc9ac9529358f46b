"""Two and three tensor ranks built in one process: each loads only its slice, and together they are the whole."""

import torch
from safetensors.torch import save_file

from hpckv.comm import Collectives, ParallelDims, SingleRank
from hpckv.model.linear import RowParallel, VocabularyParallel, column_parallel
from hpckv.model.weights import WeightSource


class Collecting(Collectives):
    """Stands for the exchange: hands a rank's partial result out instead of exchanging it."""

    def all_reduce(self, x):
        return x

    def all_gather(self, x):
        return x


def source(folder, **tensors):
    save_file(tensors, folder / "model.safetensors")
    return WeightSource(folder, dtype=torch.float32, device=torch.device("cpu"))


def test_columns_side_by_side_are_the_whole_layer(tmp_path):
    weights = source(
        tmp_path,
        **{
            "q.weight": torch.randn(12, 5),
            "q.bias": torch.randn(12),
            "k.weight": torch.randn(6, 5),
            "k.bias": torch.randn(6),
        },
    )
    x = torch.randn(7, 5)
    whole = column_parallel(weights, [("q", 12, [slice(0, 12)]), ("k", 6, [slice(0, 6)])], 5, bias=True)(x)
    parts = []
    for rank in range(3):
        dims = ParallelDims(tp=3, tp_rank=rank)
        layer = column_parallel(weights, [("q", 12, [dims.columns(12)]), ("k", 6, [dims.columns(6)])], 5, bias=True)
        assert layer.out_features == 6
        parts.append(layer(x))
    together = torch.cat([p[:, :4] for p in parts] + [p[:, 4:] for p in parts], dim=1)
    assert torch.allclose(together, whole, atol=1e-6)


def test_row_partial_sums_add_up_with_the_bias_once(tmp_path):
    weights = source(tmp_path, **{"o.weight": torch.randn(4, 10), "o.bias": torch.randn(4)})
    x = torch.randn(3, 10)
    whole = RowParallel(weights, "o", (4, 10), [slice(0, 10)], ParallelDims(), SingleRank(), bias=True)(x)
    parts = []
    for rank in range(2):
        dims = ParallelDims(tp=2, tp_rank=rank)
        layer = RowParallel(weights, "o", (4, 10), [dims.columns(10)], dims, Collecting(), bias=True)
        parts.append(layer(x[:, dims.columns(10)]))
    assert torch.allclose(sum(parts), whole, atol=1e-5)


def test_an_odd_vocabulary_is_split_with_padding(tmp_path):
    weights = source(tmp_path, **{"e.weight": torch.randn(11, 4)})
    ids, x = torch.arange(11), torch.randn(2, 4)
    whole = VocabularyParallel(weights, "e", (11, 4), ParallelDims(), SingleRank())
    ranks = [VocabularyParallel(weights, "e", (11, 4), ParallelDims(tp=3, tp_rank=r), Collecting()) for r in range(3)]
    assert {len(r.weight) for r in ranks} == {4}
    assert torch.equal(sum(r.embed(ids) for r in ranks), whole.embed(ids))
    assert torch.allclose(torch.cat([r.linear(x) for r in ranks], dim=1)[:, :11], whole.logits(x), atol=1e-6)
