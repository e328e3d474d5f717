"""Collective dispatch over real gloo groups, its ranks being threads, against the reference."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from actors.dispatch.collective import CollectiveDispatch
from actors.dispatch.contract import build_routing_table
from actors.dispatch.group import EpochGroup, RendezvousStore
from actors.dispatch.reference import ReferenceDispatch
from actors.dispatch.rows import TokenShape

CPU = torch.device("cpu")
LAYERS = (1, 3)
Slots = dict[int, dict[int, tuple[int, ...]]]


@pytest.fixture(autouse=True)
def _one_thread_per_rank() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Ranks:
    """The ranks of one epoch, each a thread with a group of its own."""

    def __init__(self, groups: list[EpochGroup], pool: ThreadPoolExecutor) -> None:
        self.groups = groups
        self._pool = pool

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """work(rank) on every rank at once."""
        futures = [self._pool.submit(work, rank) for rank in range(len(self.groups))]
        wait(futures)
        return [future.result() for future in futures]


@contextmanager
def ranks_of_world(world: int) -> Iterator[Ranks]:
    store = RendezvousStore("127.0.0.1")
    store.start()
    groups = [EpochGroup(CPU, "127.0.0.1") for _ in range(world)]
    with ThreadPoolExecutor(world) as pool:
        ranks = Ranks(groups, pool)
        ranks.run(lambda rank: groups[rank].prepare(store.endpoint))
        ranks.run(lambda rank: groups[rank].join(1, rank, world, 10.0, 10.0))
        try:
            yield ranks
        finally:
            ranks.run(lambda rank: groups[rank].leave())
            store.stop()


class Model:
    """Experts [layer, expert] as matrices: y = tanh(x @ W + b), so that every expert and every scale tells."""

    def __init__(self, num_experts: int, hidden: int, dtype: torch.dtype = torch.float32) -> None:
        rng = torch.Generator().manual_seed(7)
        shape = (num_experts, hidden, hidden)
        self.weights = {la: (torch.randn(shape, generator=rng) / hidden**0.5).to(dtype) for la in LAYERS}
        self.biases = {la: torch.randn(num_experts, hidden, generator=rng).to(dtype) for la in LAYERS}

    def expert(self, layer: int, expert: int) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.tanh(x @ self.weights[layer][expert] + self.biases[layer][expert])

    def reference(self, num_experts: int) -> ReferenceDispatch:
        return ReferenceDispatch({la: [self.expert(la, e) for e in range(num_experts)] for la in LAYERS})


class SlotCompute:
    """The experts of one rank. Counts rows per (layer, slot); what it returns for padding must never be read."""

    def __init__(self, model: Model, slots: dict[int, tuple[int, ...]]) -> None:
        self._model = model
        self._slots = slots
        self.rows: dict[tuple[int, int], int] = {}
        self.padding_rows = 0

    def __call__(self, layer: int, x_ND: Tensor, slots_N: Tensor) -> Tensor:
        y_ND = torch.full_like(x_ND, torch.nan, memory_format=torch.contiguous_format)
        self.padding_rows += int((slots_N == -1).sum())
        for slot, expert in enumerate(self._slots.get(layer, ())):
            chosen = slots_N == slot
            self.rows[layer, slot] = self.rows.get((layer, slot), 0) + int(chosen.sum())
            y_ND[chosen] = self._model.expert(layer, expert)(x_ND[chosen])
        return y_ND


class Layout(NamedTuple):
    attention: tuple[int, ...]
    slots: Slots


def spread(expert_ranks: tuple[int, ...], num_experts: int, replicas: int = 1) -> Slots:
    """Experts dealt out in turn; replica r of an expert is r ranks further on."""
    return {
        rank: {
            layer: tuple(
                e for e in range(num_experts) if any((e + layer + r) % len(expert_ranks) == i for r in range(replicas))
            )
            for layer in LAYERS
        }
        for i, rank in enumerate(expert_ranks)
    }


NUM_EXPERTS = 6
LAYOUTS = {
    "1A+1E": Layout((0,), spread((1,), NUM_EXPERTS)),
    "2A+2E": Layout((0, 1), spread((2, 3), NUM_EXPERTS)),
    "1A+3E": Layout((0,), spread((1, 2, 3), NUM_EXPERTS)),
    "3A+1E": Layout((0, 1, 2), spread((3,), NUM_EXPERTS)),
    "2A+3E replicas": Layout((0, 1), spread((2, 3, 4), NUM_EXPERTS, replicas=2)),
    "colocated 1": Layout((0,), spread((0,), NUM_EXPERTS)),
    "colocated 2": Layout((0, 1), spread((0, 1), NUM_EXPERTS)),
    "colocated 3": Layout((0, 1, 2), spread((0, 1, 2), NUM_EXPERTS)),
    "colocated 2 replicas": Layout((0, 1), spread((0, 1), NUM_EXPERTS, replicas=2)),
    "mixed": Layout((0, 1), spread((1, 2), NUM_EXPERTS)),
}


class Tokens(NamedTuple):
    x_TD: Tensor
    ids_TK: Tensor
    scores_TK: Tensor


def random_tokens(num_tokens: int, k: int, hidden: int, seed: int, dtype: torch.dtype = torch.float32) -> Tokens:
    rng = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(num_tokens, NUM_EXPERTS, generator=rng).argsort(1)[:, :k]
    return Tokens(
        torch.randn(num_tokens, hidden, generator=rng).to(dtype),
        ids_TK,
        torch.rand(num_tokens, k, generator=rng).to(dtype),
    )


Step = list[dict[int, Tokens]]
"""Tokens of each rank that has some, for each layer."""


def run_steps(
    ranks: Ranks, layout: Layout, model: Model, steps: list[Step], shape: TokenShape, inline_bytes: int | None = None
) -> tuple[list[list[dict[int, Tensor]]], dict[int, SlotCompute]]:
    """Runs steps on all ranks; y[step][layer][rank] and each expert rank's compute."""
    routing = build_routing_table(layout.slots, LAYERS, NUM_EXPERTS, CPU)
    computes = {rank: SlotCompute(model, slots) for rank, slots in layout.slots.items()}
    results: list[list[dict[int, Tensor]]] = [[{} for _ in LAYERS] for _ in steps]

    @torch.inference_mode()  # as in serving
    def work(rank: int) -> None:
        dispatch = CollectiveDispatch(
            ranks.groups[rank], routing, computes.get(rank), layout.attention, shape, inline_bytes
        )
        for step, outputs in zip(steps, results, strict=True):
            counts = tuple(len(step[0][r].x_TD) if r in step[0] else 0 for r in range(len(ranks.groups)))
            if rank not in step[0]:
                dispatch.serve_step(counts)
                continue
            dispatch.begin_step(counts)
            for layer, tokens, output in zip(LAYERS, step, outputs, strict=True):
                output[rank] = dispatch.combine(dispatch.dispatch(*tokens[rank], layer))

    ranks.run(work)
    return results, computes


