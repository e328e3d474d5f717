"""The environment of a private Ray: nothing foreign stays, nothing is shared."""

import socket
from pathlib import Path

import pytest

from actors.errors import ConfigError
from cluster.private_ray import apply_environment, check_port, free_block


def _environment(scratch: Path, **foreign: str) -> dict[str, str]:
    environment = {"HOME": "/root", **foreign}
    apply_environment(environment, scratch, "haproxy", scratch / "token")
    return environment


def test_another_cluster_and_an_old_token_are_out_of_sight(tmp_path: Path) -> None:
    environment = _environment(tmp_path, RAY_ADDRESS="10.0.0.1:6379", RAY_AUTH_TOKEN="old", RAY_TMPDIR="/elsewhere")
    assert not {"RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_TMPDIR"} & set(environment)
    assert environment["RAY_AUTH_MODE"] == "token"
    token = Path(environment["RAY_AUTH_TOKEN_PATH"])
    assert token.parent == tmp_path and len(token.read_text()) == 64
    assert token.stat().st_mode & 0o777 == 0o600
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"


def test_the_front_is_chosen(tmp_path: Path) -> None:
    assert _environment(tmp_path)["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    environment: dict[str, str] = {}
    apply_environment(environment, tmp_path, "proxy", tmp_path / "token")
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "0"


def test_haproxys_sockets_fit_their_limit() -> None:
    """Serve puts a node id of 56 characters into the path, and HAProxy takes 97 bytes."""
    scratch = Path("/tmp/corral-abcdefgh")
    longest = scratch / ("f" * 56) / "metrics.sock"
    assert len(str(longest)) <= 97


def test_two_services_have_different_ports(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    ours, theirs = _environment(first), _environment(second)
    ports = [key for key in ours if key.endswith("_PORT") and "DIRECT" not in key]
    assert len({ours[key] for key in ports}) == len(ports) == 4
    ranges = [int(ours[f"RAY_SERVE_DIRECT_INGRESS_{end}_{kind}_PORT"]) for kind in ("HTTP", "GRPC")
              for end in ("MIN", "MAX")]  # fmt: skip
    assert ranges == sorted(ranges) and ranges[0] + 32 == ranges[3] < 32768
    assert theirs["RAY_AUTH_TOKEN_PATH"] != ours["RAY_AUTH_TOKEN_PATH"]


def test_a_busy_port_is_named_with_its_flag() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"grpc-port: 127.0.0.1:{port} cannot be used.*--grpc-port"):
            check_port("127.0.0.1", port, "grpc-port")
    check_port("127.0.0.1", port, "grpc-port")


def test_a_block_avoids_a_port_that_many_may_share() -> None:
    """gRPC servers set SO_REUSEPORT, so that a second one would listen on the same port without an error."""
    start = free_block(4)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("", start))
        listener.listen()
        with pytest.raises(ConfigError):
            check_port("", start, "port")
        assert free_block(4) != start


def test_a_block_has_none_of_the_ports_that_are_spoken_for() -> None:
    taken = range(20000, 26000)
    assert all(free_block(16, taken) not in taken for _ in range(30))
