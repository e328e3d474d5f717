"""Symmetric dispatch on one GPU: the ranks of an epoch as streams of this process, which share its memory.

The kernels, their order and their waits are those of separate GPUs; how memory is mapped between processes is tested in
test_symmetric_processes.py.
"""

import os
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from symmetric_cases import (
    LAYERS,
    NUM_EXPERTS,
    Experts,
    Layout,
    Tokens,
    compute,
    counts_of,
    expected,
    random_tokens,
    spread,
)
from torch import Tensor

from actors.attention.model import Stages, run_in_turn
from actors.dispatch.by_size import ServingGraphs
from actors.dispatch.micro_batches import MicroBatches, room_of_half
from actors.dispatch.peer_memory import SharedMemory
from actors.dispatch.reference import ReferenceDispatch
from actors.dispatch.rows import TokenShape
from actors.dispatch.symmetric import SymmetricDispatch
from actors.errors import RankError

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # streams that share one wait for each other

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

TIMEOUT_S = 10.0
MOST_WHOLE_ROWS = 16  # of dispatches in halves
LAYOUTS = {
    "1A+1E": Layout((0,), spread((1,))),
    "2A+2E": Layout((0, 1), spread((2, 3))),
    "1A+3E": Layout((0,), spread((1, 2, 3))),
    "2A+3E replicas": Layout((0, 1), spread((2, 3, 4), replicas=2)),
    "colocated 1": Layout((0,), spread((0,))),
    "colocated 3": Layout((0, 1, 2), spread((0, 1, 2))),
    "mixed": Layout((0, 1), spread((1, 2))),
}
Step = dict[int, list[Tokens]]
"""Of each rank with tokens, those of every layer."""


def shape_of(k: int = 1, hidden: int = 5120, dtype: torch.dtype = torch.bfloat16) -> TokenShape:
    return TokenShape(hidden=hidden, experts_per_token=k, dtype=dtype, device=torch.device("cuda", 0))


@lru_cache
def make_streams(device: torch.device) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(5)]


class Ranks:
    """The ranks of one epoch, each a stream. Layer by layer, all of them do what they do first, then what is next: the
    host never gives a stream something to wait for that it has not given to another before.
    """

    def __init__(
        self,
        layout: Layout,
        shape: TokenShape,
        timeout_s: float = TIMEOUT_S,
        max_tokens: int = 64,
        in_halves: bool = False,
    ) -> None:
        self.layout, self.shape = layout, shape
        self.streams = make_streams(shape.device)[: layout.world]
        self.experts = {rank: Experts(shape, slots) for rank, slots in layout.slots.items()}
        self.dispatches: list[Any] = []

        def make(memory: SharedMemory, room: int, name: str = "whole") -> SymmetricDispatch:
            experts, routing = self.experts.get(memory.rank), layout.routing(shape.device)
            return SymmetricDispatch(memory, routing, experts, layout.attention, shape, timeout_s, room, name)

        for memory in SharedMemory.of_world(layout.world, shape.device):
            if in_halves:
                first, second = (make(memory, room_of_half(max_tokens, MOST_WHOLE_ROWS), f"half {i}") for i in (1, 2))
                self.dispatches.append(MicroBatches(first, second, max_tokens, MOST_WHOLE_ROWS))
            else:
                self.dispatches.append(make(memory, max_tokens))
        for dispatch in self.dispatches:
            dispatch.start()
        self.load_experts(max_tokens)

    def load_experts(self, max_tokens: int) -> None:
        """Kernels that are used for the first time are loaded, which waits for those that run: here, for each other."""
        num_rows = len(self.layout.attention) * 8
        while num_rows <= len(self.layout.attention) * max_tokens * self.shape.experts_per_token:
            x_ND = torch.zeros(num_rows, self.shape.hidden, dtype=self.shape.dtype, device=self.shape.device)
            slots_N = torch.full((num_rows,), -1, device=self.shape.device)
            for experts in self.experts.values():
                experts(LAYERS[0], x_ND, slots_N)
            torch.cat((x_ND, x_ND))  # as halves are joined
            num_rows *= 2

    def each(self, work: Callable[[int, Any], Any]) -> list[Any]:
        results = []
        for rank, (stream, dispatch) in enumerate(zip(self.streams, self.dispatches, strict=True)):
            with torch.cuda.stream(stream):
                results.append(work(rank, dispatch))
        return results

    def run(self, counts: tuple[int, ...], step: Step, lost: int = -1) -> list[dict[int, Tensor]]:
        """Runs a step; the outputs of every layer by rank, unless a rank is left out."""
        torch.cuda.synchronize()  # inputs were made on another stream
        self.each(lambda rank, dispatch: dispatch.begin_step(counts) if rank != lost else None)
        outputs: list[dict[int, Tensor]] = []
        for layer_idx, layer in enumerate(LAYERS):
            receipts = self.each(
                lambda rank, dispatch, at=(layer_idx, layer): (
                    dispatch.dispatch(*step[rank][at[0]], at[1]) if rank in step and rank != lost else None
                )
            )
            self.each(
                lambda rank, dispatch, la=layer: dispatch.serve_layer(la) if rank not in step and rank != lost else None
            )
            output = self.each(
                lambda rank, dispatch, r=receipts: dispatch.combine(r[rank]) if r[rank] is not None else None
            )
            outputs.append({rank: y_TD for rank, y_TD in enumerate(output) if y_TD is not None})
        return outputs

    def wait(self) -> None:
        self.each(lambda _, dispatch: dispatch.wait())

    def close(self) -> None:
        for dispatch in self.dispatches:
            dispatch.close()


