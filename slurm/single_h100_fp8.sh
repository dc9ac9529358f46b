#!/bin/bash
# One H100, weights in FP8. This version has no FP8 yet and ends with 78, which says so; until then single_a100.sh on an H100.
#
#   sbatch slurm/single_h100_fp8.sh RUN.yaml
#
# ---- yours: what your site asks for ---------------------------------------------------------------------------------
#SBATCH --account=CHANGE_ME        # the project that pays
#SBATCH --partition=CHANGE_ME      # where these GPUs are
#SBATCH --constraint=h100          # what your site calls them: sinfo -o '%f %G'
#SBATCH --time=02:00:00            # requests that are left by then are done by the next start
#SBATCH --nodes=1                  # one process on one node
#SBATCH --ntasks-per-node=1        # one process a GPU
#SBATCH --gpus-per-node=1          # its GPU
#SBATCH --cpus-per-task=8          # stored blocks are read and written beside the GPU
#SBATCH --mem=64G                  # weights on their way to the GPU, and store.host_size
#SBATCH --job-name=hpckv           # what squeue shows
#SBATCH --output=%x-%j.log         # one log for all starts of the job
#SBATCH --open-mode=append         # a start after a requeue does not overwrite it
#SBATCH --signal=B:USR1@120        # so many seconds before the end: finish the step, keep everything, stop
#SBATCH --requeue                  # may be requeued, by Slurm after a node's failure or by itself
: "${HPCKV_HOME:=$SLURM_SUBMIT_DIR}"          # the checkout: where this folder slurm/ is
: "${HPCKV_CONTINUE:=requeue}"                # when time is up: requeue, chain (where sites forbid requeue), or none
# export HPCKV_SIF=/project/hpckv.sif          # an image, instead of $HPCKV_HOME/.venv
# export HPCKV_RUN_DIR=/scratch/me/run         # instead of the run file's `output:`
# -------------------------------------------------------------------------------------------------------------------------
# shellcheck source=lib/common.sh
. "$HPCKV_HOME/slurm/lib/common.sh" || exit 66
hpckv_main run "$@" --set "model.quantization=${HPCKV_QUANTIZATION:-fp8}"
