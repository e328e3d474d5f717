"""Dispatch over memory that ranks map into each other: rows are pushed, results are pushed back, nobody asks.

Owns the order of a step's kernels on ranks that are attention, expert or both, and how a lost peer is noticed. Knows
nothing of how memory is mapped (`peer_memory.py`), nor of how rows are written and awaited (`kernels/peer_rows.py`).

For decode steps: a source may bring `max_tokens` at most (see `fits`); larger steps take the collective dispatch. All
shapes follow from `begin_step`, counts and replicas from device memory, so a step can be captured in a CUDA graph and
replayed: one graph serves all steps of the same tokens on this rank and the same `block_rows`. On a rank without tokens
it serves all steps of the same `block_rows`.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.dispatch.contract import ExpertCompute, RoutingTable
from actors.dispatch.peer_memory import Mapping, PeerMemory
from actors.dispatch.rows import TokenShape
from actors.errors import RankError
from actors.kernels import peer_rows
from actors.kernels.peer_areas import (
    OPENED,
    SLOT_BITS,
    SLOT_MASK,
    AreaLayout,
    Exchange,
    LayerRoutes,
    PeerAreas,
    Turn,
)
from actors.laps import Laps

log = logging.getLogger("corral.dispatch")

MAX_TOKENS = 256
DESTINATION_ROOM = 8  # places for them, as far as there are no more: so that graphs go on when another one comes
RANK_ROOM = 16
# Sequence numbers that are set aside for each epoch in the same memory. They are used up after seven, and memory is new
# then: torch keeps all that was ever mapped with it, that of ranks that are gone too.
EPOCH_SEQUENCES = 1 << 36
MAX_SEQUENCE = 1 << 39
MIN_BLOCK_ROWS = 8
SPIN_S = 0.002
POLL_S = 0.00002
UNKNOWN_RANK = -1


@dataclass(frozen=True, slots=True)
class SymmetricReceipt:
    """The rank that each (token, k) went to; -1 where it went nowhere."""

    layer_idx: int
    chosen_N: Tensor


class SymmetricDispatch:
    """Dispatch of one micro-batch over mapped memory. One object per rank, epoch and micro-batch.

    As `CollectiveDispatch`: a step runs all of `routing.layers` in order; a rank with tokens calls `begin_step`, then
    `dispatch` and `combine` for each layer, a rank without tokens `serve_step`. Two micro-batches in ping-pong are two
    objects with a `name` each, whose layers are served in turn (`serve_layer`). Expert ids of -1 route nowhere: their
    rows come back as zeros.

    On CUDA all methods of a step queue work on the current stream and return, whether it is captured or not: the caller
    calls `wait` before it believes a result, or `check` if it has waited for the device. Waits on the device end after
    `timeout_s`: what follows in the step computes garbage, and then RankError names the peer. The object is of no use
    afterwards, nor are graphs that were captured with it: `close` unmaps the memory that they write to.

    Raises ValueError where the caller breaks the contract.
    """

    def __init__(
        self,
        memory: PeerMemory,
        routing: RoutingTable,
        experts: ExpertCompute | None,
        attention_ranks: Sequence[int],
        shape: TokenShape,
        timeout_s: float,
        max_tokens: int = MAX_TOKENS,
        name: str = "dispatch",
        before: "SymmetricDispatch | None" = None,
    ) -> None:
        self.is_capturable = True
        self._memory = memory
        self._experts = experts
        self._shape = shape
        self._timeout_s = timeout_s
        self._max_tokens = max_tokens
        self._name = name
        self._layers = routing.layers
        self._sources = tuple(sorted(attention_ranks))
        self._destinations = tuple(sorted(set(routing.ranks_MER.flatten().tolist())))
        self._serves = _served_layers(routing, memory.rank)
        self._is_source = memory.rank in self._sources
        self._is_destination = memory.rank in self._destinations
        if self._is_destination and experts is None:
            raise ValueError(f"rank {memory.rank} holds slots but no experts")
        self._before = before
        self._begin = 0  # the sequence number that the epoch begins with
        self._keys_MER = _keys(routing, self._destinations)
        self._num_replicas_ME = routing.num_replicas_ME.clone()
        self._exchange: Exchange | None = None
        self._state = torch.zeros(3, dtype=torch.int64, device=shape.device)
        self._partner_state = self._state
        self._keeper: object = None
        self._failure: RankError | None = None
        self._tokens_of_rank: tuple[int, ...] = ()
        self._block_rows = 0
        self._next_idx = 0
        self._is_open = False

    # --- the epoch ---------------------------------------------------------------------------------------------------

    def pair_with(self, partner: "SymmetricDispatch") -> None:
        """Has waits that this one gives up end those of `partner`, too. Before either is started."""
        self._partner_state, partner._partner_state = partner._state, self._state

    @torch.inference_mode(False)  # else nobody could write to what is made here outside of that mode
    def start(self) -> None:
        """Maps the memory of all ranks, which all do at once. Raises RankError."""
        layout = AreaLayout(
            hidden=self._shape.hidden,
            dtype=self._shape.dtype,
            capacity=_block_rows(self._max_tokens * self._shape.experts_per_token),
            num_sources=len(self._sources),
            num_destinations=max(DESTINATION_ROOM, len(self._destinations)),
        )
        mapping = self._map(layout)
        device, rank = self._shape.device, self._memory.rank
        bases = torch.zeros(max(RANK_ROOM, len(mapping.buffers)), dtype=torch.int64, device=device)
        bases[: len(mapping.buffers)] = mapping.bases
        places = (*self._destinations, *[-1] * (layout.num_destinations - len(self._destinations)))
        self._state[: OPENED + 1] = self._begin
        self._keeper = mapping
        self._exchange = Exchange(
            areas=PeerAreas(layout=layout, buffers=mapping.buffers, bases=bases),
            rank=rank,
            source=self._sources.index(rank) if self._is_source else -1,
            destination=self._destinations.index(rank) if self._is_destination else -1,
            source_ranks_S=torch.tensor(self._sources, dtype=torch.int32, device=device),
            destination_ranks_P=torch.tensor(places, dtype=torch.int32, device=device),
            state=self._state,
            partner_state=self._partner_state,
            host=torch.zeros(2, dtype=torch.int64, pin_memory=device.type == "cuda"),
            timeout_s=self._timeout_s,
        )
        self._memory.attach(self)
        laps = Laps()
        peer_rows.load_all(self._exchange, self._routes(0), self._shape.experts_per_token)
        laps.lap("loaded")
        log.info("kernels of %r: %s", self._name, laps)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # what was made here may be used on any stream

    def _map(self, layout: AreaLayout) -> Mapping:
        """The memory of all ranks; this one's is that of the epoch before, if it has the same layout. Flags there hold
        numbers below those that this epoch begins with.
        """
        before, self._before = self._before, None
        old = None if before is None else before._exchange
        begin = -EPOCH_SEQUENCES if before is None or old is None else before._begin
        begin = self._memory.largest(self._name, begin) + EPOCH_SEQUENCES
        self._begin = begin if begin + EPOCH_SEQUENCES < MAX_SEQUENCE else 0
        is_kept = old is not None and old.areas.layout == layout and self._begin == begin
        own = old.areas.buffers[old.rank] if old is not None and is_kept else None
        return self._memory.map(self._name, layout.num_bytes, own)

    def can_take_over(self, before: object) -> bool:
        """Whether graphs that captured `before` would do what this one does, if it took over: the same sources bring
        tokens, and this rank is in the same place. Both are started, and nobody was lost.
        """
        if not isinstance(before, SymmetricDispatch) or before._exchange is None or self._exchange is None:
            return False
        return (
            self._exchange.is_in_place_of(before._exchange)
            and before._layers == self._layers
            and before._keys_MER.shape == self._keys_MER.shape
            and not any(new and not old for new, old in zip(self._serves, before._serves, strict=True))
        )

    def take_over(self, before: object) -> None:
        """Goes on in the tables of `before`, which is over then: its graphs do what this one does. Between two steps,
        on a device that is idle.
        """
        assert isinstance(before, SymmetricDispatch) and before._exchange and self._exchange, "it can take over"
        self._exchange = self._exchange.moved_into(before._exchange)
        before._keys_MER.copy_(self._keys_MER)
        before._num_replicas_ME.copy_(self._num_replicas_ME)
        self._keys_MER, self._num_replicas_ME = before._keys_MER, before._num_replicas_ME
        self._state, self._partner_state = self._exchange.state, self._exchange.partner_state
        before._exchange = before._keeper = None
        if self._shape.device.type == "cuda":
            torch.cuda.current_stream(self._shape.device).synchronize()

    @property
    def blamed(self) -> int | None:
        """See `DeviceWaits`."""
        exchange = self._exchange
        return None if exchange is None else exchange.given_up

    def abort(self) -> None:
        """See `DeviceWaits`."""
        self.interrupt()

    def close(self) -> None:
        """Ends this rank's waits and lets go of the memory, once the device is done with it."""
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        exchange.abort()
        if self._shape.device.type == "cuda":
            torch.cuda.synchronize(self._shape.device)
        self._keeper = None

    def interrupt(self) -> None:
        """Has this rank's waits end at once, and its step fail. From any thread."""
        exchange = self._exchange
        if exchange is not None:
            exchange.abort()

    def update_routing(self, routing: RoutingTable) -> None:
        """Replaces the table in place, in the current stream's order: graphs that were captured follow the new one.

        It has as many layers, experts and replicas at most as the old one, and names a rank in no layer that the old
        one did not name it in. All ranks change it between the same two steps.
        """
        keys_MER = _keys(routing, self._destinations)
        if routing.layers != self._layers or keys_MER.shape != self._keys_MER.shape:
            raise ValueError("a routing table can be replaced by one of the same shape alone")
        if any(
            new and not old for new, old in zip(_served_layers(routing, self._memory.rank), self._serves, strict=True)
        ):
            raise ValueError(f"rank {self._memory.rank} is to serve a layer that it did not serve before")
        self._keys_MER.copy_(keys_MER)
        self._num_replicas_ME.copy_(routing.num_replicas_ME)

    # --- the step ----------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        """All that a step runs, in this order."""
        return self._layers

    @property
    def block_rows(self) -> int:
        """Rows of each source's block in the step that was begun, the same on all ranks: a power of two."""
        return self._block_rows

    def fits(self, tokens_of_rank: Sequence[int]) -> bool:
        """Whether a step is small enough."""
        return max(tokens_of_rank) <= self._max_tokens

    def begin_step(self, tokens_of_rank: tuple[int, ...], most_tokens: int = 0) -> None:
        """States how many tokens every rank brings to each layer of the step, padding included. Blocks have room for
        `most_tokens` where no rank brings as many.
        """
        world = len(self._active.areas.buffers)
        if len(tokens_of_rank) != world:
            raise ValueError(f"{len(tokens_of_rank)} token counts for {world} ranks")
        if not self.fits(tokens_of_rank):
            raise ValueError(f"a rank brings {max(tokens_of_rank)} tokens, there is room for {self._max_tokens}")
        if self._next_idx not in (0, len(self._layers)) or self._is_open:
            raise ValueError(f"a step began after {self._next_idx} of {len(self._layers)} layers of the one before")
        self._tokens_of_rank = tokens_of_rank
        self._block_rows = _block_rows(max(*tokens_of_rank, most_tokens) * self._shape.experts_per_token)
        self._next_idx = 0

    def serve_step(self, tokens_of_rank: tuple[int, ...]) -> None:
        """A whole step of a rank that brings no tokens: computes what others send, layer after layer. See `wait`."""
        self.begin_step(tokens_of_rank)
        self.serve_layers()

    def serve_layers(self) -> None:
        """What `serve_step` does once the step was begun."""
        for layer in self._layers:
            self.serve_layer(layer)

    def serve_layer(self, layer: int) -> None:
        """One layer of a rank that brings no tokens to the step."""
        shape = self._shape
        if self._tokens_of_rank[self._memory.rank]:
            raise ValueError(f"rank {self._memory.rank} has tokens in this step: it must dispatch them")
        if self._is_source:  # it says that nothing comes
            x_TD = torch.empty(0, shape.hidden, dtype=shape.dtype, device=shape.device)
            ids_TK = torch.empty(0, shape.experts_per_token, dtype=torch.int64, device=shape.device)
            self.combine(self.dispatch(x_TD, ids_TK, ids_TK.to(shape.dtype), layer))
            return
        self._serve(self._enter(layer))
        self._leave_layer()

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor, scores_TK: Tensor, layer: int) -> SymmetricReceipt:
        """Pushes each scaled token to its experts' ranks. Expects x_TD in the shape's dtype. See `Dispatch`."""
        layer_idx = self._enter(layer)
        num_tokens, shape = self._tokens_of_rank[self._memory.rank], self._shape
        if x_TD.shape != (num_tokens, shape.hidden) or x_TD.dtype != shape.dtype:
            raise ValueError(
                f"expected [{num_tokens}, {shape.hidden}] of {shape.dtype}, got {list(x_TD.shape)} of {x_TD.dtype}"
            )
        turn, routes = self._turn(layer_idx), self._routes(layer_idx)
        chosen_N = peer_rows.push_rows(self._active, turn, routes, x_TD, expert_ids_TK, scores_TK)
        self._is_open = True
        return SymmetricReceipt(layer_idx, chosen_N)

    def combine(self, receipt: SymmetricReceipt) -> Tensor:
        """Serves this rank's own experts, then waits for the results: y_TD in the shape's dtype."""
        layer_idx, K = receipt.layer_idx, self._shape.experts_per_token
        if not self._is_open or layer_idx != self._next_idx:
            raise ValueError("a receipt is combined once, before the next dispatch")
        if self._is_destination:
            self._serve(layer_idx)
        y_TD = peer_rows.combine_results(self._active, self._turn(layer_idx), receipt.chosen_N, K)
        self._is_open = False
        self._leave_layer()
        return y_TD

    def end_step(self) -> None:
        """See `Dispatch`."""
        self.wait()

    def wait(self) -> None:
        """Waits for what was queued on the current stream, then as `check`."""
        if self._shape.device.type == "cuda":
            self._synchronize()
        self.check()

    def check(self) -> None:
        """Raises RankError if a wait was given up in what the device has done so far; the host does not wait."""
        exchange = self._active
        if exchange.is_aborted:
            self._failure = RankError(UNKNOWN_RANK, "the epoch is over")
        elif exchange.given_up is not None:
            problem = f"did not answer within {self._timeout_s} s in {self._name!r}"
            self._failure = RankError(exchange.given_up, problem)
        else:
            return
        self.close()
        raise RankError(self._failure.rank, self._failure.problem)

    # --- inside a step -----------------------------------------------------------------------------------------------

    def _serve(self, layer_idx: int) -> None:
        exchange, turn = self._active, self._turn(layer_idx)
        x_ND, slots_N = peer_rows.await_rows(exchange, turn)
        y_ND = x_ND
        if self._serves[layer_idx]:
            assert self._experts is not None
            y_ND = self._experts(self._layers[layer_idx], x_ND, slots_N).contiguous()
        peer_rows.push_results(exchange, turn, y_ND, slots_N)

    def _enter(self, layer: int) -> int:
        if not self._block_rows:
            raise ValueError("no step was begun")
        if self._is_open or self._next_idx >= len(self._layers) or self._layers[self._next_idx] != layer:
            raise ValueError(f"layer {layer} was dispatched out of order")
        return self._next_idx

    def _leave_layer(self) -> None:
        self._next_idx += 1
        if self._next_idx == len(self._layers) and self._shape.device.type == "cpu":  # all of it is done by now
            self.check()

    def _turn(self, layer_idx: int) -> Turn:
        """Layers take turns by their number, so that captured ones stay where they are. Where that number is odd, the
        last layer of a step and the first of the next have the same place: nobody may be behind then.
        """
        num_layers = len(self._layers)
        repeats = layer_idx == num_layers - 1 and num_layers % 2 == 1
        return Turn(block_rows=self._block_rows, parity=layer_idx % 2, lag=0 if repeats else 1)

    def _routes(self, layer_idx: int) -> LayerRoutes:
        return LayerRoutes(
            keys_ER=self._keys_MER[layer_idx],
            num_replicas_E=self._num_replicas_ME[layer_idx],
            first=self._memory.rank + layer_idx,
        )

    def _synchronize(self) -> None:
        """Waits for the device, whose waits end by themselves; ends them if they do not."""
        longest_s = self._timeout_s * (len(self._layers) + 1)
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._shape.device))
        start_s = time.monotonic()
        while not event.query():
            waited_s = time.monotonic() - start_s
            if waited_s > longest_s:
                self._active.abort()
                event.synchronize()
                return
            if waited_s > SPIN_S:
                time.sleep(POLL_S)

    @property
    def _active(self) -> Exchange:
        if self._exchange is not None:
            return self._exchange
        if self._failure is not None:
            raise RankError(self._failure.rank, self._failure.problem)
        raise RankError(UNKNOWN_RANK, "the dispatch was not started, or is closed")


