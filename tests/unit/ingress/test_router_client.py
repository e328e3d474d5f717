"""The channel to the router on a real socket: merging, leaving, loss, deadlines."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from conftest import until
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import DeadlineError, UnavailableError
from actors.ingress.mailbox import Mailbox
from actors.ingress.router_client import RouterClient
from actors.ingress.testing import ScriptedRouter, token_event
from actors.types import ErrorInfo, Request, RouterStatus, SampledToken, SamplingParams, TokenEvent


def request_of(request_id: str, deadline_s: float | None = None) -> Request:
    return Request(
        request_id=request_id, prompt_ids=(1,), sampling=SamplingParams(max_tokens=100_000), deadline_s=deadline_s
    )


@asynccontextmanager
async def connected(
    script: Any = None, **options: Any
) -> AsyncIterator[tuple[RouterClient, ScriptedRouter, list[str]]]:
    router = ScriptedRouter(script)
    endpoints = [await router.start()]

    async def discover() -> str:
        if not endpoints:
            raise UnavailableError("no router yet")
        return endpoints[-1]

    client = RouterClient(discover, beat_s=0.02, **options)
    await client.start()
    try:
        await until(lambda: client.status.serving)
        yield client, router, endpoints
    finally:
        await client.stop()
        await router.stop()
    assert client.num_open == 0


async def taken(client: RouterClient, *requests: Request) -> list[TokenEvent]:
    async with aclosing(client.events(requests)) as news:
        return [event async for events in news for event in events]


async def test_two_requests_of_one_call() -> None:
    async with connected(lambda request: [7, 8, 9]) as (client, _, _endpoints):
        events = await taken(client, request_of("a"), request_of("b"))
        for request_id in ("a", "b"):
            mine = [event for event in events if event.request_id == request_id]
            assert [token.token_id for event in mine for token in event.tokens] == [7, 8, 9]
            assert [event.finish_reason for event in mine if event.finish_reason] == ["length"]


async def test_a_slow_reader_gets_everything_merged_and_stalls_nobody() -> None:
    """The backlog is one event however many came, and another call runs meanwhile."""
    async with connected() as (client, router, _):
        slow = request_of("slow")
        async with aclosing(client.events([slow])) as news:
            reading = asyncio.ensure_future(anext(news))
            await router.until(lambda: len(router.submitted) == 1)
            await router.emit(token_event(slow, 0, [0]))
            await reading  # then it reads no more
            for i in range(1, 2000):
                await router.emit(token_event(slow, i, [i], "length" if i == 1999 else None))
            quick = asyncio.create_task(taken(client, request_of("quick")))
            await router.until(lambda: len(router.submitted) == 2)
            await router.emit(token_event(router.submitted[1], 0, [5], "stop"))
            assert [event.finish_reason for event in await quick] == ["stop"]
            (event,) = await anext(news)
            assert (event.token_index, len(event.tokens), event.finish_reason) == (1, 1999, "length")
            assert [token.token_id for token in event.tokens] == list(range(1, 2000))
        assert router.cancelled == []


async def test_a_reader_that_goes_cancels_what_has_not_ended() -> None:
    async with connected() as (client, router, _):
        ended, left = request_of("ended"), request_of("left")
        async with aclosing(client.events([ended, left])) as news:
            reading = asyncio.ensure_future(anext(news))
            await router.until(lambda: len(router.submitted) == 2)
            await router.emit(token_event(ended, 0, [1], "stop"))
            await reading
        await router.until(lambda: bool(router.cancelled))
        assert router.cancelled == ["left"]
        await router.emit(token_event(left, 0, [1]))  # was still on its way: nobody minds
        next_call = asyncio.create_task(taken(client, request_of("next")))
        await router.until(lambda: len(router.submitted) == 3)
        await router.emit(token_event(router.submitted[2], 0, [5], "stop"))
        assert [event.request_id for event in await next_call] == ["next"]


async def test_open_requests_go_on_at_the_next_router_from_the_tokens_that_came() -> None:
    async with connected() as (client, router, endpoints):
        request = request_of("a")
        reading = asyncio.create_task(taken(client, request))
        await router.until(lambda: bool(router.submitted))
        await router.emit(token_event(request, 0, [5, 6]))
        await until(lambda: [item.token_ids for item in client._open.values()] == [[5, 6]])
        endpoints.clear()
        await router.stop()
        await until(lambda: not client.status.serving)
        late = asyncio.create_task(taken(client, request_of("b")))  # asked for while there is no router

        another = ScriptedRouter()
        another.status = RouterStatus(serving=False, detail="forming")
        endpoints.append(await another.start())
        await until(lambda: client.status.detail == "forming")
        assert another.submitted == [], "a router that does not serve yet would refuse"
        await another.set_status(RouterStatus(serving=True, detail=""))
        await another.until(lambda: len(another.submitted) == 2)
        again, new = another.submitted
        assert (again.request_id, again.output_ids, new.request_id, new.output_ids) == ("a", (5, 6), "b", ())
        assert another.num_again == 1
        await another.emit(token_event(again, 2, [7], "stop"))
        await another.emit(token_event(new, 0, [1], "stop"))
        assert [token.token_id for event in await reading for token in event.tokens] == [5, 6, 7]
        await late
        await another.stop()


async def test_open_requests_do_not_go_on_with_another_model() -> None:
    async with connected() as (client, router, endpoints):
        await router.set_status(RouterStatus(serving=True, detail="", model="one"))
        await until(lambda: client.status.model == "one")
        reading = asyncio.create_task(taken(client, request_of("a")))
        await router.until(lambda: bool(router.submitted))
        endpoints.clear()
        await router.stop()
        another = ScriptedRouter()
        another.status = RouterStatus(serving=True, detail="", model="two")
        endpoints.append(await another.start())
        with pytest.raises(UnavailableError, match="another model"):
            await reading
        assert another.submitted == []
        await another.stop()


async def test_without_a_router_open_calls_end_when_patience_does() -> None:
    async with connected(patience_s=0.2) as (client, router, endpoints):
        reading = asyncio.create_task(taken(client, request_of("a")))
        await router.until(lambda: bool(router.submitted))
        endpoints.clear()
        start_s = time.monotonic()
        await router.stop()
        with pytest.raises(UnavailableError, match="router was lost"):
            await reading
        assert 0.15 < time.monotonic() - start_s < 2
        with pytest.raises(UnavailableError, match="not serving"):
            await taken(client, request_of("b"))


async def test_before_a_router_has_served_calls_are_refused() -> None:
    router = ScriptedRouter()
    router.status = RouterStatus(serving=False, detail="loading weights")
    endpoint = await router.start()

    async def discover() -> str:
        return endpoint

    client = RouterClient(discover, beat_s=0.02)
    await client.start()
    await until(lambda: client.status.detail == "loading weights")
    with pytest.raises(UnavailableError, match="loading weights"):
        await taken(client, request_of("a"))
    await client.stop()
    await router.stop()


async def test_a_router_that_answers_no_beat_is_lost_and_found_again() -> None:
    async with connected() as (client, router, _):
        request = request_of("a")
        reading = asyncio.create_task(taken(client, request))
        await router.until(lambda: bool(router.submitted))
        router.answers_beats = False
        await until(lambda: not client.status.serving)
        router.answers_beats = True
        await router.until(lambda: len(router.submitted) == 2)
        await router.emit(token_event(request, 0, [5], "stop"))
        assert [event.finish_reason for event in await reading] == ["stop"]


async def test_a_deadline_that_the_router_lets_pass_is_kept_by_the_ingress() -> None:
    async with connected(grace_s=0.01) as (client, router, _):
        with pytest.raises(DeadlineError):
            await taken(client, request_of("a", deadline_s=time.time() + 0.02))
        await router.until(lambda: router.cancelled == ["a"])


async def test_stopping_ends_open_calls() -> None:
    async with connected() as (client, router, _):
        reading = asyncio.create_task(taken(client, request_of("a")))
        await router.until(lambda: bool(router.submitted))
        await client.stop()
        with pytest.raises(UnavailableError, match="stopping"):
            await reading


async def test_an_interval_packs_what_comes_meanwhile() -> None:
    async with connected() as (client, router, _):
        request = request_of("a")
        async with aclosing(client.events([request], interval_s=0.02)) as news:
            first = asyncio.ensure_future(anext(news))
            await router.until(lambda: bool(router.submitted))
            await router.emit(token_event(request, 0, [0]))
            assert len((await first)[0].tokens) == 1  # the first token waits for nothing
            rest = asyncio.ensure_future(anext(news))
            for i in range(1, 6):
                await router.emit(token_event(request, i, [i], "stop" if i == 5 else None))
            assert len((await rest)[0].tokens) == 5


# --- the mailbox by itself ---------------------------------------------------------------------------------------


@given(cuts=st.lists(st.integers(0, 30), max_size=8), reads=st.sets(st.integers(0, 8)))
async def test_a_mailbox_neither_skips_nor_repeats(cuts: list[int], reads: set[int]) -> None:
    """However the router cuts 30 tokens into events and whenever the reader comes."""
    bounds = [0, *sorted(cuts), 30]
    mailbox, got = Mailbox(("a",)), []
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        tokens = tuple(SampledToken(request_idx=0, token_id=t) for t in range(start, end))
        last = end == 30 and i == len(bounds) - 2
        mailbox.put(
            TokenEvent(request_id="a", token_index=start, tokens=tokens, finish_reason="length" if last else None)
        )
        if i in reads and (tokens or last):
            got += await mailbox.take()
    while not mailbox.ended:
        got += await mailbox.take()
    assert [token.token_id for event in got for token in event.tokens] == list(range(30))
    assert [event.token_index for event in got if event.tokens] == [
        event.tokens[0].token_id for event in got if event.tokens
    ]
    assert [event.finish_reason for event in got if event.finish_reason] == ["length"]


async def test_a_gap_in_tokens_fails_the_call() -> None:
    mailbox = Mailbox(("a",))
    token = SampledToken(request_idx=0, token_id=1)
    mailbox.put(TokenEvent(request_id="a", token_index=0, tokens=(token,)))
    mailbox.put(TokenEvent(request_id="a", token_index=2, tokens=(token,)))
    assert len(await mailbox.take()) == 1
    with pytest.raises(UnavailableError, match="token 2 came where 1 was due"):
        await mailbox.take()


async def test_tokens_before_an_error_are_given_out_first() -> None:
    mailbox = Mailbox(("a",))
    token = SampledToken(request_idx=0, token_id=1)
    mailbox.put(TokenEvent(request_id="a", token_index=0, tokens=(token,)))
    mailbox.put(TokenEvent(request_id="a", token_index=1, error=ErrorInfo(kind="DeadlineError", problem="late")))
    assert not mailbox.ended
    assert (await mailbox.take())[0].tokens == (token,)
    with pytest.raises(DeadlineError, match="late"):
        await mailbox.take()
