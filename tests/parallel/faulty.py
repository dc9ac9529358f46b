"""`hpckv` with something happening to one rank at one moment: FAULT="rank phase action"."""

import os
import signal
import sys

RANK, PHASE, ACTION = os.environ.get("FAULT", "-1 none none").split()


def strike() -> None:
    """What happens, once."""
    if ACTION == "raise":
        raise RuntimeError("struck")
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "drain": signal.SIGUSR1}[ACTION])


def arm() -> None:
    """Lay it where it belongs."""
    from hpckv.engine.rank import Rank
    from hpckv.engine.runner import Runner
    from hpckv.store import segment_writer

    load, close, forward, publish = Rank.load, Rank.close, Runner.forward, segment_writer.publish
    seen = {"prefill": 0, "decode": 0, "is_mine": False}

    def loading(self, *given):
        seen["is_mine"] = self.world.everyone.rank == int(RANK)
        if PHASE == "start" and seen["is_mine"]:
            strike()
        return load(self, *given)

    def closing(self):
        if PHASE == "end" and seen["is_mine"]:
            strike()
        return close(self)

    def computing(self, chunks, x=None):
        kind = "prefill" if any(chunk.num_tokens > 1 for chunk in chunks) else "decode"
        seen[kind] += 1
        if seen["is_mine"] and kind == PHASE and seen[kind] == 2:
            strike()
        return forward(self, chunks, x)

    def publishing(*given, **more):
        if PHASE == "write" and seen["is_mine"]:
            strike()
        return publish(*given, **more)

    Rank.load, Rank.close, Runner.forward, segment_writer.publish = loading, closing, computing, publishing


if __name__ == "__main__":
    from hpckv.workload.drain import block_signals

    block_signals()
    if PHASE != "none":
        arm()
    from hpckv.cli.main import main

    sys.argv[0] = "hpckv"
    main()
