"""What streams of requests saw, as figures of the window in which the load was steady.

Every event counts where it happened: a token when the message with it came, a wait for a first token when that came, a
request when it was whole. So requests that reach over the window's ends weigh no more and no less than others.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.trace import Trace
from benchmarks.workload import Item

TOGETHER_S = 0.5e-3  # messages that come within this are one; a step takes longer


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """From `begin_s` to before `end_s`, of perf_counter, which on Linux all processes of a machine share."""

    begin_s: float
    end_s: float

    def holds(self, time_s: float) -> bool:
        return self.begin_s <= time_s < self.end_s

    @property
    def length_s(self) -> float:
        return self.end_s - self.begin_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A load: stream i sends items i, i + num_streams and so on, one after the other, until the window ends."""

    num_streams: int
    items: Sequence[Item]
    window: Window


@dataclass(slots=True)
class Answer:
    """To item `number`. Neither whole nor with a problem: it was still open when the window ended, and cancelled."""

    number: int
    trace: Trace
    is_whole: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one path to the engine at one level. Latencies are None where nothing was seen."""

    path: str
    num_streams: int
    output_tokens_per_s: float
    requests_per_s: float
    num_requests: int  # that were whole in the window
    num_failures: int  # at any time, warm-up included
    problem: str  # of one of them
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    token_p50_ms: float | None
    token_p99_ms: float | None
    tokens_per_message: float | None
    num_cold: int  # streams whose first answer, which the warm-up is for, was not over when the window began
    busiest_client: float = 0.0  # share of a core that the busiest client process took
    cores: dict[str, float] = field(default_factory=dict)  # that each part of the service took, warm-up included


def figures(path: str, level: Level, answers: Sequence[Answer], busiest_client: float = 0.0) -> Figures:
    """Of all `answers` of a level. Tokens of requests that failed do not count."""
    window = level.window
    problems = [problem for answer in answers if (problem := problem_of(answer, window))]
    traces = [answer.trace for answer in answers if not problem_of(answer, window)]
    num_requests = sum(a.is_whole and window.holds(a.trace.token_s[-1]) for a in answers)
    ttfts_s = [trace.ttft_s for trace in traces if trace.token_s and window.holds(trace.token_s[0])]
    latencies_s = [wait_s for trace in traces for wait_s in token_latencies_s(trace, window)]
    num_tokens = sum(window.holds(time_s) for trace in traces for time_s in trace.token_s)
    num_messages = sum(window.holds(time_s) for trace in traces for time_s in set(trace.token_s))
    return Figures(
        path=path,
        num_streams=level.num_streams,
        output_tokens_per_s=num_tokens / window.length_s,
        requests_per_s=num_requests / window.length_s,
        num_requests=num_requests,
        num_failures=len(problems),
        problem=problems[0] if problems else "",
        ttft_p50_ms=percentile_ms(ttfts_s, 50),
        ttft_p99_ms=percentile_ms(ttfts_s, 99),
        token_p50_ms=percentile_ms(latencies_s, 50),
        token_p99_ms=percentile_ms(latencies_s, 99),
        tokens_per_message=num_tokens / num_messages if num_messages else None,
        num_cold=sum(is_cold(answer, level) for answer in answers),
        busiest_client=busiest_client,
    )


def problem_of(answer: Answer, window: Window) -> str:
    """Why a request failed; "" if it did not. One of which nothing was heard in the whole window has failed too."""
    trace = answer.trace
    last_s = trace.token_s[-1] if trace.token_s else trace.sent_s
    if not trace.problem and not answer.is_whole and last_s < window.begin_s:
        return f"nothing came for {window.length_s:.0f} s"
    return trace.problem


def is_cold(answer: Answer, level: Level) -> bool:
    """Whether this is a stream's first answer, and the window began before it was over."""
    if answer.number >= level.num_streams or answer.trace.problem:
        return False
    return not answer.is_whole or answer.trace.token_s[-1] >= level.window.begin_s


def token_latencies_s(trace: Trace, window: Window) -> Iterator[float]:
    """One value per token after the first message: the gap between two messages, divided over the second's tokens.

    Messages that come together count as one: they waited in a buffer, or for their reader to be given a core.
    """
    for (before_s, _), (time_s, num_tokens) in itertools.pairwise(_messages(trace.token_s)):
        if window.holds(time_s):
            yield from [(time_s - before_s) / num_tokens] * num_tokens


def _messages(token_s: Sequence[float]) -> list[tuple[float, int]]:
    """When each message came, and its number of tokens."""
    messages: list[tuple[float, int]] = []
    for time_s in token_s:
        if messages and time_s - messages[-1][0] < TOGETHER_S:
            messages[-1] = (messages[-1][0], messages[-1][1] + 1)
        else:
            messages.append((time_s, 1))
    return messages


def percentile_ms(values_s: Sequence[float], percent: float) -> float | None:
    """Interpolated between the two nearest values. None of no values."""
    return float(np.percentile(values_s, percent)) * 1e3 if len(values_s) else None
