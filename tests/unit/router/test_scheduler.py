"""The scheduler's promises one by one, on cases that fit on paper."""

from collections import Counter
from typing import Any

import pytest
from scheduler_harness import Driver

from actors.errors import OverloadedError, RankError, RequestError
from actors.router.scheduler import OwnedEvent, RankPages, Scheduler, SchedulerLimits
from actors.types import ErrorInfo, RankPlan, Request, SampledToken, SamplingParams, Work

LOST = ErrorInfo(kind="UnavailableError", problem="a rank was lost")


def make_limits(**changes: Any) -> SchedulerLimits:
    values: dict[str, Any] = {
        "max_model_len": 64, "max_num_batched_tokens": 64, "max_num_seqs": 8, "max_queued_requests": 8,
        "page_tokens": 4, "watermark_fraction": 0.0,
    }  # fmt: skip
    return SchedulerLimits(**{**values, **changes})


def make_driver(pages: int = 32, chunked_pages: int = 32, num_ranks: int = 1, **changes: Any) -> Driver:
    return Driver(make_limits(**changes), {rank: RankPages(pages, chunked_pages) for rank in range(num_ranks)})


def make_request(name: str = "r", num_prompt: int = 5, *, output_ids: tuple[int, ...] = (), **sampling: Any) -> Request:
    return Request(
        request_id=name,
        prompt_ids=tuple(range(num_prompt)),
        sampling=SamplingParams(**{"max_tokens": 4, **sampling}),
        output_ids=output_ids,
    )


def plan_of(driver: Driver) -> RankPlan:
    plans = driver.schedule()
    assert plans is not None
    return plans[0]


def answers(plan: RankPlan, token_id: int) -> list[SampledToken]:
    return [SampledToken(request_idx=work.request_idx, token_id=token_id) for work in plan.work if work.samples]


# --- pipelining ---


def test_a_prompt_and_its_first_decodes_as_the_rank_sees_them() -> None:
    scheduler = Scheduler(make_limits(max_steps_in_flight=3), {0: RankPages(8)})
    request = make_request(num_prompt=7)
    scheduler.submit(request, b"i", 0.0)
    first, second, third = (scheduler.schedule(0.0) for _ in range(3))
    assert first is not None and second is not None and third is not None
    assert first[0].admitted[0].prompt_ids == request.prompt_ids
    assert first[0].work == (Work(request_idx=0, start=0, num_tokens=7, samples=True, global_pages=(0, 1)),)
    assert second[0] == RankPlan(work=(Work(request_idx=0, start=7, num_tokens=1, samples=True),))
    assert third[0] == RankPlan(work=(Work(request_idx=0, start=8, num_tokens=1, samples=True, global_pages=(2,)),))


def test_at_most_two_steps_are_in_flight_until_every_rank_answers() -> None:
    driver = make_driver(num_ranks=2)
    driver.submit(3, 10)
    driver.submit(3, 10)
    assert driver.schedule() and driver.schedule()
    assert driver.schedule() is None
    driver.deliver(0)
    driver.deliver(0)
    assert driver.schedule() is None, "rank 1 has answered neither step"
    driver.deliver(1)
    assert driver.schedule() is not None
    driver.run()


def test_nothing_is_planned_beyond_max_tokens_or_the_context() -> None:
    driver = make_driver(max_model_len=12)
    driver.submit(6, 3)
    driver.submit(10, 50)
    driver.run()
    work = Counter(work.request_idx for plans in driver.plans for work in plans[0].work)
    assert work == {0: 3, 1: 2}
    assert [client.ended for client in driver.clients.values()] == ["length", "length"]


def test_a_finished_request_gives_its_pages_back_before_its_last_token_is_known() -> None:
    driver = make_driver()
    driver.submit(6, 2)
    plan_of(driver)
    assert driver.scheduler.load().global_pages_used == 2
    plan_of(driver)
    load = driver.scheduler.load()
    assert (load.global_pages_used, load.num_running) == (0, 1)
    driver.deliver_step()
    driver.deliver_step()
    assert driver.clients["r0"].ended == "length"
    driver.submit(1, 1)
    assert plan_of(driver).released == (0,)
    driver.run()


