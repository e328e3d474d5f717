"""Kernels that begin before those ahead have ended, in graphs and without: nothing is read or written too soon."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, type-arg, misc"

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.language.extra.cuda import globaltimer  # noqa: E402

from actors.kernels.early_triton import await_inputs, early  # noqa: E402

pytestmark = pytest.mark.gpu(devices=1)
PROGRAMS, LANES, ROUNDS = 64, 128, 20
SLOW_NS = 20_000  # of one program in eight: long enough for a kernel behind to read what is not there yet


@triton.jit
def _add_kernel(x, other, y, slow_ns, LANES: tl.constexpr):
    """y = x + other + 1, where each program reads what another one of the kernel ahead wrote, some of them late."""
    await_inputs()
    program = tl.program_id(0)
    if program % 8 == 7:
        began = globaltimer()
        while globaltimer() - began < slow_ns:
            pass
    from_program = tl.num_programs(0) - 1 - program
    at = tl.arange(0, LANES)
    total = tl.load(x + from_program * LANES + at) + tl.load(other + from_program * LANES + at) + 1
    tl.store(y + program * LANES + at, total)


def _add(x_N: Tensor, other_N: Tensor, y_N: Tensor, slow_ns: int = SLOW_NS) -> None:
    _add_kernel[(PROGRAMS,)](x_N, other_N, y_N, slow_ns, LANES=LANES, **early())


def _chain(zeros_N: Tensor, x_N: Tensor, slow_ns: int = SLOW_NS) -> Tensor:
    """x + 6, over two buffers that each kernel writes while the one ahead may still read them."""
    buffers = torch.empty_like(x_N), torch.empty_like(x_N)
    for step in range(6):
        _add(x_N, zeros_N, buffers[step % 2], slow_ns)
        x_N = buffers[step % 2]
    return x_N


def _forked(zeros_N: Tensor, x_N: Tensor, side: torch.cuda.Stream, slow_ns: tuple[int, int]) -> Tensor:
    """2 x + 15: after one kernel a chain here and one on another stream, of which either may be the slow one."""
    first_N, y_N = torch.empty_like(x_N), torch.empty_like(x_N)
    _add(x_N, zeros_N, first_N)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        beside_N = _chain(zeros_N, first_N, slow_ns[0])
    here_N = _chain(zeros_N, first_N, slow_ns[1])
    torch.cuda.current_stream().wait_stream(side)
    _add(here_N, beside_N, y_N)
    return y_N


def _rounds(compute: Callable[[Tensor], Tensor], x_N: Tensor, captured: bool) -> Tensor:
    """What ROUNDS of y = compute(x) and x = y come to."""
    x_N = x_N.clone()
    compute(x_N)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph):
            x_N.copy_(compute(x_N))
    for _ in range(ROUNDS):
        if captured:
            graph.replay()
        else:
            x_N.copy_(compute(x_N))
    return x_N


@pytest.mark.parametrize("captured", [True, False])
def test_a_kernel_sees_all_that_the_ones_ahead_wrote_and_overwrites_nothing_too_soon(captured: bool) -> None:
    zeros_N = torch.zeros(PROGRAMS * LANES, dtype=torch.int32, device="cuda")
    found_N = _rounds(lambda x_N: _chain(zeros_N, x_N), zeros_N, captured)
    assert found_N.eq(6 * ROUNDS).all()


@pytest.mark.parametrize("slow_ns", [(SLOW_NS, 0), (0, SLOW_NS), (SLOW_NS, SLOW_NS)])
@pytest.mark.parametrize("captured", [True, False])
def test_a_kernel_after_a_join_waits_for_both_streams(captured: bool, slow_ns: tuple[int, int]) -> None:
    zeros_N, side = torch.zeros(PROGRAMS * LANES, dtype=torch.int32, device="cuda"), torch.cuda.Stream()
    found_N = _rounds(lambda x_N: _forked(zeros_N, x_N, side, slow_ns), zeros_N, captured)
    assert found_N.eq(15 * (2**ROUNDS - 1)).all()
