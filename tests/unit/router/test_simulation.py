"""Thousands of seeded schedules of loads and faults, in virtual time: nothing is lost, repeated or left over.

A failing seed prints itself: `CORRAL_SIM_SEED=123 pytest tests/unit/router/test_simulation.py` runs it alone.
"""

import logging
import multiprocessing
import os
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from sim_pipeline import Pipeline, SimClient

from actors.types import EMPTY_SLOT

NUM_SCHEDULES = 2000
BATCH = 50
FAULTS_S = 20.0  # loads and faults come within this time
HEAL_S = 150.0  # then everything must be over by itself
DEADLINE_SLACK_S = 1.5


def faults_of(p: Pipeline) -> list[tuple[float, Callable[[Pipeline], None]]]:
    """What goes wrong, when. Each heals by itself, in the end."""
    kinds = (
        kill_a_rank, kill_a_rank, kill_two_ranks, stop_a_rank, stop_and_continue, slow_a_rank, slow_a_rank_for_good,
        cut_a_rank, kill_router, kill_ingress, lose_connection, scale_experts, scale_attention, skew_the_load,
        fail_loads, corrupt_loads, fail_starts, fail_steps, reset_a_connection, reset_a_connection,
        ask_what_is_deadly,
    )  # fmt: skip
    return [(p.rng.uniform(0.0, FAULTS_S), p.rng.choice(kinds)) for _ in range(p.rng.randint(0, 7))]


def some_rank(p: Pipeline) -> int | None:
    return p.rng.choice(sorted(p.cluster.ranks)) if p.cluster.ranks else None


def kill_a_rank(p: Pipeline) -> None:
    rank = some_rank(p)
    if rank is not None:
        p.cluster.kill(rank)


def kill_two_ranks(p: Pipeline) -> None:
    kill_a_rank(p)
    kill_a_rank(p)


def stop_a_rank(p: Pipeline) -> None:
    rank = some_rank(p)
    if rank is not None:
        p.cluster.ranks[rank].stopped = True


def stop_and_continue(p: Pipeline) -> None:
    rank = some_rank(p)
    if rank is not None:
        process = p.cluster.ranks[rank]
        process.stopped = True
        p.world.after(p.rng.choice((0.3, 1.5, 2.5, 6.0)), process.resume)


def slow_a_rank(p: Pipeline) -> None:
    rank = some_rank(p)
    if rank is not None:
        process = p.cluster.ranks[rank]
        process.slowness = p.rng.choice((10.0, 100.0))
        p.world.after(8.0, lambda: setattr(process, "slowness", 1.0))


def slow_a_rank_for_good(p: Pipeline) -> None:
    rank = some_rank(p)
    if rank is not None:
        p.cluster.ranks[rank].slowness = 12.0


def cut_a_rank(p: Pipeline) -> None:
    """Its packets to some or all other ranks are lost for a while; the router reaches everybody."""
    rank = some_rank(p)
    others = [other for other in p.cluster.ranks if other != rank]
    if rank is None or not others:
        return
    cut = {frozenset((rank, other)) for other in p.rng.sample(others, p.rng.randint(1, len(others)))}
    p.cluster.faults.cut |= cut
    p.world.after(p.rng.uniform(0.5, 15.0), lambda: p.cluster.faults.cut.difference_update(cut))


def reset_a_connection(p: Pipeline) -> None:
    """Of the router with a rank: messages under way are lost, and nobody has died."""
    rank = some_rank(p)
    if rank is not None and p.router is not None:
        p.router.reset(rank, p.rng.randint(0, 1), p.rng.randint(0, 2), p.rng.randint(0, 2))


def kill_router(p: Pipeline) -> None:
    p.kill_router()


def kill_ingress(p: Pipeline) -> None:
    alive = [front for front in p.fronts if front.alive]
    if len(alive) > 1:
        p.rng.choice(alive).die()


def lose_connection(p: Pipeline) -> None:
    p.rng.choice([front for front in p.fronts if front.alive]).lose_connection()


