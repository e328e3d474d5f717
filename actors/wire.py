"""Messages over ZeroMQ sockets, encoded as msgpack.

Owns framing, the codec of each direction and the sockets' options (bounded queues, dead peers noticed by the io
thread). Knows nothing of what the messages mean.
"""

from typing import Any, Generic, TypeVar

import msgspec
import zmq

from actors.types import FromRank, FromRouter, ToRank, ToRouter

T = TypeVar("T")

HEARTBEAT_MS = 1000
HEARTBEAT_TIMEOUT_MS = 4000
HIGH_WATER_MESSAGES = 100_000


class Codec(Generic[T]):
    """Encodes and decodes the messages of one direction."""

    def __init__(self, message_type: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(message_type)

    def encode(self, message: T) -> bytes:
        return self._encoder.encode(message)

    def decode(self, data: bytes | memoryview) -> T:
        return self._decoder.decode(data)


TO_RANK: Codec[ToRank] = Codec(ToRank)
FROM_RANK: Codec[FromRank] = Codec(FromRank)
TO_ROUTER: Codec[ToRouter] = Codec(ToRouter)
FROM_ROUTER: Codec[FromRouter] = Codec(FromRouter)


def open_socket(context: zmq.Context[Any], kind: int) -> zmq.Socket[Any]:
    """A socket that never blocks at close and whose io thread notices a dead peer within 4 s."""
    socket: zmq.Socket[Any] = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MESSAGES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    return socket


def bind_any(socket: zmq.Socket[Any], host: str) -> str:
    """Binds to a free TCP port of `host` and returns the endpoint that peers connect to."""
    port = socket.bind_to_random_port(f"tcp://{host}")
    return f"tcp://{host}:{port}"
