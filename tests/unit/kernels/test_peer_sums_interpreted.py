"""The Triton kernels of sums and gathers over ranks, run by Triton's interpreter.

The interpreter runs one rank after another, and nobody can be waited for: ranks that come too early have sent what they
had to send when they give up. So all run again, as if for the first time, until everything that is awaited is there.
"""

from collections.abc import Callable

import pytest
import torch
from interpreter import run_interpreted
from torch import Tensor

from actors.kernels.norm import add_rms_norm
from actors.kernels.peer_sums import BLAMED, SEQUENCE, PeerSums, SumLayout
from actors.kernels.triton_here import HAS_TRITON

WORLD = 3
HIDDEN = 36
ROUNDS = 3  # a sliced sum is sent in two steps, and received in a third


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


def main() -> None:
    for dtype, whole_rows in ((torch.float16, 4), (torch.float16, 0), (torch.float32, 0)):
        check_sums(dtype, whole_rows)
    check_gather(torch.float16)


def make_ranks(dtype: torch.dtype, hidden: int, whole_rows: int) -> list[PeerSums]:
    layout = SumLayout(
        world=WORLD, hidden=hidden, dtype=dtype, whole_rows=whole_rows, sliced_rows=4, gather_bytes=16384
    )
    buffers = tuple(torch.zeros(layout.num_bytes, dtype=torch.uint8) for _ in range(WORLD))
    bases = torch.tensor([buffer.data_ptr() for buffer in buffers])
    zeros = lambda num: torch.zeros(num, dtype=torch.int64)  # noqa: E731
    return [
        PeerSums(
            layout=layout, rank=rank, buffers=buffers, bases=bases, state=zeros(3), host=zeros(2), timeout_s=1.0
        )
        for rank in range(WORLD)
    ]  # fmt: skip


def run(ranks: list[PeerSums], call: Callable[[PeerSums], Tensor]) -> list[Tensor]:
    """What `call` of each rank returns once everything that it waits for has been sent."""
    results: list[Tensor] = []
    began_at = int(ranks[0].state[SEQUENCE])
    for _ in range(ROUNDS):
        for peers in ranks:
            peers.state.copy_(torch.tensor([began_at, 0, 0]))
            peers.host.zero_()
            blame_at = peers.layout.blame
            peers.buffers[peers.rank][blame_at:].zero_()
        results = [call(peers) for peers in ranks]
    assert all(int(peers.state[BLAMED]) == 0 and peers.given_up is None for peers in ranks)
    assert all(int(peers.state[SEQUENCE]) == began_at + 1 for peers in ranks)
    return results


def check_sums(dtype: torch.dtype, whole_rows: int) -> None:
    ranks = make_ranks(dtype, HIDDEN, whole_rows)
    for seed in range(2):  # both halves of the areas
        torch.manual_seed(seed)
        a, b = (torch.randn(WORLD, 2, HIDDEN).to(dtype) for _ in range(2))
        check_reduce(ranks, a, b)
        check_norm(ranks, a, torch.randn(2, HIDDEN).to(dtype), torch.randn(HIDDEN).to(dtype))


def check_reduce(ranks: list[PeerSums], a: Tensor, b: Tensor) -> None:
    from actors.kernels import peer_sums_triton

    total = ordered_sum(a + b)
    for each in run(ranks, lambda peers: peer_sums_triton.sum_rows(peers, (a[peers.rank], b[peers.rank]))):
        torch.testing.assert_close(each, total)


def check_norm(ranks: list[PeerSums], a: Tensor, h: Tensor, weight: Tensor) -> None:
    from actors.kernels import peer_sums_triton

    residuals = [h.clone() for _ in range(WORLD)]

    def norm(peers: PeerSums) -> Tensor:
        residuals[peers.rank].copy_(h)
        return peer_sums_triton.add_rms_norm_rows(peers, residuals[peers.rank], (a[peers.rank],), weight, 1e-5)

    expected_h = h + ordered_sum(a)
    expected = add_rms_norm(expected_h.clone(), (), weight, 1e-5)
    for each, residual in zip(run(ranks, norm), residuals, strict=True):
        torch.testing.assert_close(residual, expected_h)
        torch.testing.assert_close(each, expected, rtol=0, atol=2e-5 if h.dtype == torch.float32 else 8e-3)


def ordered_sum(x: Tensor) -> Tensor:
    return (x[0].float() + x[1].float() + x[2].float()).to(x.dtype)


def check_gather(dtype: torch.dtype) -> None:
    ranks = make_ranks(dtype, HIDDEN, 4)
    for call in range(2):
        check_columns(ranks, torch.arange(WORLD * 5 * 200).view(WORLD, 5, 200).remainder(97 + call).to(dtype))


def check_columns(ranks: list[PeerSums], x: Tensor) -> None:
    from actors.kernels import peer_sums_triton

    def gather(peers: PeerSums) -> Tensor:
        out = torch.empty(x.shape[1], WORLD * x.shape[2], dtype=x.dtype)
        peer_sums_triton.gather(peers, x[peers.rank], out)
        return out

    for each in run(ranks, gather):
        assert torch.equal(each, torch.cat(list(x), dim=1))


if __name__ == "__main__":
    main()
