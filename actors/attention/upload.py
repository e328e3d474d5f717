"""Small host values to the device, and a mark in what it is doing.

Owns the one way that does not wait for the device: pinned memory, asynchronous copies, events.
"""

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def upload(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` as a 1-D tensor on `device`."""
    on_host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def upload_array(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """`values` on `device`. What is not pinned would be copied while the host waits for the device, if it is large."""
    on_host = torch.from_numpy(values)
    if device.type == "cuda" and values.size:
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)


def mark(device: torch.device) -> torch.cuda.Event | None:
    """An event behind all that was queued on the device so far; None on a CPU, where all has been done."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))  # not the stream of whichever device is current
    return event