def scale_experts(p: Pipeline) -> None:
    p.set_bounds(min_experts=p.rng.randint(1, 4), max_experts=p.rng.randint(4, 5))


def scale_attention(p: Pipeline) -> None:
    p.set_bounds(min_attention=p.rng.randint(1, 3), max_attention=p.rng.randint(3, 4))


def skew_the_load(p: Pipeline) -> None:
    for expert in range(p.num_experts):
        p.cluster.skew[expert] = p.rng.choice((1.0, 1.0, 1.0, 20.0))


def _for_a_while(p: Pipeline, name: str, probability: float) -> None:
    setattr(p.cluster.faults, name, probability)
    p.world.after(10.0, lambda: setattr(p.cluster.faults, name, 0.0))


def fail_loads(p: Pipeline) -> None:
    _for_a_while(p, "load_fails", 0.5)


def corrupt_loads(p: Pipeline) -> None:
    _for_a_while(p, "load_corrupts", 0.2)


def fail_starts(p: Pipeline) -> None:
    _for_a_while(p, "start_fails", 0.5)


def fail_steps(p: Pipeline) -> None:
    _for_a_while(p, "step_fails", 0.02)


def ask_what_is_deadly(p: Pipeline) -> None:
    """Whoever computes it ends, or takes another rank along."""
    p.ask()
    p.deadly.append(p.clients[-1])
    p.cluster.faults.deadly.add(p.clients[-1].request.prompt_ids)


def run_schedule(seed: int) -> Pipeline:
    p = Pipeline(seed)
    begin_s = p.world.now_s + 15.0
    p.run_until(begin_s, lambda: all(front.takes_requests for front in p.fronts))
    assert all(front.takes_requests for front in p.fronts), "it never served"
    begin_s = p.world.now_s
    for at_s, fault in faults_of(p):
        p.world.after(at_s, lambda fault=fault: fault(p))  # type: ignore[misc]
    for _ in range(p.rng.randint(3, 25)):
        at_s, deadline = p.rng.uniform(0.0, FAULTS_S), p.rng.random() < 0.2
        p.world.after(at_s, lambda deadline=deadline: p.ask(deadline))  # type: ignore[misc]
        if p.rng.random() < 0.1:
            p.world.after(at_s + p.rng.uniform(0.0, 5.0), lambda: cancel_one(p))
    p.run_until(begin_s + FAULTS_S)
    heal(p)
    p.run_until(begin_s + FAULTS_S + HEAL_S, lambda: is_over(p))
    check(p)
    return p


def cancel_one(p: Pipeline) -> None:
    live = [client for front in p.fronts for client in front.open.values()]
    if live:
        client = p.rng.choice(live)
        next(front for front in p.fronts if client.request.request_id in front.open).cancel(client)


def heal(p: Pipeline) -> None:
    """Stopped processes stay stopped, killed ones dead: only the world around them is sound again."""
    p.cluster.faults.load_fails = p.cluster.faults.load_corrupts = p.cluster.faults.start_fails = 0.0
    p.cluster.faults.step_fails = 0.0
    p.cluster.faults.cut.clear()
    for process in p.cluster.ranks.values():
        process.slowness = 1.0


def is_over(p: Pipeline) -> bool:
    """All requests have ended, and the membership is where it should be."""
    if any(not client.ended for client in p.clients) or p.router is None:
        return False
    core, machine = p.router.core, p.router.machine
    epoch = machine.epoch
    return (
        machine.serving and not machine.changing and epoch is not None and not core._steps
        and core.num_live == 0
        and set(p.cluster.ranks) == {spec.rank for spec in epoch.ranks}
        and not p.cluster.starting
        and not any(process.stopped for process in p.cluster.ranks.values())
        and p.planner().propose(epoch.ranks, machine.goal, {}, 1000) is None
    )  # fmt: skip


