"""Symmetric dispatch between processes with a GPU each: mapped memory, pasts that differ, a peer that dies."""

import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from symmetric_cases import LAYERS, NUM_EXPERTS, Experts, Layout, counts_of, expected, random_tokens, spread
from torch import Tensor

from actors.dispatch.collective import CollectiveDispatch
from actors.dispatch.group import EpochGroup, RendezvousStore
from actors.dispatch.peer_memory import SymmetricMemory
from actors.dispatch.rows import TokenShape
from actors.dispatch.symmetric import SymmetricDispatch
from actors.errors import RankError

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

ADDRESS = "127.0.0.1"
JOIN_S = 30.0
WORK_S = 75.0
TIMEOUT_S = 5.0
LAYOUTS = {
    "colocated 1": Layout((0,), spread((0,))),
    "1A+1E": Layout((0,), spread((1,))),
    "colocated 2": Layout((0, 1), spread((0, 1))),
    "colocated 2 replicas": Layout((0, 1), spread((0, 1), replicas=2)),
    "1A+2E": Layout((0,), spread((1, 2))),
    "grown 1A+2E": Layout((0,), spread((1,)) | spread((2,))),
    "grown 1A+3E": Layout((0,), spread((1, 2)) | {3: spread((1, 2))[2]}),
    "2A+2E": Layout((0, 1), spread((2, 3))),
    "1A+3E": Layout((0,), spread((1, 2, 3))),
    "colocated 4": Layout((0, 1, 2, 3), spread((0, 1, 2, 3))),
}


class Rank:
    """This process as a rank of one layout after another, each in an epoch of its own."""

    def __init__(self, rank: int, endpoint: str) -> None:
        self.rank, self.epoch = rank, 1
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        self.shape = TokenShape(hidden=5120, experts_per_token=1, dtype=torch.bfloat16, device=device)
        self.group = EpochGroup(device, ADDRESS)
        self.group.prepare(endpoint)
        if rank == 0:  # it has met others before, and nobody else has
            self.group.join(1, 0, 1, JOIN_S)
            SymmetricMemory(self.group, device, JOIN_S).map("alone", 4096)

    def join(self, layout: Layout, timeout_s: float = TIMEOUT_S) -> SymmetricDispatch:
        device, self.epoch = self.shape.device, self.epoch + 1
        self.layout = layout
        self.experts = Experts(self.shape, layout.slots[self.rank]) if self.rank in layout.slots else None
        self.group.join(self.epoch, self.rank, layout.world, JOIN_S, TIMEOUT_S)
        memory = SymmetricMemory(self.group, device, JOIN_S)
        dispatch = SymmetricDispatch(
            memory, layout.routing(device), self.experts, layout.attention, self.shape, timeout_s, max_tokens=64
        )
        dispatch.start()
        return dispatch

    def run(self, dispatch: Any, counts: tuple[int, ...], seed: int, **how: Any) -> list[Tensor]:
        """A step of any dispatch; outputs of every layer, checked."""
        if not counts[self.rank]:
            dispatch.serve_step(counts)
            return []
        dispatch.begin_step(counts)
        outputs = []
        for layer in LAYERS:
            tokens = random_tokens(counts[self.rank], self.shape, seed * 100 + self.rank * 10 + layer, **how)
            y_TD = dispatch.combine(dispatch.dispatch(*tokens, layer))
            assert torch.equal(y_TD, expected(layer, tokens)), f"seed {seed}, layer {layer}, rank {self.rank}"
            outputs.append(y_TD)
        return outputs


def work(main: Callable[..., Any], rank: int, names: tuple[str, ...], endpoint: str, results: Any) -> None:
    try:
        results.put((rank, main(Rank(rank, endpoint), *(LAYOUTS[name] for name in names))))
    except BaseException:
        results.put((rank, traceback.format_exc()))
        raise


