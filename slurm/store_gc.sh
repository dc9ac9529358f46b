#!/bin/bash
# Brings a store back under its quota: your blocks that have expired or are worth least go, small segments become large ones.
#
#   sbatch slurm/store_gc.sh DIR                                          once
#   sbatch --begin=now+7days slurm/store_gc.sh DIR                        in a week
#   scrontab: @weekly sbatch .../slurm/store_gc.sh DIR                    where the site has scrontab
#
# ---- yours: what your site asks for ---------------------------------------------------------------------------------
#SBATCH --account=CHANGE_ME        # the project that pays
#SBATCH --partition=CHANGE_ME      # one without GPUs
#SBATCH --time=01:00:00            # what it has not done by then it does the next time
#SBATCH --nodes=1                  # one process on one node
#SBATCH --ntasks-per-node=1        # one
#SBATCH --cpus-per-task=2          # it waits for the filesystem
#SBATCH --mem=4G                   # little
#SBATCH --job-name=hpckv           # what squeue shows
#SBATCH --output=%x-%j.log         # its log
: "${HPCKV_HOME:=$SLURM_SUBMIT_DIR}"          # the checkout: where this folder slurm/ is
: "${HPCKV_CONTINUE:=none}"                   # what is left is left for the next time
# export HPCKV_SIF=/project/hpckv.sif          # an image, instead of $HPCKV_HOME/.venv
# -------------------------------------------------------------------------------------------------------------------------
# shellcheck source=lib/common.sh
. "$HPCKV_HOME/slurm/lib/common.sh" || exit 66
(hpckv_main store gc "$@") && hpckv_main store compact "$@"
