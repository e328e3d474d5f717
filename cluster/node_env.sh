# The environment of Ray on every node of a `ray up` cluster. ~/.bashrc reads it there (`ray up` puts it in), and Ray's
# launcher reads ~/.bashrc before each of its commands, `ray down`'s too.
#
# Meant to be sourced: no `exit`, no `set`.

export PATH=$HOME/.corral/venv/bin:$PATH

# Who has no token is let in nowhere in Ray. All nodes share it; `ray up` copies it.
unset RAY_ADDRESS RAY_AUTH_TOKEN
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$HOME/.corral/ray-token

export RAY_USAGE_STATS_ENABLED=0

# Serve's Python proxy carries about a tenth of the messages that HAProxy does.
export RAY_SERVE_ENABLE_HA_PROXY=1

# Serve replaces a front that failed three checks in a row, by default one every 10 s.
export RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=1

# A node that is cut off is dead after about 8 s instead of a minute. Ranks notice far sooner by themselves.
export RAY_health_check_period_ms=1000
export RAY_health_check_timeout_ms=2000
export RAY_health_check_failure_threshold=3

# A node that has lost its head ends after this long instead of a minute. `ray down` counts on it: where hosts are your
# own, it stops Ray on the head only.
export RAY_gcs_rpc_server_reconnect_timeout_s=10

# Ray makes its workers nice by default; here they are what the node is for.
export RAY_worker_niceness=0

# Replicas are asynchronous throughout: a hop between threads per message would only cost.
export RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0
export RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0
