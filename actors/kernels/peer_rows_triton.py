"""The Triton form of `peer_rows.py`: one program per row, each row's flag stored behind the row itself.

Owns the memory order. A program's threads write a row, meet at a barrier, and one of them stores the flag with release
semantics at system scope; whoever reads the flag with acquire semantics sees the row. Needs GPUs that reach each
other's memory with native atomics (NVLink); never uses multicast. Needs Triton: imported only where it is installed.

One thread polls for its program (`peer_waits_triton.py`). What all threads act upon is read once more, by an atomic,
which one of them performs for all.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
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
from actors.kernels.peer_end import ABORT, BLAMED, REPORTED
from actors.kernels.peer_waits_triton import is_over, now_ns, read_by_one

_CLOSED = tl.constexpr(CLOSED)
_OPENED = tl.constexpr(OPENED)
_BLAMED = tl.constexpr(BLAMED)
_ABORT = tl.constexpr(ABORT)
_REPORTED = tl.constexpr(REPORTED)
_SEQUENCE_SHIFT = tl.constexpr(SEQUENCE_SHIFT)
_CARRIED_MASK = tl.constexpr(CARRIED_MASK)
_SLOT_BITS = tl.constexpr(SLOT_BITS)
_SLOT_MASK = tl.constexpr(SLOT_MASK)
_WORD_BYTES = tl.constexpr(WORD_BYTES)

_THREAD_BYTES = 16
_MAX_WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def _await_word(
    word, sequence, rank, state, partner, host, timeout_ns,
    SHIFT: tl.constexpr, LANES: tl.constexpr, IS_TIMED: tl.constexpr,
):  # fmt: skip
    """(whether the word came to hold `sequence` or a later one, the word). Blames `rank` if it did not, and the partner
    had not given up before.
    """
    lanes = tl.arange(0, LANES)
    value = read_by_one(word, lanes)
    if (value >> SHIFT) < sequence:
        began_ns = now_ns(lanes, IS_TIMED)
        blamed, of_partner = state + _BLAMED, partner + _BLAMED
        polls, over = 0, 0
        while ((value >> SHIFT) < sequence) & (over == 0):
            value = read_by_one(word, lanes)
            polls += 1
            over = is_over(lanes, began_ns, polls, blamed, of_partner, host + _ABORT, timeout_ns, IS_TIMED)
    value = tl.atomic_add(word, sequence * 0, sem="acquire", scope="sys")
    has_come = (value >> SHIFT) >= sequence
    if has_come == 0:
        told = read_by_one(partner + _BLAMED, lanes)
        if told == 0:
            blame = (sequence * 0) + rank + 1
            if tl.atomic_cas(state + _BLAMED, sequence * 0, blame) == 0:
                tl.store(host + _REPORTED, blame)
    return has_come, value


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["num_rows", "first", "at_rows", "at_flags", "at_arrivals"],
    do_not_specialize_on_alignment=["ids", "scores", "keys", "replicas", "chosen"],
)
def _push_rows_kernel(
    x, ids, scores, keys, replicas, bases, destination_ranks, state, chosen,
    num_rows, x_stride, first, at_rows, at_flags, at_arrivals,
    K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, REPLICAS: tl.constexpr, REPLICAS_BLOCK: tl.constexpr,
    DESTINATIONS: tl.constexpr, DESTINATIONS_BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """One program per row, or a single one where there are none. What does not depend on the expert is read first."""
    row = tl.program_id(0)
    token = row // K
    dtype = x.dtype.element_ty
    word = tl.pointer_type(tl.int64)
    is_row = row < num_rows
    expert = tl.load(ids + row, mask=is_row, other=-1)
    sequence = tl.load(state + _CLOSED) + 1
    numbers = tl.arange(0, DESTINATIONS_BLOCK)
    ranks = tl.load(destination_ranks + numbers, mask=numbers < DESTINATIONS, other=-1)
    is_one = ranks >= 0
    peers = tl.load(bases + ranks, mask=is_one, other=0)
    columns = tl.arange(0, BLOCK)
    inside = (columns < D) & is_row
    values = tl.load(x + token.to(tl.int64) * x_stride + columns, mask=inside)
    score = tl.load(scores + row, mask=is_row, other=0.0)
    if row == 0:
        tl.store(state + _OPENED, sequence)
        announced = (sequence << _SEQUENCE_SHIFT) + num_rows + numbers * 0
        tl.atomic_xchg((peers + at_arrivals).to(word), announced, mask=is_one, sem="relaxed", scope="sys")
    if is_row:
        destination = -1
        carried = sequence * 0
        chosen_rank = -1
        if expert >= 0:
            if REPLICAS == 1:
                key = tl.load(keys + expert)
            else:
                r = tl.arange(0, REPLICAS_BLOCK)
                keys_of_expert = tl.load(keys + expert * REPLICAS + r, mask=r < REPLICAS, other=0)
                replica = (token + first) % tl.load(replicas + expert)
                key = tl.sum(tl.where(r == replica, keys_of_expert, 0), axis=0)
            destination = (key >> _SLOT_BITS).to(tl.int32)
            carried = (key & _SLOT_MASK) + 1
            chosen_rank = tl.sum(tl.where(numbers == destination, ranks, 0), axis=0)
            base = tl.sum(tl.where(numbers == destination, peers, 0), axis=0)
            address = base + at_rows + row.to(tl.int64) * (D * dtype.primitive_bitwidth // 8)
            target = tl.multiple_of(address.to(tl.pointer_type(dtype)), ALIGNMENT)
            tl.store(target + columns, (values.to(tl.float32) * score.to(tl.float32)).to(dtype), mask=inside)
        tl.store(chosen + row, chosen_rank)
        tl.debug_barrier()
        flags = (sequence << _SEQUENCE_SHIFT) + tl.where(numbers == destination, carried, 0)
        at = (peers + at_flags + row * _WORD_BYTES).to(word)
        tl.atomic_xchg(at, flags, mask=is_one, sem="release", scope="sys")


@triton.jit(do_not_specialize=["at_arrivals", "at_flags", "block_rows"])  # type: ignore[untyped-decorator]
def _await_rows_kernel(
    words, slots, source_ranks, state, partner, host, at_arrivals, at_flags, block_rows, timeout_ns,
    OPENS: tl.constexpr, LANES: tl.constexpr, IS_TIMED: tl.constexpr,
):  # fmt: skip
    """One program of one warp per source and row of its block."""
    source = tl.program_id(0)
    place = tl.program_id(1)
    if OPENS:
        sequence = tl.load(state + _CLOSED) + 1
        if (source == 0) & (place == 0):
            tl.store(state + _OPENED, sequence)
    else:
        sequence = tl.load(state + _OPENED)
    rank = tl.load(source_ranks + source)
    slot = sequence * 0 - 1
    row = source * block_rows + place
    arrival = words + at_arrivals // _WORD_BYTES + source
    flag = words + at_flags // _WORD_BYTES + row
    is_told, announced = _await_word(
        arrival, sequence, rank, state, partner, host, timeout_ns, _SEQUENCE_SHIFT, LANES, IS_TIMED
    )
    if is_told & (place < (announced & _CARRIED_MASK)):
        has_come, value = _await_word(
            flag, sequence, rank, state, partner, host, timeout_ns, _SEQUENCE_SHIFT, LANES, IS_TIMED
        )
        if has_come:
            slot = (value & _CARRIED_MASK) - 1
    tl.store(slots + row, slot)


@triton.jit(do_not_specialize=["at_finished", "block_rows"])  # type: ignore[untyped-decorator]
def _push_results_kernel(
    y, slots, bases, source_ranks, state, at_results, at_flags, at_finished, block_rows,
    D: tl.constexpr, BLOCK: tl.constexpr, SOURCES: tl.constexpr,
    SOURCES_BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr, CLOSES: tl.constexpr,
):  # fmt: skip
    """One program per place of a row. The experts have read their rows: their kernels came before this one."""
    row = tl.program_id(0)
    dtype = y.dtype.element_ty
    word = tl.pointer_type(tl.int64)
    slot = tl.load(slots + row)
    sequence = tl.load(state + _OPENED)
    base = tl.load(bases + tl.load(source_ranks + row // block_rows))
    if row == 0:
        numbers = tl.arange(0, SOURCES_BLOCK)
        is_one = numbers < SOURCES
        peers = tl.load(bases + tl.load(source_ranks + numbers, mask=is_one, other=0), mask=is_one, other=0)
        tl.atomic_xchg((peers + at_finished).to(word), sequence + numbers * 0, mask=is_one, sem="release", scope="sys")
        if CLOSES:
            tl.store(state + _CLOSED, sequence)
    if slot >= 0:
        place = (row % block_rows).to(tl.int64)
        address = base + at_results + place * (D * dtype.primitive_bitwidth // 8)
        target = tl.multiple_of(address.to(tl.pointer_type(dtype)), ALIGNMENT)
        columns = tl.arange(0, BLOCK)
        values = tl.load(y + row.to(tl.int64) * D + columns, mask=columns < D)
        tl.store(target + columns, values, mask=columns < D)
        tl.debug_barrier()
        tl.atomic_xchg((base + at_flags + place * _WORD_BYTES).to(word), sequence, sem="release", scope="sys")


@triton.jit(do_not_specialize=["num_tokens", "lag"])  # type: ignore[untyped-decorator]
def _combine_results_kernel(
    results, flags, finished, chosen, y, destination_ranks, state, partner, host, num_tokens, lag, timeout_ns,
    K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, DESTINATIONS: tl.constexpr,
    LANES: tl.constexpr, IS_TIMED: tl.constexpr,
):  # fmt: skip
    """One program per token, or a single one where there are none."""
    token = tl.program_id(0)
    sequence = tl.load(state + _OPENED)
    if token < num_tokens:
        columns = tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(K):
            row = token * K + k
            rank = tl.load(chosen + row)
            if rank >= 0:
                has_come, _ = _await_word(
                    flags + row, sequence, rank, state, partner, host, timeout_ns, 0, LANES, IS_TIMED
                )
                tl.debug_barrier()
                if has_come:
                    total += tl.load(results + row.to(tl.int64) * D + columns, mask=columns < D, other=0.0).to(
                        tl.float32
                    )
        tl.store(y + token.to(tl.int64) * D + columns, total.to(y.dtype.element_ty), mask=columns < D)
    if token == 0:
        for number in range(DESTINATIONS):
            rank = tl.load(destination_ranks + number)
            if rank >= 0:
                _await_word(
                    finished + number, sequence - lag, rank, state, partner, host, timeout_ns, 0, LANES, IS_TIMED
                )
        tl.store(state + _CLOSED, sequence)


@dataclass(frozen=True, slots=True)
class _Launch:
    """A kernel with all it is given."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.options)

    def load(self) -> None:
        """Compiles it and loads it: loading may wait for kernels that run, and those may wait for a peer."""
        compiled = self.kernel.warmup(*self.arguments, grid=self.grid, **self.options)
        _ = compiled.run


