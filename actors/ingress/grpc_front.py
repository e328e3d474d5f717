"""The gRPC front: corral.v1.Inference and grpc.health.v1.Health over protobuf messages.

Owns the translation between messages and asks, and how errors and health look in gRPC. Knows nothing of Serve beyond
the context's methods that it names; `deployment.py` and `servicers.py` bind it.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health_pb2

from actors.errors import BodyTooLargeError, CorralError, RequestError
from actors.ingress.ask import Ask, GenerationSpec
from actors.ingress.generation import Answer, Delta
from actors.ingress.status import INTERNAL_PROBLEM, grpc_trailers, message_of, status_of
from actors.ingress.telemetry import Api
from actors.ingress.tokenizer import ROLES
from actors.ingress.worker import Call, Ingress
from actors.types import FinishReason, SampledToken
from protos import inference_pb2 as pb

TIMEOUT_KEY = "corral-timeout-ms"  # metadata that `servicers.py` adds: what is left of the call's gRPC deadline
SERVICES = ("", "corral.v1.Inference")  # that the health service knows

_SPELLING = {
    **{name: f"sampling.{name}" for name in (
        "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "logit_bias", "seed",
    )},
    **{name: f"stopping.{name}" for name in ("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos")},
    "n": "output.n",
    "num_logprobs": "output.top_logprobs",
}  # fmt: skip
_FINISH = {None: pb.FINISH_REASON_UNSPECIFIED, "stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


class Context(Protocol):
    """What is used of a servicer's context."""

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str | bytes]]) -> None: ...

    def invocation_metadata(self) -> Iterable[tuple[str, str]]: ...


class GrpcFront:
    """The methods of both services. On an error they set the context's status and answer with an empty message.

    Why not raise: Serve drops trailing metadata of a method that raises, and logs a traceback for every bad request.
    An empty message is nothing but a carrier; `servicers.py` keeps it from clients that stream.
    """

    def __init__(self, ingress: Ingress) -> None:
        self._ingress = ingress

    async def generate(self, request: Any, context: Context, api: Api) -> Any:
        """Generate and Chat: GenerateRequest or ChatRequest in, GenerateResponse out."""
        response = pb.GenerateResponse()
        async with _status_on(context):
            with self._ingress.call("grpc", api) as call:
                model, spec = await self._prepare(request, context)
                answers = await self._ingress.complete(spec, call)
                response = pb.GenerateResponse(
                    id=call.id,
                    model=model,
                    choices=[_choice(i, answer, _wants_logprobs(spec)) for i, answer in enumerate(answers)],
                    usage=_usage(spec, call),
                )
        return response

    async def stream(self, request: Any, context: Context, api: Api) -> AsyncGenerator[Any, None]:
        """GenerateStream and ChatStream: GenerateRequest or ChatRequest in, GenerateChunks out."""
        failed = True
        async with _status_on(context):
            with self._ingress.call("grpc", api) as call:
                _, spec = await self._prepare(request, context)
                num_open = spec.num_answers
                async with aclosing(self._ingress.stream(spec, call)) as news:
                    async for deltas in news:
                        for delta in deltas:
                            num_open -= delta.finish_reason is not None
                            yield _chunk(call, delta, spec, is_last=num_open == 0)
            failed = False
        if failed:
            yield pb.GenerateChunk()

    async def get_model(self, request: Any, context: Context) -> Any:
        """GetModelRequest in, Model out."""
        async with _status_on(context):
            self._check_key(context)
            return self._model(self._ingress.check_model(request.model))
        return pb.Model()

    async def list_models(self, request: Any, context: Context) -> Any:
        """ListModelsRequest in, ListModelsResponse out."""
        async with _status_on(context):
            self._check_key(context)
            return pb.ListModelsResponse(models=[self._model(name) for name in self._ingress.model_names])
        return pb.ListModelsResponse()

    async def check_health(self, request: Any, context: Context) -> Any:
        """grpc.health.v1 Check: SERVING while the router serves; NOT_FOUND for a service that is not here."""
        if request.service not in SERVICES:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details(f"unknown service {request.service!r}")
            return health_pb2.HealthCheckResponse()
        return self._health()

    async def watch_health(self, request: Any) -> AsyncGenerator[Any, None]:
        """grpc.health.v1 Watch: the status now and whenever it changes, until the client goes."""
        kinds = health_pb2.HealthCheckResponse
        while True:
            next_change = self._ingress.next_change
            yield self._health() if request.service in SERVICES else kinds(status=kinds.SERVICE_UNKNOWN)
            await next_change.wait()

    async def list_health(self) -> Any:
        """grpc.health.v1 List: the status of every service."""
        return health_pb2.HealthListResponse(statuses={service: self._health() for service in SERVICES})

    def _check_key(self, context: Context) -> None:
        self._ingress.check_key(dict(context.invocation_metadata()).get("authorization"))

    async def _prepare(self, request: Any, context: Context) -> tuple[str, GenerationSpec]:
        self._check_key(context)
        limit_bytes = self._ingress.config.max_body_bytes
        if request.ByteSize() > limit_bytes:
            raise BodyTooLargeError("request", f"is larger than {limit_bytes} bytes")
        model = self._ingress.check_model(request.model)
        if isinstance(request, pb.ChatRequest):
            ask = _ask(request, context, {"messages": "messages"})
            return model, await self._ingress.chat_spec(ask, _conversation(request))
        field, prompt = _prompt(request)
        return model, await self._ingress.prompt_spec(_ask(request, context, {"prompt": field}), [prompt])

    def _model(self, name: str) -> Any:
        card = self._ingress.card
        return pb.Model(
            name=name,
            max_context_tokens=card.max_model_len,
            vocab_size=card.vocab_size,
            bos_token_id=card.bos_token_id,
            eos_token_ids=card.eos_token_ids,
            created_s=card.created_s,
        )

    def _health(self) -> Any:
        kinds = health_pb2.HealthCheckResponse
        return kinds(status=kinds.SERVING if self._ingress.status.serving else kinds.NOT_SERVING)


