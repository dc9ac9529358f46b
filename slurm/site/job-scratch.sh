# Sites where a job has a folder on the node's own disk, under a name of the site's. Slurm has no variable for it: some sites set SLURM_TMPDIR,
# which hpckv looks at by itself, others TMPDIR, others make /scratch/JOB or /local/USER/JOB.
#
#   . slurm/site/job-scratch.sh && sbatch slurm/single_a100.sh RUN.yaml
#
if [ -z "${hpckv_in_job:-}" ]; then
    HPCKV_SITE_SH=$(realpath -- "${BASH_SOURCE[0]}") && export HPCKV_SITE_SH
else
    export HPCKV_LOCAL=${HPCKV_LOCAL:-/scratch/$SLURM_JOB_ID} # your site's name for it; the same on every node of the job
    export TMPDIR=$HPCKV_LOCAL                                # caches and temporary files too
fi