def test_a_stop_token_ends_the_request_and_the_overrun_token_is_dropped() -> None:
    scheduler = Scheduler(make_limits(), {0: RankPages(8)})
    scheduler.submit(make_request(max_tokens=9, stop_token_ids=(77,)), b"i", 0.0)
    plans = [scheduler.schedule(0.0), scheduler.schedule(0.0)]
    assert plans[0] and plans[1]
    owner, event = scheduler.complete(0, 1, answers(plans[0][0], 77))[0]
    assert (owner, event.token_index, event.finish_reason) == (b"i", 0, "stop")
    assert [token.token_id for token in event.tokens] == [77]
    assert scheduler.load().global_pages_used == 0
    assert scheduler.complete(0, 2, answers(plans[1][0], 5)) == []
    assert not scheduler.has_requests
    scheduler.submit(make_request("next"), b"i", 0.0)
    plan = scheduler.schedule(0.0)
    assert plan and plan[0].released == (0,) and plan[0].admitted[0].request_idx == 0


@pytest.mark.parametrize(("min_tokens", "num_outputs"), [(0, 1), (1, 2), (3, 4)])
def test_a_stop_token_counts_only_after_min_tokens(min_tokens: int, num_outputs: int) -> None:
    scheduler = Scheduler(make_limits(), {0: RankPages(8)})
    scheduler.submit(make_request(max_tokens=9, stop_token_ids=(77,), min_tokens=min_tokens), b"i", 0.0)
    events: list[OwnedEvent] = []
    for step in range(1, 20):
        plans = scheduler.schedule(0.0)
        if plans is None:
            break
        events += scheduler.complete(0, step, answers(plans[0], 77))
    assert len(events) == num_outputs
    assert events[-1].event.finish_reason == "stop"


# --- pages ---


def test_pages_of_a_chunk_are_free_when_its_last_position_is_planned() -> None:
    driver = make_driver(chunk_tokens=8)
    driver.submit(6, 20)
    used = []
    for _ in range(5):
        start = plan_of(driver).work[0].start
        used.append((start, driver.scheduler.load().chunked_pages_used))
        driver.deliver_step()
    assert used == [(0, 2), (6, 2), (7, 0), (8, 1), (9, 1)]
    assert driver.scheduler.load().global_pages_used == 3
    driver.run()


def test_pages_of_a_chunk_that_ends_in_a_plan_are_granted_in_the_next_not_in_this_one() -> None:
    driver = make_driver(chunk_tokens=8, chunked_pages=3)
    driver.submit(7, 20)
    plan_of(driver)
    driver.submit(6, 1)  # needs two pages; one is free
    turn = plan_of(driver)
    assert [work.start for work in turn.work] == [7] and not turn.admitted
    driver.deliver_step()
    after = plan_of(driver)
    assert [(work.start, len(work.chunked_pages)) for work in after.work] == [(8, 1), (0, 2)]
    driver.run()


def test_a_piece_across_chunks_holds_all_their_pages_only_while_its_step_reads_them() -> None:
    driver = make_driver(chunk_tokens=8)
    driver.submit(20, 2)
    assert len(plan_of(driver).work[0].chunked_pages) == 5
    load = driver.scheduler.load()
    assert (load.chunked_pages_used, load.global_pages_used) == (1, 5)
    driver.run()


def test_a_long_prompt_passes_through_a_pool_of_one_chunk() -> None:
    driver = make_driver(chunk_tokens=8, chunked_pages=2)
    driver.submit(30, 5)
    driver.run()
    assert [work.num_tokens for plans in driver.plans for work in plans[0].work][:5] == [8, 8, 8, 6, 1]


def test_a_model_without_global_layers_is_granted_no_global_pages() -> None:
    driver = make_driver(pages=0, chunked_pages=3, chunk_tokens=8, has_global_layers=False)
    driver.submit(30, 9)
    driver.submit(5, 9)
    driver.run()
    work = [work for plans in driver.plans for work in plans[0].work]
    assert not any(item.global_pages for item in work)
    assert sum(len(item.chunked_pages) for item in work) >= 10 + 4


def test_a_request_that_fills_the_pool_to_the_last_page_finishes() -> None:
    driver = make_driver(pages=4, watermark_fraction=0.5)
    driver.submit(9, 8)
    driver.submit(3, 2)
    driver.run()
    assert len(driver.clients["r0"].got) == 8
    assert driver.scheduler.load().num_preemptions == 0