def _block_rows(num_rows: int) -> int:
    return max(MIN_BLOCK_ROWS, 1 << (num_rows - 1).bit_length())


def _served_layers(routing: RoutingTable, rank: int) -> list[bool]:
    return (routing.ranks_MER == rank).flatten(1).any(1).tolist()


def _keys(routing: RoutingTable, destinations: tuple[int, ...]) -> Tensor:
    """int64 [M, E, R]: number of the destination << SLOT_BITS | slot; there is room for a replica on each of
    DESTINATION_ROOM ranks at least. Raises ValueError.
    """
    if int(routing.slots_MER.max()) > SLOT_MASK - 1:
        raise ValueError(f"a rank holds more than {SLOT_MASK} slots of one layer")
    numbers = {rank: number for number, rank in enumerate(destinations)}
    strangers = {rank for rank in routing.ranks_MER.flatten().tolist() if rank not in numbers}
    if strangers:
        raise ValueError(f"rank {min(strangers)} held no experts when the epoch began")
    flat = [numbers[rank] for rank in routing.ranks_MER.flatten().tolist()]
    numbers_MER = torch.tensor(flat, device=routing.ranks_MER.device).view_as(routing.ranks_MER)
    keys_MER = (numbers_MER << SLOT_BITS) | routing.slots_MER
    return torch.nn.functional.pad(keys_MER, (0, max(0, DESTINATION_ROOM - keys_MER.shape[2])))