@asynccontextmanager
async def _status_on(context: Context) -> AsyncIterator[None]:
    """Puts an error's status on the context and swallows what was raised on purpose; anything else goes on, with a
    status that says nothing of our insides.
    """
    try:
        yield
    except CorralError as e:
        context.set_code(status_of(e).grpc)
        context.set_details(message_of(e))
        context.set_trailing_metadata(grpc_trailers(e))
    except Exception:
        context.set_code(grpc.StatusCode.INTERNAL)
        context.set_details(INTERNAL_PROBLEM)
        raise


def _ask(request: Any, context: Context, spelling: dict[str, str]) -> Ask:
    sampling, stopping, output = request.sampling, request.stopping, request.output
    return Ask(
        temperature=_float(sampling, "temperature"),
        top_k=_optional(sampling, "top_k"),
        top_p=_float(sampling, "top_p"),
        min_p=_float(sampling, "min_p"),
        repetition_penalty=_float(sampling, "repetition_penalty"),
        presence_penalty=_float(sampling, "presence_penalty"),
        frequency_penalty=_float(sampling, "frequency_penalty"),
        logit_bias={token_id: _shortest(bias) for token_id, bias in sampling.logit_bias.items()},
        seed=_optional(sampling, "seed"),
        max_tokens=_optional(stopping, "max_tokens"),
        min_tokens=stopping.min_tokens,
        stop=tuple(stopping.stop),
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        n=1 if output.n == 0 else output.n,
        num_logprobs=_optional(output, "top_logprobs"),
        deadline_s=_deadline_s(request.timeout_ms, context),
        spelling={**_SPELLING, **spelling},
    )


def _optional(message: Any, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None


def _float(message: Any, field: str) -> float | None:
    return _shortest(getattr(message, field)) if message.HasField(field) else None


def _shortest(value: float) -> float:
    """The shortest decimal that a float32 stands for, so that 0.7 here samples as 0.7 over HTTP does."""
    return float(f"{value:.7g}")


def _deadline_s(timeout_ms: int, context: Context) -> float | None:
    """Unix time of the earlier of the field's and the call's own deadline."""
    timeouts_ms = [timeout_ms] if timeout_ms else []
    timeouts_ms += [
        int(value) for key, value in context.invocation_metadata() if key == TIMEOUT_KEY and value.isdigit()
    ]
    return time.time() + min(timeouts_ms) / 1000 if timeouts_ms else None


def _prompt(request: Any) -> tuple[str, str | Sequence[int]]:
    match request.WhichOneof("prompt"):
        case "text":
            return "text", request.text
        case "token_ids":
            return "token_ids", list(request.token_ids.ids)
        case _:
            raise RequestError("prompt", "needs text or token_ids")


def _conversation(request: Any) -> list[dict[str, str]]:
    if not request.messages:
        raise RequestError("messages", "must hold at least one message")
    for i, message in enumerate(request.messages):
        if message.role not in ROLES:
            raise RequestError(f"messages[{i}].role", f"must be one of {', '.join(ROLES)}")
    return [{"role": message.role, "content": message.content} for message in request.messages]


def _choice(index: int, answer: Answer, wants_logprobs: bool) -> Any:
    return pb.Choice(
        index=index,
        text=answer.text,
        token_ids=[token.token_id for token in answer.tokens],
        logprobs=_logprobs(answer.tokens) if wants_logprobs else (),
        finish_reason=_finish(answer.finish_reason),
    )


def _chunk(call: Call, delta: Delta, spec: GenerationSpec, is_last: bool) -> Any:
    return pb.GenerateChunk(
        id=call.id,
        index=delta.answer_idx,
        token_index=delta.token_index,
        token_ids=[token.token_id for token in delta.tokens],
        text=delta.text,
        logprobs=_logprobs(delta.tokens) if _wants_logprobs(spec) else (),
        finish_reason=_finish(delta.finish_reason),
        usage=_usage(spec, call) if is_last else None,
    )


def _logprobs(tokens: Sequence[SampledToken]) -> list[Any]:
    return [
        pb.TokenLogprob(
            logprob=token.logprob,
            top=[pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in token.top_logprobs],
        )
        for token in tokens
    ]


def _usage(spec: GenerationSpec, call: Call) -> Any:
    return pb.Usage(prompt_tokens=spec.prompt_tokens, completion_tokens=call.timer.generated_tokens)


def _wants_logprobs(spec: GenerationSpec) -> bool:
    return spec.sampling[0].num_logprobs >= 0


def _finish(reason: FinishReason | None) -> Any:
    return _FINISH[reason]