def test_a_request_ends_where_the_pages_end() -> None:
    driver = make_driver(pages=4)
    driver.submit(9, 50)
    driver.run()
    assert (len(driver.clients["r0"].got), driver.clients["r0"].ended) == (8, "length")


def test_prompts_that_do_not_fit_together_are_admitted_one_after_the_other() -> None:
    """Admission looks at whole prompts, or two long ones would preempt each other halfway."""
    driver = make_driver(pages=10, max_num_batched_tokens=8)
    driver.submit(24, 2)
    driver.submit(24, 2)
    driver.run()
    assert driver.scheduler.load().num_preemptions == 0
    assert not driver.plans[0][0].admitted[1:]


def test_admission_counts_the_chunk_pages_that_running_prompts_still_need() -> None:
    for chunked_pages, num_admitted in ((3, 1), (4, 2)):
        driver = make_driver(chunk_tokens=8, chunked_pages=chunked_pages, max_num_batched_tokens=6)
        driver.submit(8, 2)
        driver.submit(8, 2)
        plan = plan_of(driver)
        assert len(plan.admitted) == num_admitted
        driver.run()


def test_a_watermark_stays_free_at_admissions() -> None:
    for watermark_fraction, num_admitted in ((0.0, 2), (0.25, 1)):
        driver = make_driver(pages=4, watermark_fraction=watermark_fraction)
        driver.submit(8, 4)
        driver.submit(8, 4)
        assert len(plan_of(driver).admitted) == num_admitted
        driver.run()


# --- preemption ---


def test_the_youngest_is_preempted_and_computed_again_from_all_its_tokens() -> None:
    driver = make_driver(pages=5)
    driver.submit(7, 6)
    driver.submit(7, 6)
    plan_of(driver)  # two pages each
    plan_of(driver)  # position 7
    driver.deliver_step()
    plan = plan_of(driver)  # position 8: one page is left, the older takes it
    assert plan.released == (1,)
    assert [work.request_idx for work in plan.work] == [0]
    load = driver.scheduler.load()
    assert (load.num_preemptions, load.num_queued, load.global_pages_used) == (1, 1, 3)
    assert driver.clients["r1"].got == driver.clients["r1"].expected[:1]
    driver.deliver_step()  # the token that was in flight at preemption
    assert driver.clients["r1"].got == driver.clients["r1"].expected[:2]
    driver.run()
    again = [admission for plans in driver.plans for admission in plans[0].admitted][2]
    assert list(again.output_ids) == driver.clients["r1"].expected[:2]


def test_a_preempted_request_waits_for_its_tokens_in_flight() -> None:
    """Another rank has room for it at once, but nobody could tell that rank its newest token."""
    driver = make_driver(pages=5, num_ranks=2)
    driver.submit(7, 20)
    driver.submit(15, 1)
    victim = driver.clients[driver.submit(7, 20)]
    driver.schedule()  # the first and third on rank 0; the second leaves rank 1 empty again
    driver.schedule()
    driver.deliver_step()
    driver.schedule()  # position 8: one page for two
    assert driver.plans[2][0].released == (1,)
    assert not driver.plans[2][1].admitted
    driver.deliver_step()
    driver.schedule()
    assert [list(admission.output_ids) for admission in driver.plans[3][1].admitted] == [victim.expected[:2]]
    driver.run()


def test_preempted_requests_go_back_to_the_front_in_their_order() -> None:
    driver = make_driver(pages=6, page_tokens=2, max_model_len=40, max_steps_in_flight=1)
    for _ in range(3):
        driver.submit(3, 8)  # two pages each: the pool is full
    for _ in range(3):
        driver.submit(1, 1)
    driver.run()
    order = [admission.prompt_ids for plans in driver.plans for admission in plans[0].admitted]
    names = [next(n for n, c in driver.clients.items() if c.request.prompt_ids == prompt) for prompt in order]
    assert names[:3] == ["r0", "r1", "r2"]
    readmitted = [name for name in names[3:] if name in ("r1", "r2")]
    assert readmitted[0] == "r1"
    assert names.index("r3") > 3 + names[3:].index("r2"), "a preempted request was overtaken"


