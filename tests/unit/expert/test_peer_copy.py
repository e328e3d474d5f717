"""Experts that come from peers: the checkpoint's bytes, or the checkpoint itself when anything goes wrong."""

import logging
import re
import resource
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import zmq

from actors.expert import weight_client, weight_server
from actors.expert.peer_messages import ASK_PIECE, PIECE_BYTES, PIECE_HEADER, PIECES_IN_FLIGHT, AskPiece
from actors.expert.slots import Held, LayerSlots
from actors.expert.stored import Part
from actors.expert.weight_client import STALL_S, Copy, Want, WeightClient, choose_sources
from actors.expert.weight_server import MAX_WAITING_PIECES, WeightServer
from actors.expert.worker import ExpertWorker
from actors.types import EMPTY_SLOT, SlotProof, SlotSource
from actors.wire import ChannelKeys, bind_any, open_socket

if TYPE_CHECKING:
    from conftest import Setup

HOST = "127.0.0.1"
SOON_MS = 5000
ALL = {1: (0, 1, 2, 3)}
MakeSetup = Callable[..., "Setup"]
Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server for a giver and returns its endpoint; stops all of them."""
    servers: list[WeightServer] = []

    def start(giver: Any, keys: ChannelKeys | None = None) -> str:
        servers.append(WeightServer(HOST, lambda: giver, keys))
        return servers[-1].start()

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dozens of pieces per expert, though experts are small."""
    monkeypatch.setattr(weight_client, "PIECE_BYTES", 4096)


def _source(endpoint: str, experts: dict[int, tuple[int, ...]] = ALL) -> SlotSource:
    return SlotSource(endpoint=endpoint, experts=experts)


def _bytes(worker: ExpertWorker, layer: int, slot: int) -> list[bytes]:
    return [part.read(0, part.num_bytes).numpy().tobytes() for part in worker._layers[layer].parts(slot)]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return f"tcp://{HOST}:{probe.getsockname()[1]}"


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        ("fused", torch.float32),
        ("fused", torch.bfloat16),
        ("fp8", torch.float32),
        ("fp8", torch.bfloat16),
        ("int4", torch.bfloat16),
    ],
)
def test_copies_are_the_checkpoints_bytes(
    setup: MakeSetup, serve: Serve, small_pieces: None, stored: str, dtype: torch.dtype
) -> None:
    ours = setup(stored, dtype)
    worker, origin = ours.worker()
    in_use = {1: (0,)}
    worker.change(in_use, {})
    giver = ours.loaded({1: (3, 1, 2)})
    worker.change({1: (0, 2, EMPTY_SLOT, 3)}, in_use, [_source(serve(giver))])
    assert origin.asked == [(1, 0)]  # what came later came from the peer
    read = ours.loaded({1: (0, 2, EMPTY_SLOT, 3)})
    for slot in (0, 1, 3):
        assert _bytes(worker, 1, slot) == _bytes(read, 1, slot)
    assert worker.proofs(ALL | {1: (0, 2, EMPTY_SLOT, 3)}) == read.proofs({1: (0, 2, EMPTY_SLOT, 3)})


def test_several_peers_and_the_checkpoint_together(setup: MakeSetup, serve: Serve, small_pieces: None) -> None:
    ours = setup()
    worker, origin = ours.worker()
    told: list[tuple[int, int]] = []
    sources = [
        _source(serve(ours.loaded({1: (0, 1)})), {1: (0, 1)}),
        _source(serve(ours.loaded({3: (2,)})), {3: (2,)}),
    ]
    slots = {1: (1, 3, 0), 3: (2,)}
    worker.change(slots, {}, sources, lambda done, total: told.append((done, total)))
    assert origin.asked == [(1, 3)]
    assert worker.proofs(slots) == ours.loaded(slots).proofs(slots)
    assert told[-1] == (worker.weight_bytes, worker.weight_bytes)


def test_channels_with_the_pipelines_keys(setup: MakeSetup, serve: Serve) -> None:
    ours = setup()
    keys, others = (ChannelKeys.from_secret(secrets.token_bytes(32)) for _ in range(2))
    endpoint = serve(ours.loaded(ALL), keys)
    for taker_keys, reads in ((keys, []), (others, [(1, 2)])):
        worker, origin = ours.worker()
        worker._keys = taker_keys
        worker.change({1: (2,)}, {}, [_source(endpoint)])
        assert origin.asked == reads
        assert worker.holds({1: (2,)})


