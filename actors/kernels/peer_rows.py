"""Rows pushed into other ranks' memory and results pushed back, each with a flag that says it is there.

Owns the order of writes and waits, and that every wait ends: by arrival, by time, or because the host says so. Nothing
here waits for the host, and no shape depends on data, so all of it can be captured and replayed. Knows nothing of what
experts compute. On a CPU, areas are those of threads of one process.

A layer runs `push_rows` and `combine_results` on a source, `await_rows` and `push_results` on a destination; on a rank
that is both all four, the destination's between the source's. Once a wait was given up, later ones end after a few
polls: results are garbage then, and `Exchange.given_up` says who it was.
"""

import time

import torch
from torch import Tensor

from actors.kernels.peer_areas import (
    CARRIED_MASK,
    CLOSED,
    OPENED,
    SEQUENCE_SHIFT,
    SLOT_BITS,
    SLOT_MASK,
    WORD_BYTES,
    Exchange,
    LayerRoutes,
    Turn,
)
from actors.kernels.peer_end import ABORT, BLAMED, POLL_S, REPORTED
from actors.kernels.triton_here import HAS_TRITON

if HAS_TRITON:
    from actors.kernels import peer_rows_triton


def load_all(exchange: Exchange, routes: LayerRoutes, experts_per_token: int) -> None:
    """Compiles and loads what this rank will launch, so that no peer waits for that in a step."""
    if exchange.state.is_cuda and HAS_TRITON:
        peer_rows_triton.load_all(exchange, routes, experts_per_token)


def push_rows(
    exchange: Exchange, turn: Turn, routes: LayerRoutes, x_TD: Tensor, expert_ids_TK: Tensor, scores_TK: Tensor
) -> Tensor:
    """A source opens a layer: writes score * x of every (token, k) into the area of its expert's rank.

    expert_ids_TK: integers, -1 in rows that route nowhere. T may be 0: destinations are told so. The product is rounded
    once, to x's dtype, which is the areas'. Returns chosen_N, int32 [T * K]: the rank of each row, -1 for none.
    """
    if x_TD.is_cuda and HAS_TRITON:
        return peer_rows_triton.push_rows(exchange, turn, routes, x_TD, expert_ids_TK, scores_TK)
    return _push_rows(exchange, turn, routes, x_TD, expert_ids_TK, scores_TK)


def await_rows(exchange: Exchange, turn: Turn) -> tuple[Tensor, Tensor]:
    """A destination waits for the rows of all sources; opens the layer if it is no source itself.

    Returns x_ND, a view of its area, and slots_N, int64: source s has rows from s * block_rows on; -1 marks those that
    are not for this rank, whose x are left from earlier layers.
    """
    if exchange.state.is_cuda and HAS_TRITON:
        return peer_rows_triton.await_rows(exchange, turn)
    return _await_rows(exchange, turn)


def push_results(exchange: Exchange, turn: Turn, y_ND: Tensor, slots_N: Tensor) -> None:
    """A destination writes each row of y_ND whose slot is not -1 into its source's area, and tells all that it is done
    with the rows of this layer. Closes the layer if it is no source itself. y_ND has contiguous rows.
    """
    if y_ND.is_cuda and HAS_TRITON:
        peer_rows_triton.push_results(exchange, turn, y_ND, slots_N)
    else:
        _push_results(exchange, turn, y_ND, slots_N)


def combine_results(exchange: Exchange, turn: Turn, chosen_N: Tensor, experts_per_token: int) -> Tensor:
    """A source waits for its rows' results and closes the layer. Returns y_TD, the sum of each token's K rows.

    chosen_N is what `push_rows` returned. The sum is in float32, rounded once; rows that route nowhere count as zeros.
    """
    if chosen_N.is_cuda and HAS_TRITON:
        return peer_rows_triton.combine_results(exchange, turn, chosen_N, experts_per_token)
    return _combine_results(exchange, turn, chosen_N, experts_per_token)


