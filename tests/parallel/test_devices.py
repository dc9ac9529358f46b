"""Tensors that never leave their GPUs: NCCL for one rank, and what two ranks on one GPU do instead."""

import pytest
import torch

from hpckv.comm.collectives import SingleRank
from hpckv.comm.device_group import DeviceCollectives, DevicePeers
from hpckv.comm.group import Single, Watch
from tests.parallel.ranks import run_cases

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("reduces_in", ["float32", "compute"])
def test_a_group_of_one_over_nccl_gives_back_what_it_was_given(reduces_in):
    device = torch.device("cuda", 0)
    peers = DevicePeers(Single(), Watch(60.0), device, 60.0, is_one_node=True)
    x = torch.randn(7, 64, device=device).bfloat16()
    for has_fixed_order in (False, True):
        collectives = DeviceCollectives(peers, SingleRank(), has_fixed_order=has_fixed_order, reduces_in=reduces_in)
        assert torch.equal(collectives.all_reduce(x), x)
        assert torch.equal(collectives.all_gather(x), x)
        assert torch.equal(collectives.all_reduce(x.cpu()), x.cpu())
    assert torch.equal(peers.all_gather(x), x[None])


@pytest.mark.mpi
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_two_ranks_on_one_gpu_pass_tensors_through_host_memory(tp, pp, checkpoint, tmp_path):
    """NCCL takes no two ranks of a GPU."""
    if torch.cuda.device_count() > 1:
        pytest.skip("every rank has a GPU of its own here")
    folder = checkpoint("llama", num_attention_heads=4, num_key_value_heads=2)
    case = {"model": str(folder), "prompts": [[3, 4, 5, 6, 7]], "sampling": {"max_tokens": 16, "ignore_eos": True}}
    alone, both = run_cases(tmp_path, [{**case, "tp": 1, "pp": 1}, {**case, "tp": tp, "pp": pp}], size=2)
    assert both["tokens"] == alone["tokens"]
    assert {rank["transport"] for rank in both["ranks"]} == {"host"}


@pytest.mark.mpi
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_ranks_with_gpus_of_their_own_use_nccl(tp, pp, checkpoint, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    folder = checkpoint("llama", num_attention_heads=4, num_key_value_heads=2)
    case = {"model": str(folder), "prompts": [[3, 4, 5, 6, 7]], "sampling": {"max_tokens": 16, "ignore_eos": True}}
    alone, both = run_cases(tmp_path, [{**case, "tp": 1, "pp": 1}, {**case, "tp": tp, "pp": pp}], size=2)
    assert both["tokens"] == alone["tokens"]
    assert {rank["transport"] for rank in both["ranks"]} == {"device"}
