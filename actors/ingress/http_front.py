"""The HTTP front: OpenAI's endpoints as an ASGI application.

Owns routes, bodies, server-sent events and error bodies. What is generated, and how, is `worker.py`'s.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

from actors.errors import CorralError, ModelNotFoundError, UnavailableError
from actors.ingress.ask import GenerationSpec
from actors.ingress.http_body import read_body
from actors.ingress.openai_requests import Body, ChatBody, CompletionBody, parse_body
from actors.ingress.openai_responses import ChatShape, CompletionShape, Shape, model_object
from actors.ingress.status import http_headers, openai_error, status_of
from actors.ingress.telemetry import Api
from actors.ingress.worker import Ingress

DONE = b"data: [DONE]\n\n"


def build_app(ingress: Ingress) -> Starlette:
    """The ASGI application. Its lifespan starts and stops the ingress."""
    front = HttpFront(ingress)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await ingress.start()
        try:
            yield
        finally:
            await ingress.stop()

    return Starlette(
        routes=[
            Route("/health", front.health, methods=["GET"]),
            Route("/v1/models", front.list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", front.get_model, methods=["GET"]),
            Route("/v1/completions", front.completions, methods=["POST"]),
            Route("/v1/chat/completions", front.chat, methods=["POST"]),
        ],
        exception_handlers={CorralError: _answer_error, HTTPException: _answer_http, Exception: _answer_error},
        lifespan=lifespan,
    )


class HttpFront:
    """The endpoints."""

    def __init__(self, ingress: Ingress) -> None:
        self._ingress = ingress

    async def health(self, request: Request) -> Response:
        """200 while the router serves, else 503 with its reason."""
        status = self._ingress.status
        if not status.serving:
            raise UnavailableError(status.detail)
        return _json({
            "status": "ok", "detail": status.detail, "epoch": status.epoch, "requests_running": status.num_running,
            "requests_queued": status.num_queued, "kv_used_fraction": status.kv_used_fraction,
        })  # fmt: skip

    async def list_models(self, request: Request) -> Response:
        self._check_key(request)
        return _json({"object": "list", "data": [self._model(name) for name in self._ingress.model_names]})

    async def get_model(self, request: Request) -> Response:
        self._check_key(request)
        name = request.path_params["model"]
        if not name:
            raise ModelNotFoundError(name)
        return _json(self._model(self._ingress.check_model(name)))

    async def completions(self, request: Request) -> Response:
        async def prepare(body: CompletionBody) -> GenerationSpec:
            prompts = body.prompts(self._ingress.config.max_prompts)
            return await self._ingress.prompt_spec(body.ask(), prompts)

        return await self._generate(request, "completions", CompletionBody, prepare, CompletionShape)

    async def chat(self, request: Request) -> Response:
        async def prepare(body: ChatBody) -> GenerationSpec:
            return await self._ingress.chat_spec(body.ask(), body.conversation())

        return await self._generate(request, "chat", ChatBody, prepare, ChatShape)

    async def _generate(
        self,
        request: Request,
        api: Api,
        kind: type[Body],
        prepare: Callable[[Body], Awaitable[GenerationSpec]],
        shape_type: type[CompletionShape] | type[ChatShape],
    ) -> Response:
        """Runs one call, streamed or whole. Both are one generator, so that a call has one scope (`Ingress.call`)."""

        async def run() -> AsyncGenerator[bytes | None, None]:
            """Yields None once it is known that the call does not stream, then JSON; or else events."""
            with self._ingress.call("http", api) as call:
                self._check_key(request)
                body = parse_body(await read_body(request, self._ingress.config.max_body_bytes), kind)
                model = self._ingress.check_model(body.model)
                spec = await prepare(body)
                shape = shape_type(
                    call.id, model, spec, self._ingress.tokenizer.token_bytes, bool(body.return_token_ids)
                )
                if body.stream:
                    async with aclosing(self._ingress.stream(spec, call)) as news:
                        async for data in _events(shape, news, body.include_usage, call.timer):
                            yield data
                    return
                yield None
                whole = msgspec.json.encode(shape.whole(await self._ingress.complete(spec, call)))
            yield whole

        output = run()
        first = await anext(output)
        if first is not None:
            return EventStream(first, output)
        async with aclosing(output):
            return Response(await anext(output), media_type="application/json")

    def _check_key(self, request: Request) -> None:
        self._ingress.check_key(request.headers.get("authorization"))

    def _model(self, name: str) -> dict[str, Any]:
        return model_object(name, self._ingress.card.created_s, self._ingress.card.max_model_len)


async def _events(
    shape: Shape, news: AsyncIterator[list[Any]], include_usage: bool, timer: Any
) -> AsyncGenerator[bytes, None]:
    """The stream's events; those that are ready together are one piece. Nothing is sent before the first token, so
    that a refused request still gets its own status.
    """
    ahead = shape.opening()
    async for deltas in news:
        chunks = ahead + [chunk for delta in deltas for chunk in shape.chunks(delta)]
        ahead = []
        if chunks:
            yield b"".join(_event(chunk, include_usage) for chunk in chunks)
    if include_usage:
        yield _event(shape.usage_chunk(timer.generated_tokens), False)
    yield DONE


class EventStream(StreamingResponse):
    """Server-sent events. An error in mid-stream is sent as an event, and the generator is closed whatever happens."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes | None, None]) -> None:
        super().__init__((), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._first = first
        self._rest = rest

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._rest):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _send_piece(send, self._first)
            try:
                async for piece in self._rest:
                    await _send_piece(send, piece or b"")
            except CorralError as e:
                await _send_piece(send, _event(openai_error(e), False) + DONE)
            except Exception as e:
                await _send_piece(send, _event(openai_error(e), False) + DONE)
                raise
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_piece(send: Send, piece: bytes) -> None:
    await send({"type": "http.response.body", "body": piece, "more_body": True})


def _event(chunk: dict[str, Any], with_null_usage: bool) -> bytes:
    if with_null_usage:  # OpenAI: all chunks but the last carry usage null where usage was asked for
        chunk = {**chunk, "usage": None}
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def _json(body: dict[str, Any], status_code: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status_code, headers, "application/json")


async def _answer_error(request: Request, error: Exception) -> Response:
    return _json(openai_error(error), status_of(error).http, http_headers(error))


async def _answer_http(request: Request, error: Exception) -> Response:
    """Starlette's own errors (no such path, wrong method) in OpenAI's form."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    message = f"unknown request URL: {where}" if error.status_code == 404 else f"{error.detail}: {where}"
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return _json(body, error.status_code, dict(error.headers or {}))
