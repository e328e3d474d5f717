"""The Triton form of `draw.py`, over the columns of one rank or of several that write into each other's memory.

Owns how a row's weight is summed and its token found: one program per row, twice over its columns. Ranks tell each
other their columns' weight, and the token, as `peer_words_triton.py` sends words. Needs Triton: imported only where it
is installed.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, type-arg, misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.attention.distribution import unit
from actors.kernels.draw import Draws
from actors.kernels.early_triton import await_inputs, early
from actors.kernels.peer_sums import CALLS, SAID_WORDS, SENT_BYTES, PeerSums
from actors.kernels.peer_words_triton import receive, send

_CALLS = tl.constexpr(CALLS)
_WARPS = 8
_BLOCK = 2048
_AT_ONCE = tl.constexpr(4)  # blocks whose loads do not wait for each other


@triton.jit
def _weights(x, at, num_columns, largest, temperature, least, unit_weight, LEAST: tl.constexpr):
    """int64 weights of the columns `at`; 0 beyond the last."""
    values = tl.load(x + at, mask=at < num_columns, other=-float("inf")).to(tl.float32)
    distance = tl.div_rn(largest - values, values * 0.0 + temperature)
    weights = (tl.exp(0.0 - distance) * unit_weight).to(tl.int64)
    if LEAST:
        weights = tl.where(weights < least, 0, weights)
    return tl.where(at < num_columns, weights, 0)


@triton.jit
def _tell(
    low, high, bases, state, host, timeout_ns, rank, number, at_own, at_told, SOURCE_BYTES: tl.constexpr,
    WORLD: tl.constexpr, WORLD_BLOCK: tl.constexpr, LANES: tl.constexpr, IS_TIMED: tl.constexpr,
):  # fmt: skip
    """int64 [WORLD_BLOCK]: every rank's number, of which this one's is in two words. Areas have `at_own` for rank 0."""
    word = tl.arange(0, 2)
    words = tl.where(word == 0, low, high)
    for step in tl.static_range(WORLD - 1):
        peer = (rank + 1 + step) % WORLD
        send(bases, peer, at_own + rank * SOURCE_BYTES, words, word, word >= 0, number)
    sources = tl.arange(0, WORLD_BLOCK)
    is_own = (sources == rank)[:, None]
    present = (sources < WORLD)[:, None] & (word >= 0)[None, :]
    own = (tl.load(bases + rank) + at_own).to(tl.pointer_type(tl.int64))
    at = own + sources[:, None].to(tl.int64) * (SOURCE_BYTES // 8) + word[None, :]
    arrived = receive(
        at, present & (is_own == 0), number, state, host, bases, rank, at_told, timeout_ns, WORLD, WORLD_BLOCK,
        LANES, IS_TIMED,
    )  # fmt: skip
    arrived = tl.where(is_own, words[None, :], arrived).to(tl.int64) & 0xFFFFFFFF
    values = tl.sum(tl.where(word[None, :] == 0, arrived, arrived << 32), axis=1)
    return tl.where(sources < WORLD, values, 0)


@triton.jit(do_not_specialize=["num_columns", "rank", "timeout_ns"])
def draw_kernel(
    x, rows, largests, temperatures, uniforms, leasts, tokens, bases, state, host, timeout_ns, rank, x_stride,
    num_columns, at_told, at_first, at_second, unit_weight, LEAST: tl.constexpr, BLOCK: tl.constexpr,
    ROW_BYTES: tl.constexpr, SOURCE_BYTES: tl.constexpr, WORLD: tl.constexpr, WORLD_BLOCK: tl.constexpr,
    LANES: tl.constexpr, IS_TIMED: tl.constexpr,
):  # fmt: skip
    """What ranks tell each other of row n lies ROW_BYTES * n into what a source has of an area, SOURCE_BYTES, in two
    areas, from bytes `at_first` and `at_second` on.
    """
    await_inputs(HOLDS_NEXT=WORLD > 1)
    row = tl.program_id(0).to(tl.int64)
    of_batch = tl.load(rows + row)
    largest = tl.load(largests + of_batch)
    temperature = tl.load(temperatures + row)
    uniform = tl.load(uniforms + row)
    least = tl.load(leasts + row) if LEAST else 0
    x_at = x + of_batch * x_stride
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, num_columns, BLOCK * _AT_ONCE):
        for i in tl.static_range(_AT_ONCE):
            at = first + i * BLOCK + lanes
            total += _weights(x_at, at, num_columns, largest, temperature, least, unit_weight, LEAST)
    mine = tl.sum(total, axis=0)
    all_ranks, before, at_own = mine, mine * 0, row * ROW_BYTES
    number = mine.to(tl.int32)
    sequence = mine
    if WORLD > 1:
        sequence = tl.load(state + _CALLS + row) + 1
        number = sequence.to(tl.int32)
        at_own += (sequence & 1) * (WORLD * SOURCE_BYTES)
        told = _tell(
            (mine & 0xFFFFFFFF).to(tl.int32), (mine >> 32).to(tl.int32), bases, state, host, timeout_ns, rank, number,
            at_first + at_own, at_told, SOURCE_BYTES, WORLD, WORLD_BLOCK, LANES, IS_TIMED,
        )  # fmt: skip
        all_ranks = tl.sum(told, axis=0)
        before = tl.sum(tl.where(tl.arange(0, WORLD_BLOCK) < rank, told, 0), axis=0)
    target = (all_ranks.to(tl.float64) * uniform).to(tl.int64)
    target = tl.minimum(target, all_ranks - 1) - before
    found, reached = number * 0, mine * 0
    if (target >= 0) & (target < mine):
        for first in range(0, num_columns, BLOCK * _AT_ONCE):
            for i in tl.static_range(_AT_ONCE):
                at = first + i * BLOCK + lanes
                weights = _weights(x_at, at, num_columns, largest, temperature, least, unit_weight, LEAST)
                weight = tl.sum(weights, axis=0)
                if (reached <= target) & (reached + weight > target):
                    sums = tl.cumsum(weights, axis=0) + reached
                    found = first + i * BLOCK + tl.sum((sums <= target).to(tl.int32), axis=0)
                reached += weight
        found += rank * num_columns
    if WORLD > 1:
        told = _tell(
            found, found * 0, bases, state, host, timeout_ns, rank, number, at_second + at_own, at_told, SOURCE_BYTES,
            WORLD, WORLD_BLOCK, LANES, IS_TIMED,
        )  # fmt: skip
        found = tl.sum(told, axis=0).to(tl.int32)
        tl.store(state + _CALLS + row, sequence)
    tl.store(tokens + row, found.to(tl.int64))


def launch_draw(x_BV: Tensor, draws: Draws, vocab_size: int, peers: PeerSums | None = None) -> Tensor:
    """See `draw.draw_tokens`, and with peers `peer_sums.draw_columns`. The form does not depend on the width."""
    num_rows = len(draws.row_R)
    tokens_R = torch.empty(num_rows, dtype=torch.int64, device=x_BV.device)
    given = draws.row_R, draws.largest_B, draws.temperature_R, draws.uniform_R, draws.least_R
    where: tuple[Tensor | int | None, ...] = (None, None, None, 0, 0, x_BV.stride(0), x_BV.shape[1], 0, 0, 0)
    world, row_bytes, source_bytes = 1, 0, 0
    if peers is not None:
        layout = peers.layout
        world, row_bytes = layout.world, SAID_WORDS * SENT_BYTES
        source_bytes = layout.max_rows * row_bytes
        where = (
            peers.bases, peers.state, peers.host, peers.timeout_ns, peers.rank, x_BV.stride(0), x_BV.shape[1],
            layout.blame, layout.said, layout.said + row_bytes // 2,
        )  # fmt: skip
    draw_kernel[(num_rows,)](
        x_BV, *given, tokens_R, *where, float(unit(vocab_size)), LEAST=draws.least_R is not None, BLOCK=_BLOCK,
        ROW_BYTES=row_bytes, SOURCE_BYTES=source_bytes, WORLD=world, WORLD_BLOCK=triton.next_power_of_2(world),
        LANES=32 * _WARPS, IS_TIMED=x_BV.is_cuda, num_warps=_WARPS, **early(),
    )  # fmt: skip
    return tokens_R