def load_all(exchange: Exchange, routes: LayerRoutes, experts_per_token: int) -> None:
    """See `peer_rows.load_all`."""
    layout, device, K = exchange.areas.layout, exchange.state.device, experts_per_token
    turn = Turn(block_rows=8, parity=0, lag=1)
    x_ND = torch.empty(8, layout.hidden, dtype=layout.dtype, device=device)
    ids_NK = torch.empty(8, K, dtype=torch.int64, device=device)
    chosen_N, slots_N = ids_NK.flatten().int(), ids_NK[:, 0].contiguous()
    launches = []
    if exchange.source >= 0:
        launches.append(_push_rows(exchange, turn, routes, x_ND, ids_NK, ids_NK.to(layout.dtype), chosen_N))
        launches.append(_combine_results(exchange, turn, chosen_N, x_ND, K))
    if exchange.destination >= 0:
        launches.append(_await_rows(exchange, turn, slots_N))
        launches.append(_push_results(exchange, turn, x_ND, slots_N))
    for launch in launches:
        launch.load()


def push_rows(
    exchange: Exchange, turn: Turn, routes: LayerRoutes, x_TD: Tensor, expert_ids_TK: Tensor, scores_TK: Tensor
) -> Tensor:
    """See `peer_rows.push_rows`."""
    chosen_N = torch.empty(expert_ids_TK.numel(), dtype=torch.int32, device=x_TD.device)
    _push_rows(exchange, turn, routes, x_TD, expert_ids_TK.contiguous(), scores_TK.contiguous(), chosen_N).run()
    return chosen_N


