"""Clients of a running service: openai, gRPC from Python, gRPC from Node, and clients that behave badly."""

import asyncio
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc

ROOT = Path(__file__).parent.parent.parent
NODE_CLIENT = Path(__file__).parent / "clients"
PROMPT = "The horses"
GREEDY = pb.Sampling(temperature=0, seed=1)


@pytest.fixture(scope="module")
def client(service: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{service.http_port}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


@pytest.fixture(scope="module")
def channel(service: Any) -> Iterator[grpc.Channel]:
    options = [("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0)]
    with grpc.insecure_channel(f"127.0.0.1:{service.grpc_port}", options) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> Any:
    return inference_pb2_grpc.InferenceStub(channel)


def base_url(service: Any) -> str:
    return f"http://127.0.0.1:{service.http_port}"


def asking(num_tokens: int, **fields: Any) -> Any:
    return pb.GenerateRequest(
        text=PROMPT, sampling=GREEDY, stopping=pb.Stopping(max_tokens=num_tokens, ignore_eos=True), **fields
    )


# --- openai ------------------------------------------------------------------------------------------------------


def test_openai_models(client: openai.OpenAI, service: Any) -> None:
    assert service.model in [model.id for model in client.models.list()]
    assert client.models.retrieve(service.model).object == "model"


def test_openai_completions_stream_what_they_return(client: openai.OpenAI, service: Any) -> None:
    ask: dict[str, Any] = {
        "model": service.model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "seed": 1,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    whole = client.completions.create(**ask)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    assert whole.choices[0].finish_reason == "length"
    chunks = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


def test_openai_chat(client: openai.OpenAI, service: Any) -> None:
    ask: dict[str, Any] = {
        "model": service.model, "messages": [{"role": "user", "content": "Hello <|eot|>"}], "max_tokens": 12,
        "temperature": 1, "seed": 5, "n": 2, "logprobs": True, "top_logprobs": 3, "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    whole = client.chat.completions.create(**ask)
    assert [choice.index for choice in whole.choices] == [0, 1]
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 12
        for token in choice.logprobs.content:
            assert token.logprob <= 0
            assert len(token.top_logprobs) == 3
            assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
    streamed = {0: "", 1: ""}
    for chunk in client.chat.completions.create(**ask, stream=True):
        for delta in chunk.choices:
            streamed[delta.index] += delta.delta.content or ""
    assert streamed == {choice.index: choice.message.content for choice in whole.choices}


def test_openai_errors(client: openai.OpenAI, service: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        client.completions.create(model="no-such-model", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature") as e:
        client.completions.create(model=service.model, prompt="x", temperature=9)
    assert e.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as e:
        client.completions.create(model=service.model, prompt=[5] * 300_000)
    assert e.value.code == "context_length_exceeded"


# --- gRPC --------------------------------------------------------------------------------------------------------


def test_grpc_all_rpcs_agree(stub: Any, client: openai.OpenAI, service: Any) -> None:
    whole = stub.Generate(asking(24, output=pb.Output(top_logprobs=2)), timeout=60)
    chunks = list(stub.GenerateStream(asking(24), timeout=60))
    ids = [i for chunk in chunks for i in chunk.token_ids]
    assert ids == list(whole.choices[0].token_ids)
    assert len(ids) == 24
    assert "".join(chunk.text for chunk in chunks) == whole.choices[0].text
    count = 0
    for chunk in chunks:
        assert chunk.token_index == count
        count += len(chunk.token_ids)
    assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert chunks[-1].usage == whole.usage
    assert len(whole.choices[0].logprobs) == 24
    over_http = client.completions.create(
        model=service.model, prompt=PROMPT, max_tokens=24, temperature=0, seed=1, extra_body={"ignore_eos": True}
    )
    assert over_http.choices[0].text == whole.choices[0].text

    messages = [pb.ChatMessage(role="system", content="Be brief."), pb.ChatMessage(role="user", content="Hello")]
    chat = pb.ChatRequest(
        messages=messages, sampling=GREEDY, stopping=pb.Stopping(max_tokens=8, ignore_eos=True), output=pb.Output(n=2)
    )
    answer = stub.Chat(chat, timeout=60)
    parts: dict[int, list[int]] = {0: [], 1: []}
    for chunk in stub.ChatStream(chat, timeout=60):
        parts[chunk.index] += chunk.token_ids
    assert parts == {choice.index: list(choice.token_ids) for choice in answer.choices}
    models = stub.ListModels(pb.ListModelsRequest(), timeout=10).models
    assert stub.GetModel(pb.GetModelRequest(model=service.model), timeout=10) in models


def test_grpc_health_and_reflection(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "corral.v1.Inference"):
        request = health_pb2.HealthCheckRequest(service=name)
        assert health.Check(request, timeout=10).status == health_pb2.HealthCheckResponse.SERVING
    watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=10)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol="corral.v1.Inference")
    (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]), timeout=10)
    assert b"GenerateStream" in answer.file_descriptor_response.file_descriptor_proto[0]


def test_grpc_bad_input_names_the_field(stub: Any, channel: grpc.Channel, service: Any) -> None:
    for request, field in (
        (pb.GenerateRequest(text="x", sampling=pb.Sampling(temperature=9)), "sampling.temperature"),
        (pb.GenerateRequest(text="x", stopping=pb.Stopping(stop=["s"] * 10_000)), "stopping.stop"),
        (pb.GenerateRequest(), "prompt"),
        (pb.GenerateRequest(text="word " * 200_000), "text"),
        (pb.GenerateRequest(text="x" * 50_000_000), "request"),
    ):
        for call in (stub.Generate, lambda request, timeout: list(stub.GenerateStream(request, timeout=timeout))):
            with pytest.raises(grpc.RpcError) as e:
                call(request, timeout=60)
            assert e.value.code() == grpc.StatusCode.INVALID_ARGUMENT, e.value
            assert e.value.details().startswith(f"{field}: ")
            rich = status_pb2.Status.FromString(dict(e.value.trailing_metadata())["grpc-status-details-bin"])
            detail = error_details_pb2.BadRequest()
            assert rich.details[0].Unpack(detail)
            assert detail.field_violations[0].field == field
    broken = channel.unary_unary("/corral.v1.Inference/Generate", request_serializer=bytes)
    with pytest.raises(grpc.RpcError) as e:
        broken(b"\xff\xff\xff\xff", timeout=10)
    assert e.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as e:
        stub.Generate(asking(1, model="no-such-model"), timeout=10)
    assert e.value.code() == grpc.StatusCode.NOT_FOUND
    service.wait_idle()


def test_grpc_deadlines_and_cancel_free_everything(stub: Any, service: Any) -> None:
    with pytest.raises(grpc.RpcError) as e:
        stub.Generate(asking(10_000), timeout=0.05)
    assert e.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    with pytest.raises(grpc.RpcError) as e:
        list(stub.GenerateStream(asking(10_000, timeout_ms=50), timeout=60))
    assert e.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    stream = stub.GenerateStream(asking(10_000), timeout=60)
    next(stream)
    stream.cancel()
    service.wait_idle()


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs node and npm")
def test_node_client(service: Any, stub: Any, tmp_path: Path) -> None:
    """Its packages are those that `make test` has installed, if it has."""
    folder = NODE_CLIENT
    if not (folder / "node_modules").is_dir():
        folder = tmp_path
        for name in ("package.json", "client.mjs"):
            shutil.copy(NODE_CLIENT / name, folder)
        install = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(install, cwd=folder, check=True, timeout=100, capture_output=True)
    command = ["node", "client.mjs", f"127.0.0.1:{service.grpc_port}", str(ROOT), service.model]
    done = subprocess.run(command, cwd=folder, timeout=100, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    here = stub.Generate(asking(12), timeout=60)
    assert result["token_ids"] == list(here.choices[0].token_ids)
    assert result["text"] == here.choices[0].text
    assert result["finish_reason"] == "FINISH_REASON_LENGTH"
    assert result["usage"]["completion_tokens"] == 12
    assert len(result["chat"]["choices"][0]["token_ids"]) == 5
    assert result["unknown_model"]["code"] == grpc.StatusCode.NOT_FOUND.value[0]
    assert result["bad_value"]["details"].startswith("sampling.temperature: ")
    assert result["cancelled"] == grpc.StatusCode.CANCELLED.value[0]
    service.wait_idle()


# --- clients that behave badly -----------------------------------------------------------------------------------


def test_http_bodies_that_are_wrong(service: Any) -> None:
    with httpx.Client(base_url=base_url(service), timeout=60) as http:
        for data, status in (
            (b"{", 400), (b"", 400), (b"\xff\xfe", 400), (b"[" * 100_000, 400), (b" " * 50_000_000, 413),
            (json.dumps({"prompt": "x", "stop": ["s"] * 10_000}).encode(), 400),
            (json.dumps({"prompt": ""}).encode(), 200),
        ):  # fmt: skip
            answer = http.post("/v1/completions", content=data, params={})
            assert answer.status_code == status, (data[:20], answer.text[:200])
            if status != 200:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert http.get("/nothing").json()["error"]["code"] == "unknown_url"
        assert http.delete("/v1/completions").json()["error"]["code"] == "method_not_allowed"
    service.wait_idle()


async def test_500_connections_at_once(service: Any) -> None:
    """Every one is answered, with an answer or with 429; and the service goes on."""
    body = {"prompt": PROMPT, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    limits = httpx.Limits(max_connections=500, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=base_url(service), limits=limits, timeout=110) as http:
        answers = await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(500)))
    codes = {answer.status_code for answer in answers}
    assert codes <= {200, 429}, codes
    good = [answer for answer in answers if answer.status_code == 200]
    assert len(good) >= 250
    assert len({answer.json()["choices"][0]["text"] for answer in good}) == 1
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)
    service.wait_idle()


def test_a_slow_reader_stalls_nobody(service: Any, stub: Any) -> None:
    """It reads nothing of its long stream, while others are served; then it finds everything there."""
    slow = stub.GenerateStream(asking(100), timeout=100)
    first = next(slow)
    for _ in range(3):
        assert len(stub.Generate(asking(4), timeout=30).choices[0].token_ids) == 4
    ids = list(first.token_ids)
    for chunk in slow:
        assert chunk.token_index == len(ids)
        ids += chunk.token_ids
    assert len(ids) == 100


def test_clients_that_vanish_leave_nothing_behind(service: Any, channel: grpc.Channel) -> None:
    """Sockets are closed in mid-stream, without a word; KV pages go back to zero."""
    body = json.dumps(
        {"prompt": PROMPT, "max_tokens": 4000, "stream": True, "ignore_eos": True, "temperature": 0}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()

    def vanish(_: int) -> bytes:
        with socket.create_connection(("127.0.0.1", service.http_port), timeout=60) as connection:
            connection.sendall(head + body)
            return connection.recv(100)

    with ThreadPoolExecutor(8) as pool:
        assert all(b" 200 " in head for head in pool.map(vanish, range(8)))
    with grpc.insecure_channel(f"127.0.0.1:{service.grpc_port}", [("grpc.use_local_subchannel_pool", 1)]) as other:
        streams = [inference_pb2_grpc.InferenceStub(other).GenerateStream(asking(4000)) for _ in range(4)]
        for stream in streams:
            next(stream)
        service.wait_busy(len(streams))  # and no longer with those before
    service.wait_idle()
