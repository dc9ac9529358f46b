# What the batch scripts of this folder and those of `hpckv submit` have in common: one step on every task of the job, signals handed
# on, and going on afterwards. Sourced by bash on the first node of the job; needs Slurm's commands only.
#
# hpckv_main run RUN.yaml [flags]     the scripts of this folder: `hpckv run RUN.yaml` on every task
# hpckv_worker COMMAND...             scripts of `hpckv submit`: COMMAND on every task
# hpckv_here COMMAND...               the same without Slurm: COMMAND on this machine, once
#
# Set before, in the script's own block or in the environment (sbatch --export=ALL,HPCKV_SIF=...):
#   HPCKV_HOME      the checkout; found by itself if the job was submitted from there
#   HPCKV_SIF       image to run in; without one $HPCKV_HOME/.venv or the hpckv in PATH runs on the host
#   HPCKV_RUNTIME   apptainer, singularity or charliecloud; found by itself
#   HPCKV_BIND      further folders for the image, SOURCE[:TARGET[:OPTIONS]], with commas between
#   HPCKV_MPI       srun --mpi=...; pmi2 where srun offers it, else ranks find each other without MPI
#   HPCKV_RUN_DIR   the run directory; what has to be remembered between starts of a run is remembered there
#   HPCKV_CONTINUE  and HPCKV_ATTEMPTS, HPCKV_MAX_...: what to do when the time is up, see continue.sh
#   HPCKV_SITE_SH   shell code of the site, set by itself when it is sourced before sbatch: see ../site/example.sh
#
# Scripts of `hpckv submit` also set, for themselves only: hpckv_folder, theirs in the run directory; hpckv_sbatch, options of sbatch that
# a header cannot hold; hpckv_srun, options of srun; hpckv_paths, what the image must see.

