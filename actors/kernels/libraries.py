"""Kernel libraries that may be installed: what this process can call beside torch itself.

Owns finding and loading them, once. Refuses to know what their kernels compute: callers ask `has(op)` and go another
way where the answer is no.
"""

import functools
import importlib.util
import logging
from pathlib import Path

import torch

log = logging.getLogger("corral.kernels")

# The wheel's one library. Its Python packages are not imported: they want packages of their own.
FBGEMM_LIBRARY = Path("experimental/gen_ai/fbgemm_gpu_experimental_gen_ai.so")


@functools.cache
def fbgemm_loaded() -> bool:
    """Loads FBGEMM's GenAI operators (torch.ops.fbgemm) where there is CUDA and the wheel is installed."""
    if not torch.cuda.is_available():
        return False
    package = importlib.util.find_spec("fbgemm_gpu")
    roots = list(package.submodule_search_locations or ()) if package else []
    library = next((path for root in roots if (path := Path(root) / FBGEMM_LIBRARY).exists()), None)
    if library is None:
        log.warning("fbgemm-gpu-genai is not installed: experts run on Triton's and torch's kernels alone")
        return False
    try:
        torch.ops.load_library(str(library))
    except OSError as e:  # built for another torch or CUDA
        log.warning("FBGEMM does not load, experts run on Triton's and torch's kernels alone: %s", e)
        return False
    log.info("FBGEMM loaded from %s", library)
    return True


@functools.cache
def has(op: str) -> bool:
    """Whether torch.ops.fbgemm has `op`."""
    return fbgemm_loaded() and hasattr(torch.ops.fbgemm, op)
