#!/bin/bash

# Parameters
#SBATCH --account=proj
#SBATCH --gpus-per-node=1
#SBATCH --job-name=hpckv
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output='/FOLDER/folder/run %%x/logs/%x-%j.log'
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --time=02:00:00

# setup
cd -- /FOLDER/folder || exit 66
hpckv_folder='/FOLDER/folder/run %x/submit/TIME-RANDOM'
export -n HPCKV_RUN_DIR='/FOLDER/folder/run %x'
export -n HPCKV_SIF=
export -n HPCKV_RUNTIME=auto
export -n HPCKV_BIND=
export -n HPCKV_MPI=
export -n HPCKV_CONTINUE=requeue
export -n HPCKV_ATTEMPTS=20
export -n HPCKV_MAX_ELAPSED=
export -n HPCKV_MAX_POINTS=
export -n HPCKV_POINTS_PER_NODE_HOUR=
. '/FOLDER/folder/run %x/submit/TIME-RANDOM/lib/common.sh' || exit 66

# command
export SUBMITIT_EXECUTOR=slurm
hpckv_worker /PYTHON -u -m submitit.core._submit '/FOLDER/folder/run %x/submit/TIME-RANDOM'

