"""Sums and gathers of an attention unit: over gloo, and through memory that threads share as GPUs would."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from actors.dispatch.group import EpochGroup, RendezvousStore
from actors.dispatch.peer_memory import Mapping, SharedMemory
from actors.dispatch.rows import TokenShape
from actors.dispatch.tensor_parallel import (
    ALONE,
    GATHER_BYTES,
    LEAST_SUMMED_ROWS,
    MOST_SUMMED_ROWS,
    NEVER,
    OverGroup,
    OverPeerMemory,
    TensorParallel,
    make_tensor_parallel,
)
from actors.errors import RankError
from actors.kernels.draw import Draws, draw_tokens
from actors.kernels.norm import add_rms_norm

CPU = torch.device("cpu")
TIMEOUT_S = 10.0
SHORT_S = 0.5
D = 7  # which does not divide into slices
MAX_ROWS = MOST_SUMMED_ROWS + 10  # of a step: some are large
POSITIONS = (1, 2, 0)  # of shards 0, 1, 2: replacements come last, whatever their shard


class Unit:
    """Three ranks of one unit, threads of this process."""

    def __init__(self, groups: Sequence[EpochGroup], members: Sequence[TensorParallel]) -> None:
        self.groups = groups  # by shard
        self.members = members

    def all(self, work: Callable[[TensorParallel], Tensor | bool | None]) -> list[Tensor]:
        """`work` of every member at once; results by shard."""
        with ThreadPoolExecutor(len(self.members)) as pool:
            return list(pool.map(work, self.members))  # type: ignore[arg-type]


@pytest.fixture
def store() -> Iterator[RendezvousStore]:
    store = RendezvousStore("127.0.0.1")
    store.start()
    yield store
    store.stop()


@pytest.fixture(params=["group", "memory"])
def unit(request: pytest.FixtureRequest, store: RendezvousStore) -> Iterator[Unit]:
    groups = [EpochGroup(CPU, "127.0.0.1") for _ in POSITIONS]
    memories = SharedMemory.of_world(3, CPU)
    shape = TokenShape(hidden=D, experts_per_token=1, dtype=torch.float32, device=CPU)
    unit = Unit(
        groups,
        [
            OverGroup(i, 3)
            if request.param == "group"
            else OverPeerMemory(i, 3, shape, MAX_ROWS, memories[POSITIONS[i]])
            for i in range(3)
        ],
    )
    join(unit, store, 1, fresh=True)
    yield unit
    for group in groups:
        group.leave()


def join(unit: Unit, store: RendezvousStore, epoch: int, fresh: bool, timeout_s: float = TIMEOUT_S) -> list[bool]:
    def work(member: TensorParallel) -> bool:
        group = unit.groups[member.index]
        group.prepare(store.endpoint)
        group.join(epoch, POSITIONS[member.index], 3, TIMEOUT_S, timeout_s)
        return member.join(group, POSITIONS, fresh)

    return unit.all(work)  # type: ignore[return-value]


def terms(num_rows: int, width: int = D) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    return [torch.randn(num_rows, width, generator=generator) for _ in POSITIONS]


@pytest.mark.parametrize("num_rows", [1, 5, MOST_SUMMED_ROWS, MAX_ROWS])
def test_sums_are_the_same_bits_on_every_member(unit: Unit, num_rows: int) -> None:
    x = terms(num_rows)
    for _ in range(3):  # both halves of what is shared, and again
        sums = unit.all(lambda member: member.all_reduce(x[member.index].clone()))
        assert torch.equal(sums[0], x[0] + x[1] + x[2])
        assert torch.equal(sums[1], sums[0]) and torch.equal(sums[2], sums[0])


def test_parts_are_added_up_reduced_added_and_normed(unit: Unit) -> None:
    a, b, h, weight = terms(4), [x[:4] for x in terms(5)], torch.randn(4, D), torch.randn(D)
    expected_h = h + ((a[0] + b[0]) + (a[1] + b[1]) + (a[2] + b[2]))
    expected_x = add_rms_norm(expected_h.clone(), (), weight, 1e-5)
    residuals = [h.clone() for _ in POSITIONS]

    def norm(member: TensorParallel) -> Tensor:
        i = member.index
        return member.add_rms_norm(residuals[i], (a[i].clone(), b[i].clone()), weight, 1e-5)

    normed = unit.all(norm)
    for x_TD, h_TD in zip(normed, residuals, strict=True):
        torch.testing.assert_close(h_TD, expected_h, rtol=0, atol=1e-6)
        torch.testing.assert_close(x_TD, expected_x, rtol=0, atol=1e-5)
        assert torch.equal(x_TD, normed[0])


def test_a_residual_is_added_to_in_parts(unit: Unit) -> None:
    """Three layers' worth of two parts of which no member has an equal share."""
    h, weight, parts = terms(11)[0], torch.randn(D), (slice(0, 4), slice(4, 11))
    summed = [[terms(11 + layer)[i][:11] for i in range(3)] for layer in range(3)]

    def run(member: TensorParallel) -> Tensor:
        residual = member.residual(parts, h.clone(), weight, 1e-5)
        began = residual.x_TD.clone()
        for layer, of_member in enumerate(summed):
            for rows in parts:
                residual.wait(rows)
                half = of_member[member.index][rows] / 2
                residual.add(rows, (half.clone(), half.clone()), weight if layer < 2 else None)
        residual.finish()
        return torch.cat([began, residual.x_TD])

    expected_h = h + sum(x for of_member in summed for x in of_member)
    for each in (results := unit.all(run)):
        torch.testing.assert_close(each[:11], add_rms_norm(h.clone(), (), weight, 1e-5))
        torch.testing.assert_close(each[11:], expected_h, rtol=0, atol=1e-5)
        assert torch.equal(each, results[0])


