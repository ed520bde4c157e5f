#!/bin/sh
# Makes a base image for `make image BASE=…` from Debian's packages, where no image registry can be reached:
#   deploy/base.sh [NAME] [SUITE]      as root; needs mmdebstrap and podman
# Its Python must be that of the environment (3.11 in bookworm, 3.13 in trixie).
set -eu

name=${1:-localhost/ood-base}
suite=${2:-$(. /etc/os-release && echo "$VERSION_CODENAME")}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 755 "$folder" # apt's own user reads here
mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-venv \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    "$suite" "$folder/base.tar"
podman import --quiet --message "Debian $suite" "$folder/base.tar" "$name"
