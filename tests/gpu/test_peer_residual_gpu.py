"""The divided residual stream: several ranks on one GPU, each with a stream."""

import pytest
import torch
from ranks_of_one_gpu import CUDA, RanksOfOneGpu
from torch import Tensor

from actors.kernels.norm import add_rms_norm
from actors.kernels.peer_residual import PeerResidual, ResidualLayout, add_sums, kept_of

pytestmark = pytest.mark.gpu

D, MAX_ROWS, EPS = 5120, 700, 1e-5
TOLERANCES = {torch.bfloat16: 1e-2, torch.float32: 1e-5}  # two roundings, relative


def unit_of(world: int, dtype: torch.dtype = torch.bfloat16, timeout_s: float = 5.0) -> RanksOfOneGpu[PeerResidual]:
    return RanksOfOneGpu(PeerResidual, ResidualLayout(world=world, hidden=D, dtype=dtype, max_rows=MAX_ROWS), timeout_s)


def load_kernels(world: int, dtype: torch.dtype = torch.bfloat16, timeout_s: float = 5.0) -> None:
    """Loading one waits until nothing runs: here, for a rank that waits for another one's, which is launched later.
    Triton compiles another for a timeout of more nanoseconds than 32 bits hold.
    """
    unit = unit_of(world, dtype, timeout_s)
    for peers in unit.ranks:
        peers.abort()  # they come one after another
    for weight in (None, torch.ones(D, dtype=dtype, device=CUDA)):
        for peers in unit.ranks:
            share = kept_of(peers, slice(0, 300))
            add_sums(
                peers, torch.zeros(share.stop - share.start, D, dtype=dtype, device=CUDA), slice(0, 300), weight, EPS
            )
            torch.cuda.synchronize()


def terms(world: int, num_rows: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(num_rows)
    return torch.randn(world, num_rows, D, generator=generator, device=CUDA).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_rows_are_right_and_the_same_bits_everywhere(world: int, dtype: torch.dtype) -> None:
    load_kernels(world, dtype)
    unit, tolerance = unit_of(world, dtype), TOLERANCES[dtype]
    for call, rows in enumerate((slice(0, 300), slice(300, 700), slice(5, 6), slice(100, 613))):
        num_rows, weight = rows.stop - rows.start, torch.randn(D, device=CUDA).to(dtype) if call % 2 else None
        x, h = terms(world, num_rows, dtype), torch.randn(num_rows, D, device=CUDA).to(dtype)
        shares = [kept_of(peers, rows) for peers in unit.ranks]
        kept = [h[share.start - rows.start : share.stop - rows.start].clone() for share in shares]
        for peers in unit.ranks:
            peers.rows(peers.rank)[rows] = x[peers.rank]
        unit.launch(lambda p: add_sums(p, kept[p.rank], rows, weight, EPS))  # noqa: B023
        torch.cuda.synchronize()
        assert [peers.given_up for peers in unit.ranks] == [None] * world
        expected_h = h + x.float().sum(0).to(dtype)
        expected = expected_h if weight is None else add_rms_norm(expected_h.clone(), (), weight, EPS)
        for peers in unit.ranks:
            share = shares[peers.rank]
            of_rank = expected_h[share.start - rows.start : share.stop - rows.start]
            torch.testing.assert_close(kept[peers.rank], of_rank, rtol=tolerance, atol=4 * tolerance)
            torch.testing.assert_close(peers.rows(peers.rank)[rows], expected, rtol=tolerance, atol=4 * tolerance)
            assert torch.equal(peers.rows(peers.rank), unit.ranks[0].rows(0))


def test_a_peer_that_does_not_come_is_named_once_and_not_waited_for_again() -> None:
    load_kernels(3, timeout_s=0.2)
    unit = unit_of(3, timeout_s=0.2)
    h = torch.zeros(100, D, dtype=torch.bfloat16, device=CUDA)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()

    def ten(peers: PeerResidual) -> None:
        for _ in range(10):
            add_sums(peers, h, slice(0, 300), None, EPS)

    unit.launch(ten, 2)
    torch.cuda.synchronize()
    end.record()
    torch.cuda.synchronize()
    assert [peers.given_up for peers in unit.ranks] == [2, 2, None]
    assert begin.elapsed_time(end) < 3 * 200, "later calls waited too"


def test_the_host_ends_a_wait() -> None:
    load_kernels(2, timeout_s=30.0)
    unit = unit_of(2, timeout_s=30.0)
    h = torch.zeros(20, D, dtype=torch.bfloat16, device=CUDA)
    unit.launch(lambda p: add_sums(p, h, slice(0, 40), None, EPS), 1)
    waits = torch.cuda.Event()
    waits.record(unit.streams[0])
    assert not waits.query()
    unit.ranks[0].abort()
    torch.cuda.synchronize()  # would take 30 s, or for ever
    assert unit.ranks[0].given_up == 1
