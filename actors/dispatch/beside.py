"""Routed experts beside the shared one: in captured small steps on a stream of their own.

Owns the fork and the join. Knows nothing of routing tables. A small step's kernels leave most of the GPU idle between
each other; two chains of them fill each other's gaps. Outside of captures the host's launches set the pace, and large
steps fill the GPU alone: there experts are computed when they are asked for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.dispatch.contract import ExpertCompute

MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class RoutedReceipt:
    """What the experts are asked, as for `ExpertCompute.routed`, and the answer if they are at it already.

    It keeps what the other stream reads until the streams are joined: memory that is freed before could be taken by
    kernels of the caller's stream that run at the same time.
    """

    layer: int
    x_TD: Tensor
    keys_TK: Tensor
    scores_TK: Tensor
    slot_of_key: Tensor
    y_TD: Tensor | None = None


class ExpertsBeside:
    """Starts the routed experts of a layer, and gives their answer. One layer at a time."""

    def __init__(self, experts: ExpertCompute, device: torch.device) -> None:
        self._experts = experts
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, layer: int, x_TD: Tensor, keys_TK: Tensor, scores_TK: Tensor, slot_of_key: Tensor) -> RoutedReceipt:
        """Forks a captured step of few tokens: its graph is whole only after `finish`."""
        if self._stream is None or not 0 < x_TD.shape[0] <= MAX_TOKENS or not torch.cuda.is_current_stream_capturing():
            return RoutedReceipt(layer, x_TD, keys_TK, scores_TK, slot_of_key)
        self._stream.wait_stream(torch.cuda.current_stream(x_TD.device))
        with torch.cuda.stream(self._stream):
            y_TD = self._experts.routed(layer, x_TD, keys_TK, scores_TK, slot_of_key)
        return RoutedReceipt(layer, x_TD, keys_TK, scores_TK, slot_of_key, y_TD)

    def finish(self, receipt: RoutedReceipt) -> Tensor:
        """The sum of the routed experts, for kernels of the caller's stream.

        Its memory is the other stream's, which takes it again in the next `start` at the earliest, and waits first for
        all that the caller launched until then.
        """
        if receipt.y_TD is None:
            r = receipt
            return self._experts.routed(r.layer, r.x_TD, r.keys_TK, r.scores_TK, r.slot_of_key)
        assert self._stream is not None, "who started on another stream has one"
        torch.cuda.current_stream(receipt.x_TD.device).wait_stream(self._stream)
        return receipt.y_TD
