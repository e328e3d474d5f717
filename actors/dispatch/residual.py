"""The residual stream of one large step, as the members of an attention unit add to it together.

Owns that sums of some rows run beside the computing of others: on a GPU on a stream of their own. Knows nothing of what
is added, nor of layers. Every member makes the same calls with the same rows in the same order.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from actors.kernels.norm import add_rms_norm
from actors.kernels.peer_residual import MOST_PROGRAMS, PeerResidual, add_sums, kept_of
from actors.kernels.spared import spare_multiprocessors

BESIDE_PROGRAMS = 16  # of sums beside matmuls, which leave them as many multiprocessors


class Residual(Protocol):
    """h of a step that is not captured, and what the next layer reads of it. Parts of the step are slices of its rows,
    the same ones in every call.
    """

    x_TD: Tensor
    """What the next layer reads, where nothing is being added. Until then who adds may write his part there."""

    def add(self, rows: slice, parts: Sequence[Tensor], weight_D: Tensor | None) -> None:
        """h += the members' sum of the sum of their parts (one or two [rows, D]; the first may be `x_TD[rows]`, and
        values are undefined afterwards); x becomes rms_norm(h) * weight, or h without a weight: see `wait`.
        """
        ...

    def wait(self, rows: slice) -> None:
        """Comes before x of these rows is read, written, or added to, by whatever is launched from then on."""
        ...

    def finish(self) -> None:
        """Waits for all rows; x stays as it is until the next step. The last call."""
        ...


class GroupResidual:
    """Over sums that end before they return: on a CPU, and where memory is not shared."""

    def __init__(self, all_reduce: Callable[[Tensor], Tensor], h_TD: Tensor, weight_D: Tensor, eps: float) -> None:
        """`h_TD` becomes the residual's own. x begins as rms_norm(h) * weight."""
        self._all_reduce = all_reduce
        self._h_TD = h_TD
        self._eps = eps
        self.x_TD = add_rms_norm(h_TD, (), weight_D, eps)

    def add(self, rows: slice, parts: Sequence[Tensor], weight_D: Tensor | None) -> None:
        h_RD, x_RD = self._h_TD[rows], self.x_TD[rows]
        h_RD.add_(self._all_reduce(parts[0] if len(parts) == 1 else parts[0].add_(parts[1])))
        x_RD.copy_(h_RD if weight_D is None else add_rms_norm(h_RD, (), weight_D, self._eps))

    def wait(self, rows: slice) -> None:
        """Has nothing to wait for."""

    def finish(self) -> None:
        """Has nothing to wait for."""


class SharedResidual:
    """Over memory that the members map into each other. Each keeps h of its share of the rows alone."""

    def __init__(
        self, peers: PeerResidual, stream: torch.cuda.Stream | None, rows: Sequence[slice], h_TD: Tensor,
        weight_D: Tensor, eps: float,
    ) -> None:  # fmt: skip
        """`stream`: where sums run; None on a CPU. No other residual of these peers is in use any more."""
        self._peers = peers
        self._stream = stream
        self._eps = eps
        self._is_beside = stream is not None and len(rows) > 1
        self._num_programs = BESIDE_PROGRAMS if self._is_beside else MOST_PROGRAMS
        if self._is_beside:
            spare_multiprocessors(BESIDE_PROGRAMS, h_TD.device)
        self._kept = {part.start: h_TD[kept_of(peers, part)].clone() for part in rows}
        self._events: dict[int, torch.cuda.Event] = {}
        self.x_TD = peers.rows(peers.rank)[: len(h_TD)]
        self.x_TD.copy_(add_rms_norm(h_TD, (), weight_D, eps))

    def add(self, rows: slice, parts: Sequence[Tensor], weight_D: Tensor | None) -> None:
        x_RD = self.x_TD[rows]
        if len(parts) > 1:
            torch.add(parts[0], parts[1], out=x_RD)
        elif parts[0].data_ptr() != x_RD.data_ptr():
            x_RD.copy_(parts[0])
        kept_OD = self._kept[rows.start]
        if self._stream is None:
            add_sums(self._peers, kept_OD, rows, weight_D, self._eps, self._num_programs)
            return
        self._stream.wait_stream(torch.cuda.current_stream(x_RD.device))
        with torch.cuda.stream(self._stream):
            add_sums(self._peers, kept_OD, rows, weight_D, self._eps, self._num_programs)
            self._events[rows.start] = self._stream.record_event()

    def wait(self, rows: slice) -> None:
        event = self._events.pop(rows.start, None)
        if event is not None:
            torch.cuda.current_stream(self.x_TD.device).wait_event(event)

    def finish(self) -> None:
        for event in self._events.values():
            torch.cuda.current_stream(self.x_TD.device).wait_event(event)
        self._events.clear()
        if self._is_beside:
            spare_multiprocessors(0, self.x_TD.device)
