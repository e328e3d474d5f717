"""Steps in two halves, by ranks that are threads: what comes back, who is served when, and how a lost rank shows."""

import contextlib
import threading
import time
from typing import Any

import pytest
import torch
from test_collective import (
    LAYERS,
    LAYOUTS,
    NUM_EXPERTS,
    Layout,
    Model,
    SlotCompute,
    random_step,
    random_tokens,
)
from test_symmetric import CPU, HIDDEN, on_all, shape_of

from actors.attention.captured import sizes_of_singles
from actors.dispatch.contract import build_routing_table
from actors.dispatch.micro_batches import MicroBatches, room_of_half, rows_of_first
from actors.dispatch.peer_memory import SharedMemory
from actors.dispatch.symmetric import SymmetricDispatch
from actors.errors import RankError

MAX_TOKENS, MOST_WHOLE_ROWS = 100, 16


def started(
    layout: Layout, model: Model, k: int = 1, timeout_s: float = 10.0
) -> tuple[list[MicroBatches], dict[int, SlotCompute]]:
    world = max((*layout.attention, *layout.slots)) + 1
    routing = build_routing_table(layout.slots, LAYERS, NUM_EXPERTS, CPU)
    computes = {rank: SlotCompute(model, slots) for rank, slots in layout.slots.items()}
    dispatches = []
    for memory in SharedMemory.of_world(world, CPU):
        halves = [
            SymmetricDispatch(
                memory, routing, computes.get(memory.rank), layout.attention, shape_of(k), timeout_s,
                room_of_half(MAX_TOKENS, MOST_WHOLE_ROWS), f"half {i}",
            )
            for i in (1, 2)
        ]  # fmt: skip
        dispatches.append(MicroBatches(*halves, MAX_TOKENS, MOST_WHOLE_ROWS))
    for dispatch in dispatches:
        dispatch.start()
    return dispatches, computes


@pytest.mark.parametrize("name", ["1A+1E", "2A+2E", "1A+3E", "2A+3E replicas"])
@pytest.mark.parametrize("k", [1, 2])
def test_equals_the_reference_whether_divided_or_not(name: str, k: int) -> None:
    layout, model = LAYOUTS[name], Model(NUM_EXPERTS, HIDDEN)
    reference = model.reference(NUM_EXPERTS)
    dispatches, computes = started(layout, model, k)
    world = len(dispatches)
    counts = [(3, 0), (16, 16), (17, 3), (0, 40), (33, 32), (64, 65), (0, 0), (100, 1)]
    steps = [random_step(layout, (*c, 0), k, HIDDEN, seed) for seed, c in enumerate(counts)]

    def work(rank: int, dispatch: MicroBatches) -> None:
        for step in steps:
            tokens_of_rank = tuple(len(step[0][r].x_TD) if r in step[0] else 0 for r in range(world))
            if rank not in step[0] or not tokens_of_rank[rank]:
                dispatch.serve_step(tokens_of_rank)
                continue
            dispatch.begin_step(tokens_of_rank)
            assert dispatch.is_divided == (max(tokens_of_rank) > MOST_WHOLE_ROWS)
            for layer, tokens in zip(LAYERS, step, strict=True):
                y_TD = dispatch.combine(dispatch.dispatch(*tokens[rank], layer))
                torch.testing.assert_close(y_TD, reference.combine(reference.dispatch(*tokens[rank], layer)))

    on_all(dispatches, work)  # type: ignore[arg-type]
    num_rows = sum(tokens.ids_TK.numel() for step in steps for layer in step for tokens in layer.values())
    assert sum(sum(compute.rows.values()) for compute in computes.values()) == num_rows


