#!/usr/bin/env bash
# Runs a command on a "host" of its own: network, process, mount and name spaces with an sshd, a private home of root,
# /tmp and /dev/shm. What `ray up` and `ray stop` do there reaches nobody else. All of it ends with the command.
#
#   host.sh FOLDER KEEP[:KEEP…] COMMAND…
#
# FOLDER holds the host's files; each KEEP is a folder (a Python, a virtual environment) that stays visible though it
# lies under root's home or /tmp.
set -euo pipefail
folder=$1 keep=$2
shift 2

prepare() { # once, outside the namespaces
  mkdir -p "$folder"/{root/.ssh,tmp,etc}
  [ -f "$folder/etc/hostkey" ] || ssh-keygen -q -t ed25519 -N '' -f "$folder/etc/hostkey"
  [ -f "$folder/root/.ssh/id_ed25519" ] || ssh-keygen -q -t ed25519 -N '' -f "$folder/root/.ssh/id_ed25519"
  chmod 700 "$folder/root/.ssh"
  chmod 1777 "$folder/tmp"
  cat >"$folder/etc/sshd_config" <<CONFIG
ListenAddress 127.0.0.1
Port 22
HostKey $folder/etc/hostkey
AuthorizedKeysFile $folder/root/.ssh/id_ed25519.pub
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
UsePAM no
PidFile none
Subsystem sftp internal-sftp
CONFIG
}

enter() { # inside
  hostname corral-test
  ip link set lo up
  mount --make-rprivate /
  local path target
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
  mount -t proc proc /proc
  mount -t tmpfs tmpfs /dev/shm
  mkdir -p /run/sshd
  mount --rbind "$folder/tmp" /tmp
  mount --rbind "$folder/root" /root
  export HOME=/root
  /usr/sbin/sshd -f "$folder/etc/sshd_config"
  "$@"
}

if [ "${CORRAL_HOST_INSIDE:-}" ]; then
  enter "$@"
else
  prepare
  CORRAL_HOST_INSIDE=1 exec unshare --net --pid --fork --mount --uts --ipc --kill-child "$0" "$folder" "$keep" "$@"
fi
