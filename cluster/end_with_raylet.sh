#!/bin/sh
# Sees to it that a node of Ray ends whole: waits in the background for its raylet to end, then ends what that left of
# its session (log monitor, agents, a proxy), and nothing else. Ray does so itself only where a machine is given back.
# To be called after `ray start` in a session that is Ray's alone, as every command of the autoscaler's ssh has one.
raylet=$(pgrep -n -x raylet) || exit 1
session=$(ps -o sid= -p "$raylet" | tr -d ' ')
setsid sh -c "tail --pid=$raylet -f /dev/null; sleep 3; pkill -s $session; sleep 3; pkill -KILL -s $session" \
  </dev/null >/dev/null 2>&1 &