def check(p: Pipeline) -> None:
    for client in p.clients:
        check_client(client, client in p.deadly, bool(p.deadly))
    assert p.router is not None
    core, machine = p.router.core, p.router.machine
    epoch = machine.epoch
    assert epoch is not None and machine.serving, machine.detail()
    assert core.num_live == 0 and not core._steps and not core._outbox, "something is left over"
    load = core._scheduler.load()
    assert load.global_pages_used == load.chunked_pages_used == 0, "pages leaked"
    assert set(p.cluster.ranks) == {spec.rank for spec in epoch.ranks}, "a process is left over"
    assert not any(process.stopped for process in p.cluster.ranks.values()), "a stopped rank was never found"
    for layer in p.moe_layers:
        held = {expert for spec in epoch.ranks for expert in spec.slots.get(layer, ())} - {EMPTY_SLOT}
        assert held == set(range(p.num_experts))
    check_counts(p)


def check_counts(p: Pipeline) -> None:
    """As many ranks as the goal says, or as many more as it takes to hold every expert as often as asked."""
    assert p.router is not None and p.router.machine.epoch is not None
    machine, epoch = p.router.machine, p.router.machine.epoch
    attention, experts, goal = len(epoch.of_role("attention")), len(epoch.of_role("expert")), machine.goal
    suffices = goal.expert_ranks * p.num_slots >= p.num_experts * p.replicas and goal.expert_ranks >= p.replicas
    news = (attention, experts, goal, list(machine.history)[-3:])
    assert experts == goal.expert_ranks or (experts > goal.expert_ranks and not suffices), news
    assert attention == (experts if p.colocated else goal.attention_ranks), news


def check_client(client: SimClient, is_deadly: bool = False, may_be_beside: bool = False) -> None:
    deadline_s = client.request.deadline_s
    what = f"{client.request.request_id} ended as {client.ended!r} after {len(client.got)} tokens"
    if client.is_cancelled or client.ended == "ingress died":
        return
    if is_deadly or (may_be_beside and client.ended == "GivenUpError"):
        assert client.ended in ("GivenUpError", "DeadlineError") and (client.got != client.expected), what
        return
    if deadline_s is not None and client.ended == "DeadlineError":
        assert client.ended_s >= deadline_s - 0.01, what
        return
    assert client.ended in ("stop", "length"), what
    assert deadline_s is None or client.ended_s <= deadline_s + DEADLINE_SLACK_S, what


@pytest.mark.parametrize("seed", [4, 5, 6, 8])
def test_a_planned_change_long_after_the_start_fails_nobody(seed: int) -> None:
    """Joining is no outage, however long ago the last one was."""
    p = Pipeline(seed)
    p.run_until(p.world.now_s + 15.0, lambda: all(front.takes_requests for front in p.fronts))
    p.run_until(p.world.now_s + 2 * p.config.recovery_timeout_s)
    for number in (4, 2, 5):
        p.set_bounds(min_experts=number, max_experts=number)
        for _ in range(200):  # somebody is always open
            p.ask()
            p.run_until(p.world.now_s + 0.05)
        p.run_until(p.world.now_s + 30.0)
    assert {client.ended for client in p.clients} <= {"stop", "length"}
    assert p.router is not None and p.router.machine.num_done >= 3


@pytest.mark.parametrize("seed", [1, 4, 5, 7])
def test_a_rank_that_stays_slow_is_replaced_and_no_client_sees_it(seed: int) -> None:
    p = Pipeline(seed)
    p.run_until(p.world.now_s + 15.0, lambda: all(front.takes_requests for front in p.fronts))
    keep_busy(p, 38.0)  # where there are few ranks of a kind, it is the past that tells
    slow = p.rng.choice(sorted(p.cluster.ranks))
    p.cluster.ranks[slow].slowness = 10.0
    keep_busy(p, 25.0)
    assert slow not in p.cluster.ranks
    p.run_until(p.world.now_s + 30.0, lambda: is_over(p))
    check(p)
    assert p.router is not None
    assert [record.why for record in p.router.machine.history if f"rank {slow} is slow" in record.why]


