#!/bin/sh
# Programs that pip does not have: oracles of the tests, and what makes their filesystems. Installs what is missing where it
# may, and names it where not.
set -eu
missing=
for pair in h5dump:hdf5-tools h5ls:hdf5-tools setfacl:acl mkfs.ext4:e2fsprogs mkfs.xfs:xfsprogs fusermount3:fuse3; do
    command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair#*:}"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    # shellcheck disable=SC2086 # a list of words
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing; } >/dev/null
    exit 0
fi
echo "the tests need these packages, which only an administrator can install:$missing" >&2
[ -z "${CI:-}" ]