def test_a_stop_token_in_flight_ends_a_preempted_request_in_the_queue() -> None:
    scheduler = Scheduler(make_limits(), {0: RankPages(4)})
    for name in ("a", "b"):
        scheduler.submit(make_request(name, num_prompt=8, max_tokens=8, stop_token_ids=(77,)), b"i", 0.0)
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    assert first and second and second[0].released == (1,)
    assert scheduler.load().num_queued == 1
    tokens = [SampledToken(request_idx=0, token_id=5), SampledToken(request_idx=1, token_id=77)]
    reasons = [event.finish_reason for _, event in scheduler.complete(0, 1, tokens)]
    assert reasons == [None, "stop"]
    assert (scheduler.load().num_queued, scheduler.load().num_running) == (0, 1)


# --- policy ---


def test_a_short_prompt_passes_a_long_one() -> None:
    driver = make_driver(max_num_batched_tokens=16)
    driver.submit(50, 2)
    plan_of(driver)
    driver.submit(5, 2)
    work = {item.request_idx: item for item in plan_of(driver).work}
    assert work[1].num_tokens == 5 and work[1].samples
    assert work[0].num_tokens == 11, "what the short one leaves goes to the long one"
    driver.run()


def test_a_prompt_alone_takes_the_whole_budget() -> None:
    driver = make_driver(max_num_batched_tokens=16)
    driver.submit(50, 1)
    driver.run()
    assert [plans[0].work[0].num_tokens for plans in driver.plans] == [16, 16, 16, 2]


def test_decodes_go_on_while_a_long_prompt_is_computed() -> None:
    driver = make_driver(max_num_batched_tokens=8)
    driver.submit(3, 12)
    plan_of(driver)
    driver.submit(50, 2)
    for _ in range(6):
        driver.deliver_step()
        assert [(item.request_idx, item.num_tokens) for item in plan_of(driver).work] == [(0, 1), (1, 7)]
    driver.run()


@pytest.mark.parametrize("budget", [1, 2, 4])
def test_decodes_beyond_the_budget_take_turns_and_leave_room_to_prompts(budget: int) -> None:
    driver = make_driver(pages=128, max_num_batched_tokens=budget)
    for _ in range(6):
        driver.submit(1, 60)
    for _ in range(24):
        driver.schedule()
        driver.deliver_step()
    progress = [len(client.got) for client in driver.clients.values()]
    assert all(progress), "a prompt starved"
    before = {name: len(client.got) for name, client in driver.clients.items()}
    for _ in range(12):
        driver.schedule()
        driver.deliver_step()
    gains = [len(client.got) - before[name] for name, client in driver.clients.items()]
    assert max(gains) - min(gains) <= 1, "turns are unfair"
    assert sum(gains) == 12 * budget, "nobody waits: all of the budget is for decodes"
    driver.run()


def test_a_step_does_not_come_out_empty_because_its_only_decode_gives_way() -> None:
    """The ranks would be idle, and no answer would come that makes the router plan again."""
    driver = make_driver(pages=3, page_tokens=2, max_num_batched_tokens=1, max_steps_in_flight=1)
    driver.submit(1, 4)
    driver.submit(1, 3)
    driver.run()
    assert driver.scheduler.load().num_preemptions == 1


def test_a_prompt_without_pages_does_not_hold_decodes_back() -> None:
    """The prompt's turn with a budget of one token: nothing would be planned, and nothing would move again."""
    driver = make_driver(pages=4, page_tokens=2, max_num_batched_tokens=1, max_steps_in_flight=1)
    for num_prompt, max_tokens in ((1, 8), (1, 8), (3, 3), (2, 3)):
        driver.submit(num_prompt, max_tokens)
    driver.run()
    assert all(client.ended == "length" for client in driver.clients.values())


def test_requests_go_to_the_rank_with_most_free_pages() -> None:
    driver = make_driver(num_ranks=2, max_num_batched_tokens=16)
    for num_prompt in (40, 24, 30, 4):
        driver.submit(num_prompt, 2)
    driver.schedule()
    first = driver.plans[0]
    assert [len(plan.admitted[0].prompt_ids) for plan in first.values()] == [40, 24]
    driver.run()
    prompts = [[len(a.prompt_ids) for plans in driver.plans for a in plans[rank].admitted] for rank in (0, 1)]
    assert prompts == [[40, 4], [24, 30]]