def keep_busy(p: Pipeline, seconds: float) -> None:
    """Somebody is always open, and the queue is never full."""
    ends_s = p.world.now_s + seconds
    while p.world.now_s < ends_s:
        if sum(len(front.open) for front in p.fronts) < 4:
            p.ask()
        p.run_until(p.world.now_s + 0.02)


@pytest.mark.parametrize("seed", [1, 3, 6])
def test_requests_are_served_again_after_an_outage_that_was_given_up(seed: int) -> None:
    """An attention rank outlives it, with steps that it never answered."""
    p = Pipeline(seed)
    assert not p.colocated
    p.run_until(p.world.now_s + 15.0, lambda: all(front.takes_requests for front in p.fronts))
    for _ in range(6):
        p.ask()
    p.run_until(p.world.now_s + 0.02)
    p.cluster.faults.start_fails = 1.0
    for rank in [rank for rank, process in p.cluster.ranks.items() if process.spec and "expert" in process.spec.roles]:
        p.cluster.kill(rank)
    p.run_until(p.world.now_s + p.config.recovery_timeout_s + 5.0)
    assert all(client.ended for client in p.clients) and any(c.ended == "UnavailableError" for c in p.clients)
    p.cluster.faults.start_fails = 0.0
    assert p.router is not None
    p.run_until(p.world.now_s + 60.0, lambda: p.router is not None and p.router.machine.serving)
    late = len(p.clients)
    for _ in range(6):
        p.ask()
    p.run_until(p.world.now_s + 30.0)
    assert {client.ended for client in p.clients[late:]} <= {"stop", "length"}


@pytest.mark.parametrize("seed", [1, 4, 7, 15])
def test_a_request_that_ends_ranks_is_given_up_and_the_others_are_served(seed: int) -> None:
    """Also in layouts where a step that was sent would be sent again, and where all ranks share an attention."""
    p = Pipeline(seed)
    p.run_until(p.world.now_s + 15.0, lambda: all(front.takes_requests for front in p.fronts))
    ask_what_is_deadly(p)
    deadly = p.clients[-1]
    for _ in range(8):
        p.run_until(p.world.now_s + 1.0)
        p.ask()
    p.run_until(p.world.now_s + 60.0, lambda: is_over(p))
    assert deadly.ended == "GivenUpError" and not deadly.got
    ended = [client.ended for client in p.clients]
    assert ended.count("GivenUpError") < 6 and set(ended) - {"GivenUpError"} <= {"stop", "length"}
    check(p)
    assert p.router is not None
    assert 3 <= p.router.core.metrics.epochs_lost <= 6 and p.router.core.metrics.requests_given_up >= 1


def failures_of(seeds: range) -> list[str]:
    """The schedules of `seeds` that fail, each as one line."""
    logging.disable(logging.CRITICAL)
    failed = []
    for seed in seeds:
        try:
            run_schedule(seed)
        except Exception as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            failed.append(
                f"CORRAL_SIM_SEED={seed}: {type(e).__name__}: {e} ({Path(where.filename).name}:{where.lineno})"
            )
            if not isinstance(e, AssertionError | ValueError | KeyError | TypeError | IndexError):
                raise
    return failed


@pytest.mark.timeout(300)
def test_seeded_schedules() -> None:
    if "CORRAL_SIM_SEED" in os.environ:
        run_schedule(int(os.environ["CORRAL_SIM_SEED"]))
        return
    batches = [range(first, first + BATCH) for first in range(0, NUM_SCHEDULES, BATCH)]
    # Not forked: a fork has what other tests left behind, and grpc waits for ever for threads that it has not.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        failed = [line for lines in pool.map(failures_of, batches) for line in lines]
    assert not failed, "\n".join([f"{len(failed)} of {NUM_SCHEDULES} schedules failed:", *failed[:10]])
