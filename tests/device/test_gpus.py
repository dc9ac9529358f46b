"""A GPU's names, as drivers, data sheets and site files write them."""

import pytest

from hpckv.device.gpus import gpu_class, is_kind
from hpckv.usage.rates import Rates, best_rates


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA H200", "H200 141GB"),
        ("a100", "A100 40GB"),
    ],
)
def test_a_drivers_name_is_of_a_class(name, kind):
    found = gpu_class(name)
    assert found is not None
    assert found.name == kind


@pytest.mark.parametrize("name", ["NVIDIA A10", "NVIDIA L40S", "cpu", "GH200 480GB", ""])
def test_others_are_of_none(name):
    assert gpu_class(name) is None


def test_a_part_of_a_name_is_whole_words():
    assert is_kind("h100", "NVIDIA H100 80GB HBM3")
    assert not is_kind("A10", "NVIDIA A100-SXM4-40GB")


def test_the_best_rates_are_the_models_own_on_a_replica_of_that_size():
    def of(gpu: str, model: str | None, num_gpus: int, rate: float) -> Rates:
        return Rates(gpu=gpu, model=model, num_gpus=num_gpus, prefill_tokens_per_s=rate, decode_tokens_per_s=rate)

    known = [of("A100", None, 1, 1.0), of("A100", "m", 4, 2.0), of("A100", "m", 1, 3.0), of("A10", "m", 1, 4.0)]
    assert best_rates(known, "NVIDIA A100-SXM4-40GB", "m", 1) == known[2]
    assert best_rates(known, "A100", "m", 4) == known[1]
    assert best_rates(known, "NVIDIA A100-SXM4-40GB", "another", 1) == known[0]
    assert best_rates(known, "NVIDIA A10", "m", 1) == known[3]
    assert best_rates([of("NVIDIA A100-SXM4-40GB", "m", 1, 5.0)], "A100", "m", 1).prefill_tokens_per_s == 5.0
    assert best_rates(known, "V100", "m", 1) is None