def await_rows(exchange: Exchange, turn: Turn) -> tuple[Tensor, Tensor]:
    """See `peer_rows.await_rows`."""
    areas = exchange.areas
    num_rows = areas.layout.num_sources * turn.block_rows
    slots_N = torch.empty(num_rows, dtype=torch.int64, device=exchange.state.device)
    _await_rows(exchange, turn, slots_N).run()
    return areas.rows(exchange.rank, areas.layout.rows_at(turn.parity, 0), num_rows), slots_N


def push_results(exchange: Exchange, turn: Turn, y_ND: Tensor, slots_N: Tensor) -> None:
    """See `peer_rows.push_results`."""
    _push_results(exchange, turn, y_ND, slots_N).run()


def combine_results(exchange: Exchange, turn: Turn, chosen_N: Tensor, experts_per_token: int) -> Tensor:
    """See `peer_rows.combine_results`."""
    layout, num_tokens = exchange.areas.layout, chosen_N.shape[0] // experts_per_token
    y_TD = torch.empty(num_tokens, layout.hidden, dtype=layout.dtype, device=chosen_N.device)
    _combine_results(exchange, turn, chosen_N, y_TD, experts_per_token).run()
    return y_TD


def _push_rows(
    exchange: Exchange, turn: Turn, routes: LayerRoutes, x_TD: Tensor, ids_TK: Tensor, scores_TK: Tensor, out_N: Tensor
) -> _Launch:
    layout, first_row = exchange.areas.layout, exchange.source * turn.block_rows
    arguments = (
        x_TD, ids_TK, scores_TK, routes.keys_ER, routes.num_replicas_E,
        exchange.areas.bases, exchange.destination_ranks_P, exchange.state, out_N,
        out_N.shape[0], x_TD.stride(0), routes.first, layout.rows_at(turn.parity, first_row),
        layout.row_flags_at(turn.parity, first_row), layout.arrivals_at(turn.parity, exchange.source),
    )  # fmt: skip
    options = {
        "K": ids_TK.shape[1],
        "REPLICAS": routes.keys_ER.shape[1],
        "REPLICAS_BLOCK": triton.next_power_of_2(routes.keys_ER.shape[1]),
        "DESTINATIONS": layout.num_destinations,
        "DESTINATIONS_BLOCK": triton.next_power_of_2(layout.num_destinations),
        "ALIGNMENT": layout.alignment,
    }
    return _Launch(_push_rows_kernel, (max(1, out_N.shape[0]),), arguments, options | _row_options(exchange))


