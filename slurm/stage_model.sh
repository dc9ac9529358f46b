#!/bin/bash
# Copies a model onto the own disk of each of the job's nodes, verified, where it stays for jobs that come there (on sites whose disks are
# not emptied between jobs). Elsewhere `model: {stage: true}` in the run file copies it at the start of each job.
#
#   sbatch --nodes=4 slurm/stage_model.sh MODEL [--to DIR]
#
# ---- yours: what your site asks for ---------------------------------------------------------------------------------
#SBATCH --account=CHANGE_ME        # the project that pays
#SBATCH --partition=CHANGE_ME      # whose nodes are to have it
#SBATCH --time=00:30:00            # what is not whole by then is copied again
#SBATCH --nodes=1                  # so many get a copy
#SBATCH --ntasks-per-node=1        # one copies
#SBATCH --cpus-per-task=2          # to verify what was written
#SBATCH --mem=4G                   # little
#SBATCH --job-name=hpckv-stage     # what squeue shows
#SBATCH --output=%x-%j.log         # the folder on each node
: "${HPCKV_HOME:=$SLURM_SUBMIT_DIR}"          # the checkout: where this folder slurm/ is
: "${HPCKV_CONTINUE:=none}"                   # once
# export HPCKV_SIF=/project/hpckv.sif          # an image, instead of $HPCKV_HOME/.venv
# export HPCKV_LOCAL=/local                    # the nodes' disk, if it is not found
# -------------------------------------------------------------------------------------------------------------------------
# shellcheck source=lib/common.sh
. "$HPCKV_HOME/slurm/lib/common.sh" || exit 66
hpckv_main model stage "$@"
