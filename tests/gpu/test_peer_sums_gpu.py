"""Sums and gathers over ranks: several on one GPU, each with a stream, and processes with a GPU each."""

from collections.abc import Callable, Iterator

import pytest
import torch
from ranks_of_one_gpu import CUDA, R, RanksOfOneGpu
from torch import Tensor

from actors.kernels import holders, peer_sums
from actors.kernels.draw import Draws, draw_tokens
from actors.kernels.largest import largest
from actors.kernels.norm import add_rms_norm
from actors.kernels.peer_sums import PeerSums, SumLayout
from benchmarks.gpu_collectives import TIMEOUT_S, check, interrupt, lose, recover
from benchmarks.unit_of_ranks import UnitOfRanks

pytestmark = pytest.mark.gpu

D = 5120
GATHER_BYTES = 1 << 18
TOLERANCES = {torch.bfloat16: 1e-2, torch.float32: 1e-5}  # two roundings, relative: kernels add up in pairs


class Ranks(RanksOfOneGpu[PeerSums]):
    """Four calls of 32 rows find room, two of 64, or four of chunks of GATHER_BYTES."""

    def __init__(
        self, world: int, dtype: torch.dtype = torch.bfloat16, hidden: int = D, timeout_s: float = 5.0
    ) -> None:
        layout = SumLayout(world=world, hidden=hidden, dtype=dtype, max_rows=64, gather_bytes=GATHER_BYTES)
        super().__init__(PeerSums, layout, timeout_s)

    def run(self, call: Callable[[PeerSums], R]) -> list[R]:
        """What `call` returns on all ranks, once it is there."""
        results = self.launch(call)
        torch.cuda.synchronize()
        self.check()
        return results

    def check(self) -> None:
        """Nobody was given up, and what was read has left its place empty."""
        assert [peers.given_up for peers in self.ranks] == [None] * len(self.ranks)
        for peers in self.ranks:
            assert not peers.buffers[peers.rank][: peers.layout.said].any()


def terms(world: int, num_rows: int, dtype: torch.dtype, hidden: int = D) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(num_rows)
    return torch.randn(world, num_rows, hidden, generator=generator, device=CUDA).to(dtype)


def ordered_sum(x: Tensor) -> Tensor:
    total = x[0].float()
    for term in x[1:]:
        total = total + term.float()
    return total.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_sums_are_right_and_the_same_bits_everywhere(world: int, dtype: torch.dtype) -> None:
    unit = Ranks(world, dtype)  # of three slices the last is shorter
    weight = torch.randn(D, device=CUDA).to(dtype)
    for num_rows in (1, 8, 9, 32, 3):
        a, b = terms(world, num_rows, dtype), terms(world, num_rows, dtype).flip(0)
        near = {"rtol": TOLERANCES[dtype], "atol": 4 * TOLERANCES[dtype]}
        sums = unit.run(lambda p: peer_sums.all_reduce_rows(p, (a[p.rank],)))  # noqa: B023
        torch.testing.assert_close(sums[0], ordered_sum(a), **near)
        assert all(torch.equal(each, sums[0]) for each in sums)
        h = torch.randn(num_rows, D, device=CUDA).to(dtype)
        residuals = [h.clone() for _ in range(world)]

        def norm(p: PeerSums) -> Tensor:
            parts = (a[p.rank], b[p.rank])  # noqa: B023
            return peer_sums.add_all_reduced_rms_norm(p, residuals[p.rank], parts, weight, 1e-5)  # noqa: B023

        normed = unit.run(norm)
        expected_h = h + ordered_sum(a + b)
        expected = add_rms_norm(expected_h.clone(), (), weight, 1e-5)
        for x_TD, h_TD in zip(normed, residuals, strict=True):
            assert torch.equal(h_TD, residuals[0]) and torch.equal(x_TD, normed[0])
            torch.testing.assert_close(h_TD, expected_h, **near)
            torch.testing.assert_close(x_TD, expected, **near)