def _await_rows(exchange: Exchange, turn: Turn, slots_N: Tensor) -> _Launch:
    layout, state = exchange.areas.layout, exchange.state
    arguments = (
        exchange.areas.words(exchange.rank, 0, layout.num_bytes // WORD_BYTES), slots_N, exchange.source_ranks_S,
        state, exchange.partner_state, exchange.host, layout.arrivals_at(turn.parity, 0),
        layout.row_flags_at(turn.parity, 0), turn.block_rows, exchange.timeout_ns,
    )  # fmt: skip
    options = {"OPENS": exchange.source < 0, "LANES": 32, "IS_TIMED": state.is_cuda, "num_warps": 1}
    return _Launch(_await_rows_kernel, (layout.num_sources, turn.block_rows), arguments, options)


def _push_results(exchange: Exchange, turn: Turn, y_ND: Tensor, slots_N: Tensor) -> _Launch:
    layout = exchange.areas.layout
    arguments = (
        y_ND, slots_N, exchange.areas.bases, exchange.source_ranks_S, exchange.state, layout.results,
        layout.result_flags, layout.finished + exchange.destination * WORD_BYTES, turn.block_rows,
    )  # fmt: skip
    options = {
        "SOURCES": layout.num_sources,
        "SOURCES_BLOCK": triton.next_power_of_2(layout.num_sources),
        "ALIGNMENT": layout.alignment,
        "CLOSES": exchange.source < 0,
    }
    return _Launch(_push_results_kernel, (slots_N.shape[0],), arguments, options | _row_options(exchange))


def _combine_results(exchange: Exchange, turn: Turn, chosen_N: Tensor, y_TD: Tensor, K: int) -> _Launch:
    areas, layout = exchange.areas, exchange.areas.layout
    num_tokens = chosen_N.shape[0] // K
    arguments = (
        areas.rows(exchange.rank, layout.results, layout.capacity),
        areas.words(exchange.rank, layout.result_flags, layout.capacity),
        areas.words(exchange.rank, layout.finished, layout.num_destinations),
        chosen_N, y_TD, exchange.destination_ranks_P, exchange.state, exchange.partner_state, exchange.host,
        num_tokens, turn.lag, exchange.timeout_ns,
    )  # fmt: skip
    shape = _row_options(exchange)
    waiting = {"LANES": 32 * shape["num_warps"], "IS_TIMED": y_TD.is_cuda}
    options = {"K": K, "DESTINATIONS": layout.num_destinations} | waiting | shape
    return _Launch(_combine_results_kernel, (max(1, num_tokens),), arguments, options)


def _row_options(exchange: Exchange) -> dict[str, Any]:
    """A row is one block, and has as many warps as store it in few vectors each."""
    layout = exchange.areas.layout
    block = triton.next_power_of_2(layout.hidden)
    num_warps = min(_MAX_WARPS, max(1, block * layout.dtype.itemsize // (32 * _THREAD_BYTES)))
    return {"D": layout.hidden, "BLOCK": block, "num_warps": num_warps}
