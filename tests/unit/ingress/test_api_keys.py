"""API keys: what counts as one, and that both fronts ask for one wherever something is told or generated."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_ingress_grpc import serve_grpc  # noqa: F401 (a fixture)

from actors.errors import ConfigError, UnauthenticatedError
from actors.ingress.api_keys import ApiKeys
from cluster.commands.clients import ChatClient, GrpcClient, HttpClient, Message, Options
from protos import inference_pb2 as pb

Serve = Callable[..., Any]
GOOD = {"authorization": "Bearer open sesame"}
BAD = [
    {},
    {"authorization": "Bearer shut sesame"},
    {"authorization": "open sesame"},
    {"authorization": "Basic open sesame"},
]


@pytest.fixture
def keys_file(tmp_path: Path) -> str:
    path = tmp_path / "keys"
    path.write_text("# of the night shift\n\nalmond\n  open sesame  \n")
    return str(path)


@pytest.mark.parametrize("shown", ["Bearer open sesame", "bearer almond", "BEARER  almond "])
def test_a_known_key_is_let_in(keys_file: str, shown: str) -> None:
    ApiKeys.read(keys_file).check(shown)


@pytest.mark.parametrize(
    "shown",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer #",
        "Bearer # of the night shift",
        "Bearer almon",
        "almond",
        "Bearer älmond",
    ],
)
def test_anything_else_is_not(keys_file: str, shown: str | None) -> None:
    with pytest.raises(UnauthenticatedError, match="Bearer KEY") as e:
        ApiKeys.read(keys_file).check(shown)
    assert "almon" not in str(e.value).lower()


def test_without_a_file_everybody_is_let_in() -> None:
    ApiKeys.read("").check(None)
    ApiKeys.read("").check("Bearer whatever")


def test_a_file_that_lets_nobody_in_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# none yet\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("empty", "binary", "absent"):
        with pytest.raises(ConfigError, match="api_keys_file"):
            ApiKeys.read(str(tmp_path / name))


async def test_http_asks_for_a_key(serve: Serve, saying: Any, keys_file: str) -> None:
    async with serve(saying("Hi."), api_keys_file=keys_file) as service:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi?"}]}
        asks = [
            ("/v1/models", None),
            ("/v1/models/tiny", None),
            ("/v1/completions", {"model": "tiny", "prompt": "x"}),
            ("/v1/chat/completions", body),
            ("/v1/chat/completions", body | {"stream": True}),
        ]
        for path, send in asks:
            method = "GET" if send is None else "POST"
            for headers in BAD:
                reply = await service.http.request(method, path, json=send, headers=headers)
                assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
                assert reply.json()["error"]["code"] == "invalid_api_key"
        assert service.router.submitted == []
        assert (await service.http.post("/v1/chat/completions", json=body, headers=GOOD)).status_code == 200
        assert (await service.http.get("/v1/models", headers=GOOD)).status_code == 200
        assert (await service.http.get("/health")).status_code == 200  # load balancers have no key
        assert service.sink.calls[0][2] == "unauthenticated"


async def test_grpc_asks_for_a_key(serve_grpc: Serve, saying: Any, keys_file: str) -> None:  # noqa: F811
    async with serve_grpc(saying("Hi."), api_keys_file=keys_file) as service:
        chat = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="Hi?")])
        calls = [
            (service.stub.Generate, pb.GenerateRequest(text="x")),
            (service.stub.Chat, chat),
            (service.stub.GetModel, pb.GetModelRequest()),
            (service.stub.ListModels, pb.ListModelsRequest()),
        ]
        for headers in BAD:
            metadata = list(headers.items())
            for call, request in calls:
                with pytest.raises(grpc.aio.AioRpcError) as e:
                    await call(request, metadata=metadata)
                assert e.value.code() is grpc.StatusCode.UNAUTHENTICATED
            for stream, request in (
                (service.stub.GenerateStream, pb.GenerateRequest(text="x")), (service.stub.ChatStream, chat)
            ):  # fmt: skip
                with pytest.raises(grpc.aio.AioRpcError, match="API key"):
                    assert [chunk async for chunk in stream(request, metadata=metadata)] == []
        assert service.router.submitted == []
        for call, request in calls:
            await call(request, metadata=list(GOOD.items()))
        health = health_pb2_grpc.HealthStub(service.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING


async def test_our_own_clients_show_their_key(serve_grpc: Serve, saying: Any, keys_file: str) -> None:  # noqa: F811
    async with serve_grpc(saying("Hi."), api_keys_file=keys_file) as service:

        def answer(client: ChatClient) -> str:
            question = [Message(role="user", content="Hi?")]
            return "".join(piece.text for piece in client.stream(question, Options()))

        for make, address in ((HttpClient, service.url), (GrpcClient, service.address)):
            assert await asyncio.to_thread(answer, make(address, "open sesame")) == "Hi."
            with pytest.raises(click.ClickException, match="API key"):
                await asyncio.to_thread(answer, make(address))
