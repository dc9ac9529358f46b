#!/bin/bash
# Load a stored prefix, or compute it? Measured for a run's model, store and GPU: a table by length, and lines for the site file.
#
#   sbatch slurm/bench_load_or_recompute.sh RUN.yaml                      on the kind of node that the runs will have
#   sbatch slurm/bench_load_or_recompute.sh RUN.yaml --lengths 1024,8192  flags of hpckv bench load
#
# ---- yours: what your site asks for ---------------------------------------------------------------------------------
#SBATCH --account=CHANGE_ME        # the project that pays
#SBATCH --partition=CHANGE_ME      # where the runs will be
#SBATCH --time=00:15:00            # a few minutes, most of them for reading the weights
#SBATCH --nodes=1                  # as many as a replica of the run has
#SBATCH --ntasks-per-node=1        # one process a GPU
#SBATCH --gpus-per-node=1          # its GPU
#SBATCH --cpus-per-task=8          # blocks are read and verified beside the GPU, as in a run
#SBATCH --mem=64G                  # weights on their way to the GPU, and store.host_size
#SBATCH --job-name=hpckv-bench     # what squeue shows
#SBATCH --output=%x-%j.log         # the table
: "${HPCKV_HOME:=$SLURM_SUBMIT_DIR}"          # the checkout: where this folder slurm/ is
: "${HPCKV_CONTINUE:=none}"                   # once
# export HPCKV_SIF=/project/hpckv.sif          # an image, instead of $HPCKV_HOME/.venv
# -------------------------------------------------------------------------------------------------------------------------
# shellcheck source=lib/common.sh
. "$HPCKV_HOME/slurm/lib/common.sh" || exit 66
hpckv_main bench load "$@"