def test_a_residual_is_normed_where_there_is_a_weight(unit: Unit) -> None:
    h, weight, rows, x = terms(5)[0], torch.randn(D), slice(0, 5), terms(6)

    def run(member: TensorParallel) -> Tensor:
        residual = member.residual([rows], h.clone(), weight, 1e-5)
        residual.x_TD[:] = x[member.index][:5]  # where a part may lie
        residual.add(rows, (residual.x_TD[rows],), weight)
        residual.wait(rows)
        return residual.x_TD.clone()

    expected = add_rms_norm(h + x[0][:5] + x[1][:5] + x[2][:5], (), weight, 1e-5)
    for each in unit.all(run):
        torch.testing.assert_close(each, expected, rtol=0, atol=1e-5)


def test_columns_are_in_the_order_of_shards(unit: Unit) -> None:
    x = [torch.full((2, 3), float(i)) for i in range(3)]
    for _ in range(3):
        gathered = unit.all(lambda member: member.all_gather_columns(x[member.index]))
        for each in gathered:
            assert each.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2]] * 2


def test_the_largest_column_is_the_first_of_all_members(unit: Unit) -> None:
    x = torch.randn(3, 5, 4)
    x[:, 1] = torch.tensor([0.5, 2.0, 2.0, 1.0])  # ties, within a member and between them
    x[2, 2, 1] = torch.nan
    x[:, 3] = -torch.inf
    expected = torch.cat(list(x), dim=1).max(1)
    for values, columns in unit.all(lambda member: member.largest_columns(x[member.index])):  # type: ignore[arg-type]
        torch.testing.assert_close(values, expected.values, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(columns, expected.indices) and int(columns[1]) == 1


def test_tokens_are_drawn_from_all_members_columns_alike(unit: Unit) -> None:
    x, generator = torch.randn(3, 6, 40), torch.Generator().manual_seed(5)
    whole = torch.cat(list(x), dim=1)
    draws = Draws(
        row_R=torch.tensor([5, 0, 3, 3]),
        largest_B=whole.amax(1),
        temperature_R=torch.tensor([0.5, 1.0, 2.0, 9.0]),
        uniform_R=torch.rand(4, generator=generator, dtype=torch.float64),
        least_R=torch.tensor([0, 1 << 50, 0, 0]),
    )
    expected = draw_tokens(whole, draws)
    for each in unit.all(lambda member: member.draw_columns(x[member.index], draws)):
        assert torch.equal(each, expected)


def test_the_next_epoch_goes_on_where_nobody_was_lost(unit: Unit, store: RendezvousStore) -> None:
    """What graphs were captured with is void only where the members start afresh."""
    x = terms(2)
    unit.all(lambda member: member.all_reduce(x[member.index].clone()))
    assert not any(join(unit, store, 2, fresh=False))
    sums = unit.all(lambda member: member.all_reduce(x[member.index].clone()))
    assert torch.equal(sums[0], x[0] + x[1] + x[2])
    is_memory = isinstance(unit.members[0], OverPeerMemory)
    assert join(unit, store, 3, fresh=True) == [is_memory] * 3
    sums = unit.all(lambda member: member.all_reduce(x[member.index].clone()))
    assert torch.equal(sums[1], x[0] + x[1] + x[2])


@pytest.mark.parametrize("is_large", [False, True])
def test_who_does_not_come_is_named(store: RendezvousStore, is_large: bool) -> None:
    """Shard 2, at position 0, is missing: the others give up in time, and later calls do not wait again."""
    unit = make_unit(store, SHORT_S)
    x = terms(1)
    began_s = time.monotonic()

    def work(member: TensorParallel) -> int:
        if member.index == 2:
            return -1
        for _ in range(10):
            if is_large:
                member.residual([slice(0, 1)], x[0].clone(), x[1][0], 1e-5).add(slice(0, 1), (x[2].clone(),), None)
            else:
                member.all_reduce(x[member.index].clone())
        with pytest.raises(RankError) as caught:
            unit.groups[member.index].synchronize()
        return caught.value.rank

    assert unit.all(work) == [0, 0, -1]  # type: ignore[arg-type]
    assert time.monotonic() - began_s < 4 * SHORT_S


def test_an_interrupt_ends_a_wait_at_once(store: RendezvousStore) -> None:
    unit = make_unit(store, 60.0)
    began_s = time.monotonic()

    def work(member: TensorParallel) -> None:
        if member.index == 0:
            member.all_reduce(terms(1)[0])
        elif member.index == 1:
            unit.groups[0].interrupt()

    unit.all(work)
    assert time.monotonic() - began_s < TIMEOUT_S
    with pytest.raises(RankError):
        unit.groups[0].synchronize()


def make_unit(store: RendezvousStore, timeout_s: float) -> Unit:
    memories = SharedMemory.of_world(3, CPU)
    shape = TokenShape(hidden=D, experts_per_token=1, dtype=torch.float32, device=CPU)
    members = [OverPeerMemory(i, 3, shape, MAX_ROWS, memories[POSITIONS[i]]) for i in range(3)]
    unit = Unit([EpochGroup(CPU, "127.0.0.1") for _ in POSITIONS], members)
    join(unit, store, 1, fresh=True, timeout_s=timeout_s)
    return unit


def test_a_member_that_leaves_frees_the_others(store: RendezvousStore) -> None:
    unit = Unit([EpochGroup(CPU, "127.0.0.1") for _ in POSITIONS], [OverGroup(i, 3) for i in range(3)])
    join(unit, store, 1, fresh=True)
    unit.groups[2].leave()
    for member in unit.members[:2]:
        with pytest.raises(RankError, match="lost in epoch 1"):
            member.all_reduce(terms(1)[member.index])


@pytest.mark.parametrize(
    ("max_rows", "summed", "least_large"),
    [(0, LEAST_SUMMED_ROWS, NEVER), (1000, 1000, NEVER), (MAX_ROWS, MOST_SUMMED_ROWS, MOST_SUMMED_ROWS + 1)],
)
def test_rows_of_any_step_have_room(store: RendezvousStore, max_rows: int, summed: int, least_large: int) -> None:
    """What joining takes is what the member says, of two halves of slices and sums and of the rows of a large step."""
    taken = []

    class Counted(SharedMemory):
        def map(self, name: str, num_bytes: int, own: Tensor | None = None) -> Mapping:
            taken.append(num_bytes)
            return super().map(name, num_bytes, own)

    shape = TokenShape(hidden=16, experts_per_token=1, dtype=torch.float32, device=CPU)
    member = OverPeerMemory(0, 1, shape, max_rows, Counted.of_world(1, CPU)[0])
    assert member.min_large_rows == least_large
    group = EpochGroup(CPU, "127.0.0.1")
    group.prepare(store.endpoint)
    group.join(1, 0, 1, TIMEOUT_S, TIMEOUT_S)
    member.join(group, (0,), True)
    assert member.shared_bytes == sum(taken)
    assert member._ready.max_rows == summed and taken[0] > 2 * GATHER_BYTES + 4 * summed * 16 * 4
    group.leave()


def test_alone_there_is_nothing_to_do() -> None:
    shape = TokenShape(hidden=D, experts_per_token=1, dtype=torch.float32, device=CPU)
    member = make_tensor_parallel((0, 1), shape)
    assert member is ALONE
    x = torch.randn(3, D)
    assert member.all_reduce(x) is x and member.all_gather_columns(x) is x
    h = torch.zeros(3, D)
    member.add_all_reduced(h, (x, x))
    assert torch.equal(h, x + x)
