"""The one table from errors to status codes, for both fronts.

Owns which HTTP status, OpenAI error type and code, and gRPC status each error of `actors/errors.py` gets, and the retry
hints. Knows nothing of requests.
"""

import asyncio
import math
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from actors.errors import (
    BodyTooLargeError,
    ContextLengthError,
    CorralError,
    DeadlineError,
    GivenUpError,
    ModelNotFoundError,
    OverloadedError,
    RequestCancelledError,
    RequestError,
    UnauthenticatedError,
    UnavailableError,
)
from actors.types import ErrorInfo

INTERNAL_PROBLEM = "internal error"  # what a client hears of an error that nobody meant; the log has the rest


@dataclass(frozen=True, slots=True)
class Status:
    """How one class of errors looks from outside. `openai_type` and `openai_code` as api.openai.com spells them."""

    http: int
    openai_type: str
    openai_code: str | None
    grpc: grpc.StatusCode


# Looked up by the error's class, then its bases: the first that is here.
TABLE: dict[type[BaseException], Status] = {
    BodyTooLargeError: Status(413, "invalid_request_error", "request_too_large", grpc.StatusCode.INVALID_ARGUMENT),
    ContextLengthError: Status(
        400, "invalid_request_error", "context_length_exceeded", grpc.StatusCode.INVALID_ARGUMENT
    ),
    RequestError: Status(400, "invalid_request_error", None, grpc.StatusCode.INVALID_ARGUMENT),
    UnauthenticatedError: Status(401, "invalid_request_error", "invalid_api_key", grpc.StatusCode.UNAUTHENTICATED),
    ModelNotFoundError: Status(404, "invalid_request_error", "model_not_found", grpc.StatusCode.NOT_FOUND),
    OverloadedError: Status(429, "rate_limit_error", "rate_limit_exceeded", grpc.StatusCode.RESOURCE_EXHAUSTED),
    DeadlineError: Status(504, "timeout_error", "deadline_exceeded", grpc.StatusCode.DEADLINE_EXCEEDED),
    RequestCancelledError: Status(499, "cancelled_error", "request_cancelled", grpc.StatusCode.CANCELLED),
    asyncio.CancelledError: Status(499, "cancelled_error", "request_cancelled", grpc.StatusCode.CANCELLED),
    GeneratorExit: Status(499, "cancelled_error", "request_cancelled", grpc.StatusCode.CANCELLED),  # the reader went
    GivenUpError: Status(500, "server_error", "request_given_up", grpc.StatusCode.INTERNAL),
    UnavailableError: Status(503, "service_unavailable_error", "service_unavailable", grpc.StatusCode.UNAVAILABLE),
    BaseException: Status(500, "server_error", "internal_error", grpc.StatusCode.INTERNAL),
}


def status_of(error: BaseException) -> Status:
    """The table's row for `error`."""
    return next(TABLE[base] for base in type(error).__mro__ if base in TABLE)


def outcome_of(error: BaseException | None) -> str:
    """One word for metrics and logs: "ok", or the error's gRPC status in lower case."""
    return "ok" if error is None else status_of(error).grpc.name.lower()


def retry_after_s(error: BaseException) -> float | None:
    """Seconds after which trying again is right, or None where it never is."""
    return error.retry_after_s if isinstance(error, OverloadedError | UnavailableError) else None


def message_of(error: BaseException) -> str:
    """What the client is told. Errors nobody raised on purpose say nothing of our insides."""
    return str(error) if isinstance(error, CorralError) else INTERNAL_PROBLEM


def openai_error(error: BaseException) -> dict[str, Any]:
    """OpenAI's error body."""
    status = status_of(error)
    param = error.field if isinstance(error, RequestError) else "model" if status.http == 404 else None
    return {
        "error": {
            "message": message_of(error),
            "type": status.openai_type,
            "param": param,
            "code": status.openai_code,
        }
    }


def http_headers(error: BaseException) -> dict[str, str]:
    """Headers beside the error body: Retry-After in whole seconds, at least 1, and how to authenticate.

    Source: RFC 9110, sections 10.2.3 and 11.6.1.
    """
    if isinstance(error, UnauthenticatedError):
        return {"www-authenticate": "Bearer"}
    delay_s = retry_after_s(error)
    return {} if delay_s is None else {"retry-after": str(max(1, math.ceil(delay_s)))}


def grpc_trailers(error: BaseException) -> list[tuple[str, str | bytes]]:
    """Trailing metadata beside code and details: the standard retry delay and, in grpc-status-details-bin, a
    google.rpc.Status with RetryInfo or BadRequest.

    Source: grpc proposals A6 (grpc-retry-pushback-ms), google/rpc/error_details.proto.
    """
    details: list[any_pb2.Any] = []
    trailers: list[tuple[str, str | bytes]] = []
    delay_s = retry_after_s(error)
    if delay_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(delay_s * 1000))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
        trailers.append(("grpc-retry-pushback-ms", str(round(delay_s * 1000))))
    if isinstance(error, RequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.problem)
        details.append(_pack(error_details_pb2.BadRequest(field_violations=[violation])))
    if details:
        rich = status_pb2.Status(code=status_of(error).grpc.value[0], message=message_of(error), details=details)
        trailers.append(("grpc-status-details-bin", rich.SerializeToString()))
    return trailers


def error_from_wire(info: ErrorInfo) -> CorralError:
    """The router's error as an exception again. A kind that is unknown here is an UnavailableError."""
    match info.kind:
        case "RequestError":
            return RequestError("request", info.problem)
        case "OverloadedError":
            return OverloadedError(info.problem, info.retry_after_s)
        case "DeadlineError":
            return DeadlineError(info.problem)
        case "RequestCancelledError":
            return RequestCancelledError(info.problem)
        case "GivenUpError":
            return GivenUpError(info.problem)
        case _:
            return UnavailableError(info.problem, info.retry_after_s or 1.0)


def _pack(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