def test_the_second_half_leaves_before_the_first_is_back() -> None:
    """The experts compute nothing of a half before the other one's tokens are with them, too."""
    layout, model = LAYOUTS["1A+1E"], Model(NUM_EXPERTS, HIDDEN)
    dispatches, computes = started(layout, model)
    have_left = [threading.Event() for _ in LAYERS]
    seen: list[int] = []

    def call(self: SlotCompute, layer: int, x_ND: torch.Tensor, slots_N: torch.Tensor) -> torch.Tensor:
        assert have_left[LAYERS.index(layer)].wait(5.0)
        seen.append(int((slots_N >= 0).sum()))
        return SlotCompute.__call__(self, layer, x_ND, slots_N)

    computes[1].__class__ = type("Watched", (SlotCompute,), {"__call__": call})
    reference = model.reference(NUM_EXPERTS)

    def work(rank: int, dispatch: MicroBatches) -> None:
        if rank == 1:
            dispatch.serve_step((40, 0))
            return
        dispatch.begin_step((40, 0))
        parts = dispatch.parts(40)
        assert [rows for _, rows in parts] == [slice(0, 24), slice(24, 40)]
        for layer, event in zip(LAYERS, have_left, strict=True):
            tokens = [random_tokens(rows.stop - rows.start, 1, HIDDEN, layer + rows.start) for _, rows in parts]
            receipts = [part.dispatch(*some, layer) for (part, _), some in zip(parts, tokens, strict=True)]
            event.set()
            for (part, _), receipt, some in zip(parts, receipts, tokens, strict=True):
                y_TD = part.combine(receipt)
                torch.testing.assert_close(y_TD, reference.combine(reference.dispatch(*some, layer)))

    on_all(dispatches, work)  # type: ignore[arg-type]
    assert seen == [24, 16] * len(LAYERS)


def test_ranks_agree_whatever_padding_they_know_of() -> None:
    """An attention rank captures a step of so many rows as its graph has, the others know the tokens of the plan."""
    (dispatch,), _ = started(LAYOUTS["colocated 1"], Model(NUM_EXPERTS, HIDDEN))
    for max_rows in (12, 20, 100):
        sizes = sizes_of_singles(max_rows)
        for num_rows in range(1, max_rows + 1):
            dispatch.begin_step((num_rows,))
            known = dispatch.is_divided, [part.block_rows for part, _ in dispatch.parts(num_rows)]
            size = next(size for size in sizes if size >= num_rows)
            dispatch.begin_step((size,))
            parts = dispatch.parts(size)
            assert (dispatch.is_divided, [part.block_rows for part, _ in parts]) == known
            assert [rows.start for _, rows in parts][1:] == [rows.stop for _, rows in parts][:-1]
            assert parts[-1][1].stop == size


def test_the_first_half_is_about_half_and_fits() -> None:
    for num_rows in range(1, 300):
        first = rows_of_first(num_rows)
        assert 0 <= first <= num_rows and abs(2 * first - num_rows) <= 16
        assert max(first, min(num_rows, 16)) <= room_of_half(num_rows, 16)


@pytest.mark.parametrize("lost", [0, 2])
def test_a_lost_rank_is_named_within_one_timeout(lost: int) -> None:
    """By those that wait for it, whose waits in the other half end at once; they blame nobody else."""
    layout, timeout_s = LAYOUTS["2A+2E"], 0.8
    dispatches, _ = started(layout, Model(NUM_EXPERTS, HIDDEN), timeout_s=timeout_s)
    step = random_step(layout, (50, 50), 1, HIDDEN, 0)
    took_s: dict[int, float] = {}

    def run(rank: int, dispatch: MicroBatches) -> None:
        if rank in layout.slots:
            dispatch.serve_step((50, 50, 0, 0))
            return
        dispatch.begin_step((50, 50, 0, 0))
        for layer, tokens in zip(LAYERS, step, strict=True):
            dispatch.combine(dispatch.dispatch(*tokens[rank], layer))

    def work(rank: int, dispatch: Any) -> None:
        if rank == lost:
            return
        began_s = time.monotonic()
        if (rank in layout.slots) == (lost in layout.slots):
            with contextlib.suppress(RankError):
                run(rank, dispatch)
            return
        with pytest.raises(RankError, match="did not answer") as caught:
            run(rank, dispatch)
        took_s[rank] = time.monotonic() - began_s
        assert caught.value.rank == lost

    on_all(dispatches, work)
    assert len(took_s) == 2 and all(took < 2 * timeout_s for took in took_s.values()), took_s


def test_an_interrupt_ends_waits_of_either_half() -> None:
    dispatches, _ = started(LAYOUTS["1A+1E"], Model(NUM_EXPERTS, HIDDEN), timeout_s=60.0)
    timer = threading.Timer(0.05, dispatches[1].interrupt)
    timer.start()
    began_s = time.monotonic()
    with pytest.raises(RankError, match="the epoch is over"):
        dispatches[1].serve_step((40, 0))
    assert time.monotonic() - began_s < 5.0
    timer.join()
