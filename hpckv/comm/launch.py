"""What the launcher says of this process and its job: by PMI, by Slurm's variables, by torchrun's, or nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpckv.errors import ConfigError

_PART = re.compile(r"[^,\[\]]*(?:\[[^\]]*\][^,\[\]]*)*")


@dataclass(frozen=True)
class Launch:
    """What the launcher's environment says of this process."""

    kind: str
    """`mpi`, `slurm`, `torchrun` or `single`."""
    rank: int = 0
    size: int = 1
    local_rank: int | None = None

    @classmethod
    def read(cls, environ: Mapping[str, str], kind: str = "auto") -> Launch:
        """The first of the ladder that is there, or the one asked for; raises `ConfigError` if that is not."""

        def number(name: str, default: int = 0) -> int:
            return int(environ.get(name, "") or default)

        local = environ.get("SLURM_LOCALID")
        found = {
            "mpi": any(name in environ for name in ("PMI_RANK", "PMI_FD", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")),
            # SLURM_STEP_ID: set by srun, not in the batch script itself.
            "slurm": "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ,
            "torchrun": "MASTER_ADDR" in environ and "RANK" in environ,
            "single": True,
        }
        if kind == "auto":
            kind = next(name for name, is_there in found.items() if is_there)
        elif not found[kind]:
            hints = {"mpi": "mpiexec, or srun --mpi=pmi2", "slurm": "srun", "torchrun": "torchrun"}
            raise ConfigError(f"parallel.coordinator: {kind}: this process was not started by {hints[kind]}")
        if kind == "slurm" or (kind == "mpi" and found["slurm"]):
            size = number("SLURM_STEP_NUM_TASKS", number("SLURM_NTASKS", 1))
            return cls(kind, number("SLURM_PROCID"), size, int(local) if local else None)
        if kind == "torchrun":
            return cls(kind, number("RANK"), number("WORLD_SIZE", 1), number("LOCAL_RANK"))
        return cls(kind)


def check_nodes(hosts: Sequence[str], environ: Mapping[str, str], *, may_be_idle: bool = False) -> None:
    """Raise `ConfigError` if nodes are paid for on which no rank runs; `hosts` are the ranks'."""
    paid = int(environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES") or 1)
    used = Counter(hosts)
    if len(used) >= paid or may_be_idle:
        return
    short = {host.partition(".")[0] for host in used}
    listed = expand_nodelist(environ.get("SLURM_JOB_NODELIST", ""))
    idle = ", ".join(name for name in listed if name.partition(".")[0] not in short)
    where = ", ".join(f"{count} on {host}" for host, count in used.items())
    raise ConfigError(
        f"you pay for {paid} nodes and use {len(used)}: of {len(hosts)} ranks {where}; "
        f"none on {idle or 'the others'} (parallel.allow_idle_nodes=true goes on all the same)"
    )


def expand_nodelist(text: str) -> list[str]:
    """Every node's name, in order; zeros in front of a number are kept."""
    names: list[str] = []
    for part in _PART.findall(text):
        if part:
            names += _expand(part)
    return names


def _expand(part: str) -> list[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        return [part]
    inside, _, tail = rest.partition("]")
    numbers = []
    for piece in inside.split(","):
        first, dash, last = piece.partition("-")
        numbers += [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)] if dash else [first]
    return [f"{head}{number}{end}" for number in numbers for end in _expand(tail)]
