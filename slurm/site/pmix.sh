# Sites whose srun offers PMIx and no pmi2 (`srun --mpi=list`), for an image or environment whose MPI speaks PMIx too (OpenMPI). MPICH, which
# hpckv's own images bring, speaks pmi2: with it nothing need be set, ranks then meet by Slurm's variables.
#
#   . slurm/site/pmix.sh && sbatch --nodes=2 --ntasks-per-node=4 slurm/multinode_tp_pp.sh RUN.yaml
#
if [ -z "${hpckv_in_job:-}" ]; then
    HPCKV_SITE_SH=$(realpath -- "${BASH_SOURCE[0]}") && export HPCKV_SITE_SH
else
    export HPCKV_MPI=${HPCKV_MPI:-pmix}
    # Where Slurm's PMIx uses munge and the image's does not, or the other way round, ranks are refused.
    export PMIX_MCA_psec=${PMIX_MCA_psec:-native}
    # Errors about a data store (gds) in shared memory, from PMIx of different versions: this one works between them.
    # export PMIX_MCA_gds=hash
    # Containers in user namespaces may not read each other's memory; where UCX says so: shared memory of System V, and InfiniBand.
    # export UCX_TLS=sysv,ib
fi
