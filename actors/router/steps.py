"""Steps that were sent and are not answered by everyone.

Owns the plans of steps in flight, so that those which an epoch's end cut short can be sent again in the next one. Knows
nothing of sockets, nor of what a plan says.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from actors.types import RankPlan


@dataclass(slots=True)
class SentStep:
    """A step and the attention ranks that have not answered it, with their plans; `sent_s` is when it was sent."""

    step: int
    plans: dict[int, RankPlan]
    sent_s: float


class StepsInFlight:
    """In the order of the steps."""

    def __init__(self) -> None:
        self._steps: list[SentStep] = []

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[SentStep]:
        return iter(self._steps)

    @property
    def oldest(self) -> SentStep | None:
        return self._steps[0] if self._steps else None

    def sent(self, step: int, plans: Mapping[int, RankPlan], now_s: float) -> SentStep:
        sent = SentStep(step, dict(plans), now_s)
        self._steps.append(sent)
        return sent

    def answered(self, rank: int, step: int) -> None:
        for sent in self._steps:
            if sent.step == step:
                sent.plans.pop(rank, None)
        self._drop_answered()

    def keep_only(self, ranks: Collection[int], now_s: float) -> None:
        """Forgets what other ranks were asked; what is left is about to be sent again."""
        for sent in self._steps:
            sent.plans = {rank: plan for rank, plan in sent.plans.items() if rank in ranks}
            sent.sent_s = now_s
        self._drop_answered()

    def _drop_answered(self) -> None:
        self._steps = [sent for sent in self._steps if sent.plans]
