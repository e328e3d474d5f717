#!/usr/bin/env bash
# Runs on every node of a `ray up` cluster: installs Corral, and starts Ray the way Corral wants it.
#
#   node.sh install        a virtual environment in ~/.corral/venv with the package from ~/corral
#   node.sh head|worker    (re)starts Ray; a worker needs RAY_HEAD_IP, which `ray up` sets
#   node.sh run COMMAND    a command of that environment, e.g. `node.sh run serve deploy ~/corral/deploy/maverick.yaml`
#
# CORRAL_EXTRA_START adds arguments to `ray start`. The token that all nodes share lies in ~/.corral/ray-token.
set -euo pipefail

home=$HOME/.corral
venv=$home/venv
token=$home/ray-token
source_dir=$HOME/corral

find_python() {
  local candidate
  for candidate in python3.12 python3.11 python3.13 python3; do
    if "$candidate" -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "Corral needs Python 3.11 to 3.13 with its venv module on every node" >&2
  return 1
}

install_package() {
  [ -x "$venv/bin/python" ] || "$(find_python)" -m venv "$venv"
  "$venv/bin/pip" install --quiet ${CORRAL_PIP_OPTIONS:-} "$source_dir"
}

prepare_environment() {
  [ -s "$token" ] || { echo "$token is missing: see the head of the cluster file" >&2; return 1; }
  chmod 600 "$token"
  unset RAY_ADDRESS RAY_AUTH_TOKEN
  export PATH=$venv/bin:$PATH
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token
  export RAY_USAGE_STATS_ENABLED=0
  # Serve's Python proxy carries a tenth of what HAProxy does (docs: cluster).
  export RAY_SERVE_ENABLE_HA_PROXY=1
  # A node that is cut off is dead after about 8 s, instead of a minute. Ranks notice far sooner by themselves.
  export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=2000 RAY_health_check_failure_threshold=3
}

start_ray() {
  ray stop --force >/dev/null 2>&1 || true # nothing to stop is no error
  ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"
  # Messages and tensors do not travel through the object store, so it is small; ports are for private networks only.
  # shellcheck disable=SC2086  # the extra arguments are several words
  ray start --object-store-memory=500000000 --disable-usage-stats "$@" ${CORRAL_EXTRA_START:-}
}

case ${1:-} in
install) install_package ;;
head)
  prepare_environment
  start_ray --head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config="$HOME/ray_bootstrap_config.yaml"
  ;;
worker)
  prepare_environment
  start_ray --address="$RAY_HEAD_IP:6379"
  ;;
run)
  prepare_environment
  shift
  exec "$@"
  ;;
*)
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
  ;;
esac
