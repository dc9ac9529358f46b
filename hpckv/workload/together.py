"""All processes of one `hpckv run`: they come together, and end together, whatever happens to one of them."""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hpckv import log
from hpckv.comm import ParallelConfig, World, enter
from hpckv.errors import HpckvError


def together(parallel: ParallelConfig, work: Callable[[World], int], output: Path | None = None) -> int:
    """Do `work` on every rank and return its exit code.

    An error on any rank is said once, where it happened, and ends every rank with its code.
    Ranks other than 0 write their logs into the run directory `output`.
    """

    def log_of(rank: int) -> str:
        return str(rank_log(output, rank)) if output and rank else ""

    world = enter(parallel, log_of=log_of, rendezvous=output)
    rank = world.dims.world_rank
    try:
        if output and world.everyone.size > 1:
            _open_logs(world, output)
        code = work(world)
        world.leave(code)
    except BaseException as error:
        if world.everyone.size == 1:
            raise
        known = world.watch.named(error)
        _say(known, rank)
        world.give_up(known)
    return code


def rank_log(output: Path, rank: int) -> Path:
    """Where a rank other than 0, which writes to the terminal, keeps its log."""
    return output / "logs" / f"rank-{rank}.log"


def _open_logs(world: World, output: Path) -> None:
    """The folder by rank 0, then a file by each of the others.

    Where clients of a network filesystem make a folder at the same time, one may be refused what is in it for a moment.
    """
    rank = world.dims.world_rank
    path = rank_log(output, rank)
    with contextlib.suppress(OSError):
        if rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
    world.watch.wait(world.everyone.reduce_min(np.zeros(1, np.int32)), "rank 0 to make the folder of logs")
    with contextlib.suppress(OSError):
        if rank:
            log.to_file(path)


def _say(error: BaseException, rank: int) -> None:
    logger = logging.getLogger("hpckv")
    if not isinstance(error, HpckvError):
        logger.error("rank %d: %s", rank, "".join(traceback.format_exception(error)))
    line = " ".join(str(error).splitlines()) or type(error).__name__
    if rank == 0:
        sys.stderr.write(f"hpckv: {line}\n")
    else:
        logger.error("%s", line)
