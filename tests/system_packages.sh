#!/bin/sh
# Programs that pip does not have: oracles of the tests, what makes their filesystems, and what builds images. Installs what is
# missing where it may, and names it where not.
set -eu
missing=
tools="h5dump:hdf5-tools h5ls:hdf5-tools setfacl:acl strace:strace mkfs.ext4:e2fsprogs mkfs.xfs:xfsprogs fusermount3:fuse3
    shellcheck:shellcheck glusterfs:glusterfs-client glusterfsd:glusterfs-server ip:iproute2 pgrep:procps
    slurmctld:slurmctld slurmd:slurmd srun:slurm-client slurmdbd:slurmdbd munged:munge mariadbd:mariadb-server
    mmdebstrap:mmdebstrap mksquashfs:squashfs-tools squashfuse:squashfuse newuidmap:uidmap patchelf:patchelf
    ch-run:charliecloud-runtime ch-convert:charliecloud-builders /usr/share/lmod/lmod/libexec/lmod:lmod chromium:chromium"
PATH=$PATH:/usr/sbin:/sbin
for pair in $tools; do
    command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair#*:}"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    # Tests start daemons of their own; a package must start none that nobody asked for.
    guard=/usr/sbin/policy-rc.d
    if [ ! -e $guard ]; then
        printf '#!/bin/sh\nexit 101\n' >$guard
        chmod 755 $guard
        trap 'rm -f $guard' EXIT
    fi
    # shellcheck disable=SC2086 # a list of words
    {
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
    } >/dev/null
    exit 0
fi
echo "the tests need these packages, which only an administrator can install:$missing" >&2
[ -z "${CI:-}" ]
