"""The HTTP front against OpenAI's shapes: the openai client itself, bodies, events, errors."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from actors.errors import OverloadedError, UnavailableError
from actors.ingress.testing import LOGPROB, token_event
from actors.types import ErrorInfo, RouterStatus, TokenEvent

Serve = Callable[..., Any]
HELLO = "The horses are in the stable."
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Where?"}]}
COMPLETION = {"model": "tiny", "prompt": "Where?"}


def events_of(text: str) -> list[Any]:
    """The stream's data, [DONE] left as it stands."""
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def client_of(service: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)


async def test_openai_client_chat_whole_and_streamed(serve: Serve, saying: Callable[[str], Any]) -> None:
    async with serve(saying(HELLO)) as service, client_of(service) as client:
        whole = await client.chat.completions.create(**CHAT, seed=7, n=2, temperature=0)  # type: ignore[arg-type]
        assert [choice.message.content for choice in whole.choices] == [HELLO, HELLO]
        assert whole.choices[0].finish_reason == "stop"
        assert whole.choices[0].message.role == "assistant"
        requests = service.router.submitted
        assert [request.sampling.seed for request in requests] == [7, 8]
        prompt = service.tokenizer.encode_chat(CHAT["messages"])
        assert list(requests[0].prompt_ids) == prompt
        num_tokens = len(service.tokenizer.encode_prompt(HELLO))  # BOS less, end of turn more
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt), 2 * num_tokens)
        assert whole.usage.total_tokens == len(prompt) + 2 * num_tokens

        text, reasons, usages = "", [], []
        async for chunk in await client.chat.completions.create(
            **CHAT,
            stream=True,
            stream_options={"include_usage": True},  # type: ignore[arg-type]
        ):
            usages.append(chunk.usage)
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reasons.append(choice.finish_reason)
        assert text == HELLO
        assert [reason for reason in reasons if reason] == ["stop"]
        assert [usage.completion_tokens for usage in usages if usage] == [num_tokens]
        assert usages[-1] is not None


async def test_openai_client_completions_with_several_prompts(serve: Serve, saying: Callable[[str], Any]) -> None:
    async with serve(saying(HELLO)) as service, client_of(service) as client:
        done = await client.completions.create(model="tiny", prompt=["one", "two"], n=2, max_tokens=3)
        assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
        assert {choice.finish_reason for choice in done.choices} == {"length"}
        prompts = [list(request.prompt_ids) for request in service.router.submitted]
        one, two = service.tokenizer.encode_prompt("one"), service.tokenizer.encode_prompt("two")
        assert prompts == [one, one, two, two]
        assert done.usage is not None
        assert done.usage.prompt_tokens == len(one) + len(two)
        by_ids = await client.completions.create(model="tiny", prompt=[[5, 6], [7]], max_tokens=1)
        assert len(by_ids.choices) == 2
        assert [list(request.prompt_ids) for request in service.router.submitted[-2:]] == [[5, 6], [7]]  # no BOS added
        text = ""
        async for chunk in await client.completions.create(model="tiny", prompt=[5, 6], stream=True):
            text += chunk.choices[0].text
        assert text == HELLO


async def test_logprobs_and_token_ids_in_both_shapes(serve: Serve, saying: Callable[[str], Any]) -> None:
    async with serve(saying("Hi é")) as service:
        ids = [*service.tokenizer.encode_prompt("Hi é")[1:], service.tokenizer.control_ids["<|eot|>"]]
        ask = {"return_token_ids": True, "logprobs": True, "top_logprobs": 2}
        chat = (await service.http.post("/v1/chat/completions", json={**CHAT, **ask})).json()
        choice = chat["choices"][0]
        assert choice["token_ids"] == ids
        assert chat["prompt_token_ids"] == service.tokenizer.encode_chat(CHAT["messages"])
        content = choice["logprobs"]["content"]
        assert len(content) == len(ids)
        assert bytes(b for token in content[:-1] for b in token["bytes"]).decode() == "Hi é"
        assert content[0]["logprob"] == LOGPROB
        assert [top["logprob"] for top in content[0]["top_logprobs"]] == [LOGPROB, LOGPROB - 1]

        ask = {"return_token_ids": True, "logprobs": 1}
        legacy = (await service.http.post("/v1/completions", json={**COMPLETION, **ask})).json()["choices"][0]
        assert legacy["token_ids"] == ids
        assert legacy["prompt_token_ids"] == service.tokenizer.encode_prompt("Where?")
        logprobs = legacy["logprobs"]
        assert logprobs["token_logprobs"] == [LOGPROB] * len(ids)
        assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]
        assert all(
            top[token] == LOGPROB for top, token in zip(logprobs["top_logprobs"], logprobs["tokens"], strict=True)
        )

        for path, body in (("chat/completions", {**CHAT, "logprobs": True}), ("completions", {**COMPLETION, **ask})):
            body |= {"stream": True, "return_token_ids": True}
            events = events_of((await service.http.post(f"/v1/{path}", json=body)).text)
            choices = [chunk["choices"][0] for chunk in events[:-1]]
            assert [i for choice in choices for i in choice.get("token_ids", [])] == ids
            num_logprobs = sum(
                len(choice["logprobs"].get("content") or choice["logprobs"].get("tokens"))
                for choice in choices
                if choice["logprobs"] and choice.get("token_ids")
            )
            assert num_logprobs == len(ids)