def check_steps(
    layout: Layout, steps: list[Step], k: int, hidden: int = 16, inline_bytes: int | None = None
) -> dict[int, SlotCompute]:
    """Every output of every rank equals the reference's; every row was computed exactly once."""
    model = Model(NUM_EXPERTS, hidden)
    reference = model.reference(NUM_EXPERTS)
    shape = TokenShape(hidden=hidden, experts_per_token=k, dtype=torch.float32, device=CPU)
    world = max((*layout.attention, *layout.slots)) + 1
    with ranks_of_world(world) as ranks:
        results, computes = run_steps(ranks, layout, model, steps, shape, inline_bytes)
    num_rows = 0
    for step, outputs in zip(steps, results, strict=True):
        for layer, tokens, output in zip(LAYERS, step, outputs, strict=True):
            assert output.keys() == tokens.keys()
            for rank, y_TD in output.items():
                num_rows += tokens[rank].ids_TK.numel()
                torch.testing.assert_close(y_TD, reference.combine(reference.dispatch(*tokens[rank], layer)))
    assert sum(sum(compute.rows.values()) for compute in computes.values()) == num_rows
    return computes


def random_step(layout: Layout, counts: tuple[int, ...], k: int, hidden: int, seed: int) -> Step:
    return [
        {
            rank: random_tokens(num, k, hidden, seed * 100 + layer * 10 + rank)
            for rank, num in zip(layout.attention, counts, strict=False)
            if num
        }
        for layer in LAYERS
    ]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_the_reference(name: str, k: int) -> None:
    layout = LAYOUTS[name]
    counts = [(1, 1, 1), (5, 0, 2), (0, 3, 0), (4, 7, 1), (0, 0, 0), (17, 9, 30)]
    steps = [random_step(layout, c, k, 16, seed) for seed, c in enumerate(counts)]
    check_steps(layout, steps, k)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_the_reference_when_rows_are_counted(name: str, k: int) -> None:
    """Room for 4 rows inline: some ranks send fixed messages and others counted ones, in the same step."""
    layout = LAYOUTS[name]
    counts = [(20, 1, 9), (2, 30, 3), (40, 40, 0), (1, 2, 1)]
    steps = [random_step(layout, c, k, 16, seed) for seed, c in enumerate(counts)]
    check_steps(layout, steps, k, inline_bytes=4 * 80)


