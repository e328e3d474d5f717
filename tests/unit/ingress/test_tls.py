"""The secure gRPC port on Serve's own server class: who gets in with which certificate, and what is refused."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from certificates import Authority, Identity
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray._common.utils import import_attr
from ray.serve._private.grpc_util import gRPCGenericServer
from service import free_port

from actors.errors import ConfigError
from actors.ingress.servicers import add_health, add_inference
from actors.ingress.tls import SecurePort
from protos import inference_pb2, inference_pb2_grpc


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def server_identity(authority: Authority) -> Identity:
    return authority.issue("server")


def routed(service_method: str, streaming_type: Any) -> Callable[..., Any]:
    """What stands in for Serve's routing: it tells that a call got through."""
    serving = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING).SerializeToString()

    async def unary(request: Any, context: Any) -> bytes:
        return serving if service_method.endswith("Check") else b""

    async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        yield inference_pb2.GenerateChunk(text="through").SerializeToString()

    return stream if streaming_type.value == "unary_stream" else unary


@asynccontextmanager
async def serving(identity: Identity, **settings: str) -> AsyncIterator[tuple[int, int]]:
    """Serve's server as its proxy starts it. Yields the plain port and the secure one."""
    secure_port = free_port()
    server = gRPCGenericServer(routed, extra_options=[("grpc.so_reuseport", "0")])
    plain_port = server.add_insecure_port("127.0.0.1:0")
    stated = {"port": secure_port, "ssl_certfile": identity.certfile, "ssl_keyfile": identity.keyfile} | settings
    name = "actors.ingress.tls:" + ",".join(f"{key}={value}" for key, value in stated.items())
    for add in (import_attr(name), add_inference, add_health):  # as Serve imports what its config names
        add(Mock(), server)
    await server.start()
    try:
        yield plain_port, secure_port
    finally:
        await server.stop(0)


async def call(channel: grpc.aio.Channel) -> None:
    """A unary call and a stream. Raises AioRpcError."""
    async with channel:
        check = health_pb2.HealthCheckRequest()
        assert (await health_pb2_grpc.HealthStub(channel).Check(check, timeout=5)).status == 1
        stream = inference_pb2_grpc.InferenceStub(channel).GenerateStream(inference_pb2.GenerateRequest(), timeout=5)
        assert [chunk.text async for chunk in stream] == ["through"]


def secure_channel(port: int, ca: str, identity: Identity | None = None) -> grpc.aio.Channel:
    pair = [Path(file).read_bytes() for file in (identity.keyfile, identity.certfile)] if identity else [None, None]
    return grpc.aio.secure_channel(f"127.0.0.1:{port}", grpc.ssl_channel_credentials(Path(ca).read_bytes(), *pair))


async def code_of(channel: grpc.aio.Channel) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call(channel)
    return e.value.code()


async def test_who_trusts_the_authority_is_served_and_who_does_not_is_not(
    authority: Authority, server_identity: Identity, tmp_path: Path
) -> None:
    async with serving(server_identity) as (_, port):
        await call(secure_channel(port, authority.certfile))
        assert await code_of(secure_channel(port, Authority(tmp_path).certfile)) is grpc.StatusCode.UNAVAILABLE


async def test_plain_text_is_refused_on_either_port(authority: Authority, server_identity: Identity) -> None:
    async with serving(server_identity) as (plain, port):
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{plain}")
        assert await code_of(channel) is grpc.StatusCode.UNAUTHENTICATED
        async with grpc.aio.insecure_channel(f"127.0.0.1:{plain}") as channel:
            stream = inference_pb2_grpc.InferenceStub(channel).GenerateStream(inference_pb2.GenerateRequest())
            with pytest.raises(grpc.aio.AioRpcError, match="over TLS"):
                await anext(aiter(stream))
        assert await code_of(grpc.aio.insecure_channel(f"127.0.0.1:{port}")) is grpc.StatusCode.UNAVAILABLE


async def test_with_an_authority_for_clients_each_must_show_its_certificate(
    authority: Authority, server_identity: Identity, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path).issue("client")
    async with serving(server_identity, ssl_ca_certs=authority.certfile) as (plain, port):
        await call(secure_channel(port, authority.certfile, authority.issue("client")))
        assert await code_of(secure_channel(port, authority.certfile)) is grpc.StatusCode.UNAVAILABLE
        assert await code_of(secure_channel(port, authority.certfile, stranger)) is grpc.StatusCode.UNAVAILABLE
        assert await code_of(grpc.aio.insecure_channel(f"127.0.0.1:{plain}")) is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"ssl_keyfile": "/nowhere/tls.key"}, "ssl_keyfile: /nowhere/tls.key: No such file"),
        ({"port": "https"}, "Expected `int`"),
        ({"ssl_keyfiles": "x"}, "unknown field `ssl_keyfiles`"),
        ({"port": "1", "host": "203.0.113.1"}, "203.0.113.1:1 cannot be used"),
    ],
)
async def test_what_cannot_be_used_is_said(server_identity: Identity, settings: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        async with serving(server_identity, **settings):
            pass


async def test_a_key_that_is_not_the_certificates_is_said(server_identity: Identity, authority: Authority) -> None:
    other = authority.issue("other")
    with pytest.raises(ConfigError, match="cannot be used with these certificates"):
        async with serving(Identity(server_identity.certfile, other.keyfile)):
            pass


async def test_behind_haproxy_it_is_refused(server_identity: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(ConfigError, match="unset RAY_SERVE_ENABLE_HA_PROXY"):
        async with serving(server_identity):
            pass


def test_a_setting_that_is_missing_is_said() -> None:
    with pytest.raises(ConfigError, match="missing required field `ssl_keyfile`"):
        SecurePort.parse("port=9443,ssl_certfile=x")
    with pytest.raises(AttributeError):
        import_attr("actors.ingress.tls.nothing")
