"""Messages over ZeroMQ sockets, encoded as msgpack.

Owns framing, the codec of each direction, the sockets' options (bounded queues, dead peers noticed by the io thread)
and who may connect to them. Knows nothing of what the messages mean, nor where a pipeline keeps its secret.
"""

import errno
import hmac
import logging
import threading
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec
import zmq
from zmq.utils import z85

from actors.types import FromRank, FromRouter, ToRank, ToRouter

log = logging.getLogger("corral.wire")

T = TypeVar("T")

HEARTBEAT_MS = 1000
HEARTBEAT_TIMEOUT_MS = 4000
HIGH_WATER_MESSAGES = 100_000
MAX_FRAME_BYTES = 1 << 30  # whoever is not let in yet cannot make us take more
SECRET_BYTES = 32

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # where libzmq asks. Source: https://rfc.zeromq.org/spec/27/
_ZAP_DOMAIN = b"corral"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPair:
    """A Curve25519 key pair as ZeroMQ spells it: 40 characters of Z85 each."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelKeys:
    """What both ends of a pipeline's channels prove that they know: its secret.

    Whoever listens has the server's pair, whoever connects has the client's. Each knows the other's public key
    beforehand, so both ends are authenticated and all that travels is encrypted, with keys of each connection's own.
    """

    server: KeyPair
    client: KeyPair

    @staticmethod
    def from_secret(secret: bytes) -> "ChannelKeys":
        """Every process that knows the pipeline's secret derives the same keys.

        `secret` must be random. Raises ValueError if it is shorter than SECRET_BYTES.
        """
        if len(secret) < SECRET_BYTES:
            raise ValueError(f"a secret has at least {SECRET_BYTES} bytes; this one has {len(secret)}")
        return ChannelKeys(
            server=_derive(secret, b"corral channel server"), client=_derive(secret, b"corral channel client")
        )


def _derive(secret: bytes, purpose: bytes) -> KeyPair:
    """One block of HKDF-Expand. Source: RFC 5869, section 2.3."""
    key = z85.encode(hmac.digest(secret, purpose + b"\x01", "sha256"))
    return KeyPair(public=zmq.curve_public(key), secret=key)


def open_socket(
    context: zmq.Context[Any], kind: int, keys: ChannelKeys | None = None, server: bool = False
) -> zmq.Socket[Any]:
    """A socket that never blocks at close and whose io thread notices a dead peer within 4 s.

    With `keys` it speaks only to sockets of the same keys; then one side of each channel, the one that binds, is its
    `server`. All servers of a context have the same keys. Without keys, anybody may speak, and it is not encrypted.
    """
    socket: zmq.Socket[Any] = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MESSAGES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    if keys is not None and server:
        _post_doorkeeper(context, keys)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.server.secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # should the doorkeeper be gone, nobody is let in
    elif keys is not None:
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server.public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.client.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.client.secret)
    return socket


def bind_any(socket: zmq.Socket[Any], host: str) -> str:
    """Binds to a free TCP port of `host` and returns the endpoint that peers connect to."""
    port = socket.bind_to_random_port(f"tcp://{host}")
    return f"tcp://{host}:{port}"


def _post_doorkeeper(context: zmq.Context[Any], keys: ChannelKeys) -> None:
    """Sees to it that a thread answers libzmq, for all server sockets of `context`, whether a client's key is ours.

    libzmq checks that a client has the secret of the key that it shows, but leaves it to us which keys are welcome.
    """
    # A shadow's sockets are unknown to `context.destroy`, which would close this one under its thread's feet.
    door: zmq.Socket[Any] = zmq.Context.shadow(context).socket(zmq.REP)
    door.setsockopt(zmq.LINGER, 0)
    try:
        door.bind(_ZAP_ENDPOINT)
    except zmq.ZMQError as e:
        door.close()
        if e.errno != errno.EADDRINUSE:
            raise
        return  # this context has one
    threading.Thread(target=_keep_door, args=(door, keys.client.public), name="doorkeeper", daemon=True).start()


def _keep_door(door: zmq.Socket[Any], welcome: bytes) -> None:
    """Answers until the context is terminated."""
    try:
        while True:
            version, request_id, _, address, _, mechanism, *credentials = door.recv_multipart()
            known = mechanism == b"CURVE" and hmac.compare_digest(z85.encode(credentials[0]), welcome)
            if not known:
                log.warning("refused a connection from %s: it does not know the pipeline's secret", address.decode())
            status = (b"200", b"OK") if known else (b"400", b"unknown key")
            door.send_multipart([version, request_id, *status, b"", b""])
    except zmq.ContextTerminated:
        door.close()
