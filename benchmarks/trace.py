"""What a client notes of one request. Nothing heavy is imported here, so that many client processes start fast."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Trace:
    """One request as its client saw it: when it was sent, and when each token came (seconds, perf_counter).

    Tokens of one message have the same time.
    """

    sent_s: float
    token_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    problem: str = ""

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False)]
