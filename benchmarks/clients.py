"""Streaming clients that send a workload over real gRPC and HTTP and note when tokens come."""

import asyncio
import json
import time
from collections.abc import Sequence

import aiohttp
import grpc

from benchmarks.engine import Trace
from benchmarks.workload import Item
from protos import inference_pb2, inference_pb2_grpc


async def over_grpc(address: str, items: Sequence[Item]) -> list[Trace]:
    """All items at once over one channel, greedy, each to its full length."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        return list(await asyncio.gather(*(_grpc_one(stub, item) for item in items)))


async def _grpc_one(stub: inference_pb2_grpc.InferenceStub, item: Item) -> Trace:
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=item.prompt_ids),
        sampling=inference_pb2.Sampling(temperature=0),
        stopping=inference_pb2.Stopping(max_tokens=item.num_outputs, ignore_eos=True),
    )
    trace = Trace(time.perf_counter())
    async for chunk in stub.GenerateStream(request):
        trace.token_s += [time.perf_counter()] * len(chunk.token_ids)
        trace.token_ids += chunk.token_ids
    return trace


async def over_http(url: str, model: str, items: Sequence[Item]) -> list[Trace]:
    """The same over OpenAI's completions with server-sent events."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        return list(await asyncio.gather(*(_http_one(session, url, model, item) for item in items)))


async def _http_one(session: aiohttp.ClientSession, url: str, model: str, item: Item) -> Trace:
    body = {"model": model, "prompt": item.prompt_ids, "max_tokens": item.num_outputs, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True, "return_token_ids": True}
    trace = Trace(time.perf_counter())
    async with session.post(f"{url}/v1/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.content:
            if not line.startswith(b"data: {"):
                continue
            ids = json.loads(line[6:])["choices"][0].get("token_ids") or []
            trace.token_s += [time.perf_counter()] * len(ids)
            trace.token_ids += ids
    return trace
