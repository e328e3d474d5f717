"""The Triton kernels of sums and gathers over ranks, run by Triton's interpreter.

The interpreter runs one rank after another, and nobody can be waited for: ranks that come too early have sent what they
had to send when they give up. So all run again, as if for the first time, until everything that is awaited is there.
Ranks but the last are sent words once more than they read them: these are wiped, and the last must have left nothing.
"""

from collections.abc import Callable

import pytest
import torch
from interpreter import mend_interpreter, run_interpreted
from torch import Tensor

from actors.kernels.draw import Draws, draw_tokens
from actors.kernels.norm import add_rms_norm
from actors.kernels.peer_end import BLAMED
from actors.kernels.peer_sums import CALLS, PeerSums, SumLayout
from actors.kernels.triton_here import HAS_TRITON

WORLD = 3
HIDDEN = 36
ROUNDS = 3  # a sliced sum is sent in two steps, and received in a third


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


def main() -> None:
    mend_interpreter()
    for dtype, hidden in ((torch.float16, HIDDEN), (torch.float16, 40), (torch.float32, 1)):
        check_sums(dtype, hidden)
    check_all_words()
    check_gather(torch.float16)
    check_largest()
    check_draws()


def make_ranks(dtype: torch.dtype, hidden: int = HIDDEN) -> list[PeerSums]:
    layout = SumLayout(world=WORLD, hidden=hidden, dtype=dtype, max_rows=4, gather_bytes=16384)
    buffers = tuple(torch.zeros(layout.num_bytes, dtype=torch.uint8) for _ in range(WORLD))
    bases = torch.tensor([buffer.data_ptr() for buffer in buffers])
    zeros = lambda num: torch.zeros(num, dtype=torch.int64)  # noqa: E731
    return [
        PeerSums(
            layout=layout, rank=rank, buffers=buffers, bases=bases, state=zeros(layout.state_words), host=zeros(2),
            timeout_s=1.0,
        )
        for rank in range(WORLD)
    ]  # fmt: skip


def run(ranks: list[PeerSums], call: Callable[[PeerSums], Tensor]) -> list[Tensor]:
    """What `call` of each rank returns once everything that it waits for has been sent."""
    results: list[Tensor] = []
    began_at = ranks[0].state.clone()
    for _ in range(ROUNDS):
        for peers in ranks:
            peers.state.copy_(began_at)
            peers.host.zero_()
            blame_at = peers.layout.blame
            peers.buffers[peers.rank][blame_at:].zero_()
        results = [call(peers) for peers in ranks]
    assert all(int(peers.state[BLAMED]) == 0 and peers.given_up is None for peers in ranks)
    assert all(int(peers.state[CALLS] - began_at[CALLS]) == 1 for peers in ranks)
    said = ranks[0].layout.said
    assert not ranks[-1].buffers[-1][:said].any(), "a place was not left empty"
    for peers in ranks[:-1]:
        peers.buffers[peers.rank][:said].zero_()
    return results


def check_sums(dtype: torch.dtype, hidden: int) -> None:
    ranks = make_ranks(dtype, hidden)
    for seed in range(2):  # both halves of the areas
        torch.manual_seed(seed)
        a, b = (torch.randn(WORLD, 2, hidden).to(dtype) for _ in range(2))
        check_reduce(ranks, a, b)
        check_norm(ranks, a, torch.randn(2, hidden).to(dtype), torch.randn(hidden).to(dtype))


def check_all_words() -> None:
    """Numbers arrive whatever their bits are, and what is none as none: also words that look like an empty place."""
    from actors.kernels import peer_sums_triton

    each = torch.arange(1 << 16, dtype=torch.int32)
    x = torch.full((WORLD, 1, 1 << 17), -0.0).half()
    x[0] = (each | each << 16).view(torch.float16)
    for total in run(make_ranks(torch.float16, 1 << 17), lambda p: peer_sums_triton.sum_rows(p, (x[p.rank],))):
        torch.testing.assert_close(total, x[0], rtol=0, atol=0, equal_nan=True)


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
    ranks = make_ranks(dtype)
    for call in range(2):
        check_columns(ranks, torch.arange(WORLD * 5 * 200).view(WORLD, 5, 200).remainder(97 + call).to(dtype))


def check_columns(ranks: list[PeerSums], x: Tensor) -> None:
    from actors.kernels import peer_columns_triton

    def gather(peers: PeerSums) -> Tensor:
        out = torch.empty(x.shape[1], WORLD * x.shape[2], dtype=x.dtype)
        peer_columns_triton.gather(peers, x[peers.rank], out)
        return out

    for each in run(ranks, gather):
        assert torch.equal(each, torch.cat(list(x), dim=1))


def check_largest() -> None:
    """Ties, numbers that are none, and rows that do not fill a block."""
    from actors.kernels import peer_columns_triton
    from actors.kernels.largest_triton import launch_largest

    x = torch.randn(WORLD, 4, 70)
    x[:, 1] = -x[:, 1].abs()
    x[1, 2, 5] = x[2, 2, 7] = torch.nan
    x[:, 3] = -torch.inf
    x[1, 0, 9] = x[2, 0, 3] = 9.0
    expected = torch.cat(list(x), dim=1).max(1)
    results: list[Tensor] = []

    def choose(peers: PeerSums) -> Tensor:
        results[:] = peer_columns_triton.largest_columns(peers, x[peers.rank])
        return torch.stack((results[0].double(), results[1].double()))

    ranks = make_ranks(torch.float32)
    for each in run(ranks, choose):
        torch.testing.assert_close(each[0].float(), expected.values, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(each[1].long(), expected.indices)
    check_garbage_is_noticed(ranks[0], choose)
    values, columns = launch_largest(x[1])
    torch.testing.assert_close(values, x[1].max(1).values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(columns, x[1].max(1).indices)


def check_garbage_is_noticed(peers: PeerSums, choose: Callable[[PeerSums], Tensor]) -> None:
    """All that is awaited has come, but a peer has given rank 2 up, and is followed."""
    peers.state[CALLS:] -= 1
    peers.buffers[peers.rank][peers.layout.blame :].view(torch.int64)[0] = 2 + 1
    choose(peers)
    assert peers.given_up == 2


def check_draws() -> None:
    """Columns of one rank and of several give the reference's tokens; one of them has nearly all of a row's weight."""
    from actors.kernels.draw_triton import launch_draw

    x = torch.randn(WORLD, 3, 30)
    x[1, 2] += 20
    whole = torch.cat(list(x), dim=1)
    for least_R in (None, torch.tensor([0, 1 << 54, 0, 0])):
        draws = Draws(
            row_R=torch.tensor([2, 0, 1, 0]),
            largest_B=whole.amax(1),
            temperature_R=torch.tensor([1.0, 0.4, 1.0, 5.0]),
            uniform_R=torch.tensor([0.3, 0.99, 0.5, 0.0], dtype=torch.float64),
            least_R=least_R,
        )
        expected = draw_tokens(whole, draws)
        assert torch.equal(launch_draw(whole, draws, whole.shape[1]), expected)
        ranks = make_ranks(torch.float32)
        for each in run(ranks, lambda peers: launch_draw(x[peers.rank], draws, whole.shape[1], peers)):  # noqa: B023
            assert torch.equal(each, expected)


if __name__ == "__main__":
    main()