def on_all(
    main: Callable[..., Any], *names: str, but: tuple[int, ...] = (), visible: Sequence[str] = ()
) -> dict[int, Any]:
    """What `main` returns on every rank but those; the others may end as they like. `visible`: devices of each."""
    store = RendezvousStore(ADDRESS)
    store.start()
    context = mp.get_context("spawn")
    results = context.Queue()
    world = LAYOUTS[names[0]].world
    processes = [context.Process(target=work, args=(main, r, names, store.endpoint, results)) for r in range(world)]
    with pytest.MonkeyPatch.context() as patch:
        for process, devices in zip_longest(processes, visible):
            if devices is not None:
                patch.setenv("CUDA_VISIBLE_DEVICES", devices)
            process.start()
    found: dict[int, Any] = {}
    try:
        while len(found.keys() - set(but)) < world - len(but):
            rank, result = results.get(timeout=WORK_S)
            found[rank] = result
            assert not isinstance(result, str), f"rank {rank}: {result}"
    finally:
        for process in processes:
            process.join(5.0 if len(found) == world else 0.1)
            process.kill()
        store.stop()
    return found


def needs(world: int) -> Any:
    return pytest.mark.gpu(devices=world)


def equal_all(me: Rank, *layouts: Layout) -> bool:
    """Eager steps by symmetric and by collective dispatch, then replays, of one layout after another."""
    for layout in layouts:
        dispatch = me.join(layout)
        collective = CollectiveDispatch(
            me.group, layout.routing(me.shape.device), me.experts, layout.attention, me.shape
        )
        for seed, numbers in enumerate([(1, 1, 1, 1), (5, 0, 2, 3), (0, 3, 0, 0), (0, 0, 0, 0), (64, 9, 30, 1)]):
            counts = counts_of(layout, numbers)
            ours = me.run(dispatch, counts, seed, hot=seed % 2 == 1)
            dispatch.wait()
            theirs = me.run(collective, counts, seed, hot=seed % 2 == 1)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        replay_all(me, dispatch)
        dispatch.close()
        me.group.leave()
    return True