def test_ranks_share_the_budget_whoever_has_more_prompts() -> None:
    """Ranks run in lock-step: the one with most tokens sets the pace."""
    driver = make_driver(num_ranks=2, max_num_batched_tokens=16)
    for num_prompt in (60, 60, 50):
        driver.submit(num_prompt, 2)
    driver.schedule()
    assert [len(plan.admitted) for plan in driver.plans[0].values()] == [2, 1]
    driver.deliver_step()
    driver.schedule()
    tokens = [sum(work.num_tokens for work in plan.work) for plan in driver.plans[1].values()]
    assert tokens == [8, 8]
    driver.run()


def test_the_head_of_the_queue_is_never_overtaken() -> None:
    driver = make_driver(pages=6)
    driver.submit(12, 8)
    plan_of(driver)
    driver.submit(16, 2)  # does not fit beside it
    driver.submit(1, 1)  # would
    for _ in range(3):
        driver.deliver_step()
        assert not plan_of(driver).admitted
    driver.run()
    order = [len(admission.prompt_ids) for plans in driver.plans for admission in plans[0].admitted]
    assert order == [12, 16, 1]


def test_seats_bound_what_runs_and_indices_stay_below_them() -> None:
    driver = make_driver(max_num_seqs=2, max_queued_requests=50)
    for number in range(12):
        driver.submit(1 + number % 3, 1 + number % 4)
    driver.run()
    assert {admission.request_idx for plans in driver.plans for admission in plans[0].admitted} == {0, 1}
    assert all(len(plans[0].work) <= 2 for plans in driver.plans)


# --- ends from outside ---


def test_cancelling_frees_pages_for_the_very_next_plan() -> None:
    driver = make_driver(pages=4)
    name = driver.submit(14, 3)
    plan_of(driver)
    other = driver.submit(13, 3)
    plan_of(driver)
    driver.take(driver.scheduler.cancel(name))
    assert driver.scheduler.load().global_pages_used == 0
    assert driver.clients[name].ended == "RequestCancelledError"
    driver.deliver_step()
    assert driver.clients[name].got == [], "tokens of a cancelled request are dropped"
    plan = plan_of(driver)
    assert plan.released == (0,) and len(plan.work[0].global_pages) == 4
    driver.run()
    assert driver.clients[other].ended == "length"
    assert sum(plans[0].released.count(0) for plans in driver.plans) == 1


def test_cancelling_a_queued_or_unknown_request() -> None:
    driver = make_driver(max_num_seqs=1)
    driver.submit(3, 2)
    queued = driver.submit(3, 2)
    plan_of(driver)
    driver.take(driver.scheduler.cancel(queued))
    assert driver.scheduler.load().num_queued == 0
    assert driver.scheduler.cancel(queued) == []
    assert driver.scheduler.cancel("never heard of") == []
    driver.run()


def test_an_ingress_that_goes_takes_all_its_requests_and_no_other() -> None:
    driver = make_driver(max_num_seqs=2)
    for owner in (b"a", b"b", b"a", b"b"):
        driver.submit(3, 5, owner=owner)
    plan_of(driver)
    driver.take(driver.scheduler.cancel_owner(b"a"))
    assert [bool(client.ended) for client in driver.clients.values()] == [True, False, True, False]
    driver.run()


def test_deadlines_end_requests_wherever_they_are() -> None:
    driver = make_driver(max_num_seqs=1)
    driver.submit(3, 30, deadline_s=5.0)
    driver.submit(3, 30, deadline_s=4.0)
    driver.submit(3, 2, deadline_s=None)
    for driver.now_s in (1.0, 2.0, 3.0, 4.0):
        driver.schedule()
        driver.deliver_step()
    assert [client.ended for client in driver.clients.values()] == ["", "DeadlineError", ""]
    assert len(driver.clients["r0"].got) == 4
    driver.now_s = 5.0
    driver.schedule()
    assert driver.clients["r0"].ended == "DeadlineError"
    driver.run()
    assert driver.clients["r2"].ended == "length"


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    driver = make_driver(max_num_seqs=1, max_queued_requests=2)
    for _ in range(3):  # one for the free seat, two to wait
        driver.submit(3, 3)
    with pytest.raises(OverloadedError) as refused:
        driver.submit(3, 3)
    assert refused.value.retry_after_s > 0
    plan_of(driver)
    with pytest.raises(OverloadedError):
        driver.submit(3, 3)
    driver.run()
    driver.submit(3, 3)


