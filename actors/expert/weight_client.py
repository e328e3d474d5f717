"""Takes experts from peers into slots, beside serving.

Owns the choice of a peer for each expert, the requests in flight and every timeout. What a finished expert is worth is
for the caller to say (its checksum, where it lies). An expert that does not come is a failure of that copy only.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch
import zmq
from torch import Tensor

from actors.expert.peer_messages import ASK_PIECE, PIECE_BYTES, PIECE_HEADER, PIECES_IN_FLIGHT, AskPiece, PieceHeader
from actors.expert.stored import Part
from actors.types import SlotSource
from actors.wire import ChannelKeys, open_socket

log = logging.getLogger("corral.weights")

STALL_S = 2.0  # a peer that sends nothing for this long, though connected, is given up
_HUNG_UP = zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
POLL_MS = 100
MAX_IO_THREADS = 4  # they decrypt, which is the slowest part where channels have keys


@dataclass(frozen=True, slots=True)
class Want:
    """A slot that shall hold an expert."""

    layer: int
    slot: int
    expert: int


@dataclass(slots=True)
class Copy:
    """An expert on its way from a peer into the parts of a slot."""

    want: Want
    parts: tuple[Part, ...]
    num_missing: int = 0  # pieces
    checksum: int | None = None  # as the peer states it
    is_over: bool = False

    def __post_init__(self) -> None:
        self.num_missing = sum(1 for _ in self.pieces())

    def pieces(self) -> Iterator["_Piece"]:
        for idx, part in enumerate(self.parts):
            for begin in range(0, part.num_bytes, PIECE_BYTES):
                yield _Piece(self, idx, begin, min(begin + PIECE_BYTES, part.num_bytes))


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    copy: Copy
    part: int
    begin: int
    end: int


def choose_sources(wants: Iterable[Want], sources: Sequence[SlotSource]) -> dict[str, list[Want]]:
    """By endpoint, what to take from it: of the peers that have an expert, the one that gives the fewest.

    Experts that nobody has are left out.
    """
    holders: dict[tuple[int, int], list[str]] = {}
    for source in sources:
        for layer, experts in source.experts.items():
            for expert in experts:
                holders.setdefault((layer, expert), []).append(source.endpoint)
    load: Counter[str] = Counter()
    chosen: dict[str, list[Want]] = {}
    for want in wants:
        endpoints = holders.get((want.layer, want.expert))
        if endpoints:
            endpoint = min(endpoints, key=lambda endpoint: load[endpoint])
            load[endpoint] += 1
            chosen.setdefault(endpoint, []).append(want)
    return chosen


class WeightClient:
    """Copies from several peers at once. Used by one thread, once.

    `weights` names what is asked for (see AskPiece). `accept(want, checksum)` is called with each expert that lies in
    its slot, all written; it says whether it is the right one. `progress` gets the bytes of each piece that came.
    """

    def __init__(
        self,
        weights: str,
        accept: Callable[[Want, int], bool],
        progress: Callable[[int], None],
        keys: ChannelKeys | None = None,
        stall_s: float = STALL_S,
    ) -> None:
        self._weights = weights
        self._accept = accept
        self._progress = progress
        self._keys = keys
        self._stall_s = stall_s
        self._writer = _Writer()

    def fetch(self, copies: dict[str, list[Copy]]) -> list[Want]:
        """Copies from each endpoint what is listed for it, and returns what did not come whole; says why in the log.

        A peer is given up when its connection breaks or cannot be made, and when it is silent for `stall_s`.
        """
        context: zmq.Context[Any] = zmq.Context(io_threads=max(1, min(len(copies), MAX_IO_THREADS)))
        poller = zmq.Poller()
        try:
            talks = [_Talk(endpoint, open_socket(context, zmq.DEALER, self._keys), c) for endpoint, c in copies.items()]
            for talk in talks:
                talk.start(self._weights)
                poller.register(talk.socket, zmq.POLLIN)
                poller.register(talk.hung_up, zmq.POLLIN)
            while any(talk.asked for talk in talks):
                ready, now_s = dict(poller.poll(POLL_MS)), time.monotonic()
                for talk in talks:
                    if talk.socket in ready:
                        self._take_in(talk)
                    elif talk.asked and talk.hung_up in ready:
                        talk.give_up("is not reached")
                    elif talk.asked and now_s - talk.heard_s > self._stall_s:
                        talk.give_up(f"was silent for {self._stall_s:g} s")
        finally:
            context.destroy(linger=0)
        return [want for talk in talks for want in talk.failed]

    def _take_in(self, talk: "_Talk") -> None:
        """One answer: writes its piece, and judges the expert if that was its last one."""
        header_frame, *data_frames = talk.socket.recv_multipart(copy=False)
        talk.heard_s = time.monotonic()
        try:
            header = PIECE_HEADER.decode(header_frame.buffer)
        except msgspec.DecodeError as e:
            talk.give_up(f"does not speak our language: {e}")
            return
        piece = talk.asked.pop(header.ask, None)
        if piece is None:
            return
        copy = piece.copy
        if not copy.is_over:
            data = data_frames[0].buffer if data_frames else memoryview(b"")
            problem = _problem_of(header, piece, data)
            if problem:
                talk.fail(copy, problem)
            else:
                self._write(talk, header, piece, data)
        talk.ask_more(self._weights)

    def _write(self, talk: "_Talk", header: PieceHeader, piece: _Piece, data: memoryview) -> None:
        copy = piece.copy
        self._writer.write(copy.parts[piece.part], piece.begin, data)
        self._progress(len(data))
        copy.checksum = header.checksum
        copy.num_missing -= 1
        if copy.num_missing:
            return
        copy.is_over = True
        self._writer.finish()
        if not self._accept(copy.want, header.checksum):
            talk.fail(copy, "gave bytes that are not those it has")


def _problem_of(header: PieceHeader, piece: _Piece, data: memoryview) -> str:
    """Why the answer cannot be used; empty if it can."""
    part = piece.copy.parts[piece.part]
    if header.problem:
        return header.problem
    if (header.dtype, header.shape) != (part.dtype, part.shape):
        return f"has {header.dtype}{header.shape}, and here it is {part.dtype}{part.shape}"
    if len(data) != piece.end - piece.begin:
        return f"gave {len(data)} bytes instead of {piece.end - piece.begin}"
    if piece.copy.checksum not in (None, header.checksum):
        return "changed it meanwhile"
    return ""


@dataclass(slots=True)
class _Talk:
    """What goes on with one peer: at most PIECES_IN_FLIGHT requests are unanswered."""

    endpoint: str
    socket: zmq.Socket[Any]
    copies: list[Copy]
    asked: dict[int, _Piece] = field(default_factory=dict)
    failed: list[Want] = field(default_factory=list)
    heard_s: float = 0.0
    hung_up: zmq.Socket[Any] = field(init=False)
    _waiting: deque[_Piece] = field(default_factory=deque)
    _next_ask: int = 0

    def start(self, weights: str) -> None:
        self.heard_s = time.monotonic()
        self.hung_up = self.socket.get_monitor_socket(_HUNG_UP)
        self._waiting.extend(piece for copy in self.copies for piece in copy.pieces())
        self.socket.connect(self.endpoint)
        self.ask_more(weights)

    def ask_more(self, weights: str) -> None:
        while self._waiting and len(self.asked) < PIECES_IN_FLIGHT:
            piece = self._waiting.popleft()
            if piece.copy.is_over:
                continue
            want = piece.copy.want
            self.asked[self._next_ask] = piece
            message = AskPiece(
                ask=self._next_ask,
                weights=weights,
                layer=want.layer,
                expert=want.expert,
                part=piece.part,
                begin=piece.begin,
                end=piece.end,
            )
            self.socket.send(ASK_PIECE.encode(message))
            self._next_ask += 1

    def fail(self, copy: Copy, problem: str) -> None:
        copy.is_over = True
        self.failed.append(copy.want)
        where = f"expert {copy.want.expert} of layer {copy.want.layer}"
        log.warning("%s does not come from %s: the peer %s", where, self.endpoint, problem)

    def give_up(self, problem: str) -> None:
        """The peer gives nothing more. One line in the log, however many experts that is."""
        lost = [copy for copy in self.copies if not copy.is_over]
        log.warning("%d experts do not come from %s: the peer %s", len(lost), self.endpoint, problem)
        for copy in lost:
            copy.is_over = True
            self.failed.append(copy.want)
        self.asked.clear()
        self._waiting.clear()


class _Writer:
    """Writes pieces to their final place: to a GPU through pinned memory, on the current stream."""

    def __init__(self) -> None:
        self._pinned: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    def write(self, part: Part, begin: int, data: memoryview) -> None:
        values = np.frombuffer(data, np.uint8)
        if part.held.is_cuda:
            part.write(begin, self._upload(values, part.held.device))
        elif part.held.dtype == part.stored:
            # Numpy copies without torch's threads, which would take the cores from steps.
            np.copyto(part.read(begin, begin + len(values)).numpy(), values)
        else:
            part.write(begin, torch.from_numpy(values.copy()))

    def _upload(self, values: Any, device: torch.device) -> Tensor:
        if self._pinned is None or self._stream is None:
            self._pinned = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
            self._stream = torch.cuda.current_stream(device)
        self._stream.synchronize()  # the piece before has left the pinned memory
        pinned = self._pinned[: len(values)]
        np.copyto(pinned.numpy(), values)
        return pinned.to(device, non_blocking=True)

    def finish(self) -> None:
        """Returns when all that was written lies in its place."""
        if self._stream is not None:
            self._stream.synchronize()
