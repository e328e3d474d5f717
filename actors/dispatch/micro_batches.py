"""Steps in two halves: while the experts compute one, the attention ranks compute the other.

Owns which steps are divided and where, which every rank derives from the step's token counts alone, and the order in
which a rank without tokens serves the halves: layer by layer, the first one first. Knows nothing of how rows travel.

A rank with tokens may run the halves in turn itself, each through its own one of `parts`; or it knows nothing of them,
and dispatches the whole step's tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.dispatch.contract import RoutingTable
from actors.dispatch.symmetric import SymmetricDispatch, SymmetricReceipt
from actors.errors import RankError

DIVISOR = 8  # rows of the first half: kernels are compiled for alignments, and fill tiles


def rows_of_first(num_rows: int) -> int:
    """Of a divided step: about half of the rows."""
    return min(num_rows, -(-num_rows // (2 * DIVISOR)) * DIVISOR)


def room_of_half(max_rows: int, most_whole_rows: int) -> int:
    """The most rows that a part carries, where a rank brings at most `max_rows` to a step."""
    return max(rows_of_first(max_rows), min(max_rows, most_whole_rows))


@dataclass(frozen=True, slots=True)
class HalvesReceipt:
    """Those of both halves."""

    first: SymmetricReceipt
    second: SymmetricReceipt


Receipt = SymmetricReceipt | HalvesReceipt


class MicroBatches:
    """Takes the place of the one of two `SymmetricDispatch`es that would carry whole steps.

    `first` and `second` are of the same epoch and layers, under names of their own, and each carries `room_of_half` of
    `max_tokens`. Steps of at most `most_whole_rows` tokens per rank go through the first alone. It is a power of two:
    decode steps of as many are captured, among others, so that padding never has a step divided.
    """

    is_capturable = True

    def __init__(
        self, first: SymmetricDispatch, second: SymmetricDispatch, max_tokens: int, most_whole_rows: int
    ) -> None:
        self._first = first
        self._second = second
        self._max_tokens = max_tokens
        self._most_whole_rows = most_whole_rows
        self._is_divided = False

    def start(self) -> None:
        """Maps the memory of all ranks, which all do at once. Raises RankError."""
        self._first.pair_with(self._second)
        self._first.start()
        self._second.start()

    def can_take_over(self, before: object) -> bool:
        """See `SymmetricDispatch.can_take_over`."""
        if not isinstance(before, MicroBatches):
            return False
        return self._first.can_take_over(before._first) and self._second.can_take_over(before._second)

    def take_over(self, before: object) -> None:
        """See `SymmetricDispatch.take_over`."""
        assert isinstance(before, MicroBatches), "it can take over"
        self._first.take_over(before._first)
        self._second.take_over(before._second)

    @property
    def halves(self) -> tuple[SymmetricDispatch, SymmetricDispatch]:
        """For the dispatches of the epoch after this one."""
        return self._first, self._second

    def close(self) -> None:
        """See `SymmetricDispatch.close`."""
        self._first.interrupt()  # neither waits for the other's waits
        self._second.interrupt()
        self._first.close()
        self._second.close()

    def interrupt(self) -> None:
        """See `SymmetricDispatch.interrupt`."""
        self._first.interrupt()
        self._second.interrupt()

    def parts(self, num_rows: int) -> list[tuple[SymmetricDispatch, slice]]:
        """How a rank with `num_rows` tokens runs the step that was begun: which of them go through which."""
        if not self._is_divided:
            return [(self._first, slice(0, num_rows))]
        num = rows_of_first(num_rows)
        return [(self._first, slice(0, num)), (self._second, slice(num, num_rows))]

    @property
    def is_divided(self) -> bool:
        """Whether the step that was begun is."""
        return self._is_divided

    def update_routing(self, routing: RoutingTable) -> None:
        """See `SymmetricDispatch.update_routing`."""
        self._first.update_routing(routing)
        self._second.update_routing(routing)

    @property
    def block_rows(self) -> int:
        """See `SymmetricDispatch.block_rows`: of a part of the step that was begun."""
        return self._first.block_rows

    def fits(self, tokens_of_rank: Sequence[int]) -> bool:
        """Whether a step is small enough."""
        return max(tokens_of_rank) <= self._max_tokens

    def begin_step(self, tokens_of_rank: tuple[int, ...]) -> None:
        """See `Dispatch`; decides whether the step is divided."""
        most_tokens = max(tokens_of_rank)
        self._is_divided = most_tokens > self._most_whole_rows
        if not self._is_divided:
            self._first.begin_step(tokens_of_rank)
            return
        firsts = tuple(rows_of_first(num_tokens) for num_tokens in tokens_of_rank)
        seconds = tuple(num_tokens - num for num_tokens, num in zip(tokens_of_rank, firsts, strict=True))
        self._first.begin_step(firsts)
        self._second.begin_step(seconds, most_tokens=max(firsts))  # padding may move rows from one to the other

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor, scores_TK: Tensor, layer: int) -> Receipt:
        """The whole step's tokens."""
        if not self._is_divided:
            return self._first.dispatch(x_TD, expert_ids_TK, scores_TK, layer)
        num = rows_of_first(x_TD.shape[0])
        return HalvesReceipt(
            self._first.dispatch(x_TD[:num], expert_ids_TK[:num], scores_TK[:num], layer),
            self._second.dispatch(x_TD[num:], expert_ids_TK[num:], scores_TK[num:], layer),
        )

    def combine(self, receipt: Receipt) -> Tensor:
        if isinstance(receipt, SymmetricReceipt):
            return self._first.combine(receipt)
        return torch.cat((self._first.combine(receipt.first), self._second.combine(receipt.second)))

    def serve_step(self, tokens_of_rank: tuple[int, ...]) -> None:
        """A whole step of a rank that brings no tokens. See `SymmetricDispatch.serve_step`."""
        self.begin_step(tokens_of_rank)
        self.serve_layers()

    def serve_layers(self) -> None:
        """What `serve_step` does once the step was begun."""
        for layer in self._first.layers:
            self.serve_layer(layer)

    def serve_layer(self, layer: int) -> None:
        """One layer of a rank that brings no tokens to the step."""
        self._first.serve_layer(layer)
        if self._is_divided:
            self._second.serve_layer(layer)

    def end_step(self) -> None:
        """See `Dispatch`."""
        self.wait()

    def wait(self) -> None:
        """Waits for what was queued on the current stream. Raises RankError if a wait of it was given up."""
        try:
            self._first.wait()
            self._second.check()
        except RankError:
            self.close()
            raise

    def check(self) -> None:
        """Raises RankError if a wait was given up in what the device has done so far; the host does not wait."""
        try:
            self._first.check()
            self._second.check()
        except RankError:
            self.close()
            raise