async def test_streams_end_with_done_and_carry_null_usage_only_when_asked(
    serve: Serve, saying: Callable[[str], Any]
) -> None:
    async with serve(saying(HELLO)) as service:
        for path, body in (("chat/completions", CHAT), ("completions", COMPLETION)):
            plain = await service.http.post(f"/v1/{path}", json={**body, "stream": True})
            assert plain.headers["content-type"].startswith("text/event-stream")
            events = events_of(plain.text)
            assert events[-1] == "[DONE]"
            assert all("usage" not in event for event in events[:-1])
            assert len({event["id"] for event in events[:-1]}) == 1
            with_usage = {**body, "stream": True, "stream_options": {"include_usage": True}}
            events = events_of((await service.http.post(f"/v1/{path}", json=with_usage)).text)
            assert events[-2]["choices"] == []
            assert events[-2]["usage"]["completion_tokens"] > 0
            assert all(event["usage"] is None for event in events[:-2])


async def test_stop_texts_end_an_answer_and_cancel_it_behind(serve: Serve, tokenizer: Any) -> None:
    async with serve(None) as service:
        ids = tokenizer.encode_prompt("one two three four")[1:]
        call = asyncio.create_task(
            service.http.post("/v1/completions", json={**COMPLETION, "stop": "three", "return_token_ids": True})
        )
        await service.router.until(lambda: bool(service.router.submitted))
        request = service.router.submitted[0]
        await service.router.emit(token_event(request, 0, ids))  # all at once, beyond the stop
        choice = (await call).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("one two ", "stop")
        assert choice["token_ids"] == ids[: len(choice["token_ids"])]
        assert "three" in tokenizer.backend.decode(choice["token_ids"])
        assert "four" not in tokenizer.backend.decode(choice["token_ids"])
        await service.router.until(lambda: service.router.cancelled == [request.request_id])


async def test_stop_texts_do_not_count_before_min_tokens(serve: Serve, saying: Callable[[str], Any]) -> None:
    async with serve(saying("no no no yes no no")) as service:
        ids = service.tokenizer.encode_prompt("no no no yes no no")[1:]
        until_yes = next(i for i in range(len(ids)) if "yes" in service.tokenizer.backend.decode(ids[:i]))
        body = {**COMPLETION, "stop": "no", "min_tokens": until_yes}
        choice = (await service.http.post("/v1/completions", json=body)).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("no no no yes ", "stop")


