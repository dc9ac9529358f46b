#!/bin/bash

# Parameters
#SBATCH --job-name=hpckv
#SBATCH --mem=64G
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

# setup
cd -- '/FOLDER/it'"'"'s "odd", 100%
$HOME `x` ' || exit 66
hpckv_folder='/FOLDER/it'"'"'s "odd", 100%
$HOME `x` /run %x/submit/TIME-RANDOM'
hpckv_sbatch=('--output=/FOLDER/it'"'"'s "odd", 100%%
$HOME `x` /run %%x/logs/%x-%j.log')
hpckv_paths=('/FOLDER/it'"'"'s "odd", 100%
$HOME `x` ' '/FOLDER/it'"'"'s "odd", 100%
$HOME `x` /model')
export -n HPCKV_RUN_DIR='/FOLDER/it'"'"'s "odd", 100%
$HOME `x` /run %x'
export -n HPCKV_SIF='/FOLDER/it'"'"'s "odd", 100%
$HOME `x` /image.sif'
export -n HPCKV_RUNTIME=auto
export -n HPCKV_BIND=
export -n HPCKV_MPI=
export -n HPCKV_CONTINUE=requeue
export -n HPCKV_ATTEMPTS=20
export -n HPCKV_MAX_ELAPSED=
export -n HPCKV_MAX_POINTS=
export -n HPCKV_POINTS_PER_NODE_HOUR=
. '/FOLDER/it'"'"'s "odd", 100%
$HOME `x` /run %x/submit/TIME-RANDOM/lib/common.sh' || exit 66

# command
export SUBMITIT_EXECUTOR=slurm
hpckv_worker python3 -u -m submitit.core._submit '/FOLDER/it'"'"'s "odd", 100%
$HOME `x` /run %x/submit/TIME-RANDOM'

