# Sites that forbid requeue: each job submits the next one, after itself (`--dependency=afterany`), until all is answered.
#
#   . slurm/site/no-requeue.sh && sbatch --account=proj --partition=gpu slurm/single_a100.sh RUN.yaml
#
# Flags of sbatch's command line hold for the first job only; the next is submitted as the script stands and with the SBATCH_ variables that
# the site's file sets. So put account and partition into either: site/example.sh has a place for them.
if [ -z "${hpckv_in_job:-}" ]; then
    HPCKV_SITE_SH=$(realpath -- "${BASH_SOURCE[0]}") && export HPCKV_SITE_SH
    unset SBATCH_REQUEUE
    export SBATCH_NO_REQUEUE=1
    export HPCKV_CONTINUE=${HPCKV_CONTINUE:-chain}
fi
