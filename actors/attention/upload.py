"""Small host values to the device.

Owns the one way that does not wait for what the device is doing: pinned memory and an asynchronous copy.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` as a 1-D tensor on `device`."""
    on_host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)
