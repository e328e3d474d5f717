"""Groups under fire: real processes that are killed or stopped in the midst of dispatch, and what the others see."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from forked import forking
from torch import Tensor

from actors.dispatch.collective import CollectiveDispatch
from actors.dispatch.contract import build_routing_table
from actors.dispatch.group import EpochGroup, RendezvousStore
from actors.dispatch.rows import TokenShape
from actors.errors import RankError

CPU = torch.device("cpu")
LAYERS = (0, 1)
NUM_EXPERTS = 4
TIMEOUT_S = 4.0  # of one operation
AT_ONCE_S = 2.0  # well below it: noticed by the connection, not by the clock


def compute(expert_of_slot: tuple[int, ...]) -> Callable[[int, Tensor, Tensor], Tensor]:
    """Expert e of layer l adds 10 l + e."""
    experts = torch.tensor(expert_of_slot)

    def run(layer: int, x_ND: Tensor, slots_N: Tensor) -> Tensor:
        return x_ND + (10 * layer + experts[slots_N.clamp(min=0)])[:, None].to(x_ND.dtype)

    return run


def serve(group: EpochGroup, num_tokens: int, hidden: int, num_steps: int, pipe: Connection) -> int:
    """Rank 0 is attention, the others share the experts. Returns the steps done; raises RankError."""
    expert_ranks = range(1, group.world)
    slots = {r: {la: tuple(range(r - 1, NUM_EXPERTS, group.world - 1)) for la in LAYERS} for r in expert_ranks}
    routing = build_routing_table(slots, LAYERS, NUM_EXPERTS, CPU)
    experts = compute(slots[group.rank][0]) if group.rank else None
    shape = TokenShape(hidden=hidden, experts_per_token=1, dtype=torch.float32, device=CPU)
    dispatch = CollectiveDispatch(group, routing, experts, (0,), shape)
    counts = (num_tokens, *(0 for _ in expert_ranks))
    ids_TK = torch.arange(num_tokens)[:, None] % NUM_EXPERTS
    scores_TK = torch.full((num_tokens, 1), 0.5)
    for step in range(num_steps):
        if step == 1:
            pipe.send("running")
        if group.rank:
            dispatch.serve_step(counts)
            continue
        dispatch.begin_step(counts)
        x_TD = torch.full((num_tokens, hidden), float(step % 100))
        for layer in LAYERS:
            y_TD = dispatch.combine(dispatch.dispatch(x_TD, ids_TK, scores_TK, layer))
            assert torch.equal(y_TD, x_TD / 2 + 10 * layer + ids_TK), f"wrong results in step {step}"
    return num_steps


def member(pipe: Connection, endpoint: str) -> None:
    """A rank's process: does what it is told, reports what came of it. RankErrors are values here, not ends."""
    torch.set_num_threads(1)
    group = EpochGroup(CPU, "127.0.0.1")
    group.prepare(endpoint)
    actions: dict[str, Callable[..., Any]] = {
        "join": lambda *args: group.join(*args, 10.0, TIMEOUT_S),
        "join_quickly": lambda *args: group.join(*args, 0.5, TIMEOUT_S),
        "serve": lambda *args: serve(group, *args, pipe),
        "ready": lambda: None,
        "leave": group.leave,
    }
    kept: list[RankError] = []  # as a logger or debugger would: the sockets must close all the same
    while True:
        name, *args = pipe.recv()
        try:
            pipe.send(actions[name](*args))
        except RankError as e:
            kept.append(e)
            pipe.send((type(e).__name__, e.rank))