def random_step(layout: Layout, counts: tuple[int, ...], shape: TokenShape, seed: int, **how: Any) -> Step:
    return {
        rank: [random_tokens(num, shape, seed * 1000 + rank * 100 + layer, **how) for layer in LAYERS]
        for rank, num in enumerate(counts)
        if num
    }


def check(outputs: list[dict[int, Tensor]], step: Step) -> None:
    for layer_idx, (layer, output) in enumerate(zip(LAYERS, outputs, strict=True)):
        assert output.keys() == step.keys()
        for rank, y_TD in output.items():
            assert torch.equal(y_TD, expected(layer, step[rank][layer_idx])), f"layer {layer}, rank {rank}"


def test_what_is_expected_is_the_reference() -> None:
    shape = shape_of(k=2, hidden=24, dtype=torch.float32)
    tokens = random_tokens(9, shape, 0)
    numbers = torch.arange(NUM_EXPERTS, device=shape.device)
    for layer in LAYERS:
        experts = [lambda x, e=e, la=layer: compute(la, x, numbers[e : e + 1]) for e in range(NUM_EXPERTS)]
        reference = ReferenceDispatch({layer: experts})
        y_TD = reference.combine(reference.dispatch(*tokens, layer))
        torch.testing.assert_close(expected(layer, tokens), y_TD)


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape_of()) for name in LAYOUTS]
    + [(name, shape_of(2, 333, torch.float32)) for name in ("2A+3E replicas", "colocated 3")],
    ids=lambda value: value if isinstance(value, str) else f"top-{value.experts_per_token} of {value.hidden}",
)
def test_equals_what_is_expected(name: str, shape: TokenShape) -> None:
    layout = LAYOUTS[name]
    ranks = Ranks(layout, shape)
    for seed, numbers in enumerate([(1, 1, 1), (5, 0, 2), (0, 3, 0), (0, 0, 0), (64, 9, 30)]):
        counts = counts_of(layout, numbers)
        step = random_step(layout, counts, shape, seed, hot=seed % 2 == 1)
        outputs = ranks.run(counts, step)
        ranks.wait()
        check(outputs, step)
    ranks.close()