set -uo pipefail
hpckv_lib=${BASH_SOURCE[0]%/*}
hpckv_sbatch+=() hpckv_srun+=() hpckv_paths+=()
# Sourced without arguments, so these are the script's: what a chain submits again.
hpckv_submit=(${hpckv_sbatch[@]+"${hpckv_sbatch[@]}"} "$0" "$@")
hpckv_step=''     # the process that works
hpckv_drain=''    # it is to stop because the time is up
hpckv_ended=''    # it is to stop because somebody says so
hpckv_signal=''   # what is to be handed on to it when it is there
hpckv_said=''     # what it says of itself when it is over
hpckv_verb=run    # of `hpckv`, that it is
hpckv_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-0}} # one task has the whole array's number as its own
hpckv_job=${hpckv_job:-${SLURM_JOB_ID:-}}

# hpckv_note_time NAME: when a part of the start began, for summary.json.
hpckv_note_time() {
    local now=${EPOCHREALTIME:-$(date +%s.%N)} # bash 5 has it, with the comma of some languages
    export HPCKV_TIMES="${HPCKV_TIMES:-} $1=${now/,/.}"
}
HPCKV_TIMES=''
hpckv_note_time script

hpckv_say() { printf 'hpckv: %s\n' "$*" >&2; }

hpckv_hand_on() {
    if [ -n "$hpckv_step" ]; then
        kill -"$1" "$hpckv_step"
    else
        hpckv_signal=$1
    fi
}
# From the first moment: without a trap the signal would end the script.
trap 'hpckv_drain=1; hpckv_hand_on USR1' USR1
trap 'hpckv_drain=1; hpckv_hand_on USR2' USR2
# scancel, or Slurm for a job of more worth: whether this job starts again is not for itself to say.
trap 'hpckv_ended=1; hpckv_hand_on TERM' TERM INT

# shellcheck source=lib/continue.sh
. "$hpckv_lib/continue.sh" || exit 66

# What this site does differently. Its code is for where sbatch is called and for jobs, and tells them apart by hpckv_in_job.
hpckv_load_site() {
    [ -n "${HPCKV_SITE_SH:-}" ] || return 0
    if ! [ -r "$HPCKV_SITE_SH" ]; then
        hpckv_say "HPCKV_SITE_SH=$HPCKV_SITE_SH: no such file on $(hostname)"
        return 66
    fi
    # What its last command was is not asked: a site's code that wants to end the job says exit. And it is written for login shells, where a
    # variable may be unset.
    set +u
    # shellcheck source=site/example.sh
    . "$HPCKV_SITE_SH" >&2 || true
    set -u
}
# shellcheck disable=SC2034 # for the site's code
hpckv_in_job=1
hpckv_load_site || exit

# The command line before `run`, into the array hpckv_command.
hpckv_find_command() {
    if [ -n "${HPCKV_SIF:-}" ]; then
        hpckv_command=(hpckv)
    elif [ -x "$HPCKV_HOME/.venv/bin/hpckv" ]; then
        hpckv_command=("$HPCKV_HOME/.venv/bin/hpckv")
    elif command -v hpckv >/dev/null; then
        hpckv_command=(hpckv)
    else
        hpckv_say "no hpckv: set HPCKV_SIF to an image, or run make in $HPCKV_HOME"
        return 69
    fi
}

# In front of what runs in the image, into the array hpckv_enter: each task puts its own container together, for its own node.
hpckv_find_container() {
    hpckv_enter=()
    [ -n "${HPCKV_SIF:-}" ] || return 0
    local outside=() path
    for path in ${hpckv_paths[@]+"${hpckv_paths[@]}"}; do outside+=(--path "$path"); done
    [ -z "${HPCKV_RUN_DIR:-}" ] || outside+=(--path "$HPCKV_RUN_DIR")
    hpckv_enter=(bash "$hpckv_lib/runtime.sh" --image "$HPCKV_SIF" --runtime "${HPCKV_RUNTIME:-auto}" --bind "${HPCKV_BIND:-}"
        ${outside[@]+"${outside[@]}"} --)
    "${hpckv_enter[@]:0:${#hpckv_enter[@]}-1}" --check
}

hpckv_mpi() {
    if [ -n "${HPCKV_MPI:-}" ]; then
        printf '%s\n' "$HPCKV_MPI"
    elif srun --mpi=list 2>&1 | grep -qw pmi2; then
        echo pmi2
    else
        echo none
    fi
}

# Caches that libraries would put into $HOME, on this node and gone with the job: shared ones corrupt each other. Under a name that nobody
# can guess: what is compiled there is run.
hpckv_redirect_caches() {
    local place
    # ~/.local would hide the image's packages, and a file named like a module in the folder the job was submitted from the module.
    export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONNOUSERSITE=1 PYTHONSAFEPATH=1
    hpckv_cache=''
    for place in "${SLURM_TMPDIR:-}" "${TMPDIR:-}" /tmp; do
        [ -n "$place" ] || continue
        hpckv_cache=$(mktemp -d "$place/hpckv-cache-XXXXXXXX") && break
        hpckv_say "no caches in $place; the next place is tried"
    done
    [ -n "$hpckv_cache" ] || return 0
    export TRITON_CACHE_DIR=$hpckv_cache/triton TORCHINDUCTOR_CACHE_DIR=$hpckv_cache/inductor CUDA_CACHE_PATH=$hpckv_cache/cuda
    export TORCH_EXTENSIONS_DIR=$hpckv_cache/extensions NUMBA_CACHE_DIR=$hpckv_cache/numba MPLCONFIGDIR=$hpckv_cache/matplotlib
    export APPTAINER_CACHEDIR=$hpckv_cache/images SINGULARITY_CACHEDIR=$hpckv_cache/images
}

hpckv_remove_caches() {
    [ -z "${hpckv_cache:-}" ] || rm -rf -- "$hpckv_cache"
}

# Runs a command, hands on signals, and returns its exit code.
hpckv_run_step() {
    local code said
    if [ -n "$hpckv_drain$hpckv_ended" ]; then
        return 75 # told to stop before it began
    fi
    # Empty at first, but they need inodes.
    HPCKV_OUTCOME=$(mktemp 2>/dev/null || mktemp -p /tmp) && export HPCKV_OUTCOME
    HPCKV_COMMENT=$(mktemp 2>/dev/null || mktemp -p /tmp) && export HPCKV_COMMENT
    # In the background: bash runs traps only while it waits, and srun hands signals on to every task.
    "$@" &
    hpckv_step=$!
    [ -z "$hpckv_signal" ] || kill -"$hpckv_signal" "$hpckv_step" # it came while the step was begun
    while kill -0 "$hpckv_step" 2>/dev/null; do # a trap interrupts `wait`, which then has the signal's code
        wait "$hpckv_step"
    done
    wait "$hpckv_step"
    code=$?
    hpckv_step=''
    # A rank that loses another one ends them all, and srun then has the code of one that was killed.
    said=$(cat "$HPCKV_OUTCOME" 2>/dev/null)
    # What the run says of itself, in one line; hpckv_note_end tells Slurm.
    hpckv_said=$(head -n 1 "$HPCKV_COMMENT" 2>/dev/null | head -c 200 | tr -cd '[:print:]')
    rm -f "$HPCKV_OUTCOME" "$HPCKV_COMMENT"
    if [ "$code" -gt 128 ] && [ -n "$said" ]; then
        code=$said
    fi
    case $code:$hpckv_drain:$hpckv_ended in
    138:1:* | 140:1:* | 143:*:1) code=75 ;; # the signal came before Python listened
    esac
    return "$code"
}

hpckv_main() {
    hpckv_verb=$1
    hpckv_find_command || hpckv_exit
    hpckv_worker "${hpckv_command[@]}" "$@"
}

hpckv_worker() {
    local options code
    hpckv_check_settings || hpckv_exit
    hpckv_find_container || hpckv_exit
    hpckv_begin || hpckv_exit
    hpckv_redirect_caches
    options=(--mpi="$(hpckv_mpi)" --export=ALL) # a job that was submitted with --export=NONE would pass that on
    options+=(--job-name="hpckv-$hpckv_verb")   # by this name `hpckv acct --reconcile` knows the job in sacct
    # Slurm 22.05 and later do not tell a step by themselves.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    hpckv_start_budget
    hpckv_note_time step
    hpckv_run_step srun "${options[@]}" ${hpckv_srun[@]+"${hpckv_srun[@]}"} ${hpckv_enter[@]+"${hpckv_enter[@]}"} "$@"
    code=$?
    hpckv_stop_budget
    hpckv_learn_beginning
    hpckv_remove_caches
    if [ "$code" -eq 75 ] && [ -z "$hpckv_ended" ]; then
        hpckv_continue
    elif [ -n "$hpckv_ended" ] && [[ $code != [03] ]]; then
        hpckv_end_outside "$code"
    fi
    hpckv_end "$code"
}

hpckv_here() {
    local code
    hpckv_find_container && {
        hpckv_redirect_caches
        hpckv_run_step ${hpckv_enter[@]+"${hpckv_enter[@]}"} "$@"
    }
    code=$?
    hpckv_remove_caches
    # submitit's local jobs do not keep it.
    [ -z "${hpckv_folder:-}" ] || echo "$code" >"$hpckv_folder/code-${SUBMITIT_LOCAL_GLOBALID:-0}"
    exit "$code"
}

if [ -z "${hpckv_folder:-}" ] && [ "$#" -lt 1 ]; then
    hpckv_say "usage: sbatch SCRIPT RUN.yaml [flags of hpckv run]"
    exit 64
fi
