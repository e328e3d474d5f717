"""A client's load, from a host that is no Ray node: `load.py HTTP_URL GRPC_ADDRESS STREAMS`, until its input ends.

Asks each prompt once while nothing else happens; then streams of greedy answers over HTTP and gRPC, of which each must
repeat the first one token for token. Prints a line of JSON per answer, as it ends. Knows nothing of clusters.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from itertools import count

import grpc
import httpx

from protos import inference_pb2, inference_pb2_grpc

PROMPTS = ("once upon a time", "the quick brown fox", "in the beginning", "two roads diverged", "call me", "it was")
MAX_TOKENS = 96
TIMEOUT_S = 120.0
THINK_S = 0.2  # between two answers, or the machine that all hosts share would do nothing else


@dataclass(slots=True)
class Answer:
    """One answer as a client saw it. `problem` is empty if it is whole and right; `longest_gap_s` between messages."""

    front: str
    prompt: str
    problem: str = ""
    num_tokens: int = 0
    seconds: float = 0.0
    longest_gap_s: float = 0.0


async def over_http(client: httpx.AsyncClient, prompt: str) -> AsyncIterator[tuple[int, list[int]]]:
    """(index of the first token, token ids) of each message."""
    body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    index = 0
    async with client.stream("POST", "/v1/completions", json=body | {"return_token_ids": True}) as response:
        if response.status_code != 200:
            raise ValueError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data:") or line.endswith("[DONE]"):
                continue
            event = json.loads(line.removeprefix("data:"))
            if "error" in event:
                raise ValueError(str(event["error"]))
            for choice in event["choices"]:
                ids = choice.get("token_ids") or []
                yield index, ids
                index += len(ids)


async def over_grpc(stub: inference_pb2_grpc.InferenceStub, prompt: str) -> AsyncIterator[tuple[int, list[int]]]:
    request = inference_pb2.GenerateRequest(
        text=prompt,
        sampling=inference_pb2.Sampling(temperature=0),
        stopping=inference_pb2.Stopping(max_tokens=MAX_TOKENS, ignore_eos=True),
    )
    async for chunk in stub.GenerateStream(request, timeout=TIMEOUT_S):
        if chunk.token_ids:
            yield chunk.token_index, list(chunk.token_ids)


class Load:
    """Asks, and remembers what the first answers were."""

    def __init__(self, client: httpx.AsyncClient, stub: inference_pb2_grpc.InferenceStub) -> None:
        self._client = client
        self._stub = stub
        self._expected: dict[str, list[int]] = {}
        self.stopping = asyncio.Event()

    async def ask(self, front: str, prompt: str) -> None:
        """One answer, and the line about it."""
        answer = Answer(front=front, prompt=prompt)
        messages = over_http(self._client, prompt) if front == "http" else over_grpc(self._stub, prompt)
        tokens: list[int] = []
        began = last = time.monotonic()
        try:
            async for index, ids in messages:
                if index != len(tokens):
                    answer.problem = f"a message begins at token {index} after {len(tokens)}"
                tokens += ids
                answer.longest_gap_s = max(answer.longest_gap_s, time.monotonic() - last)
                last = time.monotonic()
        except (ValueError, httpx.HTTPError) as e:
            answer.problem = f"{type(e).__name__}: {e}"
        except grpc.aio.AioRpcError as e:
            answer.problem = f"{e.code().name}: {e.details()}"
        answer.num_tokens, answer.seconds = len(tokens), time.monotonic() - began
        if not answer.problem and tokens != self._expected.setdefault(prompt, tokens):
            answer.problem = f"not the first answer: {tokens} instead of {self._expected[prompt]}"
        print(json.dumps(asdict(answer)), flush=True)

    async def stream(self, first: int) -> None:
        for idx in count(first):
            if self.stopping.is_set():
                return
            await self.ask(("http", "grpc")[idx % 2], PROMPTS[idx // 2 % len(PROMPTS)])
            await asyncio.sleep(THINK_S)


async def main(url: str, address: str, num_streams: int) -> None:
    async with (
        httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client,
        grpc.aio.insecure_channel(address) as channel,
    ):
        load = Load(client, inference_pb2_grpc.InferenceStub(channel))
        for prompt in PROMPTS:
            await load.ask("grpc", prompt)
        streams = [asyncio.create_task(load.stream(first)) for first in range(num_streams)]
        await asyncio.to_thread(sys.stdin.read)
        load.stopping.set()
        await asyncio.gather(*streams)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