class Captured:
    """A graph per rank of one step with fixed token counts, and the tensors that it reads and writes."""

    def __init__(self, ranks: Ranks, counts: tuple[int, ...]) -> None:
        self.ranks = ranks
        self.inputs: Step = random_step(ranks.layout, counts, ranks.shape, 999)
        self.outputs: list[dict[int, Tensor]] = [{} for _ in LAYERS]
        check(ranks.run(counts, self.inputs), self.inputs)  # what the experts use is loaded then
        ranks.wait()
        self.graphs = [torch.cuda.CUDAGraph() for _ in ranks.dispatches]
        for rank, dispatch in enumerate(ranks.dispatches):
            with torch.cuda.graph(self.graphs[rank], stream=ranks.streams[rank]):
                dispatch.begin_step(counts)
                if rank not in self.inputs:
                    dispatch.serve_layers()
                    continue
                num = counts[rank]
                parts = dispatch.parts(num) if isinstance(dispatch, MicroBatches) else [(dispatch, slice(0, num))]
                run_in_turn([self.stages(rank, part, rows) for part, rows in parts])

    def stages(self, rank: int, dispatch: Any, rows: slice) -> Stages:
        for layer_idx, layer in enumerate(LAYERS):
            receipt = dispatch.dispatch(*(field[rows] for field in self.inputs[rank][layer_idx]), layer)
            yield
            y_TD = dispatch.combine(receipt)
            if rows.start:
                y_TD = torch.cat((self.outputs[layer_idx][rank], y_TD))
            self.outputs[layer_idx][rank] = y_TD
        return y_TD

    def replay(self, step: Step) -> list[dict[int, Tensor]]:
        for rank, layers in step.items():
            for mine, theirs in zip(self.inputs[rank], layers, strict=True):
                for a, b in zip(mine, theirs, strict=True):
                    a.copy_(b)
        torch.cuda.synchronize()
        self.ranks.each(lambda rank, _: self.graphs[rank].replay())
        self.ranks.wait()
        return self.outputs


@pytest.mark.parametrize(
    ("name", "in_halves"),
    [(name, False) for name in ("2A+2E", "1A+3E", "colocated 3", "2A+3E replicas")]
    + [("2A+2E", True), ("1A+3E", True)],
)
def test_replays_equal_what_is_expected(name: str, in_halves: bool) -> None:
    """50 replays; every replay has other inputs, some padding, and every third one hot expert."""
    layout, shape = LAYOUTS[name], shape_of()
    ranks = Ranks(layout, shape, in_halves=in_halves)
    counts = counts_of(layout, (40, 9) if in_halves else (16, 9, 16))
    captured = Captured(ranks, counts)
    for replay in range(50):
        step = random_step(layout, counts, shape, replay, hot=replay % 3 == 2, padding=replay % 9)
        check(captured.replay(step), step)
    ranks.close()