def test_empty_experts_and_all_tokens_to_one() -> None:
    """Every token wants expert 4, which one rank of three holds; the others get messages without rows."""
    layout = LAYOUTS["1A+3E"]
    for inline_bytes in (None, 0):
        tokens = random_tokens(11, 1, 16, 3)._replace(ids_TK=torch.full((11, 1), 4))
        computes = check_steps(layout, [[{0: tokens}, {0: tokens}]], 1, inline_bytes=inline_bytes)
        assert sorted(sum(compute.rows.values()) for compute in computes.values()) == [0, 11, 11]


def test_a_rank_without_slots_in_a_layer_is_left_out_of_it() -> None:
    slots: Slots = {1: {1: (0, 1, 2, 3, 4, 5), 3: (0, 1)}, 2: {3: (2, 3, 4, 5)}}
    for attention in ((0,), (0, 1), (0, 2)):
        layout = Layout(attention, slots)
        check_steps(layout, [random_step(layout, (6, 5), 2, 16, seed) for seed in range(3)], 2)
        check_steps(layout, [random_step(layout, (6, 1), 2, 16, seed) for seed in range(3)], 2, inline_bytes=4 * 80)


def test_fixed_messages_carry_padding_and_counted_ones_none() -> None:
    layout = LAYOUTS["2A+2E"]
    steps = [random_step(layout, (6, 6), 1, 16, 0)]
    fixed = check_steps(layout, steps, 1)
    counted = check_steps(layout, steps, 1, inline_bytes=0)
    assert sum(compute.padding_rows for compute in fixed.values()) == 6 * 2 * len(LAYERS)
    assert sum(compute.padding_rows for compute in counted.values()) == 0


def test_replicas_share_the_tokens_of_an_expert() -> None:
    """40 tokens from each of two ranks want expert 0, which all three expert ranks hold: 26 or 27 each."""
    layout = Layout((0, 1), {rank: {layer: tuple(range(6)) for layer in LAYERS} for rank in (2, 3, 4)})
    tokens = random_tokens(40, 1, 16, 5)._replace(ids_TK=torch.zeros(40, 1, dtype=torch.int64))
    computes = check_steps(layout, [[{0: tokens, 1: tokens}] * 2], 1)
    for compute in computes.values():
        assert all(26 <= compute.rows[layer, 0] <= 27 for layer in LAYERS)


def test_one_token_at_a_time_uses_every_replica() -> None:
    layout = Layout((0,), {rank: {layer: tuple(range(6)) for layer in LAYERS} for rank in (1, 2)})
    tokens = random_tokens(1, 1, 16, 5)
    computes = check_steps(layout, [[{0: tokens}] * 2], 1)
    assert [sum(compute.rows.values()) for compute in computes.values()] == [1, 1]