def replay_all(me: Rank, dispatch: SymmetricDispatch) -> None:
    """50 replays whose inputs change: other tokens, padding, a hot expert."""
    counts = counts_of(me.layout, (16, 7, 16, 11))
    num_tokens = counts[me.rank]
    inputs = [random_tokens(num_tokens, me.shape, layer) for layer in LAYERS]
    outputs: list[Tensor] = []
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        if num_tokens:
            dispatch.begin_step(counts)
            for tokens, layer in zip(inputs, LAYERS, strict=True):
                outputs.append(dispatch.combine(dispatch.dispatch(*tokens, layer)))
        else:
            dispatch.serve_step(counts)
    for replay in range(50):
        fresh = [
            random_tokens(num_tokens, me.shape, replay * 9 + layer, replay % 3 == 2, replay % 7 if num_tokens else 0)
            for layer in LAYERS
        ]
        for mine, theirs in zip(inputs, fresh, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                a.copy_(b)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.replay()
            dispatch.wait()
        for layer, tokens, y_TD in zip(LAYERS, inputs, outputs, strict=False):
            assert torch.equal(y_TD, expected(layer, tokens)), f"replay {replay}, layer {layer}"


@pytest.mark.parametrize("world", [pytest.param(world, marks=needs(world)) for world in (1, 2, 4)])
def test_equals_what_is_expected_and_the_collective(world: int) -> None:
    names = [name for name, layout in LAYOUTS.items() if layout.world == world]
    assert on_all(equal_all, *names) == dict.fromkeys(range(world), True)


@needs(2)
def test_ranks_that_see_one_device_each() -> None:
    assert on_all(equal_all, "1A+1E", visible=("0", "1")) == {0: True, 1: True}


def grow(me: Rank, after: Layout, before: Layout) -> bool:
    """The last rank comes; the others replay what they captured before, with the experts that they had."""
    device, comes = me.shape.device, me.rank == before.world
    old = None if comes else me.join(before)
    group = me.group.beside()
    if comes:
        me.epoch, me.experts = me.epoch + 1, Experts(me.shape, after.slots[me.rank])
    else:
        replays = Replays(me, old, counts_of(before, (16,)))
        replays.check(50)
    group.join(me.epoch + 1, me.rank, after.world, JOIN_S, TIMEOUT_S)
    new = SymmetricDispatch(
        SymmetricMemory(group, device, JOIN_S), after.routing(device), me.experts, after.attention, me.shape,
        TIMEOUT_S, max_tokens=64, before=old,
    )  # fmt: skip
    new.start()
    if comes:
        replays = Replays(me, new, counts_of(after, (16,)))
    else:
        assert new.can_take_over(old), f"rank {me.rank}"
        new.take_over(old)
        replays.dispatch = new
    group.all_reduce(torch.zeros(1, device=device))
    group.synchronize()  # nobody begins before all have come
    replays.check(50)
    new.close()
    group.leave()
    me.group.leave()
    return not comes or int(me.experts.num_rows) > 0


class Replays:
    """A step as a graph, and its outputs against what they should be, with other tokens every time."""

    def __init__(self, me: Rank, dispatch: Any, counts: tuple[int, ...]) -> None:
        self._me, self.dispatch, self._num_tokens = me, dispatch, counts[me.rank]
        self._inputs = [random_tokens(self._num_tokens, me.shape, layer) for layer in LAYERS]
        self._outputs: list[Tensor] = []
        self._graph, self._stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            dispatch.begin_step(counts)
            if not self._num_tokens:
                dispatch.serve_layers()
            for tokens, layer in zip(self._inputs, LAYERS if self._num_tokens else (), strict=False):
                self._outputs.append(dispatch.combine(dispatch.dispatch(*tokens, layer)))

    def check(self, num_replays: int) -> None:
        for replay in range(num_replays):
            for mine, layer in zip(self._inputs, LAYERS, strict=True):
                fresh = random_tokens(self._num_tokens, self._me.shape, replay * 9 + layer)
                for a, b in zip(mine, fresh, strict=True):
                    a.copy_(b)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._graph.replay()
                self.dispatch.wait()
            for layer, tokens, y_TD in zip(LAYERS, self._inputs, self._outputs, strict=False):
                assert torch.equal(y_TD, expected(layer, tokens)), f"replay {replay}, layer {layer}"


@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param("1A+1E", "grown 1A+2E", marks=needs(3)), pytest.param("1A+2E", "grown 1A+3E", marks=needs(4))],
)
def test_graphs_go_on_when_an_expert_rank_comes(before: str, after: str) -> None:
    assert on_all(grow, after, before) == dict.fromkeys(range(LAYOUTS[after].world), True)


def survive(me: Rank, layout: Layout) -> tuple[int, float]:
    """Rank 1 dies between two steps; rank 0 tells whom it blames and after how long, and goes on by itself."""
    dispatch = me.join(layout, timeout_s=1.0)
    counts = counts_of(layout, (8, 8))
    for seed in range(3):
        me.run(dispatch, counts, seed)
        dispatch.wait()
    if me.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(2.0)  # the driver has taken the dead process's memory back by now, but for what is mapped here
    began_s = time.monotonic()
    try:
        for seed in range(3, 6):  # writes to the dead, and waits for it
            tokens = random_tokens(8, me.shape, seed)
            dispatch.begin_step(counts)
            for layer in LAYERS:
                dispatch.combine(dispatch.dispatch(*tokens, layer))
            dispatch.wait()
        blamed = -1
    except RankError as e:
        blamed = e.rank
    took_s = time.monotonic() - began_s
    me.group.leave()
    go_on_alone(me)
    return blamed, took_s


def go_on_alone(me: Rank) -> None:
    """In the next epoch, of this rank alone."""
    dispatch = me.join(Layout((0,), {0: dict.fromkeys(LAYERS, tuple(range(NUM_EXPERTS)))}))
    me.run(dispatch, (8,), 9)
    dispatch.wait()
    dispatch.close()


@needs(2)
@pytest.mark.parametrize("name", ["1A+1E", "colocated 2"])
def test_a_peer_that_dies_is_named_and_its_memory_may_be_written_to(name: str) -> None:
    blamed, took_s = on_all(survive, name, but=(1,))[0]
    print(f"\n{name}: rank {blamed} was named {took_s:.2f} s after the step began (timeout 1 s)")
    assert blamed == 1 and took_s < 3.5