def test_a_new_table_needs_no_new_capture() -> None:
    """Every expert has a replica on both expert ranks; then one of them is not named any more."""
    layout = Layout((0,), {rank: dict.fromkeys(LAYERS, tuple(range(NUM_EXPERTS))) for rank in (1, 2)})
    shape = shape_of()
    ranks = Ranks(layout, shape)
    counts = counts_of(layout, (16,))
    captured = Captured(ranks, counts)
    for only in (0, 1, 2):
        table = layout.routing(shape.device)
        if only:
            table.ranks_MER.fill_(only)
        ranks.each(lambda _, dispatch, new=table: dispatch.update_routing(new))
        before = {rank: int(experts.num_rows) for rank, experts in ranks.experts.items()}
        for seed in range(3):
            step = random_step(layout, counts, shape, 50 + seed)
            check(captured.replay(step), step)
        rows = [int(ranks.experts[rank].num_rows) - before[rank] for rank in (1, 2)]
        total = 3 * 16 * len(LAYERS)
        assert rows == {0: [total // 2] * 2, 1: [total, 0], 2: [0, total]}[only]
    ranks.close()


def test_a_rank_that_is_never_chosen_keeps_up() -> None:
    layout, shape = LAYOUTS["1A+3E"], shape_of()
    ranks = Ranks(layout, shape)
    counts = counts_of(layout, (1,))
    captured = Captured(ranks, counts)
    for seed in range(20):
        step = random_step(layout, counts, shape, seed, hot=True)
        check(captured.replay(step), step)
    ranks.close()


@pytest.mark.parametrize("in_halves", [False, True])
def test_a_rank_without_tokens_serves_by_graphs(in_halves: bool) -> None:
    """Of two sizes of blocks in turn (the smaller one whole); the first step of each is run without one, the second
    captured.
    """
    layout, shape = LAYOUTS["1A+1E"], shape_of()
    ranks = Ranks(layout, shape, in_halves=in_halves)
    serving = ServingGraphs(ranks.dispatches[1])
    for seed in range(12):
        counts = counts_of(layout, (7 if seed % 2 else 30,))
        step = random_step(layout, counts, shape, seed)
        torch.cuda.synchronize()
        with torch.cuda.stream(ranks.streams[1]):
            serving.serve_step(counts)
        with torch.cuda.stream(ranks.streams[0]):
            source = ranks.dispatches[0]
            source.begin_step(counts)
            outputs = [
                {0: source.combine(source.dispatch(*tokens, layer))}
                for layer, tokens in zip(LAYERS, step[0], strict=True)
            ]
        ranks.wait()
        check(outputs, step)
    ranks.close()


def test_a_lost_rank_ends_the_waits_of_both_halves() -> None:
    """The attention rank never comes: one timeout for all layers of both."""
    layout, shape = LAYOUTS["1A+1E"], shape_of()
    ranks = Ranks(layout, shape, timeout_s=0.5, in_halves=True)
    began_s = time.monotonic()
    with torch.cuda.stream(ranks.streams[1]):
        ranks.dispatches[1].serve_step(counts_of(layout, (40,)))
        with pytest.raises(RankError, match="did not answer") as caught:
            ranks.dispatches[1].wait()
    assert caught.value.rank == 0
    assert 0.4 < time.monotonic() - began_s < 0.9
    ranks.close()


@pytest.mark.parametrize("lost", [0, 2])
def test_a_rank_that_is_silent_is_named_within_the_timeout(lost: int) -> None:
    """Three layers are bounded by one timeout, not three."""
    layout, shape = LAYOUTS["2A+2E"], shape_of()
    ranks = Ranks(layout, shape, timeout_s=0.5)
    counts = counts_of(layout, (8, 8))
    check(ranks.run(counts, (step := random_step(layout, counts, shape, 0))), step)
    ranks.wait()
    began_s = time.monotonic()
    ranks.run(counts, step, lost=lost)
    for rank, dispatch in enumerate(ranks.dispatches):
        with torch.cuda.stream(ranks.streams[rank]):
            if (rank in layout.slots) != (
                lost in layout.slots
            ):  # they wait for it; the other may get all that it needs
                with pytest.raises(RankError, match="did not answer") as caught:
                    dispatch.wait()
                assert caught.value.rank == lost
    assert 0.4 < time.monotonic() - began_s < 2.5
    ranks.close()


def test_an_interrupt_ends_waits_on_the_device() -> None:
    layout, shape = LAYOUTS["1A+1E"], shape_of()
    ranks = Ranks(layout, shape, timeout_s=30.0)
    with torch.cuda.stream(ranks.streams[1]):
        ranks.dispatches[1].serve_step(counts_of(layout, (4,)))
    time.sleep(0.05)
    began_s = time.monotonic()
    ranks.dispatches[1].interrupt()
    with pytest.raises(RankError, match="the epoch is over"), torch.cuda.stream(ranks.streams[1]):
        ranks.dispatches[1].wait()
    assert time.monotonic() - began_s < 1.0
    ranks.close()