def test_sources_take_turns() -> None:
    wants = [Want(1, slot, expert) for slot, expert in enumerate((0, 1, 2, 3, 7))] + [Want(3, 0, 0)]
    sources = [_source("a", {1: (0, 1, 2, 3)}), _source("b", {1: (3, 2, 1, 0)}), _source("c", {1: (3,), 3: (1,)})]
    chosen = choose_sources(wants, sources)
    assert {endpoint: [want.expert for want in some] for endpoint, some in chosen.items()} == {
        "a": [0, 2], "b": [1], "c": [3]
    }  # fmt: skip


# --- what goes wrong ------------------------------------------------------------------------------------------------


def _falls_back(ours: "Setup", sources: list[SlotSource]) -> None:
    """Expert 2 comes from the checkpoint though a peer was asked for it."""
    worker, origin = ours.worker()
    worker.change({1: (2,)}, {}, sources)
    assert origin.asked == [(1, 2)]
    assert worker.proofs({1: (2,)}) == ours.loaded({1: (2,)}).proofs({1: (2,)})


def test_a_peer_whose_memory_went_bad(
    setup: MakeSetup, serve: Serve, small_pieces: None, caplog: pytest.LogCaptureFixture
) -> None:
    ours = setup()
    giver = ours.loaded(ALL)
    giver._layers[1].weights.down_SDF[2].view(-1).view(torch.uint8)[-2] ^= 16
    with caplog.at_level(logging.WARNING):
        _falls_back(ours, [_source(serve(giver))])
    assert re.search(r"expert 2 of layer 1 does not come from tcp\S+ the peer gave bytes that are not", caplog.text)


