#!/bin/bash
# What a job would find: GPU against torch, MPI, filesystem, local disk, container runtime; PASS, WARN or FAIL, and what to do.
#
#   sbatch --gpus-per-node=1 slurm/doctor.sh DIR                          DIR is where a store or a run is, or will be
#
# ---- yours: what your site asks for ---------------------------------------------------------------------------------
#SBATCH --account=CHANGE_ME        # the project that pays
#SBATCH --partition=CHANGE_ME      # where the runs will be
#SBATCH --time=00:05:00            # it takes less than a minute
#SBATCH --nodes=1                  # more look at more nodes: each line begins with its node's name
#SBATCH --ntasks-per-node=1        # one looks at a node
#SBATCH --cpus-per-task=2          # for a test of MPI with two ranks
#SBATCH --mem=8G                   # torch is started
#SBATCH --job-name=hpckv-doctor    # what squeue shows
#SBATCH --output=%x-%j.log         # the table
: "${HPCKV_HOME:=$SLURM_SUBMIT_DIR}"          # the checkout: where this folder slurm/ is
: "${HPCKV_CONTINUE:=none}"                   # once
# export HPCKV_SIF=/project/hpckv.sif          # an image, instead of $HPCKV_HOME/.venv
# -------------------------------------------------------------------------------------------------------------------------
# shellcheck source=lib/common.sh
. "$HPCKV_HOME/slurm/lib/common.sh" || exit 66
hpckv_main doctor "$@"