def test_seats_do_not_count_where_pages_hold_the_queue_up() -> None:
    driver = make_driver(pages=4, max_queued_requests=1)
    driver.submit(12, 5)
    plan_of(driver)
    driver.submit(8, 1)
    with pytest.raises(OverloadedError):
        driver.submit(8, 1)
    driver.run()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (make_request(num_prompt=0), "prompt"),
        (make_request(num_prompt=64), "prompt"),
        (make_request(num_prompt=17), "prompt"),  # the pages hold 16 and one of output
        (make_request(max_tokens=0), "max_tokens"),
        (make_request("live"), "request_id"),
    ],
)
def test_requests_that_can_never_run_are_refused(request_: Request, field: str) -> None:
    scheduler = Scheduler(make_limits(), {0: RankPages(4), 1: RankPages(9)})
    scheduler.submit(make_request("live"), b"i", 0.0)
    with pytest.raises(RequestError) as refused:
        scheduler.submit(request_, b"i", 0.0)
    assert refused.value.field == field


def test_a_prompt_that_leaves_room_for_one_token_is_served() -> None:
    driver = make_driver(max_model_len=16)
    driver.submit(15, 5)
    driver.run()
    assert len(driver.clients["r0"].got) == 1


# --- replay, results, epochs ---


def test_a_replay_goes_on_after_its_tokens() -> None:
    driver = make_driver()
    driver.submit(6, 5, replay=3)
    plan = plan_of(driver)
    assert list(plan.admitted[0].output_ids) == driver.clients["r0"].expected[:3]
    assert plan.work[0].num_tokens == 9
    driver.run()
    assert driver.clients["r0"].got == driver.clients["r0"].expected


def test_a_replay_that_was_over_ends_without_a_step() -> None:
    scheduler = Scheduler(make_limits(), {0: RankPages(8)})
    scheduler.submit(make_request("length", output_ids=(1, 2), max_tokens=2), b"i", 0.0)
    scheduler.submit(make_request("stop", output_ids=(1, 77), stop_token_ids=(77,)), b"i", 0.0)
    events = [event for _, event in scheduler.expire(0.0)]
    assert [(event.token_index, event.finish_reason) for event in events] == [(2, "length"), (2, "stop")]
    assert scheduler.schedule(0.0) is None and scheduler.expire(0.0) == []


def test_an_answer_that_was_not_asked_for_changes_nothing() -> None:
    scheduler = Scheduler(make_limits(), {0: RankPages(8)})
    with pytest.raises(RankError, match="none is in flight"):
        scheduler.complete(0, 1, [])
    scheduler.submit(make_request(), b"i", 0.0)
    plan = scheduler.schedule(0.0)
    assert plan
    right = answers(plan[0], 5)
    for rank, step, tokens in ((7, 1, right), (0, 2, right), (0, 1, []), (0, 1, right * 2)):
        with pytest.raises(RankError):
            scheduler.complete(rank, step, tokens)
    with pytest.raises(RankError):
        scheduler.complete(0, 1, [SampledToken(request_idx=3, token_id=5)])
    assert len(scheduler.complete(0, 1, right)) == 1


def test_requests_of_a_lost_rank_are_computed_again_elsewhere_and_skip_nothing() -> None:
    driver = make_driver(num_ranks=2, max_num_seqs=1)
    names = [driver.submit(3, 9) for _ in range(3)]
    driver.schedule()
    driver.deliver_step()
    driver.schedule()  # its tokens are lost with the rank
    assert all(len(driver.clients[name].got) == 1 for name in names[:2])
    driver.lose(1)
    driver.run()
    assert [driver.clients[name].ended for name in names] == ["length"] * 3


def test_a_kept_rank_goes_on_with_its_pages_and_unanswered_steps() -> None:
    driver = make_driver(num_ranks=2, max_num_seqs=2)
    for _ in range(4):
        driver.submit(6, 9)
    driver.schedule()
    driver.schedule()
    used = driver.scheduler.load().global_pages_used
    driver.lose(0)
    assert 0 < driver.scheduler.load().global_pages_used < used
    assert driver.scheduler.num_steps_in_flight == 2, "rank 1 has not answered"
    driver.run()