def test_a_piece_that_is_garbled_on_the_way(
    setup: MakeSetup, serve: Serve, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the 7th piece, only one bit; the other expert of the same peer comes whole."""
    pieces: list[int] = []
    real = weight_server._Copier.copy

    def copy(self: Any, part: Part, begin: int, end: int) -> Any:
        data = real(self, part, begin, end)
        pieces.append(begin)
        if len(pieces) == 7:
            data[len(data) // 2] ^= 1
        return data

    monkeypatch.setattr(weight_server._Copier, "copy", copy)
    ours = setup()
    worker, origin = ours.worker()
    worker.change({1: (2, 3)}, {}, [_source(serve(ours.loaded(ALL)))])
    assert origin.asked == [(1, 2)]
    assert worker.proofs({1: (2, 3)}) == ours.loaded({1: (2, 3)}).proofs({1: (2, 3)})


@pytest.mark.parametrize("problem", ["holds other weights", "does not hold expert 2", "holds nothing"])
def test_a_peer_that_cannot_give(
    setup: MakeSetup, serve: Serve, caplog: pytest.LogCaptureFixture, problem: str
) -> None:
    givers = {
        "holds other weights": setup(dtype=torch.bfloat16).loaded(ALL),
        "does not hold expert 2": setup().loaded({1: (0, 1)}),
        "holds nothing": None,
    }
    with caplog.at_level(logging.WARNING):
        _falls_back(setup(), [_source(serve(givers[problem]))])
    assert ("holds other weights" if problem == "holds nothing" else problem) in caplog.text


def test_a_dead_peer_is_given_up_at_once(setup: MakeSetup) -> None:
    """Nobody listens: refused connections are enough, the timeout is not waited for."""
    began_s = time.monotonic()
    _falls_back(setup(), [_source(_free_port())])
    assert time.monotonic() - began_s < STALL_S


def test_a_peer_that_dies_meanwhile(
    setup: MakeSetup, serve: Serve, small_pieces: None, caplog: pytest.LogCaptureFixture
) -> None:
    ours = setup()
    giver = _Scripted(ours.loaded(ALL))
    server = WeightServer(HOST, lambda: giver)
    giver.at_piece[5] = server._stopping.set
    endpoint = server.start()
    with caplog.at_level(logging.WARNING):
        _falls_back(ours, [_source(endpoint)])
    server.stop()
    assert giver.num_pieces < 10  # of 18
    assert "is not reached" in caplog.text


def test_a_silent_peer_is_given_up_in_time(setup: MakeSetup, small_pieces: None) -> None:
    """It is connected and says nothing; it is asked for no more than what may be in flight."""
    ours = setup()
    worker = ours.loaded({1: (EMPTY_SLOT, EMPTY_SLOT)})
    copies = [Copy(Want(1, slot, slot), worker._layers[1].parts(slot)) for slot in range(2)]
    context: zmq.Context[Any] = zmq.Context()
    silent = open_socket(context, zmq.ROUTER)
    client = WeightClient(worker.weights_name, lambda want, checksum: True, lambda num: None, stall_s=0.2)
    began_s = time.monotonic()
    failed = client.fetch({bind_any(silent, HOST): copies})
    assert failed == [Want(1, 0, 0), Want(1, 1, 1)]
    assert 0.2 <= time.monotonic() - began_s < 2.0
    asked = []
    while silent.poll(0):
        asked.append(ASK_PIECE.decode(silent.recv_multipart()[1]))
    assert len(asked) == PIECES_IN_FLIGHT < sum(copy.num_missing for copy in copies)
    assert [ask.begin for ask in asked] == [4096 * i for i in range(PIECES_IN_FLIGHT)]
    context.destroy(linger=0)


def test_a_peer_that_speaks_another_language(setup: MakeSetup) -> None:
    context: zmq.Context[Any] = zmq.Context()
    peer = open_socket(context, zmq.ROUTER)
    endpoint = bind_any(peer, HOST)

    def babble() -> None:
        identity, _ = peer.recv_multipart()
        peer.send_multipart([identity, b"\xc1", b"?"])

    thread = threading.Thread(target=babble)
    thread.start()
    _falls_back(setup(), [_source(endpoint)])
    thread.join()
    context.destroy(linger=0)


class _Scripted:
    """A giver that does something when it is asked for its n-th piece."""

    def __init__(self, worker: ExpertWorker) -> None:
        self._worker = worker
        self.weights_name = worker.weights_name
        self.at_piece: dict[int, Callable[[], object]] = {}
        self.num_pieces = 0

    def find(self, layer: int, expert: int) -> tuple[LayerSlots, int, Held] | None:
        self.num_pieces += 1
        self.at_piece.get(self.num_pieces, lambda: None)()
        return self._worker.find(layer, expert)


@pytest.mark.parametrize("when", ["between two pieces", "while a piece is copied"])
def test_a_slot_that_is_written_is_not_given(
    setup: MakeSetup, serve: Serve, small_pieces: None, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Bytes copied before the slot was dropped are sound, those after it are not, and nobody can tell them apart."""
    ours = setup()
    giver = _Scripted(ours.loaded(ALL))
    answers: list[str] = []
    real_copy, real_take = weight_server._Copier.copy, WeightServer._take

    def copy(self: Any, part: Part, begin: int, end: int) -> Any:
        data = real_copy(self, part, begin, end)
        if when == "while a piece is copied" and giver.num_pieces == 4:
            giver._worker._layers[1].drop(2)
        return data

    def take(self: Any, ask: AskPiece, copier: Any) -> Any:
        header, data = real_take(self, ask, copier)
        answers.append(header.problem)
        return header, data

    if when == "between two pieces":
        giver.at_piece[4] = lambda: giver._worker._layers[1].drop(2)
    monkeypatch.setattr(weight_server._Copier, "copy", copy)
    monkeypatch.setattr(WeightServer, "_take", take)
    _falls_back(ours, [_source(serve(giver))])
    assert answers[:3] == ["", "", ""]
    assert all("does not hold expert 2 of layer 1" in answer for answer in answers[3:])
    assert answers[3].endswith("any more") == (when == "while a piece is copied")


def test_an_expert_that_is_not_finite_is_not_taken(setup: MakeSetup, serve: Serve) -> None:
    """A peer that holds a broken expert, and says so with the right checksum."""
    ours = setup()
    giver = ours.loaded(ALL)
    layer = giver._layers[1]
    layer.weights.down_SDF[2, 0, 0] = torch.nan
    layer.hold(2, 2, layer.prove(2, giver._probe_1D))
    _falls_back(ours, [_source(serve(giver))])


# --- the server -----------------------------------------------------------------------------------------------------


@pytest.fixture
def dealer() -> Iterator[zmq.Socket[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield open_socket(context, zmq.DEALER)
    context.destroy(linger=0)


def _ask(worker: ExpertWorker, **fields: Any) -> AskPiece:
    return AskPiece(**({"ask": 9, "weights": worker.weights_name, "layer": 1, "expert": 2, "part": 0, "begin": 0,
                        "end": 64} | fields))  # fmt: skip


def test_requests_that_make_no_sense_are_refused_and_the_server_lives_on(
    setup: MakeSetup, serve: Serve, dealer: zmq.Socket[Any]
) -> None:
    worker = setup().loaded(ALL)
    dealer.connect(serve(worker))
    last = worker._layers[1].parts(2)[0].num_bytes
    senseless = [
        {"part": -1}, {"part": 2}, {"begin": -4}, {"begin": 64}, {"begin": 2}, {"end": 63}, {"end": last + 4},
        {"begin": last, "end": last + 4}, {"layer": 0}, {"layer": -1}, {"expert": EMPTY_SLOT}, {"expert": 99},
        {"weights": "of another model"},
    ]  # fmt: skip
    dealer.send(b"\xc1 nothing of ours")
    dealer.send_multipart([b"", b"\x91", b""])
    for fields in senseless:
        dealer.send(ASK_PIECE.encode(_ask(worker, **fields)))
        assert dealer.poll(SOON_MS)
        header, data = dealer.recv_multipart()
        assert PIECE_HEADER.decode(header).problem, fields
        assert data == b""
    dealer.send(ASK_PIECE.encode(_ask(worker, begin=8, end=72)))
    assert dealer.poll(SOON_MS)
    header, data = dealer.recv_multipart()
    assert PIECE_HEADER.decode(header).ask == 9
    assert data == _bytes(worker, 1, 2)[0][8:72]


class _Large:
    """Holds one expert of several pieces, in the shape of a giver."""

    weights_name = "large"

    def __init__(self, num_bytes: int) -> None:
        self.num_asked = 0
        self.asked_enough = threading.Event()
        self._part = Part(torch.zeros(num_bytes, dtype=torch.uint8), torch.uint8)
        self._held = Held(2, SlotProof(checksum=1, probe=1.0))

    def find(self, layer: int, expert: int) -> Any:
        self.num_asked += 1
        if self.num_asked == NUM_ASKED:
            self.asked_enough.set()
        return self, 0, self._held

    def parts(self, slot: int) -> tuple[Part, ...]:
        return (self._part,)

    def held(self, slot: int) -> Held:
        return self._held


NUM_ASKED = 100


def test_a_taker_that_does_not_take_in_costs_bounded_memory(serve: Serve, dealer: zmq.Socket[Any]) -> None:
    """100 pieces of 4 MiB are asked for at once and none is read."""
    giver = _Large(PIECE_BYTES)
    dealer.setsockopt(zmq.RCVHWM, 1)
    dealer.connect(serve(giver))
    before = _resident_bytes()
    for ask in range(NUM_ASKED):
        message = AskPiece(ask=ask, weights="large", layer=1, expert=2, part=0, begin=0, end=PIECE_BYTES)
        dealer.send(ASK_PIECE.encode(message))
    assert giver.asked_enough.wait(10)
    room = (MAX_WAITING_PIECES + 6) * PIECE_BYTES  # and what both ends' io threads hold
    assert _resident_bytes() - before < room < NUM_ASKED * PIECE_BYTES / 5


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_stop_ends_the_thread_and_frees_the_port(setup: MakeSetup) -> None:
    worker = setup().loaded(ALL)
    server = WeightServer(HOST, lambda: worker)
    endpoint = server.start()
    host, port = endpoint.removeprefix("tcp://").split(":")
    socket.create_connection((host, int(port)), 1).close()
    began_s = time.monotonic()
    server.stop()
    server.stop()
    assert time.monotonic() - began_s < 1.0
    assert "weight-server" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((host, int(port)), 1)
    WeightServer(HOST, lambda: None).stop()  # never started
