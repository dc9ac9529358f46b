# What your site asks for, in one file: copy it, keep the lines you need, and source it where you call sbatch, or in ~/.bashrc:
#
#   . ~/our-site.sh && sbatch slurm/single_a100.sh RUN.yaml
#
# The first part is for sbatch: variables weigh more than the #SBATCH lines of a script, and less than flags. The second part is for the
# job: the scripts source this file again there, by the name in HPCKV_SITE_SH, so it has to be where compute nodes see it. A chain sources it
# for the next job too. `hpckv submit` reads the same from sites/example.yaml.
if [ -z "${hpckv_in_job:-}" ]; then
    HPCKV_SITE_SH=$(realpath -- "${BASH_SOURCE[0]}") && export HPCKV_SITE_SH

    # ---- for sbatch ---------------------------------------------------------------------------------------------------
    export SBATCH_ACCOUNT=CHANGE_ME                      # the project that pays
    export SBATCH_PARTITION=CHANGE_ME                    # where the GPUs are
    # export SBATCH_QOS=normal                             # where a job needs one
    # export SBATCH_CONSTRAINT=a100                        # what your site calls the GPU: sinfo -o '%f %G'
    # export SBATCH_GPUS_PER_NODE=a100:1                   # where a GPU has to be named
    # export SBATCH_WCKEY=eval-1                           # where jobs carry one: sreport then adds up by it
    # export SBATCH_NO_REQUEUE=1 HPCKV_CONTINUE=chain      # where requeue is forbidden: no-requeue.sh is that alone

    # ---- for the scripts ------------------------------------------------------------------------------------------------
    # export HPCKV_HOME=/project/hpckv                     # the checkout
    # export HPCKV_SIF=/project/hpckv.sif                  # the image
    # export HPCKV_BIND=/lustre                            # where models and prompts are, if not below $HOME: seen inside the image
    # export HPCKV_MAX_POINTS=100 HPCKV_POINTS_PER_NODE_HOUR=2.3     # an end to what a run may cost; needs HPCKV_RUN_DIR
else
    # ---- on the job's first node -----------------------------------------------------------------------------------------
    # module load apptainer || exit 69                     # no `module purge`: it takes away what sbatch was called with
    # export HPCKV_LOCAL=/scratch/$SLURM_JOB_ID            # the node's own disk, where it is not $SLURM_TMPDIR: job-scratch.sh
    # export HPCKV_MPI=pmix PMIX_MCA_psec=native           # where pmi2 is not there: pmix.sh
    # export NCCL_SOCKET_IFNAME=ib                         # the network between nodes, by the beginning of its name: ip -brief link
    # export NCCL_IB_HCA=mlx5 NCCL_IB_GID_INDEX=3          # its cards; the index for RoCE only
    # ulimit -l unlimited                                  # InfiniBand needs locked memory, where the site does not give it by itself
    :
fi
