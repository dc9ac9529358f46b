"""The environment that sbatch is started with: a job that is submitted from inside another must not inherit that one's shape."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping

_OF_A_JOB = ("SLURM", "SBATCH", "SRUN", "SUBMITIT", "PMI", "PMIX", "OMPI", "HYDRA", "MPI_LOCAL")
_OF_RANKS = frozenset(
    {
        "MASTER_ADDR",
        "MASTER_PORT",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "HPCKV_OUTCOME",
        "HPCKV_COMMENT",
        "HPCKV_BEGINNING",
    }
)
_KEPT = frozenset({"SLURM_CONF"})
_SBATCH_NAMES = {"time": "TIMELIMIT", "array": "ARRAY_INX", "mem": "MEM_PER_NODE", "no-requeue": "REQUEUE"}
"""Options whose variable is not called as they are."""


def scrubbed(environ: Mapping[str, str], options: Iterable[str] = ()) -> dict[str, str]:
    """What sbatch may see. `options` are those that its script names: a variable would have more weight than the script.

    Inside a job everything goes that Slurm or MPI set for it; where Slurm is (`SLURM_CONF`) stays.
    """
    if "SLURM_JOB_ID" in environ or "SLURM_JOBID" in environ:
        return {
            name: value
            for name, value in environ.items()
            if name in _KEPT or (not name.startswith(_OF_A_JOB) and name not in _OF_RANKS)
        }
    names = {_SBATCH_NAMES.get(option, option.upper().replace("-", "_")) for option in options}
    over = {f"SBATCH_{name}" for name in names | {f"NO_{name}" for name in names}}
    return {name: value for name, value in environ.items() if name not in over}


@contextlib.contextmanager
def environment(environ: Mapping[str, str]) -> Iterator[None]:
    """This process's, replaced for a while: submitit starts sbatch with what it finds."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
