"""A part of a layer beside the others: in captured small steps on a stream of its own.

Owns the fork and the join. Knows nothing of what is computed. As in `dispatch/beside.py`, chains of kernels fill each
other's gaps.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MAX_TOKENS = 256


class Beside:
    """`start`, what else there is, then what `start` returned. Parts that are begun before others are done come after
    them.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, compute: Callable[[Tensor], Tensor], x_TD: Tensor) -> Callable[[], Tensor]:
        """Begins `compute(x)` if the step is captured and small. What is returned gives the result to kernels of the
        caller's stream, or computes it.

        The result's memory is the other stream's, which takes it again after the next `start`, and waits first for all
        that the caller launched until then. Until the streams are joined the caller keeps x.
        """
        stream = self._stream
        if stream is None or not 0 < x_TD.shape[0] <= MAX_TOKENS or not torch.cuda.is_current_stream_capturing():
            return lambda: compute(x_TD)
        stream.wait_stream(torch.cuda.current_stream(x_TD.device))
        with torch.cuda.stream(stream):
            y_TD = compute(x_TD)
            is_computed = stream.record_event()

        def finish() -> Tensor:
            torch.cuda.current_stream(x_TD.device).wait_event(is_computed)
            return y_TD

        return finish
