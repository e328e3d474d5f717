#!/usr/bin/env bash
# An operator's session with cluster/local.yaml, on a host of its own (host.sh): up, deploy, ask, down.
# RAY_BIN is the folder of the operator's own ray and corral. Prints what it does; any failure is its exit code.
set -euo pipefail
export PATH=$RAY_BIN:$PATH RAY_UP_enable_autoscaler_v2=0 RAY_USAGE_STATS_ENABLED=0
unset RAY_ADDRESS RAY_AUTH_MODE

say() { echo "== $*"; }

say "token"
(umask 077; openssl rand -hex 32 >~/.corral/ray-token)

say "ray up"
time ray up -y --no-config-cache cluster/local.yaml

say "without the token nobody is let in"
if RAY_AUTH_MODE=disabled ray status --address 127.0.0.1:6379 2>/dev/null; then
  echo "ray status worked without the token"
  exit 1
fi
RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.corral/ray-token ray status --address 127.0.0.1:6379

say "serve deploy"
time ray exec cluster/local.yaml 'serve deploy ~/corral/deploy/local.yaml'
for attempt in $(seq 300); do
  curl --silent --fail http://127.0.0.1:8000/health && break
  [ "$attempt" -lt 300 ] || { echo "no answer"; exit 1; }
  sleep 0.5
done
echo

say "ask"
corral ask --url http://127.0.0.1:8000 --grpc 127.0.0.1:9000 --max-tokens 8 "Are you there?"
pgrep --full bin/haproxy >/dev/null || { echo "HAProxy does not run"; exit 1; }

say "ray down"
ray down -y cluster/local.yaml
for process in raylet gcs_server haproxy; do
  if pgrep --full "/$process" >/dev/null; then
    echo "$process is left"
    exit 1
  fi
done
say "done"
