"""What one signal, several at once, and an impatient second one do to a process that drains."""

import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
from hpckv.workload import drain
found = drain.install()
print("ready", flush=True)
while not found.requested:
    drain.signal.sigtimedwait([], 0.01)
print("drains", flush=True)
input()
print("drained", flush=True)
"""


@pytest.fixture
def process():
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as one:
        assert one.stdout.readline() == "ready\n"
        yield one
        one.kill()


@pytest.mark.parametrize(
    "signals", [["TERM"], ["USR1"], ["USR1", "TERM"], ["TERM", "TERM"], ["USR1", "TERM", "TERM"], ["INT"]]
)
def test_what_slurm_sends_at_once_is_one_wish(process, signals):
    for name in signals:
        process.send_signal(getattr(signal, f"SIG{name}"))
        time.sleep(0.05)
    assert process.stdout.readline() == "drains\n"
    out, err = process.communicate("go on\n", timeout=30)
    assert (process.returncode, out) == (0, "drained\n")
    assert err.count("finishing this step") == 1


@pytest.mark.parametrize(("second", "pause_s"), [("INT", 0.05), ("TERM", 2.5)])
def test_who_asks_again_does_not_want_to_wait(process, second, pause_s):
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "drains\n"
    time.sleep(pause_s)
    number = getattr(signal, f"SIG{second}")
    process.send_signal(number)
    assert process.wait(30) == 128 + number
