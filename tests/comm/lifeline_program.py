"""One rank of a run that only keeps its lifeline, as a process of its own.

    RANK SIZE BEHAVIOUR     rank 0 says on a first line where it is; the others read that line

What it ends with is its exit code and a last line: `over`, or the text of what ended it.
"""

import os
import signal
import sys
import threading
import time

from hpckv.comm import lifeline
from hpckv.comm.lifeline import Lifeline, Listener, Member, connect
from hpckv.errors import HpckvError, ModelError

lifeline.BEAT_S = 0.1
lifeline.LAST_WORDS_S = 0.5

PATIENCE_S, SILENCE_S = 60.0, 2.0


def enter(rank: int, size: int) -> Lifeline:
    members = [Member(n, f"node{n}", 100 + n, f"logs/rank-{n}.log" if n else "") for n in range(size)]
    if rank == 0:
        listener = Listener("127.0.0.1")
        print(*listener.address, listener.secret.hex(), flush=True)
        return listener.accept(members, PATIENCE_S, SILENCE_S)
    host, port, secret = sys.stdin.readline().split()
    return connect(rank, members[0], (host, int(port)), bytes.fromhex(secret), PATIENCE_S, SILENCE_S)


def follow(line: Lifeline) -> None:
    """Compute, so to speak, until nobody else is there any more."""
    while line._thread.is_alive():
        line.check()
        time.sleep(0.01)
    line.check()


def stay(line: Lifeline) -> None:
    """Compute until there is no more input."""
    is_over = threading.Event()
    threading.Thread(target=lambda: sys.stdin.read() or is_over.set(), daemon=True).start()
    print("here", flush=True)
    while not is_over.wait(0.01):
        line.check()


def behave(line: Lifeline, behaviour: str) -> None:
    match behaviour:
        case "follow":
            follow(line)
        case "leave":
            line.close()
        case "stay":
            stay(line)
            line.close()
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang in C":
            threading.Event().wait()
        case "fail":
            raise ModelError("the weights are torn")
        case "crash":
            raise ValueError("no such thing")


def main() -> None:
    rank, size, behaviour = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    line, code, text = enter(rank, size), 0, "over"
    try:
        behave(line, behaviour)
    except Exception as error:  # noqa: BLE001 - every one is reported, as a run does
        line.report(error)
        code, text = (error.exit_code if isinstance(error, HpckvError) else 70), str(error)
    print(text, flush=True)
    if rank and code:
        line.wait_for_root(PATIENCE_S)
    os._exit(code)


if __name__ == "__main__":
    main()
