"""What the ingress measures, through a sink that someone else publishes.

Owns the measures' names and the timing of one call. Knows nothing of Ray or Prometheus: `deployment.py` binds the
sink. The table of all metrics is docs/metrics.md.
"""

import time
from typing import Literal, Protocol

from actors.ingress.status import outcome_of

Api = Literal["completions", "chat"]
Front = Literal["http", "grpc"]

# Upper bounds of the histograms' buckets, in seconds. Source: vLLM's, thinned.
FIRST_TOKEN_BUCKETS_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
TOKEN_GAP_BUCKETS_S = (0.002, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
CALL_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960)


class Sink(Protocol):
    """Where measures go. Times in seconds."""

    def first_token(self, seconds: float) -> None:
        """From receipt of a call to its first token."""

    def token_gap(self, seconds: float) -> None:
        """Time between two messages of one answer, divided by the tokens of the later."""

    def call_ended(self, front: Front, api: Api, outcome: str, seconds: float, prompt: int, generated: int) -> None:
        """A call ended; `outcome` is "ok" or a gRPC status in lower case; `prompt` and `generated` are tokens."""


class NullSink:
    """Measures nothing."""

    def first_token(self, seconds: float) -> None: ...

    def token_gap(self, seconds: float) -> None: ...

    def call_ended(self, front: Front, api: Api, outcome: str, seconds: float, prompt: int, generated: int) -> None: ...


class CallTimer:
    """Times one call from its receipt, which is this object's making."""

    def __init__(self, sink: Sink, front: Front, api: Api) -> None:
        self._sink = sink
        self._front: Front = front
        self._api: Api = api
        self._start_s = time.monotonic()
        self._last_s: dict[int, float] = {}  # by answer
        self.prompt_tokens = 0
        self.generated_tokens = 0

    def tokens(self, answer_idx: int, num_tokens: int) -> None:
        """News of one answer, with this many tokens, is on its way to the client."""
        if not num_tokens:
            return
        now_s = time.monotonic()
        if not self._last_s:
            self._sink.first_token(now_s - self._start_s)
        if answer_idx in self._last_s:
            self._sink.token_gap((now_s - self._last_s[answer_idx]) / num_tokens)
        self._last_s[answer_idx] = now_s
        self.generated_tokens += num_tokens

    def ended(self, error: BaseException | None) -> str:
        """The call ended, with an error or None. Returns the outcome's name."""
        outcome = outcome_of(error)
        self._sink.call_ended(
            self._front, self._api, outcome, time.monotonic() - self._start_s, self.prompt_tokens,
            self.generated_tokens,
        )  # fmt: skip
        return outcome
