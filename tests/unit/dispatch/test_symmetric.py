"""Symmetric dispatch among threads that share memory, by the plain torch form of its kernels, against the reference."""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
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
    Step,
    Tokens,
    random_step,
    random_tokens,
)

from actors.dispatch.contract import build_routing_table
from actors.dispatch.peer_memory import Mapping, SharedMemory
from actors.dispatch.rows import TokenShape
from actors.dispatch.symmetric import SymmetricDispatch
from actors.errors import RankError

CPU = torch.device("cpu")
HIDDEN = 16


def shape_of(k: int) -> TokenShape:
    return TokenShape(hidden=HIDDEN, experts_per_token=k, dtype=torch.float32, device=CPU)


def started(
    layout: Layout, model: Model, k: int, timeout_s: float = 10.0, max_tokens: int = 32
) -> tuple[list[SymmetricDispatch], dict[int, SlotCompute]]:
    world = max((*layout.attention, *layout.slots)) + 1
    routing = build_routing_table(layout.slots, LAYERS, NUM_EXPERTS, CPU)
    computes = {rank: SlotCompute(model, slots) for rank, slots in layout.slots.items()}
    dispatches = [
        SymmetricDispatch(
            memory, routing, computes.get(memory.rank), layout.attention, shape_of(k), timeout_s, max_tokens
        )
        for memory in SharedMemory.of_world(world, CPU)
    ]
    for dispatch in dispatches:
        dispatch.start()
    return dispatches, computes