def test_the_queue_keeps_its_order_when_a_rank_is_lost() -> None:
    driver = make_driver(max_num_seqs=2)
    names = [driver.submit(3, 5) for _ in range(4)]
    driver.schedule()
    driver.deliver_step()
    driver.lose(0)
    (plan,) = (driver.schedule() or {}).values()
    assert [admission.prompt_ids for admission in plan.admitted] == [
        driver.clients[name].request.prompt_ids for name in names[:2]
    ]
    driver.run()


def test_a_last_token_that_was_lost_is_sampled_again() -> None:
    """Such a request runs no more, nor does it wait, when its rank goes."""
    driver = make_driver()
    name = driver.submit(4, 1)
    driver.schedule()
    assert driver.scheduler.load().global_pages_used == 0
    driver.lose(0)
    assert driver.scheduler.load().num_queued == 1
    driver.run()
    assert driver.clients[name].ended == "length"


def test_a_preempted_request_whose_first_token_never_came_is_computed_again() -> None:
    driver = make_driver(pages=4)
    driver.submit(8, 6)
    victim = driver.submit(8, 6)
    plan_of(driver)
    assert plan_of(driver).released == (1,)
    driver.lose(0)
    driver.run()
    assert driver.clients[victim].ended == "length"


def test_without_ranks_requests_wait() -> None:
    driver = make_driver()
    driver.submit(3, 4)
    driver.schedule()
    driver.scheduler.change_ranks({}, ())
    assert driver.schedule() is None
    assert driver.scheduler.load().num_queued == 1
    driver.lose(0)
    driver.run()


def test_stopping_ends_the_queue_too() -> None:
    driver = make_driver(max_num_seqs=1)
    driver.submit(3, 9)
    driver.submit(3, 2)
    plan_of(driver)
    driver.take(driver.scheduler.fail_all(LOST))
    driver.assert_clean()


def test_a_request_that_comes_again_is_not_refused_by_a_full_queue() -> None:
    scheduler = Scheduler(make_limits(max_queued_requests=0))
    with pytest.raises(OverloadedError):
        scheduler.submit(make_request("new"), b"i", 0.0)
    scheduler.submit(make_request("old"), b"i", 0.0, again=True)
    scheduler.forget("old")
    assert not scheduler.has_requests and scheduler.expire(0.0) == []


def test_queued_requests_that_the_next_epoch_cannot_hold_end() -> None:
    scheduler = Scheduler(make_limits())
    scheduler.submit(make_request("long", num_prompt=30), b"i", 0.0)
    scheduler.submit(make_request("short", num_prompt=12, max_tokens=30), b"i", 0.0)
    assert scheduler.schedule(0.0) is None
    scheduler.change_ranks({0: RankPages(4)}, ())
    events = [event for _, event in scheduler.expire(0.0)]
    assert [(event.request_id, event.error.kind) for event in events if event.error] == [("long", "UnavailableError")]
    ended = []
    for step in range(1, 30):
        plan = scheduler.schedule(0.0)
        if plan is None:
            break
        ended += [event.finish_reason for _, event in scheduler.complete(0, step, answers(plan[0], 5))]
    assert ended == [None] * 4 + ["length"], "16 positions fit, so 17 tokens"


def test_the_load_counts_what_happened() -> None:
    driver = make_driver(chunk_tokens=8, pages=10, chunked_pages=8, max_num_seqs=1)
    driver.submit(6, 3)
    driver.submit(2, 1)
    plan_of(driver)
    load = driver.scheduler.load()
    assert (load.num_running, load.num_queued) == (1, 1)
    assert (load.global_pages_used, load.global_pages_total) == (2, 10)
    assert (load.chunked_pages_used, load.chunked_pages_total) == (2, 8)
    assert load.kv_used_fraction == 0.25
    assert (load.step_tokens, load.step_requests, load.num_steps) == (6, 1, 1)
    driver.run()
    load = driver.scheduler.load()
    assert (load.computed_tokens, load.sampled_tokens, load.num_steps) == (6 + 2 + 2, 4, 4)
