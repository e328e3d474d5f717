"""The Triton kernels of the divided residual stream, run by Triton's interpreter.

The interpreter runs one rank after another, and nobody can be waited for: who comes too early gives up, which is undone
before the next launch.
"""

import pytest
import torch
from interpreter import mend_interpreter, run_interpreted
from torch import Tensor

from actors.kernels.norm import add_rms_norm
from actors.kernels.peer_end import BLAMED
from actors.kernels.peer_residual import SEQUENCE, PeerResidual, ResidualLayout, kept_of
from actors.kernels.triton_here import HAS_TRITON

WORLD, HIDDEN, EPS = 3, 36, 1e-5
ROWS = slice(2, 12)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


def main() -> None:
    mend_interpreter()
    for dtype in (torch.float16, torch.float32):
        ranks = make_ranks(dtype)
        for call, norms in enumerate((True, False, True)):
            check(ranks, call, norms)


def make_ranks(dtype: torch.dtype) -> list[PeerResidual]:
    layout = ResidualLayout(world=WORLD, hidden=HIDDEN, dtype=dtype, max_rows=13)
    buffers = tuple(torch.zeros(layout.num_bytes, dtype=torch.uint8) for _ in range(WORLD))
    bases = torch.tensor([buffer.data_ptr() for buffer in buffers])
    return [
        PeerResidual(
            layout=layout,
            rank=rank,
            buffers=buffers,
            bases=bases,
            state=torch.zeros(3, dtype=torch.int64),
            host=torch.zeros(2, dtype=torch.int64),
            timeout_s=1.0,
        )
        for rank in range(WORLD)
    ]


def check(ranks: list[PeerResidual], call: int, norms: bool) -> None:
    from actors.kernels import peer_residual_triton

    torch.manual_seed(call)
    dtype, num_rows = ranks[0].layout.dtype, ROWS.stop - ROWS.start
    parts, h = torch.randn(WORLD, num_rows, HIDDEN).to(dtype), torch.randn(num_rows, HIDDEN).to(dtype)
    weight = torch.randn(HIDDEN).to(dtype) if norms else None
    shares = [kept_of(peers, ROWS) for peers in ranks]
    assert [(share.start, share.stop) for share in shares] == [(2, 6), (6, 10), (10, 12)]
    kept = [h[share.start - ROWS.start : share.stop - ROWS.start].clone() for share in shares]
    for peers in ranks:
        peers.rows(peers.rank).fill_(7)
        peers.rows(peers.rank)[ROWS] = parts[peers.rank]
    for peers in ranks:
        peer_residual_triton.meet(peers)
        assert bool(peers.state[BLAMED]) == (peers.rank < WORLD - 1), "the last one finds all there"
        forget(ranks)
    for peers in ranks:
        peer_residual_triton.add_sums(peers, kept[peers.rank], shares[peers.rank], weight, EPS, 2)
        forget(ranks)
    expected_h = h + ordered_sum(parts)
    expected_x = expected_h if weight is None else add_rms_norm(expected_h.clone(), (), weight, EPS)
    for peers in ranks:
        assert int(peers.state[SEQUENCE]) == call + 1
        share = shares[peers.rank]
        torch.testing.assert_close(kept[peers.rank], expected_h[share.start - ROWS.start : share.stop - ROWS.start])
        tolerance = 2e-5 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(peers.rows(peers.rank)[ROWS], expected_x, rtol=0, atol=tolerance)
        assert torch.equal(peers.rows(peers.rank), ranks[0].rows(0))
        assert peers.rows(peers.rank)[[0, 1, 12]].eq(7).all(), "rows of others"


def forget(ranks: list[PeerResidual]) -> None:
    for peers in ranks:
        peers.state[BLAMED] = 0
        peers.host.zero_()
        peers.buffers[peers.rank][peers.layout.blame :].zero_()


def ordered_sum(x: Tensor) -> Tensor:
    return (x[0].float() + x[1].float() + x[2].float()).to(x.dtype)


if __name__ == "__main__":
    main()
