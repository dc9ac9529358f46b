"""A step's temporaries use the same memory again: the kernel is not asked to make it anew each time."""

import subprocess
import sys

SCRIPT = """
import resource, sys, torch
from hpckv.device.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for size in range(40, 60):  # each a little larger than the one before, as a decode step's are
    torch.zeros(size << 20, dtype=torch.uint8)
    if size == 49:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    found = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
    return int(found.stdout)


def test_freed_memory_is_used_again():
    pages_per_mib = 256
    assert faults("keep") < 60 * pages_per_mib  # about the largest of the ten tensors
    assert faults("leave") > 500 * pages_per_mib  # all ten, each from the first byte on
