"""The environment and ports of a Ray that belongs to one `corral serve` alone.

Owns which variables keep that Ray apart from any other on the machine: its own folder, token and ports; no address,
token or usage report of anybody else. Must be applied before ray is imported, so it does not import ray.
"""

import os
import random
import secrets
import socket
from collections.abc import Collection, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actors.errors import ConfigError

Front = Literal["haproxy", "proxy"]

# Each of these would tie our Ray to a cluster or a token that is not its own.
_FOREIGN = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_NAMESPACE",
    "RAY_RUNTIME_ENV_HOOK",
    "RAY_TMPDIR",
)


_REPLICA_PORTS = 16  # of each kind, for as many ingress replicas
_LEAST_BLOCK_PORT = 20000
_FIRST_EPHEMERAL_PORT = 32768  # Linux hands out ports from here on


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePorts:
    """What a service listens on. `host` is the front's; everything else is for this machine's own use."""

    host: str
    http: int
    grpc: int
    metrics: int


def apply_environment(
    environment: MutableMapping[str, str], scratch: Path, front: Front, token_file: Path, taken: Collection[int] = ()
) -> None:
    """Sets what a private Ray needs, and writes its token (mode 0600). Children inherit it. `taken`: ports that the
    service will listen on, and does not yet.
    """
    join_environment(environment, token_file)
    token_file.touch(mode=0o600)
    token_file.write_text(secrets.token_hex(32))
    # None that the system gives away, or a listener of Ray's own might get one before it is used. And gRPC servers of
    # two services would share a replica's port without an error, and each other's calls with it.
    stats = free_block(4 + 2 * _REPLICA_PORTS, taken)
    metrics, fallback_http, fallback_grpc, replicas = range(stats + 1, stats + 5)
    environment.update(
        {
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray makes its workers nice, and so slower than their own clients on the same cores.
            "RAY_worker_niceness": "0",
            # Replicas are asynchronous throughout: a hop between threads per message would only cost.
            "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
            "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
            # Rank and replica processes are started when they are needed; 16 idle ones would only take memory.
            "RAY_prestart_worker_first_driver": "0",
            "RAY_SERVE_ENABLE_HA_PROXY": "1" if front == "haproxy" else "0",
            # Serve replaces a front that failed three checks in a row, by default one every 10 s.
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
            # Serve puts a folder named by 56 characters between scratch and each file, and HAProxy takes socket paths
            # of at most 97 bytes: there is no room for one more folder.
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(scratch / "metrics.sock"),
            "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_http),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replicas),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replicas + _REPLICA_PORTS),
            "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(replicas + _REPLICA_PORTS),
            "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(replicas + 2 * _REPLICA_PORTS),
        }
    )


def join_environment(environment: MutableMapping[str, str], token_file: Path) -> None:
    """Sets what a process needs that joins a private Ray, and removes what would tie it to somebody else's."""
    for name in _FOREIGN:
        environment.pop(name, None)
    environment.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)})


def check_port(host: str, port: int, flag: str) -> None:
    """Raises ConfigError, naming the flag, if nothing can listen on `port`."""
    with _bound(host, port, flag):
        return


def free_block(count: int, taken: Collection[int] = ()) -> int:
    """The first of `count` consecutive ports below the ephemeral ones that nothing listens on, and none of which is
    `taken`. Raises ConfigError.
    """
    for start in random.sample(range(_LEAST_BLOCK_PORT, _FIRST_EPHEMERAL_PORT - count, count), 64):
        if any(start <= port < start + count for port in taken):
            continue
        with ExitStack() as stack, suppress(ConfigError):
            for port in range(start, start + count):
                stack.enter_context(_bound("", port, "port"))
            return start
    raise ConfigError("port", f"no {count} consecutive ports are free on this machine")


@contextmanager
def _bound(host: str, port: int, flag: str) -> Iterator[int]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            listener.bind((host, port))
            listener.listen()  # with SO_REUSEADDR only this tells a port that somebody listens on
        except OSError as e:
            raise ConfigError(flag, f"{host}:{port} cannot be used: {e.strerror}; choose another with --{flag}") from e
        yield int(listener.getsockname()[1])
