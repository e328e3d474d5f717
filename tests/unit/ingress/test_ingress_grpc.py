"""The gRPC front through Serve's own gRPC server class and our servicer functions; only Serve's routing is left out."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from ray.serve._private.grpc_util import enable_server_reflection, gRPCGenericServer
from ray.serve.grpc_util import RayServegRPCContext

from actors.ingress.grpc_front import GrpcFront
from actors.ingress.servicers import add_health, add_inference
from actors.ingress.testing import LOGPROB, token_event
from actors.types import ErrorInfo, RouterStatus, TokenEvent
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc

HELLO = "The horses are in the stable."
Serve = Callable[..., Any]


def routed_to(front: GrpcFront) -> Callable[..., Any]:
    """What Serve's replica does with a call: a context that is a copy, put back when the method has returned."""
    unary = {
        "Generate": lambda request, context: front.generate(request, context, "completions"),
        "Chat": lambda request, context: front.generate(request, context, "chat"),
        "GetModel": front.get_model,
        "ListModels": front.list_models,
        "Check": front.check_health,
        "List": lambda request, context: front.list_health(),
    }
    streams = {
        "GenerateStream": lambda request, context: front.stream(request, context, "completions"),
        "ChatStream": lambda request, context: front.stream(request, context, "chat"),
        "Watch": lambda request, context: front.watch_health(request),
    }

    def factory(service_method: str, streaming_type: Any) -> Callable[..., Any]:
        name = service_method.rpartition("/")[2]

        async def call_unary(request: Any, context: Any) -> bytes:
            copied = RayServegRPCContext(context)
            response = await unary[name](request, copied)
            copied._set_on_grpc_context(context)
            return bytes(response.SerializeToString())

        async def call_stream(request: Any, context: Any) -> AsyncIterator[bytes]:
            copied = RayServegRPCContext(context)
            async for message in streams[name](request, copied):
                yield message.SerializeToString()
            copied._set_on_grpc_context(context)

        return call_stream if streaming_type.value == "unary_stream" else call_unary

    return factory


@pytest.fixture
def serve_grpc(serve: Serve) -> Serve:
    @asynccontextmanager
    async def service(script: Any = None, **limits: object) -> AsyncIterator[Any]:
        async with serve(script, **limits) as http:
            server = gRPCGenericServer(routed_to(GrpcFront(http.ingress)))
            port = server.add_insecure_port("127.0.0.1:0")
            for add in (add_inference, add_health):
                add(Mock(), server)
            enable_server_reflection(server)
            await server.start()
            address = f"127.0.0.1:{port}"
            async with grpc.aio.insecure_channel(address) as channel:
                stub = inference_pb2_grpc.InferenceStub(channel)
                yield SimpleNamespace(**vars(http), channel=channel, stub=stub, address=address)
            await server.stop(0)

    return service


async def error_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call
    return e.value


async def drained(stream: Any) -> list[Any]:
    return [chunk async for chunk in stream]


async def test_generate_and_chat_whole(serve_grpc: Serve, saying: Any, tokenizer: Any) -> None:
    async with serve_grpc(saying(HELLO)) as service:
        ids = [*tokenizer.encode_prompt(HELLO)[1:], tokenizer.control_ids["<|eot|>"]]
        ask = pb.GenerateRequest(
            text="Where?", sampling=pb.Sampling(temperature=0.7, seed=2**64 - 1), output=pb.Output(n=2, top_logprobs=1)
        )
        response = await service.stub.Generate(ask)
        assert [choice.text for choice in response.choices] == [HELLO, HELLO]
        assert list(response.choices[1].token_ids) == ids
        assert response.choices[1].finish_reason == pb.FINISH_REASON_STOP
        assert [token.logprob for token in response.choices[0].logprobs] == [LOGPROB] * len(ids)
        assert response.choices[0].logprobs[0].top[0].token_id == ids[0]
        assert (response.model, response.usage.completion_tokens) == ("tiny", 2 * len(ids))
        assert response.usage.prompt_tokens == len(tokenizer.encode_prompt("Where?"))
        first, second = service.router.submitted
        assert first.sampling.temperature == 0.7  # not 0.699999988, which is what a float32 makes of it
        assert (first.sampling.seed, second.sampling.seed) == (2**64 - 1, 0)
        assert first.request_id == f"{response.id}-0"

        chat = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="Where? <|eot|>")])
        assert (await service.stub.Chat(chat)).choices[0].text == HELLO
        prompt = service.router.submitted[-1].prompt_ids
        assert list(prompt) == tokenizer.encode_chat([{"role": "user", "content": "Where? <|eot|>"}])


