"""Requests that one epoch after another ends with.

Owns the count. A request that brings a rank down, for whatever reason, would do so in every epoch, and soon nobody
would be served: one that was being computed when MOST_LOSSES epochs in a row ended, and got no further in between, is
to end itself. So are those that had the bad luck to be beside it every time. Knows nothing of ranks.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from actors.router.requests import RequestState

MOST_LOSSES = 3
LEAST_S = 2.0  # from the first of them on: what passes sooner, as packets that are lost for a moment, is no fault of it


@dataclass(frozen=True, slots=True)
class _Losses:
    """In a row, while the request had as many outputs."""

    num_outputs: int
    num: int
    first_s: float


class Suspects:
    """Requests that were in flight when the last epoch ended."""

    def __init__(self) -> None:
        self._losses: dict[str, _Losses] = {}  # by request id

    def after_loss(self, in_flight: Iterable[RequestState], now_s: float) -> list[RequestState]:
        """Those of the requests in flight, as an epoch ends, that are not to be tried again."""
        before, self._losses = self._losses, {}
        guilty = []
        for state in in_flight:
            losses, num_outputs = before.get(state.request_id), len(state.outputs)
            if losses is None or losses.num_outputs != num_outputs:
                losses = _Losses(num_outputs, 0, now_s)
            losses = _Losses(num_outputs, losses.num + 1, losses.first_s)
            if losses.num >= MOST_LOSSES and now_s - losses.first_s >= LEAST_S:
                guilty.append(state)
            else:
                self._losses[state.request_id] = losses
        return guilty