class Members:
    """Processes that can be told to join, serve and leave, and be killed."""

    def __init__(self, num: int, endpoint: str) -> None:
        context = forking()
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(num):
            ours, theirs = context.Pipe()
            process = context.Process(target=member, args=(theirs, endpoint), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        self.ask(range(num), "ready")

    def tell(self, ranks: Any, name: str, *args: Any) -> None:
        for rank in ranks:
            self.pipes[rank].send((name, *args))

    def hear(self, rank: int, timeout_s: float = 60.0) -> Any:
        assert self.pipes[rank].poll(timeout_s), f"member {rank} said nothing for {timeout_s} s"
        return self.pipes[rank].recv()

    def ask(self, ranks: Any, name: str, *args: Any) -> list[Any]:
        self.tell(ranks, name, *args)
        return [self.hear(rank) for rank in ranks]

    def join(self, epoch: int, members: list[int]) -> None:
        """Forms epoch's group; a member's rank is its place in the list."""
        for rank, who in enumerate(members):
            self.pipes[who].send(("join", epoch, rank, len(members)))
        for who in members:
            assert self.hear(who) is None

    def start_serving(self, members: list[int], num_tokens: int, hidden: int) -> None:
        """Returns when all are in the midst of it."""
        self.tell(members, "serve", num_tokens, hidden, 10**9)
        for who in members:
            assert self.hear(who) == "running"

    def signal(self, who: int, number: signal.Signals) -> None:
        pid = self.processes[who].pid
        assert pid is not None
        os.kill(pid, number)

    def hear_loss(self, members: list[int]) -> float:
        """All of `members` report a RankError; returns the seconds until the last did."""
        start_s = time.monotonic()
        for who in members:
            assert self.hear(who)[0] == "RankError"
        return time.monotonic() - start_s

    def check_serving(self, members: list[int]) -> None:
        """20 steps whose results are compared."""
        self.tell(members, "serve", 3, 32, 20)
        for who in members:
            assert self.hear(who) == "running"
        assert [self.hear(who) for who in members] == [20] * len(members)


@pytest.fixture
def store() -> Iterator[RendezvousStore]:
    store = RendezvousStore("127.0.0.1")
    store.start()
    yield store
    store.stop()


@pytest.fixture
def members(store: RendezvousStore, request: pytest.FixtureRequest) -> Iterator[Members]:
    members = Members(request.param, store.endpoint)
    yield members
    for process in members.processes:
        process.kill()
        process.join()


SMALL, LARGE = (4, 32), (600, 1024)  # tokens, hidden: one packet; many, in the midst of which a rank dies


@pytest.mark.parametrize("members", [4], indirect=True)
def test_killed_peers_are_noticed_at_once_and_the_rest_goes_on(members: Members) -> None:
    members.join(1, [0, 1, 2, 3])
    members.start_serving([0, 1, 2, 3], *SMALL)
    members.signal(3, signal.SIGKILL)
    assert members.hear_loss([0, 1, 2]) < AT_ONCE_S
    start_s = time.monotonic()
    members.join(2, [0, 1, 2])
    assert time.monotonic() - start_s < AT_ONCE_S
    members.start_serving([0, 1, 2], *LARGE)
    members.signal(2, signal.SIGKILL)
    assert members.hear_loss([0, 1]) < AT_ONCE_S
    members.join(3, [0, 1])
    members.check_serving([0, 1])


@pytest.mark.parametrize("members", [3], indirect=True)
def test_a_killed_attention_rank_frees_the_expert_ranks(members: Members) -> None:
    members.join(1, [0, 1, 2])
    members.start_serving([0, 1, 2], *LARGE)
    members.signal(0, signal.SIGKILL)
    assert members.hear_loss([1, 2]) < AT_ONCE_S
    members.join(2, [1, 2])
    members.check_serving([1, 2])


@pytest.mark.parametrize("members", [4], indirect=True)
def test_a_stopped_peer_ends_the_epoch_within_the_timeout_and_cannot_disturb_the_next(members: Members) -> None:
    members.join(1, [0, 1, 2, 3])
    members.start_serving([0, 1, 2, 3], *SMALL)
    members.signal(3, signal.SIGSTOP)
    assert members.hear_loss([0, 1, 2]) < TIMEOUT_S + AT_ONCE_S
    members.join(2, [0, 1, 2])
    members.start_serving([0, 1, 2], *SMALL)
    members.signal(3, signal.SIGCONT)  # it still believes in epoch 1
    assert members.hear_loss([3]) < TIMEOUT_S + AT_ONCE_S
    assert members.ask([3], "join", 1, 1, 3)[0][0] == "RankError"  # and asks for its place again
    assert not any(members.pipes[who].poll(0.2) for who in (0, 1, 2)), "a stale peer disturbed the epoch that serves"


@pytest.mark.parametrize("members", [3], indirect=True)
def test_ranks_of_different_epochs_never_meet(members: Members) -> None:
    """Ranks 0 and 1 are told epoch 2, rank 2 epoch 3: nobody joins. All meet in epoch 4."""
    members.tell([0], "join_quickly", 2, 0, 3)
    members.tell([1], "join_quickly", 2, 1, 3)
    members.tell([2], "join_quickly", 3, 2, 3)
    assert [members.hear(who)[0] for who in (0, 1, 2)] == ["RankError"] * 3
    members.join(4, [0, 1, 2])
    members.check_serving([0, 1, 2])


@pytest.mark.parametrize("members", [2], indirect=True)
def test_an_error_names_the_rank_that_was_lost(members: Members) -> None:
    members.join(1, [0, 1])
    members.start_serving([0, 1], *SMALL)
    members.signal(1, signal.SIGKILL)
    assert members.hear(0) == ("RankError", 1)


def test_joining_gives_up_in_time_and_a_lost_store_is_reported(store: RendezvousStore) -> None:
    """In this process: nobody else comes, then the store goes, then another store takes its place."""
    group = EpochGroup(CPU, "127.0.0.1")
    with pytest.raises(RankError, match="before it was prepared"):
        group.join(1, 0, 2, 0.3)
    group.prepare(store.endpoint)
    start_s = time.monotonic()
    with pytest.raises(RankError, match="epoch 1 did not form"):
        group.join(1, 0, 2, 0.3)
    assert time.monotonic() - start_s < AT_ONCE_S
    with pytest.raises(RankError, match="in no group"):
        group.post((), (), 0)
    store.stop()
    with pytest.raises(RankError, match="did not form"):
        group.join(2, 0, 2, 0.3)
    other = RendezvousStore("127.0.0.1")
    other.start()
    group.prepare(other.endpoint)
    group.join(3, 0, 1, 5.0)
    group.leave()
    other.stop()
