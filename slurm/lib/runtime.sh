#!/bin/bash
# Enters a container with the environment of this task and what a run needs of this node: the one place that knows Apptainer, Singularity and
# Charliecloud. Every task runs it, because devices, sockets and disks are the node's own.
#
#   bash runtime.sh --image IMAGE [--runtime NAME] [--bind LIST] [--path PATH]... -- COMMAND...
#   bash runtime.sh --image IMAGE [--runtime NAME] --check        whether image and program are there: 0, 66 or 69
#
# LIST is SOURCE[:TARGET[:OPTIONS]] with commas between; PATH is seen inside where it is outside, whatever signs are in its name.
# Nothing is hidden (no --contain, --containall, --cleanenv): MPI needs /dev/shm and sockets, and settings are in the environment.
set -uo pipefail

now=${EPOCHREALTIME:-$(date +%s.%N)} # bash 5 has it
[ -z "${HPCKV_TIMES:-}" ] || export HPCKV_TIMES="$HPCKV_TIMES task=${now/,/.}"

image='' runtime=auto binds='' check='' paths=()
while [ "$#" -gt 0 ]; do
    case $1 in
    --image) image=$2 && shift 2 ;;
    --runtime) runtime=$2 && shift 2 ;;
    --bind) binds=$2 && shift 2 ;;
    --path) paths+=("$2") && shift 2 ;;
    --check) check=1 && shift ;;
    --) shift && break ;;
    *) printf 'hpckv: runtime.sh: %s is not known\n' "$1" >&2 && exit 64 ;;
    esac
done

say() { printf 'hpckv: %s\n' "$*" >&2; }

find_runtime() {
    local name names
    case $runtime in
    auto) names=(apptainer singularity ch-run) ;;
    charliecloud) names=(ch-run) ;;
    apptainer | singularity) names=("$runtime") ;;
    *)
        say "HPCKV_RUNTIME=$runtime is none of apptainer, singularity, charliecloud"
        exit 64
        ;;
    esac
    for name in "${names[@]}"; do
        if program=$(command -v "$name"); then
            return
        fi
    done
    say "an image is to be used, and ${names[*]} is not here (module load ${names[0]}?)"
    exit 69
}

# A folder, or if it is still to be made the one that it will be made in.
add_what_is_there() {
    local path=$1
    [[ $path == /* ]] || path=$PWD/$path
    while [ -n "$path" ] && [ ! -e "$path" ]; do path=${path%/*}; done
    [ -z "$path" ] || paths+=("$path")
}

# What MPI, Slurm and the node's own disk need to be seen inside, as far as it is there.
add_node_paths() {
    local path
    case ${HPCKV_SITE:-} in
    */*) add_what_is_there "${HPCKV_SITE%/*}" ;; # without one it lies in the folder of the command
    esac
    [ -z "${HPCKV_STORE:-}" ] || add_what_is_there "$HPCKV_STORE"
    for path in "${HPCKV_LOCAL:-}" "${SLURM_TMPDIR:-}" "${TMPDIR:-}" "${HPCKV_OUTCOME:-}" "${HPCKV_COMMENT:-}" "${HPCKV_BEGINNING:-}" "/local/${USER:-}/${SLURM_JOB_ID:-}" \
        "${PMIX_SERVER_TMPDIR:-}" "${PMIX_SYSTEM_TMPDIR:-}" /var/spool/slurmd /var/spool/slurm /dev/infiniband /dev/shm "$PWD"; do
        if [ -n "$path" ] && [ -e "$path" ] && [ -r "$path" ]; then
            paths+=("$path")
        fi
    done
    # A job's folder that this node does not have would stop every program that wants a temporary file.
    [ -d "${TMPDIR:-/tmp}" ] || unset TMPDIR
}

# Not twice, and not what lies in another; system folders are the image's own.
thin_out_paths() {
    local all=("$@") kept=() path other
    for path in "${all[@]}"; do
        [ -e "$path" ] || continue
        [[ $path == /* ]] || path=$PWD/$path
        case $path in
        / | /usr | /usr/* | /bin | /lib | /lib64 | /etc | /proc | /sys | /dev) continue ;;
        esac
        for other in ${kept[@]+"${kept[@]}"}; do
            case $path/ in "$other"/*) continue 2 ;; esac
        done
        kept+=("$path")
    done
    paths=(${kept[@]+"${kept[@]}"})
}

# Apptainer reads --mount as one line of CSV, in which any sign may stand between quotes; --bind it cuts at commas and colons.
mount_option() {
    local quoted=${1//\"/\"\"}
    case $1 in
    *[,:\"$'\n']*) options+=(--mount "type=bind,\"source=$quoted\",\"destination=$quoted\"") ;;
    *) options+=(--bind "$1") ;;
    esac
}

[ -e "$image" ] || {
    say "$image: no such image"
    exit 66
}
find_runtime
[ -z "$check" ] || exit 0
add_node_paths
thin_out_paths ${paths[@]+"${paths[@]}"}

options=()
case ${program##*/} in
ch-run)
    for path in ${paths[@]+"${paths[@]}"}; do
        case $path in
        /tmp | /tmp/* | /dev/* | /var/spool/*) ;; # there already, or no place for it in the image
        *:*)
            say "$path: Charliecloud cannot bind a folder with a colon in its name"
            exit 64
            ;;
        *) options+=(--bind "$path:$path") ;;
        esac
    done
    IFS=, read -ra more <<<"$binds"
    for path in ${more[@]+"${more[@]}"}; do
        options+=(--bind "$(cut -d: -f1-2 <<<"$path")") # it knows no options of a bind
    done
    exec "$program" "${options[@]}" --cd "$PWD" "$image" -- "$@"
    ;;
*)
    for path in ${paths[@]+"${paths[@]}"}; do mount_option "$path"; done
    [ -z "$binds" ] || options+=(--bind "$binds")
    [ ! -e /dev/nvidiactl ] || options+=(--nv)
    exec "$program" -q exec "${options[@]}" --pwd "$PWD" "$image" "$@"
    ;;
esac
