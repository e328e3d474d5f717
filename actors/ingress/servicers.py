"""Servicer functions for Serve's `grpc_options.grpc_servicer_functions`.

Owns what happens to a call between gRPC and Serve's routing, in whichever process Serve runs its gRPC server (its
proxy, or in HAProxy mode every ingress replica). Needs no Ray: it uses the server that it is given. Measured in
docs/decisions/0001-serve-front.md.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from actors.ingress.grpc_front import TIMEOUT_KEY
from protos import inference_pb2


def add_inference(servicer: Any, server: Any) -> None:
    """Registers corral.v1.Inference, routed to the ingress deployment's methods."""
    _add_service(inference_pb2.DESCRIPTOR.services_by_name["Inference"], servicer, server)


def add_health(servicer: Any, server: Any) -> None:
    """Registers grpc.health.v1.Health, routed to the ingress deployment, which knows whether the router serves."""
    _add_service(health_pb2.DESCRIPTOR.services_by_name["Health"], servicer, server)


class CallContext:
    """A servicer's context whose metadata also tells what is left of the call's deadline.

    Serve hands metadata on to the replica, but not the deadline.
    """

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        metadata = tuple((k, v) for k, v in self._context.invocation_metadata() or () if k != TIMEOUT_KEY)
        remaining_s = self._context.time_remaining()
        if remaining_s is None or remaining_s > 2**32:  # no deadline, in grpcio's several spellings
            return metadata
        return (*metadata, (TIMEOUT_KEY, str(max(0, round(remaining_s * 1000)))))


def _add_service(service: ServiceDescriptor, servicer: Any, server: Any) -> None:
    """Registers every method of `service`. On Serve's server, its handler factory is wrapped for the while."""
    make_handler = server.service_handler_factory

    def make_wrapped(service_method: str, streaming_type: Any) -> Callable[..., Any]:
        method = service.methods_by_name[service_method.rpartition("/")[2]]
        handler = make_handler(service_method=service_method, streaming_type=streaming_type)
        return _wrap_stream(handler, method) if streaming_type.value == "unary_stream" else _wrap_unary(handler, method)

    handlers = {method.name: _placeholder(servicer, method) for method in service.methods}
    server.service_handler_factory = make_wrapped
    try:
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
    finally:
        server.service_handler_factory = make_handler


def _placeholder(servicer: Any, method: MethodDescriptor) -> grpc.RpcMethodHandler:
    """A handler whose behaviour Serve will replace. Requests stay bytes, so that broken ones can be answered well."""
    kind = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
    return kind(getattr(servicer, method.name), request_deserializer=bytes, response_serializer=bytes)


def _wrap_unary(handler: Callable[..., Any], method: MethodDescriptor) -> Callable[..., Any]:
    async def unary(data: bytes, context: Any) -> bytes:
        request = _parse(data, method, context)
        return b"" if request is None else await handler(request, CallContext(context))

    return unary


def _wrap_stream(handler: Callable[..., Any], method: MethodDescriptor) -> Callable[..., Any]:
    async def stream(data: bytes, context: Any) -> AsyncGenerator[bytes, None]:
        request = _parse(data, method, context)
        if request is None:
            return
        ready: asyncio.Queue[bytes | None] = asyncio.Queue()
        pump = asyncio.create_task(_pump(handler(request, CallContext(context)), ready))
        context.add_done_callback(lambda _: pump.cancel())
        try:
            while (message := await ready.get()) is not None:
                if message:  # an empty one carried a status and its trailing metadata (grpc_front.py); nothing else
                    yield message
            await pump
        finally:
            pump.cancel()

    return stream


async def _pump(messages: AsyncIterator[bytes], ready: "asyncio.Queue[bytes | None]") -> None:
    """Takes messages as they come, then None.

    Why a task of its own: Serve's proxy passes a cancellation on to the replica only if it comes while the proxy waits
    for the replica. One that came while a message was being sent was lost, and the request ran to its end. This task
    does nothing but wait for the replica. The queue is no new backlog: Serve has no flow control to replicas.
    """
    try:
        async for message in messages:
            ready.put_nowait(message)
    finally:
        ready.put_nowait(None)


def _parse(data: bytes, method: MethodDescriptor, context: Any) -> Message | None:
    """The request, or None with INVALID_ARGUMENT set where the bytes are not one."""
    try:
        return GetMessageClass(method.input_type).FromString(data)
    except DecodeError:
        context.set_code(grpc.StatusCode.INVALID_ARGUMENT)
        context.set_details(f"request: is not a {method.input_type.full_name}")
        return None
