"""Whatever arrives, leaves, fails or runs out, every client gets the fault-free tokens, once and in order."""

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_harness import Driver

from actors.errors import OverloadedError
from actors.router.scheduler import RankPages, SchedulerLimits

GROUPS = [  # (page_tokens, chunk_tokens, has_global_layers)
    (4, 8, True),
    (2, 0, True),
    (1, 3, True),
    (4, 6, True),  # pages straddle chunks
    (3, 2, True),  # a page holds more than a chunk
    (4, 8, False),
]


def make_limits(groups: tuple[int, int, bool], **changes: Any) -> SchedulerLimits:
    values = {"max_model_len": 40, "max_num_batched_tokens": 8, "max_num_seqs": 4, "max_queued_requests": 6}
    page_tokens, chunk_tokens, has_global = groups
    return SchedulerLimits(
        page_tokens=page_tokens, chunk_tokens=chunk_tokens, has_global_layers=has_global, **{**values, **changes}
    )


def sampling_of(rng: random.Random) -> dict[str, Any]:
    stops = tuple(rng.sample(range(23), rng.choice((0, 1, 3))))
    return {
        "max_tokens": rng.choice((1, 2, 5, 12, 30)),
        "stop_token_ids": stops,
        "min_tokens": rng.choice((0, 0, 2, 6)),
    }


class Engine(RuleBasedStateMachine):
    """Random news, in any order, over ranks that execute literally."""

    @initialize(
        groups=st.sampled_from(GROUPS), num_ranks=st.integers(1, 3), depth=st.integers(1, 3),
        budget=st.sampled_from((1, 2, 3, 8, 40)), seats=st.integers(1, 5), pages=st.integers(2, 12),
        chunked_pages=st.integers(1, 8), watermark=st.sampled_from((0.0, 0.01, 0.3)),
    )  # fmt: skip
    def begin(
        self, groups: tuple[int, int, bool], num_ranks: int, depth: int, budget: int, seats: int, pages: int,
        chunked_pages: int, watermark: float,
    ) -> None:  # fmt: skip
        limits = make_limits(
            groups, max_num_batched_tokens=budget, max_num_seqs=seats, max_steps_in_flight=depth,
            watermark_fraction=watermark,
        )  # fmt: skip
        self.driver = Driver(limits, {3 * rank: RankPages(pages, chunked_pages) for rank in range(num_ranks)})

    @rule(
        share=st.floats(0, 1), max_tokens=st.integers(1, 30), owner=st.sampled_from((b"a", b"b")),
        stops=st.sets(st.integers(0, 22), max_size=3), min_tokens=st.integers(0, 4), replay=st.integers(0, 3),
        timeout_s=st.none() | st.integers(1, 6),
    )  # fmt: skip
    def submit(
        self, share: float, max_tokens: int, owner: bytes, stops: set[int], min_tokens: int, replay: int,
        timeout_s: int | None,
    ) -> None:  # fmt: skip
        driver = self.driver
        num_prompt = 1 + int(share * (driver.room - 2))
        deadline_s = None if timeout_s is None else driver.now_s + timeout_s
        try:
            driver.submit(
                num_prompt, max_tokens, owner=owner, replay=replay, deadline_s=deadline_s, salt=len(stops),
                stop_token_ids=tuple(stops), min_tokens=min_tokens,
            )  # fmt: skip
        except OverloadedError as e:
            assert driver.scheduler.load().num_queued >= driver.limits.max_queued_requests
            assert e.retry_after_s > 0

    @rule()
    def schedule(self) -> None:
        self.driver.schedule()

    @rule(choice=st.integers(0, 2))
    def deliver(self, choice: int) -> None:
        ready = [rank for rank, results in self.driver.results.items() if results]
        if ready:
            self.driver.deliver(ready[choice % len(ready)])

    @rule()
    def run_a_step(self) -> None:
        self.driver.schedule()
        self.driver.deliver_step()

    @precondition(lambda self: self.driver.clients)
    @rule(choice=st.integers(0, 100))
    def cancel(self, choice: int) -> None:
        names = [name for name, client in self.driver.clients.items() if not client.ended]
        if names:
            name = names[choice % len(names)]
            self.driver.take(self.driver.scheduler.cancel(name))
            assert self.driver.clients[name].ended == "RequestCancelledError" or self.driver.clients[name].got
            assert self.driver.scheduler.cancel(name) == []

    @rule(owner=st.sampled_from((b"a", b"b")))
    def lose_an_ingress(self, owner: bytes) -> None:
        self.driver.take(self.driver.scheduler.expire(self.driver.now_s))
        self.driver.take(self.driver.scheduler.cancel_owner(owner))
        assert all(client.ended for client in self.driver.clients.values() if client.owner == owner)

    @rule()
    def let_time_pass(self) -> None:
        driver = self.driver
        driver.now_s += 1.0
        driver.take(driver.scheduler.expire(driver.now_s))
        for client in driver.clients.values():
            assert client.ended or client.request.deadline_s is None or client.request.deadline_s > driver.now_s

    @rule(which=st.sets(st.integers(0, 2), min_size=1))
    def lose_ranks(self, which: set[int]) -> None:
        lost = [rank for rank in self.driver.ranks if rank // 3 in which]
        ended = [bool(client.ended) for client in self.driver.clients.values()]
        self.driver.lose(*lost)
        assert [bool(client.ended) for client in self.driver.clients.values()] == ended, "nobody ends for it"
        if len(lost) == len(self.driver.ranks):
            assert self.driver.scheduler.load().global_pages_used == 0

    @invariant()
    def counts_add_up(self) -> None:
        load = self.driver.scheduler.load()
        live = sum(not client.ended for client in self.driver.clients.values())
        assert load.num_running + load.num_queued <= live

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.run()


TestEngine = Engine.TestCase
TestEngine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_crowd_in_tiny_pools_ends_with_the_right_tokens(
    groups: tuple[int, int, bool], depth: int, num_ranks: int
) -> None:
    """Long and steady pressure: preemptions are certain, and still nobody starves."""
    rng = random.Random(f"{groups} {depth} {num_ranks}")
    limits = make_limits(
        groups, max_num_batched_tokens=12, max_num_seqs=6, max_queued_requests=10_000, max_steps_in_flight=depth
    )
    pages = -(-44 // groups[0])
    chunked = 3 * (-(-groups[1] // groups[0]) + 1)
    driver = Driver(limits, {rank: RankPages(pages, chunked) for rank in range(num_ranks)})
    for _ in range(40 * num_ranks):
        driver.submit(rng.randint(1, min(30, driver.room - 1)), **sampling_of(rng))
        if rng.random() < 0.3:
            driver.schedule()
        if rng.random() < 0.3:
            driver.deliver_step()
    driver.run()
    assert all(client.ended in ("stop", "length") for client in driver.clients.values())
    assert driver.scheduler.load().num_preemptions > 0 or not groups[2]


def test_tokens_do_not_depend_on_how_steps_were_cut() -> None:
    """The same requests under very different limits give the same tokens (the driver compares with `generate`)."""
    for budget, depth, seats in ((1, 1, 1), (3, 2, 2), (200, 2, 8)):
        limits = make_limits((4, 8, True), max_num_batched_tokens=budget, max_steps_in_flight=depth, max_num_seqs=seats)
        driver = Driver(limits, {0: RankPages(14, 6)})
        for num_prompt in (1, 7, 8, 9, 16, 17, 31):
            driver.submit(num_prompt, 9)
            driver.schedule()
        driver.run()
