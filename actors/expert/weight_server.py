"""Gives this rank's experts to peers, beside serving.

Owns a thread, its socket, and the copy of a piece out of a slot that may be written at any time. Knows nothing of
epochs: it gives whatever its worker holds.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
import zmq

from actors.expert.peer_messages import ASK_PIECE, PIECE_BYTES, PIECE_HEADER, PIECES_IN_FLIGHT, AskPiece, PieceHeader
from actors.expert.slots import Held, LayerSlots
from actors.expert.stored import Bytes, Part
from actors.wire import ChannelKeys, bind_any, open_socket

log = logging.getLogger("corral.weights")

POLL_MS = 100
IO_THREADS = 2  # takers are spread over them; they encrypt, where channels have keys
# A taker that asks for more than it takes in loses the rest; at most this much waits for it.
MAX_WAITING_PIECES = 2 * PIECES_IN_FLIGHT
MAX_ASK_BYTES = 4096  # a longer message is no request


class Giver(Protocol):
    """What the server asks of an ExpertWorker."""

    @property
    def weights_name(self) -> str: ...

    def find(self, layer: int, expert: int) -> tuple[LayerSlots, int, Held] | None: ...


class WeightServer:
    """Serves pieces of the experts that `get_giver()` holds at the time; None is a rank that holds nothing yet."""

    def __init__(self, host: str, get_giver: Callable[[], Giver | None], keys: ChannelKeys | None = None) -> None:
        self._host = host
        self._get_giver = get_giver
        self._keys = keys
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> str:
        """Binds to a free port of the host, serves in a thread, and returns the endpoint."""
        context: zmq.Context[Any] = zmq.Context(io_threads=IO_THREADS)
        socket = open_socket(context, zmq.ROUTER, self._keys, server=True)
        socket.setsockopt(zmq.SNDHWM, MAX_WAITING_PIECES)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_ASK_BYTES)
        endpoint = bind_any(socket, self._host)
        self._thread = threading.Thread(target=self._run, args=(context, socket), name="weight-server", daemon=True)
        self._thread.start()
        return endpoint

    def stop(self) -> None:
        """Ends the thread and closes the socket. Takers find out by their timeout. May be called twice."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, context: zmq.Context[Any], socket: zmq.Socket[Any]) -> None:
        copier = _Copier()
        try:
            while not self._stopping.is_set():
                if socket.poll(POLL_MS):
                    identity, *frames = socket.recv_multipart()
                    for answer in self._answer(frames, copier):
                        socket.send_multipart([identity, *answer], copy=False)
        finally:
            context.destroy(linger=0)

    def _answer(self, frames: list[bytes], copier: "_Copier") -> list[list[Any]]:
        """The header and the bytes, once; nothing for what is no request."""
        try:
            ask = ASK_PIECE.decode(b"".join(frames))
        except msgspec.DecodeError as e:
            log.warning("dropped a request for weights that cannot be read: %s", e)
            return []
        header, data = self._take(ask, copier)
        return [[PIECE_HEADER.encode(header), data.data]]

    def _take(self, ask: AskPiece, copier: "_Copier") -> tuple[PieceHeader, Bytes]:
        giver = self._get_giver()
        if giver is None or giver.weights_name != ask.weights:
            return _refusal(ask, "holds other weights")
        found = giver.find(ask.layer, ask.expert)
        if found is None:
            return _refusal(ask, f"does not hold expert {ask.expert} of layer {ask.layer}")
        layer_slots, slot, held = found
        parts = layer_slots.parts(slot)
        if not _is_within(ask, parts):
            return _refusal(ask, "was asked for bytes that are not there")
        part = parts[ask.part]
        data = copier.copy(part, ask.begin, ask.end)
        # Whoever writes a slot first says that it holds nothing. As that was not so before the copy and is not so
        # after it, no byte of the copy is of another expert.
        if layer_slots.held(slot) is not held:
            return _refusal(ask, f"does not hold expert {ask.expert} of layer {ask.layer} any more")
        header = PieceHeader(ask=ask.ask, dtype=part.dtype, shape=part.shape, checksum=held.proof.checksum)
        return header, data


def _refusal(ask: AskPiece, problem: str) -> tuple[PieceHeader, Bytes]:
    return PieceHeader(ask=ask.ask, problem=problem), np.empty(0, np.uint8)


def _is_within(ask: AskPiece, parts: tuple[Part, ...]) -> bool:
    if not 0 <= ask.part < len(parts):
        return False
    part = parts[ask.part]
    is_stretch = 0 <= ask.begin < ask.end <= part.num_bytes and ask.end - ask.begin <= PIECE_BYTES
    return is_stretch and ask.begin % part.stored.itemsize == ask.end % part.stored.itemsize == 0


class _Copier:
    """Copies stored bytes to memory of their own: from a GPU through pinned memory, on a stream that steps do not
    wait for. Numpy copies, for it neither holds the GIL meanwhile nor starts threads.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pinned = torch.empty(0, dtype=torch.uint8)

    def copy(self, part: Part, begin: int, end: int) -> Bytes:
        if part.held.is_cuda:
            return self._download(part, begin, end).copy()
        data: Bytes = part.read(begin, end).numpy()
        return data.copy() if part.held.dtype == part.stored else data  # else it was narrowed into memory of its own

    def _download(self, part: Part, begin: int, end: int) -> Bytes:
        if self._stream is None:
            self._stream = torch.cuda.Stream(part.held.device)
        with torch.cuda.stream(self._stream):
            if not self._pinned.numel():
                self._pinned = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
            pinned = self._pinned[: end - begin]
            pinned.copy_(part.read(begin, end), non_blocking=True)
        self._stream.synchronize()
        data: Bytes = pinned.numpy()
        return data
