"""Has cuBLAS leave some of the GPU to kernels that run beside its own.

Its matmuls take every multiprocessor that there is until they end, so that whatever else is launched meanwhile waits as
long. Owns the call that torch does not have. Knows nothing of who runs beside.
"""

import ctypes
from functools import lru_cache
from typing import Any

import torch


def spare_multiprocessors(num: int, device: torch.device) -> bool:
    """This thread's matmuls leave `num` multiprocessors alone from now on; 0: none. False where that cannot be said.

    Source: cublasSetSmCountTarget; on Hopper it bounds the grids of persistent kernels.
    """
    library = _cublas() if device.type == "cuda" else None
    if library is None:
        return False
    all_of_them: int = torch.cuda.get_device_properties(device).multi_processor_count
    with torch.cuda.device(device):
        handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
        return bool(library.cublasSetSmCountTarget(handle, all_of_them - num if num else 0) == 0)


@lru_cache(maxsize=1)
def _cublas() -> Any:
    """The library that torch has loaded; None if it has none."""
    major = (torch.version.cuda or "").partition(".")[0]
    try:
        return ctypes.CDLL(f"libcublas.so.{major}") if major else None
    except OSError:
        return None
