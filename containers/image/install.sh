#!/bin/sh
# Runs inside the image while it is built: a virtual environment from the lock file, and hpckv in it.
#   install.sh hybrid|bind TORCH_INDEX|none
set -eu
mpi=$1 torch_index=$2
build=/opt/hpckv-build target=/opt/hpckv
fail() {
    echo "hpckv: $*" >&2
    exit 1
}
# Whatever the builder's umask is: whoever runs the image is another user than the one its files belong to.
umask 022
case $mpi in hybrid | bind) ;; *) fail "mpi=$mpi is neither hybrid nor bind" ;; esac

# How this host's pip finds packages; build.sh binds it, and nothing of it stays in the image.
if [ -r /mnt/environ ]; then
    # shellcheck source=/dev/null
    . /mnt/environ
fi
export PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# torch loads libstdc++, which a minimal base may not have.
if ! { python3 -c 'import ensurepip, venv' && ldconfig -p | grep -q 'libstdc++\.so\.6'; } 2>/dev/null; then
    command -v apt-get >/dev/null || fail "the base lacks python3 with venv, or libstdc++, and apt-get to install them"
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends python3-venv libstdc++6 ca-certificates
    rm -rf /var/lib/apt/lists/*
fi
version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$version" = 3.11 ] || fail "the lock files are for Python 3.11, and the base has $version"

# An older image may be the base: what it has of the lock file stays.
[ -x $target/bin/python ] || python3 -m venv $target
python=$target/bin/python
lock=$build/image/lock.txt
if [ "$mpi" = bind ]; then
    # The host's MPI is the only one: a second one inside would be loaded without a word where the bind is forgotten.
    sed '/^mpich==/d' $build/image/lock.txt >$build/wanted.txt
    lock=$build/wanted.txt
    $python -m pip uninstall -qq --yes mpich
fi
set --
if [ "$torch_index" != none ]; then
    set -- --extra-index-url "$torch_index"
fi
# Compiled below, by all cores. Twice quiet: an index among several that does not have a package is no news.
$python -m pip install -qq --no-deps --only-binary :all: --no-compile "$@" -r "$lock"
$python -m pip install -qq --no-deps --no-build-isolation --no-compile --force-reinstall $build/source
$python -m pip check

rm -rf $target/image $target/slurm
mv $build/image $target/image
packages=$($python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mv $target/image/hpckv_image.py "$packages"
echo 'import hpckv_image' >"$packages/hpckv_image.pth"
mv $build/source/slurm $target/slurm
rm -rf $build
# The image is read-only: what is not compiled now is compiled at every start. What only torch.compile loads, which hpckv does not
# use, is half of the work; and torch has files for newer Pythons, which do not compile.
$python -m compileall -qq -j 0 -x '/(sympy|mpmath|networkx|tests?)/' $target/lib || true

# For runtimes that do not read the image's environment.
ln -sf $target/bin/hpckv /usr/local/bin/hpckv
cat $target/image/environment.sh >"${APPTAINER_ENVIRONMENT:-$SINGULARITY_ENVIRONMENT}"
$python $target/image/check.py --labels >>"${APPTAINER_LABELS:-$SINGULARITY_LABELS}"
