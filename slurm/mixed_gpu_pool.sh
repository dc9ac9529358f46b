#!/bin/bash
# One run on every kind of GPU there is: an array on each, all of which take parts of it from one queue. A V100 is given nothing that
# needs more memory than it has.
#
#   bash slurm/mixed_gpu_pool.sh RUN.yaml                                 on the login node, or in a job
#
# ---- yours: what your site has ------------------------------------------------------------------------------------------
account=${HPCKV_ACCOUNT:-CHANGE_ME}         # the project that pays
here=$(cd "$(dirname "$0")" && pwd)
: "${HPCKV_HOME:=${here%/slurm}}"           # the checkout: where this folder slurm/ is
# Constraint, partition, jobs, image. V100s need an image of their own: newer CUDA has no code for them. "-" is no image, but .venv.
pools=(
    "v100 ${HPCKV_V100:-CHANGE_ME 0-7 /project/hpckv-cu126-v100.sif}"
    "a100 ${HPCKV_A100:-CHANGE_ME 0-3 /project/hpckv-cu13-a100-h100.sif}"
    "h100 ${HPCKV_H100:-CHANGE_ME 0-1 /project/hpckv-cu13-a100-h100.sif}"
)
# -------------------------------------------------------------------------------------------------------------------------
set -u
[ "$#" -ge 1 ] || {
    echo "hpckv: usage: $0 RUN.yaml [flags of hpckv run]" >&2
    exit 64
}
export HPCKV_HOME
# Called from inside a job: its variables would pin these to its resources.
for name in $(compgen -e | grep -E '^(SLURM|SBATCH_|SRUN_|PMI|PMIX|OMPI)' | grep -vx SLURM_CONF); do unset "$name"; done
if [ -n "${HPCKV_SITE_SH:-}" ]; then
    [ -r "$HPCKV_SITE_SH" ] || {
        echo "hpckv: HPCKV_SITE_SH=$HPCKV_SITE_SH: no such file" >&2
        exit 66
    }
    set +u # as in lib/common.sh: it is written for login shells
    # shellcheck source=site/example.sh
    . "$HPCKV_SITE_SH"
    set -u
fi
# With HPCKV_RUN_DIR the arrays share what HPCKV_MAX_POINTS and HPCKV_MAX_ELAPSED allow.
HPCKV_POOL=pool-$(date +%Y%m%dT%H%M%S)-$$ && export HPCKV_POOL
code=0
for pool in "${pools[@]}"; do
    read -r constraint partition jobs image <<<"$pool"
    unset HPCKV_SIF
    [ "$image" = - ] || export HPCKV_SIF=$image
    # shellcheck disable=SC2086 # HPCKV_SBATCH is a list of options
    sbatch --account="$account" --partition="$partition" --constraint="$constraint" --array="$jobs" --job-name="hpckv-$constraint" \
        ${HPCKV_SBATCH:-} "$HPCKV_HOME/slurm/array_replicas.sh" "$@" || code=$?
done
exit "$code"