async def test_streams_pack_what_is_ready_and_end_with_usage(serve_grpc: Serve, tokenizer: Any) -> None:
    async with serve_grpc() as service:
        stream = service.stub.GenerateStream(
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]), output=pb.Output(n=2, top_logprobs=0))
        )
        reading = asyncio.create_task(drained(stream))
        await service.router.until(lambda: len(service.router.submitted) == 2)
        a, b = service.router.submitted
        assert a.prompt_ids == (5, 6)
        ids = tokenizer.encode_prompt(HELLO)[1:]
        await service.router.emit(token_event(a, 0, ids[:4]), token_event(b, 0, ids))
        await service.router.emit(token_event(a, 4, ids[4:], "length"))
        await service.router.emit(token_event(b, len(ids), [], "length"))
        chunks = await reading
        for index in (0, 1):
            mine = [chunk for chunk in chunks if chunk.index == index]
            assert "".join(chunk.text for chunk in mine) == HELLO
            assert [i for chunk in mine for i in chunk.token_ids] == ids
            assert [chunk.token_index for chunk in mine][:1] == [0]
            assert sum(chunk.finish_reason == pb.FINISH_REASON_LENGTH for chunk in mine) == 1
            assert all(len(chunk.logprobs) == len(chunk.token_ids) for chunk in mine)
        assert len(chunks) <= 4  # one per answer and message, not one per token
        assert [chunk.HasField("usage") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1].usage.completion_tokens == 2 * len(ids)
        assert {chunk.id for chunk in chunks} == {a.request_id.removesuffix("-0")}


BAD = [
    (pb.GenerateRequest(), "prompt"),
    (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**31])), "token_ids"),
    (pb.GenerateRequest(text="word " * 600), "text"),
    (pb.GenerateRequest(text="x", sampling=pb.Sampling(temperature=float("nan"))), "sampling.temperature"),
    (pb.GenerateRequest(text="x", sampling=pb.Sampling(top_p=0)), "sampling.top_p"),
    (pb.GenerateRequest(text="x", sampling=pb.Sampling(logit_bias={5: float("inf")})), "sampling.logit_bias"),
    (pb.GenerateRequest(text="x", sampling=pb.Sampling(top_k=2**32 - 1)), "sampling.top_k"),
    (pb.GenerateRequest(text="x", stopping=pb.Stopping(max_tokens=0)), "stopping.max_tokens"),
    (pb.GenerateRequest(text="x", stopping=pb.Stopping(stop=["s"] * 10_000)), "stopping.stop"),
    (pb.GenerateRequest(text="x", stopping=pb.Stopping(stop_token_ids=[2**31])), "stopping.stop_token_ids"),
    (pb.GenerateRequest(text="x", stopping=pb.Stopping(min_tokens=2**31)), "stopping.min_tokens"),
    (pb.GenerateRequest(text="x", output=pb.Output(n=17)), "output.n"),
    (pb.GenerateRequest(text="x", output=pb.Output(top_logprobs=21)), "output.top_logprobs"),
    (pb.GenerateRequest(text="x" * 100_001), "request"),
    (pb.ChatRequest(), "messages"),
    (pb.ChatRequest(messages=[pb.ChatMessage(role="king", content="x")]), "messages[0].role"),
]


