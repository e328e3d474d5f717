"""Where rows go: the layout of a step and the order of rows, worked out by hand, for both placers."""

import pytest
import torch
from torch import Tensor

from actors.dispatch.contract import RoutingTable, build_routing_table
from actors.dispatch.layout import Membership, Source, lay_out_step, order_destinations
from actors.dispatch.rows import DevicePlacer, HostPlacer, Placer, RowBuffer, TokenShape, scale_rows

CPU = torch.device("cpu")
PLACERS = [HostPlacer, DevicePlacer]
SLOTS = {1: {0: (3, 0)}, 2: {0: (1, 2)}}  # rank 1 holds experts 3 and 0, rank 2 holds 1 and 2


def routing_table(slots: dict[int, dict[int, tuple[int, ...]]]) -> RoutingTable:
    return build_routing_table(slots, (0,), 4, CPU)


def place(placer: Placer, ids: list[int], block_rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Places tokens whose activation is their own number; returns (place_N, first_P, slots, activations)."""
    buffer = RowBuffer(TokenShape(hidden=3, experts_per_token=1, dtype=dtype, device=CPU))
    buffer.reserve(16)
    buffer.words_NW.fill_(77)
    rows_ND = torch.arange(float(len(ids)), dtype=dtype)[:, None].expand(-1, 3).contiguous()
    place_N, first_P = placer.place(0, torch.tensor(ids)[:, None], rows_ND, buffer, block_rows)
    return place_N, first_P, buffer.slots_N, buffer.x_ND


@pytest.mark.parametrize("make", PLACERS)
def test_rows_are_sorted_by_destination_and_slot(make: type[Placer]) -> None:
    placer = make(routing_table(SLOTS), (1, 2), 0)  # type: ignore[call-arg]
    place_N, first_P, slots_N, x_ND = place(placer, [2, 0, 3, 1, 0], block_rows=0)
    # rank 1: slot 0 (expert 3) token 2, slot 1 (expert 0) tokens 1 and 4; rank 2: slot 0 token 3, slot 1 token 0
    assert slots_N[:5].tolist() == [0, 1, 1, 0, 1]
    assert x_ND[:5, 0].tolist() == [2, 1, 4, 3, 0]
    assert place_N.tolist() == [4, 1, 0, 3, 2]
    assert first_P.tolist() == [0, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", PLACERS)
def test_blocks_are_padded(make: type[Placer], dtype: torch.dtype) -> None:
    placer = make(routing_table(SLOTS), (1, 2), 0)  # type: ignore[call-arg]
    place_N, _, slots_N, x_ND = place(placer, [2, 0, 3, 1, 0], block_rows=5, dtype=dtype)
    assert slots_N[:11].tolist() == [0, 1, 1, -1, -1, 0, 1, -1, -1, -1, 77]
    assert x_ND[[0, 1, 2, 5, 6]].tolist() == [[2] * 3, [1] * 3, [4] * 3, [3] * 3, [0] * 3]
    assert place_N.tolist() == [6, 1, 0, 5, 2]


@pytest.mark.parametrize("make", PLACERS)
def test_own_rows_come_last(make: type[Placer]) -> None:
    """Rank 1 sends from a buffer in which rank 2's rows lie before its own."""
    destinations = order_destinations(1, [2, 1])
    assert destinations == (2, 1)
    placer = make(routing_table(SLOTS), destinations, 1)  # type: ignore[call-arg]
    place_N, first_P, slots_N, _ = place(placer, [0, 1, 3], block_rows=0)
    assert slots_N[:3].tolist() == [0, 0, 1]
    assert place_N.tolist() == [2, 0, 1]
    assert first_P.tolist() == [0, 1]


@pytest.mark.parametrize("make", PLACERS)
def test_tokens_take_replicas_in_turn(make: type[Placer]) -> None:
    """Expert 0 has three replicas, expert 1 one; the turn starts at the rank's own number."""
    slots = {1: {0: (0, 1)}, 2: {0: (2, 0)}, 3: {0: (3, 0)}}
    for rank in (0, 4):
        placer = make(routing_table(slots), (1, 2, 3), rank)  # type: ignore[call-arg]
        place_N, first_P, _, _ = place(placer, [0, 0, 0, 0, 0, 0, 1], block_rows=0)
        starts = [*first_P.tolist(), 7]
        chosen = [next(d for d in range(3) if starts[d] <= row < starts[d + 1]) for row in place_N.tolist()]
        assert chosen == [*[(token + rank) % 3 for token in range(6)], 0]


def test_both_placers_agree() -> None:
    slots = {rank: {0: tuple((rank + i) % 7 for i in range(4))} for rank in range(5)}
    routing = build_routing_table(slots, (0,), 7, CPU)
    rng = torch.Generator().manual_seed(3)
    for num_tokens, k, block in ((1, 1, 1), (9, 3, 27), (50, 2, 0), (64, 1, 64)):
        shape = TokenShape(hidden=5, experts_per_token=k, dtype=torch.float32, device=CPU)
        ids_TK = torch.rand(num_tokens, 7, generator=rng).argsort(1)[:, :k]
        rows_ND = torch.randn(num_tokens * k, 5, generator=rng)
        found = []
        for make in PLACERS:
            buffer = RowBuffer(shape)
            buffer.reserve(512)
            buffer.words_NW.fill_(5)
            found.append((*make(routing, (0, 1, 3, 4, 2), 2).place(0, ids_TK, rows_ND, buffer, block), buffer.words_NW))
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs)


