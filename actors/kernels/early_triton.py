"""Kernels that begin while the one ahead of them ends (programmatic dependent launch: NVIDIA's Hopper and later).

Owns the rule that makes it harmless: a kernel that is launched with `early()` calls `await_inputs()` in every program
that reads what other kernels write, or writes. Until then it may load weights, and what was there before a kernel ahead
of it that was launched without. All memory of the kernels ahead is there afterwards, for each of them waited likewise.
A kernel that waits for other GPUs lets the next one begin behind the last of these waits only: programs that stand by
take room from kernels of other streams, which may be what the other GPUs wait for in the end. Needs Triton: imported
only where it is installed. Source: PTX ISA, griddepcontrol.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, type-arg, misc"

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

IS_ON = True  # False: all kernels are launched one after another, for measuring
LEAST_CAPABILITY = (9, 0)
IN_HARDWARE = tl.constexpr(not knobs.runtime.interpret)


@triton.jit
def await_inputs(HOLDS_NEXT: tl.constexpr = False):
    """Returns when the kernels ahead have ended. The next kernel may begin then, and wait likewise; one that is held,
    when all programs have come to `let_next_begin`, or ended.
    """
    if IN_HARDWARE and cuda_capability_geq(9, 0):
        gdc_wait()
    if not HOLDS_NEXT:
        let_next_begin()


@triton.jit
def let_next_begin():
    if IN_HARDWARE and cuda_capability_geq(9, 0):
        gdc_launch_dependents()


def early() -> dict[str, bool]:
    """The launch option of a kernel that calls `await_inputs`; nothing where there is no such thing."""
    return _option() if IS_ON else {}


@lru_cache(maxsize=1)
def _option() -> dict[str, bool]:
    is_nvidia = torch.version.cuda is not None and torch.cuda.is_available()
    return {"launch_pdl": True} if is_nvidia and torch.cuda.get_device_capability() >= LEAST_CAPABILITY else {}
