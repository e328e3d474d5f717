"""Streaming clients that send a workload over real gRPC and HTTP, or to a bare router, and note when tokens come.

Either all items at once (`over_grpc`, `over_http`), which raise where a request fails; or as streams that send one item
after another until a window ends (`loop_grpc`, `loop_http`, `loop_router`), which note failures and go on.
"""

import asyncio
import itertools
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack

import aiohttp
import grpc

from actors.errors import CorralError
from actors.ingress.router_client import RouterClient
from actors.types import Request, SamplingParams
from benchmarks.load_figures import Answer, Level
from benchmarks.trace import Trace
from benchmarks.workload import Item
from protos import inference_pb2, inference_pb2_grpc

STREAMS_OF_CHANNEL = 32  # servers and proxies allow about 100 calls at once on one connection
PAUSE_S = 0.2  # after a failure, so that a service that refuses is not asked in a tight loop
ROUTER_TIMEOUT_S = 10.0  # to reach a router that serves
FLUSH_S = 0.2  # for cancellations to leave the socket before it is closed


class RequestFailedError(Exception):
    """The service said so in its stream."""


FAILURES = (grpc.RpcError, aiohttp.ClientError, CorralError, RequestFailedError, ConnectionError, TimeoutError)
_Ask = Callable[[Item], AsyncIterator[Sequence[int]]]  # the token ids of each message


async def over_grpc(address: str, items: Sequence[Item]) -> list[Trace]:
    """All items at once over one channel, greedy, each to its full length."""
    async with grpc.aio.insecure_channel(address) as channel:
        ask = _over_channel(channel)
        return list(await asyncio.gather(*(_trace(ask(item)) for item in items)))


async def over_http(url: str, model: str, items: Sequence[Item]) -> list[Trace]:
    """The same over OpenAI's completions with server-sent events."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        ask = _over_session(session, url, model)
        return list(await asyncio.gather(*(_trace(ask(item)) for item in items)))


async def loop_grpc(address: str, level: Level, streams: Sequence[int]) -> list[Answer]:
    """Some of a level's streams, a channel for every few of them, each channel a connection of its own."""
    async with AsyncExitStack() as stack:
        asks = []
        for _ in range(0, len(streams), STREAMS_OF_CHANNEL):
            options = [("grpc.use_local_subchannel_pool", 1)]
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=options))
            asks.append(_over_channel(channel))
        return await _loop(asks, level, streams)


async def loop_http(url: str, model: str, level: Level, streams: Sequence[int]) -> list[Answer]:
    """Some of a level's streams; each keeps a connection while its answers come whole."""
    unbounded = aiohttp.ClientTimeout(total=None, sock_connect=30)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=unbounded) as session:
        return await _loop([_over_session(session, url, model)], level, streams)


async def loop_router(endpoint: str, level: Level, streams: Sequence[int]) -> list[Answer]:
    """Some of a level's streams, by the client that an ingress is to a router, without an ingress."""

    async def discover() -> str:
        return endpoint

    client = RouterClient(discover)
    await client.start()
    try:
        while not client.status.serving:
            await asyncio.wait_for(client.next_change.wait(), ROUTER_TIMEOUT_S)
        answers = await _loop([_over_router(client)], level, streams)
        await asyncio.sleep(FLUSH_S)
        return answers
    finally:
        await client.stop()


async def _trace(messages: AsyncIterator[Sequence[int]]) -> Trace:
    trace = Trace(time.perf_counter())
    await _note(messages, trace)
    return trace


async def _note(messages: AsyncIterator[Sequence[int]], trace: Trace) -> None:
    async for ids in messages:
        trace.token_s += [time.perf_counter()] * len(ids)
        trace.token_ids += ids


async def _loop(asks: Sequence[_Ask], level: Level, streams: Sequence[int]) -> list[Answer]:
    """Every stream asks until the window ends; what is open then is cancelled."""
    answers: list[Answer] = []
    tasks = [
        asyncio.create_task(_stream(asks[i % len(asks)], level, number, answers)) for i, number in enumerate(streams)
    ]
    left_s = level.window.end_s - time.perf_counter()
    broken, running = await asyncio.wait(tasks, timeout=left_s, return_when=asyncio.FIRST_EXCEPTION)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    for task in broken:
        task.result()  # a stream ends by itself only through an error of ours
    return answers


async def _stream(ask: _Ask, level: Level, first: int, answers: list[Answer]) -> None:
    """Sends the items `first`, `first` + streams, and so on. An answer is among `answers` from when it is asked for."""
    for number in itertools.count(first, level.num_streams):
        item = level.items[number]
        answer = Answer(number, Trace(time.perf_counter()))
        answers.append(answer)
        try:
            await _note(ask(item), answer.trace)
        except FAILURES as e:
            answer.trace.problem = _spelt(e)
        else:
            answer.is_whole = len(answer.trace.token_ids) == item.num_outputs
            if not answer.is_whole:
                answer.trace.problem = f"ended after {len(answer.trace.token_ids)} of {item.num_outputs} tokens"
        if answer.trace.problem:
            await asyncio.sleep(PAUSE_S)


def _spelt(error: BaseException) -> str:
    if isinstance(error, grpc.RpcError):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}"


def _over_channel(channel: grpc.aio.Channel) -> _Ask:
    stub = inference_pb2_grpc.InferenceStub(channel)

    async def ask(item: Item) -> AsyncIterator[Sequence[int]]:
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=item.prompt_ids),
            sampling=inference_pb2.Sampling(temperature=0),
            stopping=inference_pb2.Stopping(max_tokens=item.num_outputs, ignore_eos=True),
        )
        async for chunk in stub.GenerateStream(request):
            yield chunk.token_ids

    return ask


def _over_session(session: aiohttp.ClientSession, url: str, model: str) -> _Ask:
    async def ask(item: Item) -> AsyncIterator[Sequence[int]]:
        body = {"model": model, "prompt": item.prompt_ids, "max_tokens": item.num_outputs, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True, "return_token_ids": True}
        async with session.post(f"{url}/v1/completions", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    yield _ids(json.loads(line[6:]))

    return ask


def _over_router(client: RouterClient) -> _Ask:
    numbers = itertools.count()

    async def ask(item: Item) -> AsyncIterator[Sequence[int]]:
        request = Request(
            request_id=f"{os.getpid()}-{next(numbers)}",
            prompt_ids=tuple(item.prompt_ids),
            sampling=SamplingParams(max_tokens=item.num_outputs, temperature=0.0),
        )
        async for events in client.events([request]):
            if events[-1].error:
                raise RequestFailedError(events[-1].error.problem)
            yield [token.token_id for event in events for token in event.tokens]

    return ask


def _ids(event: dict[str, object]) -> Sequence[int]:
    """The token ids of a server-sent event. Raises RequestFailedError where it tells of an error."""
    if "error" in event:
        raise RequestFailedError(event["error"])
    choices = event["choices"]
    assert isinstance(choices, list)
    return choices[0].get("token_ids") or [] if choices else []