def _push_rows(
    exchange: Exchange, turn: Turn, routes: LayerRoutes, x_TD: Tensor, expert_ids_TK: Tensor, scores_TK: Tensor
) -> Tensor:
    areas, layout, state = exchange.areas, exchange.areas.layout, exchange.state
    K = expert_ids_TK.shape[1]
    num_rows = x_TD.shape[0] * K
    sequence = int(state[CLOSED]) + 1
    state[OPENED] = sequence
    destination_ranks = exchange.destination_ranks_P.tolist()
    rows_ND = (x_TD[:, None].float() * scores_TK[..., None].float()).flatten(0, 1).to(x_TD.dtype)
    chosen_N = torch.full((num_rows,), -1, dtype=torch.int32)
    first = exchange.source * turn.block_rows
    for rank in filter(_is_there, destination_ranks):
        areas.words(rank, layout.arrivals_at(turn.parity, exchange.source), 1)[0] = _word(sequence, num_rows)
    for row, expert in enumerate(expert_ids_TK.flatten().tolist()):
        destination, slot = -1, -1
        if expert >= 0:
            replica = (row // K + routes.first) % int(routes.num_replicas_E[expert])
            key = int(routes.keys_ER[expert, replica])
            destination, slot = key >> SLOT_BITS, key & SLOT_MASK
            chosen_N[row] = rank = destination_ranks[destination]
            areas.rows(rank, layout.rows_at(turn.parity, first + row), 1)[0] = rows_ND[row]
        for number, rank in filter(lambda place: _is_there(place[1]), enumerate(destination_ranks)):
            carried = slot + 1 if number == destination else 0
            areas.words(rank, layout.row_flags_at(turn.parity, first + row), 1)[0] = _word(sequence, carried)
    return chosen_N


def _await_rows(exchange: Exchange, turn: Turn) -> tuple[Tensor, Tensor]:
    areas, layout, state = exchange.areas, exchange.areas.layout, exchange.state
    if exchange.source < 0:
        state[OPENED] = state[CLOSED] + 1
    sequence, num_rows = int(state[OPENED]), layout.num_sources * turn.block_rows
    slots_N = torch.full((num_rows,), -1, dtype=torch.int64)
    flags_N = areas.words(exchange.rank, layout.row_flags_at(turn.parity, 0), num_rows)
    arrivals_S = areas.words(exchange.rank, layout.arrivals_at(turn.parity, 0), layout.num_sources)
    for source, rank in enumerate(exchange.source_ranks_S.tolist()):
        announced = _await_word(exchange, arrivals_S[source], sequence, SEQUENCE_SHIFT, rank) & CARRIED_MASK
        first = source * turn.block_rows
        for row in range(first, first + min(announced, turn.block_rows)):
            slots_N[row] = (_await_word(exchange, flags_N[row], sequence, SEQUENCE_SHIFT, rank) & CARRIED_MASK) - 1
    return areas.rows(exchange.rank, layout.rows_at(turn.parity, 0), num_rows), slots_N


def _push_results(exchange: Exchange, turn: Turn, y_ND: Tensor, slots_N: Tensor) -> None:
    areas, layout, state = exchange.areas, exchange.areas.layout, exchange.state
    sequence = int(state[OPENED])
    source_ranks = exchange.source_ranks_S.tolist()
    for rank in source_ranks:
        areas.words(rank, layout.finished + exchange.destination * WORD_BYTES, 1)[0] = sequence
    for row, slot in enumerate(slots_N.tolist()):
        if slot >= 0:
            rank, place = source_ranks[row // turn.block_rows], row % turn.block_rows
            areas.rows(rank, layout.results + place * layout.row_bytes, 1)[0] = y_ND[row]
            areas.words(rank, layout.result_flags + place * WORD_BYTES, 1)[0] = sequence
    if exchange.source < 0:
        state[CLOSED] = sequence


def _combine_results(exchange: Exchange, turn: Turn, chosen_N: Tensor, experts_per_token: int) -> Tensor:
    areas, layout, state = exchange.areas, exchange.areas.layout, exchange.state
    sequence = int(state[OPENED])
    flags_N = areas.words(exchange.rank, layout.result_flags, layout.capacity)
    results_ND = areas.rows(exchange.rank, layout.results, layout.capacity)
    y_ND = torch.zeros(len(chosen_N), layout.hidden)
    for row, rank in enumerate(chosen_N.tolist()):
        if rank >= 0 and _await_word(exchange, flags_N[row], sequence, 0, rank):
            y_ND[row] = results_ND[row]
    finished_P = areas.words(exchange.rank, layout.finished, layout.num_destinations)
    for number, rank in filter(lambda place: _is_there(place[1]), enumerate(exchange.destination_ranks_P.tolist())):
        _await_word(exchange, finished_P[number], sequence - turn.lag, 0, rank)
    state[CLOSED] = sequence
    return y_ND.view(-1, experts_per_token, layout.hidden).sum(1).to(layout.dtype)


def _is_there(rank: int) -> bool:
    return rank >= 0


def _word(sequence: int, carried: int) -> int:
    return sequence << SEQUENCE_SHIFT | carried


def _await_word(exchange: Exchange, word: Tensor, sequence: int, shift: int, rank: int) -> int:
    """The word once it holds `sequence` or a later one; 0 if that was given up, and `rank` is blamed for it, unless the
    partner had given up before.
    """
    deadline_s = time.monotonic() + exchange.timeout_s
    while (value := int(word)) >> shift < sequence:
        has_partner_blamed = bool(exchange.partner_state[BLAMED])
        if exchange.state[BLAMED] or has_partner_blamed or exchange.host[ABORT] or time.monotonic() > deadline_s:
            if not exchange.state[BLAMED] and not has_partner_blamed:
                exchange.state[BLAMED] = exchange.host[REPORTED] = rank + 1
            return 0
        time.sleep(POLL_S)
    return value