def test_numbers_arrive_whatever_their_bits_are() -> None:
    """All of them in 16 bits, also two that together look like an empty place; what is no number arrives as none."""
    each = torch.arange(26 * D // 2, dtype=torch.int32, device=CUDA).remainder(1 << 16).view(26, -1)
    words = (each | each << 16).view(torch.bfloat16)
    for bringing in range(2):
        x = [words if rank == bringing else torch.full_like(words, -0.0) for rank in range(2)]
        for total in Ranks(2).run(lambda p: peer_sums.all_reduce_rows(p, (x[p.rank],))):  # noqa: B023
            torch.testing.assert_close(total, words, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("hidden", [16, 130])
def test_rows_of_a_few_words(hidden: int) -> None:
    unit, x = Ranks(2, torch.float32, hidden), terms(2, 5, torch.float32, hidden)
    parts = [each.clone() for each in x]  # aligned alike: a form of the kernel is loaded only when nothing runs
    for _ in range(3):
        for total in unit.run(lambda p: peer_sums.all_reduce_rows(p, (parts[p.rank],))):
            torch.testing.assert_close(total, ordered_sum(x))


def test_graphs_of_several_sizes_in_any_order() -> None:
    """Rows count their calls apart from each other; one rank is late, and one graph is captured but never replayed."""
    unit, sizes = Ranks(2), (3, 16, 64, 32)
    x = terms(2, max(sizes), torch.bfloat16)
    unit.run(lambda p: peer_sums.all_reduce_rows(p, (x[p.rank],)))
    graphs = [[torch.cuda.CUDAGraph() for _ in sizes] for _ in unit.ranks]
    outs = []
    for peers, of_rank, stream in zip(unit.ranks, graphs, unit.streams, strict=True):
        for graph, num_rows in zip(of_rank, sizes, strict=True):
            with torch.cuda.graph(graph, stream=stream):
                outs.append(peer_sums.all_reduce_rows(peers, (x[peers.rank, :num_rows],)))
    for late, order in enumerate(((0, 1, 2, 1), (2, 0, 0, 2), (1, 2, 0, 0, 0, 1), (2, 1))):
        for out in outs:
            out.fill_(-7)
        torch.cuda.synchronize()
        for rank, (of_rank, stream) in enumerate(zip(graphs, unit.streams, strict=True)):
            with torch.cuda.stream(stream):
                if rank == late % 2:
                    torch.cuda._sleep(2_000_000)
                for idx in order:
                    of_rank[idx].replay()
        torch.cuda.synchronize()
        unit.check()
        for i, out in enumerate(outs):
            if i % len(sizes) in order:
                torch.testing.assert_close(out, ordered_sum(x)[: len(out)], rtol=1e-2, atol=4e-2)


def test_gathers_in_one_call_and_in_several() -> None:
    unit = Ranks(4)
    for num_rows, width in ((1, 50512), (3, 1000), (9, 50512), (300, 8)):
        x = torch.randn(4, num_rows, width, device=CUDA).bfloat16()
        for each in unit.run(lambda p: peer_sums.gather_columns(p, x[p.rank])):  # noqa: B023
            assert torch.equal(each, torch.cat(list(x), dim=1))


@pytest.mark.parametrize("world", [1, 3, 4])
def test_the_largest_of_all_columns(world: int) -> None:
    """Ties, numbers that are none, any width: as torch has it, wherever it lies."""
    unit = Ranks(world)
    for num_rows, width in ((1, 50512), (5, 1000), (32, 50512), (3, 7)):
        x = [torch.randn(num_rows, width, device=CUDA).bfloat16() for _ in range(world)]  # each is aligned alike
        for each in x:
            each[-1, 3] = 9.0
        x[-1][-1, 5] = 9.0
        x[0][0, 2] = torch.nan if num_rows > 1 else 1.0
        values, columns = torch.cat(x, dim=1).max(1)

        def choose(p: PeerSums) -> Tensor:
            each = largest(x[0]) if world == 1 else peer_sums.largest_columns(p, _late(x, p, late_rank))  # noqa: B023
            return torch.stack([part.double() for part in each])

        for late_rank in (-1, 0, world - 1):  # noqa: B007 (`choose` reads it)
            for each in unit.run(choose):
                torch.testing.assert_close(each[0].float(), values.float(), rtol=0, atol=0, equal_nan=True)
                assert torch.equal(each[1].long(), columns)


@pytest.mark.parametrize("world", [1, 3, 4])
def test_tokens_are_drawn_as_from_whole_rows(world: int) -> None:
    unit = Ranks(world)
    for num_rows, width in ((1, 50512), (32, 50512), (5, 96)):
        x = [(torch.randn(num_rows, width, device=CUDA) * 3).bfloat16() for _ in range(world)]
        whole = torch.cat(x, dim=1)
        num_draws = 2 * num_rows if num_rows < 32 else 32
        for least_R in (None, torch.randint(1 << 40, (num_draws,), device=CUDA)):
            draws = Draws(
                row_R=torch.randint(num_rows, (num_draws,), device=CUDA),
                largest_B=whole.amax(1).float(),
                temperature_R=torch.rand(num_draws, device=CUDA) * 2 + 0.1,
                uniform_R=torch.rand(num_draws, dtype=torch.float64, device=CUDA),
                least_R=least_R,
            )
            if world == 1:
                expected = draw_tokens(whole.cpu(), Draws(**{key: _on_cpu(value) for key, value in _fields(draws)}))
                assert torch.equal(draw_tokens(x[0], draws).cpu(), expected)
                continue
            expected = draw_tokens(whole, draws)
            for late_rank in (-1, 0, world - 1):
                for each in unit.run(lambda p: peer_sums.draw_columns(p, _late(x, p, late_rank), draws)):  # noqa: B023
                    assert torch.equal(each, expected)


def _late(x: list[Tensor], peers: PeerSums, late_rank: int) -> Tensor:
    """The rank's columns; that of `late_rank` comes so late that the others look whether the wait is over."""
    if peers.rank == late_rank:
        torch.cuda._sleep(1 << 20)  # about 0.6 ms
    return x[peers.rank]


def _fields(draws: Draws) -> list[tuple[str, Tensor | None]]:
    return [(name, getattr(draws, name)) for name in draws.__slots__]


def _on_cpu(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.cpu()


def test_a_peer_that_does_not_come_is_named_once_and_not_waited_for_again() -> None:
    unit = Ranks(3, timeout_s=0.2)
    x = terms(3, 4, torch.bfloat16)
    unit.run(lambda p: peer_sums.all_reduce_rows(p, (x[p.rank],)))  # compiles
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for peers, stream in zip(unit.ranks[:2], unit.streams, strict=False):
        stream.wait_event(begin)
        with torch.cuda.stream(stream):
            for _ in range(20):
                peer_sums.all_reduce_rows(peers, (x[peers.rank],))
    torch.cuda.synchronize()
    end.record()
    torch.cuda.synchronize()
    assert [peers.given_up for peers in unit.ranks] == [2, 2, None]
    assert begin.elapsed_time(end) < 3 * 200, "later calls waited too"


def test_who_has_all_that_it_needs_follows_a_peer_that_gave_up() -> None:
    """What such a peer sends is garbage, though it comes."""
    unit = Ranks(2)
    x = torch.randn(2, 4, 512, device="cuda")
    unit.run(lambda p: peer_sums.largest_columns(p, x[p.rank]))
    assert [peers.given_up for peers in unit.ranks] == [None, None]
    unit.ranks[0].buffers[0][unit.ranks[0].layout.blame :].view(torch.int64)[0] = 1 + 1
    unit.launch(lambda p: peer_sums.largest_columns(p, x[p.rank]))
    torch.cuda.synchronize()
    assert unit.ranks[0].given_up == 1


def test_the_host_ends_a_wait() -> None:
    unit = Ranks(2, timeout_s=30.0)
    x = terms(2, 40, torch.bfloat16)
    peer_sums.all_reduce_rows(unit.ranks[0], (x[0],))
    waits = torch.cuda.Event()
    waits.record()
    assert not waits.query()
    unit.ranks[0].abort()
    torch.cuda.synchronize()  # would take 30 s, or for ever
    assert unit.ranks[0].given_up == 1


def test_ranks_that_began_apart_catch_up() -> None:
    """A wait that was long must not make the next one long: that goes on for ever between ranks."""
    num_calls, unit = 50, Ranks(2)
    x = terms(2, 64, torch.bfloat16)
    unit.run(lambda p: peer_sums.all_reduce_rows(p, (x[p.rank],)))
    graphs = [torch.cuda.CUDAGraph() for _ in unit.ranks]
    for peers, graph, stream in zip(unit.ranks, graphs, unit.streams, strict=True):
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(num_calls):
                peer_sums.all_reduce_rows(peers, (x[peers.rank],))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for graph, stream, is_late in zip(graphs, unit.streams, (False, True), strict=True):
        with torch.cuda.stream(stream):
            if is_late:
                torch.cuda._sleep(20_000_000)  # 10 ms
                begin.record()
            graph.replay()
            end.record()
    torch.cuda.synchronize()
    assert begin.elapsed_time(end) < num_calls * 0.15, "in ms"
    unit.check()


def test_holders_are_chosen_as_by_the_reference() -> None:
    generator = torch.Generator().manual_seed(1)
    for num_ids in (1, 8, 33, 256):
        masks = torch.where(torch.rand(128, generator=generator) < 0.5, 1 << (torch.arange(128) % 4), 0b1010)
        slots = torch.randint(-1, 40, (128, 4), generator=generator)
        ids = torch.randint(-1, 128, (num_ids,), generator=generator)
        expected = holders.choose_slots(ids, masks, slots)
        assert torch.equal(holders.choose_slots(ids.cuda(), masks.cuda(), slots.cuda()).cpu(), expected)


@pytest.fixture(params=[False, True], ids=["all-visible", "isolated"])
def unit(request: pytest.FixtureRequest) -> Iterator[UnitOfRanks]:
    unit = UnitOfRanks(2, D, torch.bfloat16, request.param)
    unit.start()
    yield unit
    unit.stop()


@pytest.mark.gpu(devices=2)
@pytest.mark.timeout(110)
def test_processes_with_a_gpu_each(unit: UnitOfRanks) -> None:
    assert all(voids for _, voids in unit.join(timeout_s=TIMEOUT_S))
    assert not any(voids for _, voids in unit.join(fresh=False, timeout_s=TIMEOUT_S))
    assert check(unit) == []
    interrupt(unit)
    unit.join(timeout_s=TIMEOUT_S)
    assert "blamed 1" in lose(unit, 128)[0]
    assert "right" in recover(unit, 128)[0]