@pytest.mark.parametrize("name", ["2A+2E", "colocated 2"])
def test_many_steps_of_changing_size(name: str) -> None:
    """60 steps, sizes from a fixed sequence that crosses the inline limit and zero."""
    layout = LAYOUTS[name]
    rng = torch.Generator().manual_seed(1)
    sizes = [tuple(torch.randint(0, 12, (2,), generator=rng).tolist()) for _ in range(60)]
    check_steps(layout, [random_step(layout, size, 2, 8, i) for i, size in enumerate(sizes)], 2, 8, 8 * 48)


def test_messages_of_many_packets() -> None:
    """Above the size from which a message has a tail, fixed and counted."""
    layout = LAYOUTS["2A+2E"]
    check_steps(layout, [random_step(layout, (20, 17), 1, 1024, 0)], 1, hidden=1024)
    check_steps(layout, [random_step(layout, (37, 20), 1, 1024, 1)], 1, hidden=1024, inline_bytes=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [8, 13])
def test_other_dtypes_and_odd_widths_travel_bit_for_bit(dtype: torch.dtype, hidden: int) -> None:
    """One token, one expert: the same bits as an expert that is called without a group between."""
    layout = LAYOUTS["2A+2E"]
    model = Model(NUM_EXPERTS, hidden, dtype)
    shape = TokenShape(hidden=hidden, experts_per_token=1, dtype=dtype, device=CPU)
    step: Step = [
        {0: random_tokens(1, 1, hidden, layer, dtype), 1: random_tokens(1, 1, hidden, 9, dtype)} for layer in LAYERS
    ]
    with ranks_of_world(4) as ranks:
        results, _ = run_steps(ranks, layout, model, [step], shape)
    for layer, tokens, output in zip(LAYERS, step, results[0], strict=True):
        for rank, y_TD in output.items():
            x_TD, ids_TK, scores_TK = tokens[rank]
            assert torch.equal(y_TD, model.expert(layer, int(ids_TK[0, 0]))(x_TD * scores_TK))


def test_breaking_the_contract_is_refused() -> None:
    layout = LAYOUTS["colocated 1"]
    routing = build_routing_table(layout.slots, LAYERS, NUM_EXPERTS, CPU)
    shape = TokenShape(hidden=16, experts_per_token=1, dtype=torch.float32, device=CPU)
    tokens = random_tokens(2, 1, 16, 0)
    with ranks_of_world(1) as ranks:
        with pytest.raises(ValueError, match="no experts"):
            CollectiveDispatch(ranks.groups[0], routing, None, (0,), shape)
        compute = SlotCompute(Model(NUM_EXPERTS, 16), layout.slots[0])
        dispatch = CollectiveDispatch(ranks.groups[0], routing, compute, (0,), shape)
        with pytest.raises(ValueError, match="no step"):
            dispatch.dispatch(*tokens, 1)
        with pytest.raises(ValueError, match="2 token counts for 1 ranks"):
            dispatch.begin_step((1, 1))
        dispatch.begin_step((2,))
        with pytest.raises(ValueError, match="out of order"):
            dispatch.dispatch(*tokens, 3)
        with pytest.raises(ValueError, match=r"expected \[2, 16\]"):
            dispatch.dispatch(*random_tokens(3, 1, 16, 0), 1)
        receipt = dispatch.dispatch(*tokens, 1)
        with pytest.raises(ValueError, match="out of order"):
            dispatch.dispatch(*tokens, 1)
        dispatch.combine(receipt)
        with pytest.raises(ValueError, match="combined once"):
            dispatch.combine(receipt)
        with pytest.raises(ValueError, match="after 1 of 2 layers"):
            dispatch.begin_step((2,))
        with pytest.raises(ValueError, match="must dispatch"):
            CollectiveDispatch(ranks.groups[0], routing, compute, (0,), shape).serve_step((2,))
