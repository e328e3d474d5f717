"""The membership state machine: every road to serving, and back after a loss."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.router.epochs import BeginServing, EndEpoch, EpochMachine, Phase, StartRanks, Tell
from actors.types import Failed, Join, Joined, Load, Loaded, Prepare, Prepared, Progress, RankSpec

SPECS = tuple(RankSpec(rank=r, roles=("attention", "expert")) for r in range(3))


def machine() -> EpochMachine:
    return EpochMachine(SPECS, {"model": "m"}, "127.0.0.1:1", join_timeout_s=2.0)


def bring_up(m: EpochMachine, now_s: float = 100.0) -> list[object]:
    if m.phase is Phase.WAITING:
        assert m.begin() == [StartRanks()]
    tells = m.started()
    assert [type(t.message) for t in tells] == [Load] * 3
    actions: list[object] = []
    for message in (Loaded(rank=r, weight_bytes=1) for r in range(3)):
        actions = m.on_loaded(message, now_s)
    assert [type(t.message) for t in actions] == [Prepare] * 3
    epoch = actions[0].message.epoch
    for r in range(3):
        actions = m.on_prepared(Prepared(rank=r, epoch=epoch.epoch), now_s)
    assert [type(t.message) for t in actions] == [Join] * 3
    for r in range(3):
        actions = m.on_joined(Joined(rank=r, epoch=epoch.epoch))
    return actions


def test_all_ranks_answer_each_phase_before_the_next_begins() -> None:
    m = machine()
    (serve,) = bring_up(m)
    assert isinstance(serve, BeginServing) and m.serving
    assert serve.epoch.ranks == SPECS and set(serve.loaded) == {0, 1, 2}


def test_a_repeated_answer_does_not_stand_for_another_rank() -> None:
    m = machine()
    m.begin()
    m.started()
    for _ in range(5):
        assert m.on_loaded(Loaded(rank=1, weight_bytes=1), 0.0) == []
    assert m.phase is Phase.LOADING


def test_loss_while_serving_ends_the_epoch_once_and_tries_again_after_a_pause() -> None:
    m = machine()
    bring_up(m)
    first = m.epoch_number
    assert m.end("rank 1 was lost", 200.0) == [EndEpoch("rank 1 was lost")]
    assert m.on_failed(Failed(rank=0, epoch=first, problem="reset by peer"), 200.0) == []
    assert m.tick(200.1) == []
    assert m.tick(200.3) == [StartRanks()]
    bring_up(m, 201.0)
    assert m.epoch_number > first


def test_stale_failure_of_an_old_epoch_is_dropped() -> None:
    m = machine()
    bring_up(m)
    old = m.epoch_number
    m.end("lost", 200.0)
    m.tick(201.0)
    bring_up(m, 201.0)
    assert m.on_failed(Failed(rank=0, epoch=old, problem="late"), 202.0) == []
    assert m.serving


def test_a_broken_checkpoint_is_not_tried_again() -> None:
    m = machine()
    m.begin()
    m.started()
    assert m.on_failed(Failed(rank=2, epoch=0, problem="truncated", fatal=True), 1.0) == []
    assert m.phase is Phase.BROKEN and "truncated" in m.detail()
    assert m.tick(1e9) == []


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_a_silent_rank_fails_the_join_in_time(silent: int) -> None:
    m = machine()
    m.begin()
    m.started()
    for r in range(3):
        m.on_loaded(Loaded(rank=r, weight_bytes=1), 100.0)
    for r in range(3):
        if r != silent:
            m.on_prepared(Prepared(rank=r, epoch=m.epoch_number), 100.0)
    assert m.tick(101.9) == []
    m.tick(102.1)
    assert m.phase is Phase.WAITING and f"rank {silent}" in m.problem


def test_pauses_grow_and_are_forgotten_once_it_serves() -> None:
    m = machine()
    m.begin()
    now_s, pauses = 0.0, []
    for _ in range(8):
        m.start_failed("no room", now_s)
        began = now_s
        while not m.tick(now_s):
            now_s += 0.1
        pauses.append(now_s - began)
    assert pauses == sorted(pauses) and pauses[-1] <= 10.2
    bring_up(m, now_s)
    m.end("lost", now_s)
    assert m.tick(now_s + 0.25) == [StartRanks()]


def test_progress_is_shown() -> None:
    m = machine()
    m.begin()
    m.started()
    m.on_progress(Progress(rank=0, done_bytes=1_000_000_000, total_bytes=4_000_000_000))
    m.on_progress(Progress(rank=1, done_bytes=1_000_000_000, total_bytes=4_000_000_000))
    assert "2.00 of 8.00 GB" in m.detail()


EVENTS = st.tuples(
    st.sampled_from(["started", "start_failed", "loaded", "prepared", "joined", "failed", "end", "tick"]),
    st.integers(0, 2),
    st.booleans(),  # current epoch or a stale one
)


@settings(max_examples=200, deadline=None)
@given(st.lists(EVENTS, max_size=80))
def test_whatever_happens_epochs_grow_and_begin_and_end_in_turn(events: list[tuple[str, int, bool]]) -> None:
    m, now_s, serving, last = machine(), 1.0, False, 0
    m.begin()
    for kind, rank, current in events:
        now_s += 0.5
        epoch = m.epoch_number if current else m.epoch_number - 1
        actions = {
            "started": lambda: m.started(),
            "start_failed": lambda now=now_s: m.start_failed("x", now),
            "loaded": lambda r=rank, now=now_s: m.on_loaded(Loaded(rank=r, weight_bytes=1), now),
            "prepared": lambda r=rank, e=epoch, now=now_s: m.on_prepared(Prepared(rank=r, epoch=e), now),
            "joined": lambda r=rank, e=epoch: m.on_joined(Joined(rank=r, epoch=e)),
            "failed": lambda r=rank, e=epoch, now=now_s: m.on_failed(Failed(rank=r, epoch=e, problem="p"), now),
            "end": lambda now=now_s: m.end("lost", now),
            "tick": lambda now=now_s: m.tick(now),
        }[kind]()
        for action in actions:
            if isinstance(action, BeginServing):
                assert not serving and action.epoch.epoch > last
                serving, last = True, action.epoch.epoch
            elif isinstance(action, EndEpoch):
                assert serving
                serving = False
            elif isinstance(action, Tell):
                assert not serving
        assert m.serving == serving