def on_all(dispatches: list[SymmetricDispatch], work: Callable[[int, SymmetricDispatch], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(dispatches)) as pool:
        futures = [pool.submit(work, rank, dispatch) for rank, dispatch in enumerate(dispatches)]
        wait(futures)
        return [future.result() for future in futures]


def run_step(rank: int, dispatch: SymmetricDispatch, world: int, step: Step) -> list[torch.Tensor]:
    counts = tuple(len(step[0][r].x_TD) if r in step[0] else 0 for r in range(world))
    if rank not in step[0]:
        dispatch.serve_step(counts)
        return []
    dispatch.begin_step(counts)
    return [
        dispatch.combine(dispatch.dispatch(*tokens[rank], layer)) for layer, tokens in zip(LAYERS, step, strict=True)
    ]


def check_steps(layout: Layout, steps: list[Step], k: int) -> dict[int, SlotCompute]:
    """Every output of every rank equals the reference's; every row was computed exactly once."""
    model = Model(NUM_EXPERTS, HIDDEN)
    reference = model.reference(NUM_EXPERTS)
    dispatches, computes = started(layout, model, k)

    def work(rank: int, dispatch: SymmetricDispatch) -> list[list[torch.Tensor]]:
        return [run_step(rank, dispatch, len(dispatches), step) for step in steps]

    num_rows = 0
    for rank, outputs in enumerate(on_all(dispatches, work)):
        for step, output in zip(steps, outputs, strict=True):
            assert len(output) == (len(LAYERS) if rank in step[0] else 0)
            for layer, tokens, y_TD in zip(LAYERS, step, output, strict=False):
                num_rows += tokens[rank].ids_TK.numel()
                torch.testing.assert_close(y_TD, reference.combine(reference.dispatch(*tokens[rank], layer)))
    assert sum(sum(compute.rows.values()) for compute in computes.values()) == num_rows
    return computes


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_the_reference(name: str, k: int) -> None:
    layout = LAYOUTS[name]
    counts = [(1, 1, 1), (5, 0, 2), (0, 3, 0), (4, 7, 1), (0, 0, 0), (17, 9, 30)]
    check_steps(layout, [random_step(layout, c, k, HIDDEN, seed) for seed, c in enumerate(counts)], k)


def test_a_source_does_not_outrun_a_destination_that_it_seldom_needs() -> None:
    """Rank 2 is slow, and rank 0 does not wait for its results in most steps: it may not overwrite what rank 2 has not
    looked at yet, nor mistake a later layer's rows for this one's.
    """
    layout = Layout((0,), {1: dict.fromkeys(LAYERS, (0, 1)), 2: dict.fromkeys(LAYERS, (2, 3, 4, 5))})
    model = Model(NUM_EXPERTS, HIDDEN)
    dispatches, computes = started(layout, model, 1)
    computes[2].__class__ = type("Slow", (SlotCompute,), {"__call__": slow_call})
    reference = model.reference(NUM_EXPERTS)
    inputs = [
        random_tokens(3, 1, HIDDEN, number)._replace(ids_TK=torch.full((3, 1), 2 if number % 6 == 5 else 1))
        for number in range(24)
    ]
    steps: list[Step] = [[{0: a}, {0: b}] for a, b in zip(inputs[::2], inputs[1::2], strict=True)]

    def work(rank: int, dispatch: SymmetricDispatch) -> None:
        for step in steps:
            output = run_step(rank, dispatch, 3, step)
            for layer, tokens, y_TD in zip(LAYERS, step, output, strict=False):
                torch.testing.assert_close(y_TD, reference.combine(reference.dispatch(*tokens[0], layer)))

    on_all(dispatches, work)
    assert sum(computes[2].rows.values()) == 3 * 4


def slow_call(self: SlotCompute, layer: int, x_ND: torch.Tensor, slots_N: torch.Tensor) -> torch.Tensor:
    time.sleep(0.01)
    return SlotCompute.__call__(self, layer, x_ND, slots_N)


def test_an_odd_number_of_layers_uses_one_place_twice_in_a_row() -> None:
    """One layer: every step's rows lie where those of the step before did. Rank 1 always looks late."""
    layout = Layout((0,), {1: {1: (0, 1)}, 2: {1: (2, 3, 4, 5)}})
    routing = build_routing_table(layout.slots, (1,), NUM_EXPERTS, CPU)
    model = Model(NUM_EXPERTS, HIDDEN)
    computes = {rank: SlotCompute(model, experts) for rank, experts in layout.slots.items()}
    dispatches = [
        SymmetricDispatch(memory, routing, computes.get(memory.rank), (0,), shape_of(1), 10.0, 32)
        for memory in SharedMemory.of_world(3, CPU)
    ]
    reference = model.reference(NUM_EXPERTS)
    inputs = [
        random_tokens(3, 1, HIDDEN, number)._replace(ids_TK=torch.full((3, 1), 0 if number % 3 == 2 else 4))
        for number in range(12)
    ]

    def work(rank: int, dispatch: SymmetricDispatch) -> None:
        dispatch.start()
        for tokens in inputs:
            if rank:
                time.sleep(0.01 if rank == 1 else 0.0)
                dispatch.serve_step((3, 0, 0))
                continue
            dispatch.begin_step((3, 0, 0))
            y_TD = dispatch.combine(dispatch.dispatch(*tokens, 1))
            torch.testing.assert_close(y_TD, reference.combine(reference.dispatch(*tokens, 1)))

    on_all(dispatches, work)
    assert sum(computes[1].rows.values()) == 3 * 4


def test_padding_routes_nowhere() -> None:
    layout = LAYOUTS["2A+2E"]
    model = Model(NUM_EXPERTS, HIDDEN)
    dispatches, computes = started(layout, model, 2)
    tokens = random_tokens(6, 2, HIDDEN, 3)
    tokens.ids_TK[[1, 4, 5]] = -1

    def work(rank: int, dispatch: SymmetricDispatch) -> list[torch.Tensor]:
        return run_step(rank, dispatch, 4, [{0: tokens}] * len(LAYERS))

    outputs = on_all(dispatches, work)[0]
    kept = Tokens(*(field[[0, 2, 3]] for field in tokens))
    reference = model.reference(NUM_EXPERTS)
    for layer, y_TD in zip(LAYERS, outputs, strict=True):
        assert not y_TD[[1, 4, 5]].any()
        torch.testing.assert_close(y_TD[[0, 2, 3]], reference.combine(reference.dispatch(*kept, layer)))
    assert sum(sum(compute.rows.values()) for compute in computes.values()) == 6 * len(LAYERS)


def test_replicas_share_the_tokens_of_an_expert_and_a_new_table_is_followed() -> None:
    """All three expert ranks hold expert 0; then the table says that rank 4 alone serves it."""
    layout = Layout((0, 1), {rank: {la: tuple(range(6)) for la in LAYERS} for rank in (2, 3, 4)})
    dispatches, computes = started(layout, Model(NUM_EXPERTS, HIDDEN), 1)
    tokens = random_tokens(30, 1, HIDDEN, 5)._replace(ids_TK=torch.zeros(30, 1, dtype=torch.int64))
    step: Step = [{0: tokens, 1: tokens}] * 2
    on_all(dispatches, lambda rank, dispatch: run_step(rank, dispatch, 5, step))
    assert [computes[rank].rows[1, 0] for rank in (2, 3, 4)] == [20, 20, 20]
    table = build_routing_table(layout.slots, LAYERS, NUM_EXPERTS, CPU)
    table.num_replicas_ME.fill_(1)
    table.ranks_MER.fill_(4)
    for dispatch in dispatches:
        dispatch.update_routing(table)
    on_all(dispatches, lambda rank, dispatch: run_step(rank, dispatch, 5, step))
    assert [computes[rank].rows[1, 0] for rank in (2, 3, 4)] == [20, 20, 80]


class MappedAgain(SharedMemory):
    """Where the ranks of an epoch map what they had in the one before; who comes has new memory."""

    def __init__(self, rank: int, before: list[SymmetricDispatch], made: dict[str, Any]) -> None:
        super().__init__(rank, 4, CPU, made)
        self._kept = [dispatch._active.areas.buffers[dispatch._memory.rank] for dispatch in before]

    def map(self, name: str, num_bytes: int, own: torch.Tensor | None = None) -> Mapping:
        assert own is (self._kept[self.rank] if self.rank < len(self._kept) else None)
        new = torch.zeros(num_bytes, dtype=torch.uint8)
        self._made.setdefault(name, (*self._kept, new))
        return super().map(name, num_bytes)

    def largest(self, name: str, number: int) -> int:
        return max(number, 0)  # of those who were there before


def test_graphs_go_on_when_an_expert_rank_comes() -> None:
    """Rank 3 comes. What was captured reads tables where they were, and they say what is so now; stale flags say
    nothing, those of the last step of the epoch before either.
    """
    before = Layout((0,), {1: dict.fromkeys(LAYERS, (0, 1, 2)), 2: dict.fromkeys(LAYERS, (3, 4, 5))})
    after = Layout((0,), before.slots | {3: dict.fromkeys(LAYERS, (5, 0))})
    model = Model(NUM_EXPERTS, HIDDEN)
    reference = model.reference(NUM_EXPERTS)
    old, _ = started(before, model, 1)
    steps = [random_step(before, (9,), 1, HIDDEN, seed) for seed in range(3)]
    on_all(old, lambda rank, dispatch: [run_step(rank, dispatch, 3, step) for step in steps])
    tables = [address for dispatch in old for address in addresses_of(dispatch)]
    routing = build_routing_table(after.slots, LAYERS, NUM_EXPERTS, CPU)
    computes = {rank: SlotCompute(model, slots) for rank, slots in after.slots.items()}
    made: dict[str, Any] = {}
    new = [
        SymmetricDispatch(
            MappedAgain(rank, old, made), routing, computes.get(rank), (0,), shape_of(1), 10.0, 32,
            before=old[rank] if rank < 3 else None,
        )
        for rank in range(4)
    ]  # fmt: skip
    for dispatch in new:
        dispatch.start()
    for dispatch, of_old in zip(new, old, strict=False):
        assert dispatch.can_take_over(of_old)
        dispatch.take_over(of_old)
        of_old.close()
    assert tables == [address for dispatch in new[:3] for address in addresses_of(dispatch)]
    for dispatch in new:
        areas = dispatch._active.areas
        assert areas.bases[:4].tolist() == [buffer.data_ptr() for buffer in areas.buffers], "what kernels read"

    def work(rank: int, dispatch: SymmetricDispatch) -> None:
        for step in steps:
            for layer, tokens, y_TD in zip(LAYERS, step, run_step(rank, dispatch, 4, step), strict=False):
                torch.testing.assert_close(y_TD, reference.combine(reference.dispatch(*tokens[0], layer)))

    on_all(new, work)
    assert sum(computes[3].rows.values()) > 0


def addresses_of(dispatch: SymmetricDispatch) -> list[int]:
    exchange = dispatch._active
    tables = (
        exchange.areas.bases, exchange.destination_ranks_P, exchange.source_ranks_S, exchange.state, exchange.host,
        exchange.areas.buffers[exchange.rank], dispatch._keys_MER, dispatch._num_replicas_ME,
    )  # fmt: skip
    return [table.data_ptr() for table in tables]


@pytest.mark.parametrize(
    ("sources", "slots"),
    [((0, 1), {1: (0, 1, 2), 2: (3, 4, 5)}), ((0,), {2: (0, 1, 2, 3, 4, 5)})],
    ids=["another source", "not in its place"],
)
def test_graphs_do_not_go_on_where_they_would_do_something_else(
    sources: tuple[int, ...], slots: dict[int, tuple[int, ...]]
) -> None:
    layout = Layout((0,), {1: dict.fromkeys(LAYERS, (0, 1, 2)), 2: dict.fromkeys(LAYERS, (3, 4, 5))})
    model = Model(NUM_EXPERTS, HIDDEN)
    old, computes = started(layout, model, 1)
    of_layers = {rank: dict.fromkeys(LAYERS, experts) for rank, experts in slots.items()}
    routing = build_routing_table(of_layers, LAYERS, NUM_EXPERTS, CPU)
    memory = SharedMemory.of_world(3, CPU)[2]
    new = SymmetricDispatch(memory, routing, computes[2], sources, shape_of(1), 10.0, 32, before=old[2])
    new.start()
    assert not new.can_take_over(old[2])


def test_two_micro_batches_in_ping_pong() -> None:
    """Rank 0 pushes both before it waits for either; rank 1 serves them in turn."""
    layout = LAYOUTS["1A+1E"]
    model = Model(NUM_EXPERTS, HIDDEN)
    routing = build_routing_table(layout.slots, LAYERS, NUM_EXPERTS, CPU)
    compute = SlotCompute(model, layout.slots[1])
    pairs = [
        [SymmetricDispatch(memory, routing, compute, (0,), shape_of(1), 10.0, 32, f"micro-batch {i}") for i in (0, 1)]
        for memory in SharedMemory.of_world(2, CPU)
    ]
    counts = [(5, 0), (3, 0)]
    batches = [[random_tokens(n, 1, HIDDEN, n + layer) for layer in LAYERS] for n, _ in counts]
    reference = model.reference(NUM_EXPERTS)

    def work(rank: int, pair: Any) -> None:
        for dispatch, tokens_of_rank in zip(pair, counts, strict=True):
            dispatch.start()
            dispatch.begin_step(tokens_of_rank)
        for layer_idx, layer in enumerate(LAYERS):
            if rank == 1:
                for dispatch in pair:
                    dispatch.serve_layer(layer)
                continue
            inputs = [batch[layer_idx] for batch in batches]
            receipts = [dispatch.dispatch(*tokens, layer) for dispatch, tokens in zip(pair, inputs, strict=True)]
            for dispatch, receipt, tokens in zip(pair, receipts, inputs, strict=True):
                torch.testing.assert_close(
                    dispatch.combine(receipt), reference.combine(reference.dispatch(*tokens, layer))
                )

    on_all(pairs, work)  # type: ignore[arg-type]


@pytest.mark.parametrize("lost", [0, 2])
def test_a_lost_rank_is_named_within_the_timeout(lost: int) -> None:
    """By those that wait for it; the other rank of its role may get all that it needs. Both layers take one timeout."""
    layout = LAYOUTS["2A+2E"]
    dispatches, _ = started(layout, Model(NUM_EXPERTS, HIDDEN), 1, timeout_s=0.8)
    step = random_step(layout, (9, 9), 1, HIDDEN, 0)
    began_s = time.monotonic()

    def work(rank: int, dispatch: SymmetricDispatch) -> None:
        if rank == lost:
            return
        if (rank in layout.slots) == (lost in layout.slots):
            with contextlib.suppress(RankError):
                run_step(rank, dispatch, 4, step)
            return
        with pytest.raises(RankError, match="did not answer") as caught:
            run_step(rank, dispatch, 4, step)
        assert caught.value.rank == lost
        with pytest.raises(RankError, match="did not answer"):
            dispatch.begin_step((1, 1, 0, 0))

    on_all(dispatches, work)
    assert time.monotonic() - began_s < 4.0


def test_an_interrupt_ends_a_wait_at_once() -> None:
    layout = LAYOUTS["1A+1E"]
    dispatches, _ = started(layout, Model(NUM_EXPERTS, HIDDEN), 1, timeout_s=60.0)
    timer = threading.Timer(0.05, dispatches[1].interrupt)
    timer.start()
    began_s = time.monotonic()
    with pytest.raises(RankError, match="the epoch is over"):
        dispatches[1].serve_step((1, 0))
    assert time.monotonic() - began_s < 5.0
    timer.join()


def test_breaking_the_contract_is_refused() -> None:
    layout = LAYOUTS["colocated 1"]
    routing = build_routing_table(layout.slots, LAYERS, NUM_EXPERTS, CPU)
    (memory,) = SharedMemory.of_world(1, CPU)
    with pytest.raises(ValueError, match="no experts"):
        SymmetricDispatch(memory, routing, None, (0,), shape_of(1), 1.0)
    (dispatch,), _ = started(layout, Model(NUM_EXPERTS, HIDDEN), 1)
    tokens = random_tokens(2, 1, HIDDEN, 0)
    with pytest.raises(ValueError, match="no step"):
        dispatch.dispatch(*tokens, 1)
    with pytest.raises(ValueError, match="2 token counts for 1 ranks"):
        dispatch.begin_step((1, 1))
    assert dispatch.fits((32,)) and not dispatch.fits((33,))
    with pytest.raises(ValueError, match="33 tokens, there is room for 32"):
        dispatch.begin_step((33,))
    dispatch.begin_step((2,))
    with pytest.raises(ValueError, match="out of order"):
        dispatch.dispatch(*tokens, 3)
    with pytest.raises(ValueError, match=r"expected \[2, 16\]"):
        dispatch.dispatch(*random_tokens(3, 1, HIDDEN, 0), 1)
    with pytest.raises(ValueError, match="must dispatch"):
        dispatch.serve_layer(1)
    receipt = dispatch.dispatch(*tokens, 1)
    with pytest.raises(ValueError, match="out of order"):
        dispatch.dispatch(*tokens, 1)
    dispatch.combine(receipt)
    with pytest.raises(ValueError, match="combined once"):
        dispatch.combine(receipt)
    with pytest.raises(ValueError, match="after 1 of 2 layers"):
        dispatch.begin_step((2,))
    dispatch.close()
    with pytest.raises(RankError, match="closed"):
        dispatch.begin_step((2,))
