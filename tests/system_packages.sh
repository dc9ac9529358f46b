#!/bin/sh
# Programs that pip does not have: oracles of the tests, and what makes their filesystems. Installs what is missing where it
# may, and names it where not.
set -eu
missing=
tools="h5dump:hdf5-tools h5ls:hdf5-tools setfacl:acl strace:strace mkfs.ext4:e2fsprogs mkfs.xfs:xfsprogs fusermount3:fuse3
    glusterfs:glusterfs-client glusterfsd:glusterfs-server"
for pair in $tools; do
    command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair#*:}"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    # shellcheck disable=SC2086 # a list of words
    {
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
    } >/dev/null
    case $missing in
    *glusterfs-server*) # the tests start their own brick; nothing is left running that nobody asked for
        { systemctl disable glusterd; systemctl stop glusterd || service glusterd stop; } >/dev/null 2>&1 || true
        ;;
    esac
    exit 0
fi
echo "the tests need these packages, which only an administrator can install:$missing" >&2
[ -z "${CI:-}" ]
