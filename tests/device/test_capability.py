"""The dtype policy as a table: a V100 is tested without a V100."""

import pytest

from hpckv.device import Capability, choose_dtype
from hpckv.errors import CapabilityError

V100 = Capability("cuda", "V100", (7, 0))
A100 = Capability("cuda", "A100", (8, 0))
H100 = Capability("cuda", "H100", (9, 0))
AMX = Capability("cpu", "CPU", cpu_flags=frozenset({"amx_bf16", "avx512f"}))
OLD_CPU = Capability("cpu", "CPU", cpu_flags=frozenset({"avx2"}))


@pytest.mark.parametrize(
    ("device", "stored", "chosen"),
    [
        (V100, "bfloat16", "float16"),
        (V100, "float16", "float16"),
        (A100, "bfloat16", "bfloat16"),
        (H100, "float32", "float32"),
        (AMX, "bfloat16", "bfloat16"),
        (AMX, "float16", "float32"),
        (OLD_CPU, "bfloat16", "float32"),
    ],
)
def test_auto_takes_the_checkpoints_dtype_where_the_hardware_has_it(device, stored, chosen):
    assert choose_dtype("auto", stored, device) == chosen


def test_bf16_on_a_v100_is_refused_with_the_reason():
    with pytest.raises(CapabilityError, match="sm_80"):
        choose_dtype("bfloat16", "float32", V100)


def test_fp8_and_strict_classes():
    assert [d.has_fp8 for d in (V100, A100, H100, AMX)] == [False, False, True, False]
    assert V100.arithmetic_class != A100.arithmetic_class
    assert AMX.arithmetic_class == "cpu amx_bf16"
