#!/usr/bin/env bash
# Builds an image of hpckv as an ordinary user: no root, no sudo, nothing in $HOME.
set -euo pipefail

usage() {
    cat <<'EOF'
containers/build.sh IMAGE [flags]

  IMAGE                cpu, cu126-v100 (V100, A100, H100) or cu13-a100-h100
  -o, --output FILE    where the image goes (hpckv-IMAGE.sif in this folder)
  --force              replace FILE if it is there; jobs that run from the old one keep it
  --base BASE          what it is built on: an image file, a root filesystem's folder, or a registry's image
                       (docker://python:3.11-slim-bookworm); an older hpckv image serves too, and only what changed is installed
  --mpi hybrid|bind    hybrid: an MPI (mpich) is in the image; bind: the host's is bound in when it runs (hybrid)
  --torch-index URL    where torch's build is if pip does not find it by itself; none: nowhere else (PyTorch's own)
  --pip-conf FILE      a pip configuration; else this host's own, with its PIP_* variables and local folders of wheels
  --gzip               for hosts whose kernel cannot read zstd: slower to build and to start

Example, on a login node:
  module load apptainer
  containers/build.sh cu126-v100 -o /project/me/hpckv.sif
EOF
}
fail() {
    printf 'hpckv: %s\n' "$2" >&2
    exit "$1"
}
need() { [ "$#" -ge 2 ] || fail 64 "$1 needs a value (--help)"; }

image='' output='' base='' mpi=hybrid torch_index='' pip_conf='' force='' gzip=''
while [ "$#" -gt 0 ]; do
    case $1 in
    -h | --help)
        usage
        exit 0
        ;;
    -o | --output) need "$@" && output=$2 && shift ;;
    --base) need "$@" && base=$2 && shift ;;
    --mpi) need "$@" && mpi=$2 && shift ;;
    --torch-index) need "$@" && torch_index=$2 && shift ;;
    --pip-conf) need "$@" && pip_conf=$2 && shift ;;
    --force) force=1 ;;
    --gzip) gzip=1 ;;
    -*) fail 64 "unknown flag $1 (--help)" ;;
    *)
        [ -z "$image" ] || fail 64 "one image at a time: $image, or $1"
        image=$1
        ;;
    esac
    shift
done

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -n "$image" ] || fail 64 "which image: cpu, cu126-v100 or cu13-a100-h100? (--help)"
[ -r "$top/containers/hpckv-$image.def" ] || fail 64 "no image $image: cpu, cu126-v100 or cu13-a100-h100 (--help)"
case $mpi in hybrid | bind) ;; *) fail 64 "--mpi $mpi: hybrid or bind" ;; esac
[ -z "$pip_conf" ] || [ -r "$pip_conf" ] || fail 66 "$pip_conf: no such file"
output=$(realpath -m -- "${output:-hpckv-$image.sif}")
[ -w "$(dirname "$output")" ] || fail 73 "$(dirname "$output"): no folder to write to"
[ ! -e "$output" ] || [ -n "$force" ] || fail 73 "$output is there already (--force replaces it)"

runtime=$(command -v apptainer || command -v singularity) ||
    fail 69 "neither apptainer nor singularity is here (module load apptainer?)"
offered=$("$runtime" build --help 2>&1)
[[ $offered == *--build-arg* ]] || fail 69 "$("$runtime" --version) is too old: Apptainer 1.2 or SingularityCE 4.0 is needed"

# The files are read by whoever runs the image.
umask 022
work=$(mktemp -d "${HPCKV_LOCAL:-${TMPDIR:-/tmp}}/hpckv-build-XXXXXX")
trap 'rm -rf -- "$work" "$output.part"' EXIT
chmod 700 "$work" # pip's settings may hold a password
mkdir "$work/context" "$work/pip" "$work/cache" "$work/tmp"
export APPTAINER_CACHEDIR=${APPTAINER_CACHEDIR:-$work/cache} APPTAINER_TMPDIR=${APPTAINER_TMPDIR:-$work/tmp}
export SINGULARITY_CACHEDIR=${SINGULARITY_CACHEDIR:-$work/cache} SINGULARITY_TMPDIR=${SINGULARITY_TMPDIR:-$work/tmp}

# Made in $HOME where it is not there; where it is, it may hold the login to a registry.
[ -e "${HOME:-/nonexistent}/.apptainer" ] || export APPTAINER_CONFIGDIR=${APPTAINER_CONFIGDIR:-$work/config}

# What belongs to the package, and nothing else that lies in the checkout.
tar -C "$top" --exclude=__pycache__ -cf - hpckv slurm containers setup.cfg pyproject.toml README.md LICENSE |
    tar -C "$work/context" -xf -
# A group's checkout often belongs to somebody else, which git refuses to read unless told so.
commit=$(git -c safe.directory="$top" -C "$top" describe --always --abbrev=40 --exclude='*' --dirty 2>/dev/null) || commit=unknown

# shellcheck source-path=SCRIPTDIR/..
# shellcheck source=containers/pip_settings.sh
. "$top/containers/pip_settings.sh"
binds=()
collect_pip_settings "$work/pip" "$pip_conf"

# Forced, or an older hpckv image as the base would keep its labels.
arguments=(--force --build-arg "mpi=$mpi" --build-arg "commit=$commit")
[ -z "$torch_index" ] || arguments+=(--build-arg "torch_index=$torch_index")
case $base in
'') ;;
*://*) arguments+=(--build-arg "bootstrap=${base%%://*}" --build-arg "base=${base#*://}") ;;
*)
    [ -e "$base" ] || fail 66 "$base: no such file or folder; a registry's image begins with docker://"
    arguments+=(--build-arg bootstrap=localimage --build-arg "base=$(realpath -- "$base")")
    ;;
esac
[ "$(id -u)" = 0 ] || arguments+=(--fakeroot)
if [ -z "$gzip" ] && [[ $offered == *--mksquashfs-args* ]] && [[ $(mksquashfs -help 2>&1) == *zstd* ]]; then
    arguments+=(--mksquashfs-args "-comp zstd -Xcompression-level 1")
fi

# Its folder holds the context's relative names.
cd "$work/context"
"$runtime" build "${arguments[@]}" "${binds[@]}" "$output.part" "containers/hpckv-$image.def" ||
    fail 70 "$image was not built; the reason is above"
mv -f -- "$output.part" "$output"
printf 'hpckv: %s, %s MB, hpckv %s\n' "$output" "$(($(stat -c %s "$output") / 1000000))" "$commit"