async def test_every_bad_value_is_invalid_argument_that_names_its_field(serve_grpc: Serve) -> None:
    async with serve_grpc(max_body_bytes=100_000) as service:
        for request, field in BAD:
            is_chat = isinstance(request, pb.ChatRequest)
            whole = service.stub.Chat if is_chat else service.stub.Generate
            stream = service.stub.ChatStream if is_chat else service.stub.GenerateStream
            for error in (await error_of(whole(request)), await error_of(drained(stream(request)))):
                assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
                assert error.details().startswith(f"{field}: "), error.details()
                rich = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
                detail = error_details_pb2.BadRequest()
                assert rich.details[0].Unpack(detail)
                assert detail.field_violations[0].field == field
        assert service.router.submitted == []


async def test_broken_protobuf_is_invalid_argument(serve_grpc: Serve) -> None:
    async with serve_grpc() as service:
        for name, kind in (("Generate", "unary_unary"), ("ChatStream", "unary_stream")):
            method = getattr(service.channel, kind)(
                f"/corral.v1.Inference/{name}", request_serializer=bytes, response_deserializer=bytes
            )
            call = method(b"\xff\xff\xff\xff")
            error = await error_of(call if kind == "unary_unary" else drained(call))
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "corral.v1." in error.details()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_tells_when_to_try_again(serve_grpc: Serve, stream: bool) -> None:
    async with serve_grpc() as service:
        request = pb.GenerateRequest(text="x")
        call = drained(service.stub.GenerateStream(request)) if stream else service.stub.Generate(request)
        failing = asyncio.ensure_future(error_of(call))
        await service.router.until(lambda: bool(service.router.submitted))
        info = ErrorInfo(kind="OverloadedError", problem="the queue is full", retry_after_s=1.5)
        request_id = service.router.submitted[0].request_id
        await service.router.emit(TokenEvent(request_id=request_id, token_index=0, error=info))
        error = await failing
        assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        trailers = dict(error.trailing_metadata())
        assert trailers["grpc-retry-pushback-ms"] == "1500"
        rich = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
        retry = error_details_pb2.RetryInfo()
        assert rich.details[0].Unpack(retry)
        assert retry.retry_delay.ToMilliseconds() == 1500
        assert service.sink.calls[-1][:3] == ("grpc", "completions", "resource_exhausted")


async def test_an_error_in_mid_stream_comes_after_the_tokens(serve_grpc: Serve) -> None:
    async with serve_grpc() as service:
        chunks = aiter(service.stub.GenerateStream(pb.GenerateRequest(text="x")))
        reading = asyncio.ensure_future(anext(chunks))
        await service.router.until(lambda: bool(service.router.submitted))
        request = service.router.submitted[0]
        await service.router.emit(token_event(request, 0, [5]))
        assert list((await reading).token_ids) == [5]
        await service.router.stop()
        error = await error_of(anext(chunks))
        assert error.code() == grpc.StatusCode.UNAVAILABLE


