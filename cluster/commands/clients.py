"""Two small clients of a Corral service, over HTTP and over gRPC, behind one interface.

Owns the wire of `corral chat` and `corral ask`. Knows nothing of terminals.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import click
import grpc
import httpx

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 600.0  # between two tokens: a long prompt, or a queue


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation: role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to ask for beside the conversation; None leaves it to the service."""

    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Text as it comes. The last piece has `num_tokens`, the number of generated tokens."""

    text: str
    num_tokens: int = 0


class ChatClient(Protocol):
    """Closing the iterator cancels the answer."""

    name: str

    def stream(self, messages: Sequence[Message], options: Options) -> Iterator[Piece]: ...


class HttpClient:
    """OpenAI's chat completions, streamed."""

    def __init__(self, url: str, api_key: str = "") -> None:
        self.name = f"HTTP {url}"
        self._url = url.rstrip("/")
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    def stream(self, messages: Sequence[Message], options: Options) -> Iterator[Piece]:
        body: dict[str, Any] = {
            "model": options.model or self._first_model(),
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        stated = {"max_tokens": options.max_tokens, "temperature": options.temperature, "seed": options.seed}
        body |= {key: value for key, value in stated.items() if value is not None}
        timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        url = f"{self._url}/v1/chat/completions"
        try:
            with httpx.stream(
                "POST", url, json=body, headers=self._headers, timeout=timeout, trust_env=False
            ) as response:
                if response.status_code != 200:
                    response.read()
                    raise click.ClickException(_http_problem(response))
                yield from _pieces(response.iter_lines())
        except httpx.TransportError as e:
            raise click.ClickException(f"{self._url}: {e}") from e

    def _first_model(self) -> str:
        try:
            response = httpx.get(
                f"{self._url}/v1/models", headers=self._headers, timeout=CONNECT_TIMEOUT_S, trust_env=False
            )
        except httpx.TransportError as e:
            raise click.ClickException(f"{self._url}: {e}") from e
        if response.status_code != 200:
            raise click.ClickException(_http_problem(response))
        return str(response.json()["data"][0]["id"])


class GrpcClient:
    """corral.v1.Inference/ChatStream."""

    def __init__(self, address: str, api_key: str = "", application: str = "corral") -> None:
        self.name = f"gRPC {address}"
        self._address = address
        self._metadata = [("application", application)]  # how Serve finds the application
        if api_key:
            self._metadata.append(("authorization", f"Bearer {api_key}"))

    def stream(self, messages: Sequence[Message], options: Options) -> Iterator[Piece]:
        request = pb.ChatRequest(
            model=options.model,
            messages=[pb.ChatMessage(role=message.role, content=message.content) for message in messages],
            sampling=pb.Sampling(temperature=options.temperature, seed=options.seed),
            stopping=pb.Stopping(max_tokens=options.max_tokens),
        )
        with grpc.insecure_channel(self._address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            call = inference_pb2_grpc.InferenceStub(channel).ChatStream(request, metadata=self._metadata)
            try:
                for chunk in call:
                    yield Piece(text=chunk.text, num_tokens=chunk.usage.completion_tokens)
            except grpc.RpcError as e:
                raise click.ClickException(f"{self._address}: {e.code().name}: {e.details()}") from e
            finally:
                call.cancel()


def _pieces(lines: Iterator[str]) -> Iterator[Piece]:
    """Reads server-sent events up to `[DONE]`."""
    for line in lines:
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise click.ClickException(str(event["error"].get("message", event["error"])))
        text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        yield Piece(text=text, num_tokens=(event.get("usage") or {}).get("completion_tokens", 0))


def _http_problem(response: httpx.Response) -> str:
    try:
        return f"{response.status_code}: {response.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code}: {response.text[:200]}"
