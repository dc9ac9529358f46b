#!/bin/bash

# Parameters
#SBATCH --account=proj
#SBATCH --array=0-3%2
#SBATCH --constraint='[v100|a100]'
#SBATCH --cpus-per-task=8
#SBATCH --dependency=afterok:7
#SBATCH --error=logs/%j.err
#SBATCH --gpus-per-node=a100:4
#SBATCH --gres=gpu:a100:4
#SBATCH --job-name='it'"'"'s mine'
#SBATCH --mem=0
#SBATCH --no-requeue
#SBATCH --nodes=2
#SBATCH --ntasks=8
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output='logs/%x %j.log'
#SBATCH --partition=gpu
#SBATCH --qos=high
#SBATCH --reservation=res
#SBATCH --signal=B:USR1@120
#SBATCH --time=1-12
#SBATCH --tmp=200G

# setup
#SBATCH --mail-type=END --exclusive --comment 'it'"'"'s a "test"'
cd -- '/FOLDER/a b' || exit 66
hpckv_folder='/FOLDER/a b/run %x/submit/TIME-RANDOM'
hpckv_srun=(--label)
hpckv_paths=('/FOLDER/a b' '/FOLDER/a b/model')
export -n HPCKV_RUN_DIR='/FOLDER/a b/run %x'
export -n HPCKV_SIF='/FOLDER/a b/image.sif'
export -n HPCKV_RUNTIME=singularity
export -n HPCKV_BIND=/data:/data:ro,/opt
export -n HPCKV_MPI=pmix
export -n HPCKV_CONTINUE=chain
export -n HPCKV_ATTEMPTS=7
export -n HPCKV_MAX_ELAPSED=2-00:00:00
export -n HPCKV_MAX_POINTS=100.000000
export -n HPCKV_POINTS_PER_NODE_HOUR=2.293400
module load apptainer
. '/FOLDER/a b/run %x/submit/TIME-RANDOM/lib/common.sh' || exit 66

# command
export SUBMITIT_EXECUTOR=slurm
hpckv_worker python3 -u -m submitit.core._submit '/FOLDER/a b/run %x/submit/TIME-RANDOM'