async def test_the_calls_own_deadline_reaches_the_router(serve_grpc: Serve) -> None:
    async with serve_grpc(lambda request: [5]) as service:
        now_s = time.time()
        await service.stub.Generate(pb.GenerateRequest(text="x"))
        await service.stub.Generate(pb.GenerateRequest(text="x"), timeout=20)
        await service.stub.Generate(pb.GenerateRequest(text="x", timeout_ms=5000), timeout=20)
        await drained(service.stub.GenerateStream(pb.GenerateRequest(text="x", timeout_ms=60_000), timeout=20))
        await service.stub.Generate(pb.GenerateRequest(text="x"), metadata=[("corral-timeout-ms", "7")])  # not theirs
        deadlines_s = [request.deadline_s for request in service.router.submitted]
        assert deadlines_s[0] is None
        assert deadlines_s[4] is None
        assert [round(d - now_s) // 5 * 5 for d in deadlines_s[1:4]] in ([20, 5, 20], [15, 5, 15])


async def test_cancel_and_deadline_end_generation(serve_grpc: Serve) -> None:
    async with serve_grpc() as service:
        stream = service.stub.GenerateStream(pb.GenerateRequest(text="x"))
        reading = asyncio.ensure_future(stream.read())
        await service.router.until(lambda: len(service.router.submitted) == 1)
        await service.router.emit(token_event(service.router.submitted[0], 0, [5]))
        await reading
        stream.cancel()
        await service.router.until(lambda: len(service.router.cancelled) == 1)
        unary = service.stub.Generate(pb.GenerateRequest(text="x"), timeout=0.2)
        assert (await error_of(unary)).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await service.router.until(lambda: len(service.router.cancelled) == 2)
        assert [call[2] for call in service.sink.calls] == ["cancelled", "cancelled"]


async def test_a_cancel_while_a_message_is_being_sent_reaches_the_handler() -> None:
    """Serve's proxy would lose it: its handler hears of a cancel only where it waits for the replica."""
    waiting, heard = asyncio.Event(), asyncio.Event()

    def factory(service_method: str, streaming_type: Any) -> Callable[..., Any]:
        async def handler(request: Any, context: Any) -> AsyncIterator[bytes]:
            for _ in range(64):
                yield b"x" * 1_000_000  # more than the client's window: sending it waits for a reader
            waiting.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                heard.set()
                raise

        return handler

    server = gRPCGenericServer(factory)
    port = server.add_insecure_port("127.0.0.1:0")
    add_inference(Mock(), server)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method = channel.unary_stream("/corral.v1.Inference/GenerateStream")
        call = method(b"")
        await waiting.wait()
        call.cancel()
        await heard.wait()
    await server.stop(0)


async def test_an_error_nobody_meant_says_nothing_of_our_insides(
    serve_grpc: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve_grpc() as service:

        def explode(*args: object) -> None:
            raise ValueError("secret path /etc/x")

        monkeypatch.setattr(service.tokenizer, "encode_prompt", explode)
        context = Mock(invocation_metadata=lambda: ())
        with pytest.raises(ValueError):
            await GrpcFront(service.ingress).generate(pb.GenerateRequest(text="x"), context, "completions")
        context.set_code.assert_called_once_with(grpc.StatusCode.INTERNAL)
        context.set_details.assert_called_once_with("internal error")
        answer = await service.http.post("/v1/completions", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "internal error")


async def test_models(serve_grpc: Serve) -> None:
    async with serve_grpc() as service:
        models = (await service.stub.ListModels(pb.ListModelsRequest())).models
        assert [model.name for model in models] == ["tiny"]
        assert await service.stub.GetModel(pb.GetModelRequest()) == models[0]
        assert models[0].max_context_tokens == 512
        error = await error_of(service.stub.GetModel(pb.GetModelRequest(model="no")))
        assert error.code() == grpc.StatusCode.NOT_FOUND
        error = await error_of(service.stub.Generate(pb.GenerateRequest(model="no", text="x")))
        assert error.code() == grpc.StatusCode.NOT_FOUND


async def test_health_and_reflection(serve_grpc: Serve) -> None:
    kinds = health_pb2.HealthCheckResponse
    async with serve_grpc() as service:
        health = health_pb2_grpc.HealthStub(service.channel)
        inference = health_pb2.HealthCheckRequest(service="corral.v1.Inference")
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == kinds.SERVING
        watch = health.Watch(inference)
        assert (await watch.read()).status == kinds.SERVING
        await service.router.set_status(RouterStatus(serving=False, detail="a rank was lost"))
        assert (await watch.read()).status == kinds.NOT_SERVING
        assert (await health.Check(inference)).status == kinds.NOT_SERVING
        assert (await health.List(health_pb2.HealthListRequest())).statuses[""].status == kinds.NOT_SERVING
        await service.router.set_status(RouterStatus(serving=True, detail="again"))
        assert (await watch.read()).status == kinds.SERVING
        watch.cancel()
        unknown = health_pb2.HealthCheckRequest(service="nope")
        assert (await error_of(health.Check(unknown))).code() == grpc.StatusCode.NOT_FOUND
        watch = health.Watch(unknown)
        assert (await watch.read()).status == kinds.SERVICE_UNKNOWN
        watch.cancel()

        async def ask() -> AsyncIterator[Any]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        stub = reflection_pb2_grpc.ServerReflectionStub(service.channel)
        answers = await drained(stub.ServerReflectionInfo(ask()))
        names = [listed.name for listed in answers[0].list_services_response.service]
        assert {"corral.v1.Inference", "grpc.health.v1.Health"} <= set(names)