def test_scores_scale_each_copy_of_a_token() -> None:
    x_TD, scores_TK = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5, 2.0], [1.0, 0.0]])
    assert scale_rows(x_TD, scores_TK).tolist() == [[0.5, 1], [2, 4], [3, 4], [0, 0]]
    assert scale_rows(x_TD, scores_TK[:, :1]).tolist() == [[0.5, 1], [3, 4]]
    assert scale_rows(x_TD.bfloat16(), scores_TK).dtype == torch.bfloat16


def test_layout_of_a_disaggregated_step() -> None:
    """2A+2E, 3 and 5 tokens, room for 4 rows: rank 0 is fixed, rank 1 counted."""
    tokens = (3, 5, 0, 0)
    source = lay_out_step(Membership(rank=0, attention_ranks=(0, 1), destinations=(2, 3)), tokens, 1, 4)
    assert (source.own_rows, source.own_fixed, source.block_rows, source.out_rows) == (3, True, 3, 6)
    assert source.fixed_sources == source.counted_sources == ()
    counted = lay_out_step(Membership(rank=1, attention_ranks=(0, 1), destinations=(2, 3)), tokens, 1, 4)
    assert (counted.own_fixed, counted.block_rows, counted.out_rows, counted.capacity_rows) == (False, 0, 5, 5)
    expert = lay_out_step(Membership(rank=2, attention_ranks=(0, 1), destinations=(3, 2)), tokens, 1, 4)
    assert expert.fixed_sources == (Source(0, 3, 0),)
    assert expert.counted_sources == (Source(1, 5, -1),)
    assert (expert.out_rows, expert.counted_start, expert.capacity_rows) == (0, 3, 8)


def test_layout_of_a_colocated_step() -> None:
    """Own blocks first, rank 0's block next: ranks without tokens have none."""
    layout = lay_out_step(Membership(rank=1, attention_ranks=(0, 1, 2), destinations=(0, 2, 1)), (2, 1, 0), 2, 8)
    assert (layout.block_rows, layout.out_rows) == (2, 6)
    assert layout.fixed_sources == (Source(0, 4, 6),)
    assert (layout.counted_start, layout.capacity_rows) == (10, 10)


def test_one_destination_never_counts() -> None:
    layout = lay_out_step(Membership(rank=1, attention_ranks=(0,), destinations=(1,)), (9000, 0), 1, 4)
    assert layout.fixed_sources == (Source(0, 9000, 0),)
    assert layout.counted_sources == ()


@pytest.mark.parametrize(
    ("hidden", "dtype", "row_bytes"),
    [(4, torch.float32, 32), (5, torch.bfloat16, 32), (5120, torch.bfloat16, 10256)],
)
def test_rows_are_aligned(hidden: int, dtype: torch.dtype, row_bytes: int) -> None:
    assert TokenShape(hidden=hidden, experts_per_token=1, dtype=dtype, device=CPU).row_bytes == row_bytes
