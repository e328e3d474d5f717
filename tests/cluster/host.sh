#!/usr/bin/env bash
# The first process of a host that hosts.py makes: a home of root, /tmp, /dev/shm and /run of its own, then sshd.
# It is called in new network, process, mount and name spaces, and whatever it starts ends with it.
#
#   host.sh FOLDER SHARED KEEP[:KEEP…]
#
# FOLDER holds the host's files, and its last part is the host's name; SHARED appears under /mnt, read-only; each KEEP
# is a folder (a Python, a virtual environment) that stays visible though it lies under root's home or /tmp.
set -euo pipefail
folder=$1 shared=$2 keep=$3

hostname "$(basename "$folder")"
ip link set lo up
mount --make-rprivate /

IFS=: read -ra paths <<<"$keep"
for path in "${paths[@]}"; do
  case $path in
  /root/*) target=$folder/root/${path#/root/} ;;
  /tmp/*) target=$folder/tmp/${path#/tmp/} ;;
  *) continue ;;
  esac
  mkdir -p "$target"
  mount --bind "$path" "$target"
done

mount --bind "$folder/etc/hosts" /etc/hosts
names=$(readlink -m /etc/resolv.conf)
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd "$(dirname "$names")"
[ -e "$names" ] || touch "$names"
mount --bind "$folder/etc/resolv.conf" "$names"

mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
mount --bind -o ro "$shared" /mnt
cd "$folder" # by relative names, as a folder under /tmp or /root would be out of sight half-way
mount --no-canonicalize --rbind ./tmp /tmp
mount --no-canonicalize --rbind ./root /root
cd /
exec env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
  /usr/sbin/sshd -D -e -f /root/.ssh/sshd_config
