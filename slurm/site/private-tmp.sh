# Sites where every job has a /tmp of its own (job_container/tmpfs): on the node's own disk, and gone with the job. Blocks that are copied there
# serve this job only; the shared store is where the next one finds them. Without this file hpckv takes /tmp too, but last.
#
#   . slurm/site/private-tmp.sh && sbatch --tmp=200G slurm/single_a100.sh RUN.yaml
#
if [ -z "${hpckv_in_job:-}" ]; then
    HPCKV_SITE_SH=$(realpath -- "${BASH_SOURCE[0]}") && export HPCKV_SITE_SH
elif [ "$(stat -f -c %T /tmp)" = tmpfs ]; then
    hpckv_say "/tmp is in memory here; no blocks are copied to this node" # HPCKV_LOCAL=/tmp would take them from the job's memory
else
    export HPCKV_LOCAL=${HPCKV_LOCAL:-/tmp}
fi
