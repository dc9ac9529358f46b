#!/bin/bash
# Rolls closed months of a store's ledger up into one file each, so that `hpckv acct` answers in a second about years. For its owner.
#
#   sbatch slurm/acct_rollup.sh STORE                                     once
#   sbatch --begin=now+30days slurm/acct_rollup.sh STORE                  in a month
#   scrontab: @monthly sbatch .../slurm/acct_rollup.sh STORE              where the site has scrontab
#
# ---- yours: what your site asks for ---------------------------------------------------------------------------------
#SBATCH --account=CHANGE_ME        # the project that pays
#SBATCH --partition=CHANGE_ME      # one without GPUs
#SBATCH --time=00:30:00            # what it has not done by then it does the next time
#SBATCH --nodes=1                  # one process on one node
#SBATCH --ntasks-per-node=1        # one
#SBATCH --cpus-per-task=1          # it waits for the filesystem
#SBATCH --mem=4G                   # a month in memory
#SBATCH --job-name=hpckv           # what squeue shows
#SBATCH --output=%x-%j.log         # its log
: "${HPCKV_HOME:=$SLURM_SUBMIT_DIR}"          # the checkout: where this folder slurm/ is
: "${HPCKV_CONTINUE:=none}"                   # what is left is left for the next time
# export HPCKV_SIF=/project/hpckv.sif          # an image, instead of $HPCKV_HOME/.venv
# -------------------------------------------------------------------------------------------------------------------------
# shellcheck source=lib/common.sh
. "$HPCKV_HOME/slurm/lib/common.sh" || exit 66
hpckv_main acct --rollup --store "$@"
