"""The conformance suite on real groups: run by every rank under `mpiexec`, or by one process that forks three ranks over gloo.

    mpi WRONG_RANK
    gloo WRONG_RANK STORE_FILE      prints the ranks' exit codes

On rank `WRONG_RANK`, if it is one, the group gives wrong sums.
"""

import multiprocessing
import sys

from hpckv.comm import Group
from hpckv.comm.group import Done
from hpckv.testing.group_suite import check_group

SIZE = 3


def check(group: Group, wrong_rank: int) -> None:
    if group.rank == wrong_rank:
        group.reduce_sum = lambda values: Done()
    check_group(group)
    print(f"rank {group.rank} of {group.size} conforms", flush=True)


def over_mpi(wrong_rank: int) -> None:
    from hpckv.comm.mpi_group import MpiGroup, start_mpi

    mpi = start_mpi()
    check(MpiGroup.world(mpi), wrong_rank)
    mpi.Finalize()


def over_gloo(rank: int, wrong_rank: int, path: str) -> None:
    from hpckv.comm.torch_group import TorchGroup, distributed

    check(TorchGroup(distributed().FileStore(path, SIZE), rank, SIZE, 60.0), wrong_rank)


def main() -> None:
    kind, wrong_rank = sys.argv[1], int(sys.argv[2])
    if kind == "mpi":
        over_mpi(wrong_rank)
        return
    import torch.distributed  # once for all ranks: it takes longer than all the rest

    assert torch.distributed.is_gloo_available()
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=over_gloo, args=(rank, wrong_rank, sys.argv[3])) for rank in range(SIZE)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    print("exit codes", *(process.exitcode for process in ranks))


if __name__ == "__main__":
    main()