BAD = [
    ({"temperature": 3}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"), ({"top_k": -2}, "top_k"), ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"presence_penalty": -3}, "presence_penalty"),
    ({"frequency_penalty": 1e300}, "frequency_penalty"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"), ({"min_tokens": 10, "max_tokens": 5}, "min_tokens"), ({"n": 0}, "n"),
    ({"n": 10**9}, "n"), ({"seed": 2**70}, "seed"), ({"stop": ["x"] * 10_000}, "stop"), ({"stop": [""]}, "stop"),
    ({"stop": 5}, "stop"), ({"stop_token_ids": [10**9]}, "stop_token_ids"), ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"stream": "yes"}, "stream"), ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"timeout_ms": 0}, "timeout_ms"), ({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of"),
    ({"echo": True}, "echo"), ({"response_format": {"type": "json_object"}}, "response_format"),
]  # fmt: skip
BAD_COMPLETION = [
    ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": None}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"), ({"prompt": [1, "x"]}, "prompt"), ({"prompt": [True]}, "prompt"),
    ({"prompt": [5000]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": ["x"] * 65}, "prompt"),
    ({"logprobs": 21}, "logprobs"), ({"logprobs": True}, "logprobs"),
]  # fmt: skip
BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"), ({"messages": None}, "messages"),
    ({"messages": ["hi"]}, "messages.0"), ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
    ({"top_logprobs": 2}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"), ({"max_completion_tokens": 0}, "max_completion_tokens"),
]  # fmt: skip


async def test_every_bad_value_is_a_400_that_names_its_field(serve: Serve) -> None:
    async with serve(None, max_body_bytes=200_000) as service:
        cases = [("completions", COMPLETION, *case) for case in BAD + BAD_COMPLETION]
        cases += [("chat/completions", CHAT, *case) for case in BAD + BAD_CHAT]
        for path, base, change, field in cases:
            answer = await service.http.post(f"/v1/{path}", json={**base, **change})
            assert answer.status_code == 400, (path, change, answer.text)
            error = answer.json()["error"]
            assert error["param"] == field, (path, change, error)
            assert error["type"] == "invalid_request_error"
            assert set(error) == {"message", "type", "param", "code"}
        assert service.router.submitted == []
        assert {call[2] for call in service.sink.calls} == {"invalid_argument"}


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"x"', b"\xff", b"{" * 10_000, b'{"prompt": "\\ud800"}'])
async def test_malformed_json_is_a_400(serve: Serve, data: bytes) -> None:
    async with serve(None) as service:
        answer = await service.http.post("/v1/completions", content=data)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "body"


async def test_json_nan_and_infinity_are_refused(serve: Serve) -> None:
    async with serve(None) as service:
        for value in (b"NaN", b"Infinity", b"1e999", b"-1e999"):
            data = b'{"model": "tiny", "prompt": "x", "presence_penalty": ' + value + b"}"
            answer = await service.http.post("/v1/completions", content=data)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "presence_penalty")


async def test_a_prompt_beyond_the_context_says_so_as_openai_does(serve: Serve) -> None:
    async with serve(None) as service:
        for prompt in ([5] * 512, "word " * 600, "x" * 1_000_000):
            answer = await service.http.post("/v1/completions", json={"prompt": prompt})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
            assert "maximum context length is 512 tokens" in error["message"]


async def test_max_tokens_are_the_room_that_is_left_at_most(serve: Serve) -> None:
    async with serve(lambda request: [5] * 1000) as service:
        for max_tokens in (10**30, None):
            body = {"prompt": [5] * 500, "max_tokens": max_tokens}
            answer = (await service.http.post("/v1/completions", json=body)).json()
            assert service.router.submitted[-1].sampling.max_tokens == 12
            assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (12, "length")


async def test_unknown_and_harmless_fields_are_ignored(serve: Serve, saying: Callable[[str], Any]) -> None:
    async with serve(saying("ok")) as service:
        extra = {"user": "u", "metadata": {"a": "b"}, "brand_new_field": 1, "tools": [], "tool_choice": "none",
                 "response_format": {"type": "text"}, "top_k": -1, "max_tokens": None, "echo": False}  # fmt: skip
        answer = await service.http.post("/v1/chat/completions", json={**CHAT, **extra})
        assert answer.status_code == 200
        assert service.router.submitted[0].sampling.top_k == 0


async def test_paths_methods_and_models(serve: Serve) -> None:
    async with serve(None, extra_model_names=("alias/of-it",)) as service:
        http = service.http
        assert [m["id"] for m in (await http.get("/v1/models")).json()["data"]] == ["tiny", "alias/of-it"]
        assert (await http.get("/v1/models/alias/of-it")).json()["object"] == "model"
        for answer, status, code in (
            (await http.get("/v1/models/nope"), 404, "model_not_found"),
            (await http.post("/v1/completions", json={**COMPLETION, "model": "nope"}), 404, "model_not_found"),
            (await http.get("/v1/nothing"), 404, "unknown_url"),
            (await http.get("/v1/completions"), 405, "method_not_allowed"),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        async with client_of(service) as client:
            with pytest.raises(openai.NotFoundError, match="nope"):
                await client.models.retrieve("nope")


async def test_a_body_over_the_limit_is_a_413_which_the_client_gets_to_read(serve: Serve) -> None:
    async with serve(None, max_body_bytes=1000) as service:
        for size in (1001, 5_000_000):
            answer = await service.http.post("/v1/completions", content=b" " * size)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        for announced in ("content-length: 999999999999", "content-length: 2000\r\nexpect: 100-continue"):
            reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(service.url).port)
            writer.write(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{announced}\r\n\r\n".encode())
            assert b" 413 " in await reader.readline()  # without a byte of the body
            writer.close()


ERRORS = [
    (ErrorInfo(kind="OverloadedError", problem="the queue is full", retry_after_s=2.2), 429, "3"),
    (ErrorInfo(kind="UnavailableError", problem="rank 3 was lost", retry_after_s=0.5), 503, "1"),
    (ErrorInfo(kind="DeadlineError", problem="too late"), 504, None),
    (ErrorInfo(kind="NobodyKnowsError", problem="hm"), 503, "1"),
]


@pytest.mark.parametrize(("info", "status", "retry_after"), ERRORS)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_routers_refusal_has_its_status_streamed_or_not(
    serve: Serve, info: ErrorInfo, status: int, retry_after: str | None, stream: bool
) -> None:
    async with serve(None) as service:
        call = asyncio.create_task(service.http.post("/v1/chat/completions", json={**CHAT, "stream": stream}))
        await service.router.until(lambda: bool(service.router.submitted))
        request_id = service.router.submitted[0].request_id
        await service.router.emit(TokenEvent(request_id=request_id, token_index=0, error=info))
        answer = await call
        assert answer.status_code == status
        assert answer.json()["error"]["message"] == info.problem
        assert answer.headers.get("retry-after") == retry_after
        assert service.router.cancelled == []


async def test_an_error_in_mid_stream_is_an_event_after_the_text(serve: Serve, tokenizer: Any) -> None:
    async with serve(None) as service:
        call = asyncio.create_task(service.http.post("/v1/completions", json={**COMPLETION, "stream": True}))
        await service.router.until(lambda: bool(service.router.submitted))
        request = service.router.submitted[0]
        info = ErrorInfo(kind="UnavailableError", problem="a rank was lost")
        await service.router.emit(
            token_event(request, 0, tokenizer.encode_prompt("abc")[1:]),
            TokenEvent(request_id=request.request_id, token_index=0, error=info),
        )
        answer = await call
        *chunks, error, done = events_of(answer.text)
        assert answer.status_code == 200
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abc"
        assert error["error"]["message"] == "a rank was lost"
        assert done == "[DONE]"


async def test_health_follows_the_router(serve: Serve) -> None:
    async with serve(None) as service:
        assert (await service.http.get("/health")).json()["status"] == "ok"
        next_change = service.ingress.next_change
        await service.router.set_status(RouterStatus(serving=False, detail="loading: 3 of 4 ranks"))
        await next_change.wait()
        answer = await service.http.get("/health")
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "loading: 3 of 4 ranks"
        assert "retry-after" in answer.headers


async def test_a_client_that_vanishes_in_mid_stream_cancels_behind_itself(serve: Serve, tokenizer: Any) -> None:
    async with serve(None) as service:
        ids = tokenizer.encode_prompt("abc")[1:]
        call = asyncio.create_task(
            service.http.send(
                service.http.build_request("POST", "/v1/completions", json={**COMPLETION, "stream": True, "n": 2}),
                stream=True,
            )
        )
        await service.router.until(lambda: len(service.router.submitted) == 2)
        requests = service.router.submitted
        await service.router.emit(token_event(requests[0], 0, ids))
        answer = await call
        assert answer.status_code == 200
        await answer.aclose()
        await service.router.until(lambda: len(service.router.cancelled) == 2)
        assert sorted(service.router.cancelled) == sorted(request.request_id for request in requests)
    assert service.sink.calls[-1][2] == "cancelled"


async def test_measures(serve: Serve, saying: Callable[[str], Any]) -> None:
    async with serve(saying(HELLO)) as service:
        await service.http.post("/v1/completions", json=COMPLETION)
        num_tokens = len(service.tokenizer.encode_prompt(HELLO))
        prompt_tokens = len(service.tokenizer.encode_prompt("Where?"))
        assert service.sink.calls == [("http", "completions", "ok", prompt_tokens, num_tokens)]
        assert len(service.sink.first_tokens) == 1


def test_errors_without_a_retry_delay_have_no_retry_header() -> None:
    from actors.ingress.status import http_headers

    assert http_headers(OverloadedError("x", 0.0)) == {"retry-after": "1"}
    assert http_headers(UnavailableError("x", 59.2)) == {"retry-after": "60"}
    assert http_headers(ValueError("x")) == {}
