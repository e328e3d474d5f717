"""Which dispatch a rank takes in an epoch, and whether the graphs that it captured still hold. (Without peers.)"""

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.checkpoint.shapes import SHAPES, shape_config
from actors.config import PipelineConfig
from actors.dispatch.by_size import DispatchBySize
from actors.dispatch.collective import CollectiveDispatch
from actors.dispatch.local import LocalDispatch
from actors.dispatch.replicated import ReplicatedDispatch
from actors.held import Held
from actors.next_epoch import NextEpoch
from actors.rank import Rank
from actors.types import Epoch, RankPlan, RankSpec, StepPlan

MODEL = shape_config(SHAPES["tiny"])
EVERY = dict.fromkeys(MODEL.moe_layers, tuple(range(MODEL.num_experts)))
HALF = dict.fromkeys(MODEL.moe_layers, tuple(range(MODEL.num_experts // 2)))
OTHER = dict.fromkeys(MODEL.moe_layers, tuple(range(MODEL.num_experts // 2, MODEL.num_experts)))


class Group:
    """A process group that nobody else is in."""

    rank, world, preposts = 0, 2, False

    def join(self, *_: Any) -> None: ...

    def connect(self) -> None: ...

    def leave(self) -> None: ...

    def interrupt(self) -> None: ...


class Workers:
    """Stands for experts, attention and the unit; remembers whether graphs were to be kept."""

    has_moved = False

    def __init__(self, size: int) -> None:
        self.size, self.is_void = size, False
        self.kept: list[bool] = []

    def free_replaced(self) -> None: ...

    def start_epoch(self, dispatch: object, fresh: bool, keeps_graphs: bool, brings_tokens: list[bool]) -> None:
        self.kept.append(keeps_graphs)

    def join(self, group: object, positions: object, fresh: bool) -> bool:
        return fresh or self.is_void


def make_rank(spec: RankSpec) -> tuple[Rank, Workers]:
    rank, workers = Rank(spec.rank, torch.device("cpu"), "127.0.0.1"), Workers(spec.shard[1])
    rank._group = Group()  # type: ignore[assignment]
    stand_in: Any = workers
    rank._held = Held(
        spec=spec, pipeline=PipelineConfig(model=str(Path("m"))), model=MODEL, device=torch.device("cpu"), tp=stand_in,
        attention=stand_in, experts=stand_in,
    )  # fmt: skip
    return rank, workers


def join(rank: Rank, number: int, fresh: bool, *specs: RankSpec) -> object:
    held = rank._held
    assert held is not None
    held.spec = specs[0]
    group: Any = Group()
    rank._prepared = rank._form(Epoch(epoch=number, ranks=specs), group, False)
    rank.join(number, fresh)
    return rank._dispatch


def member(index: int, slots: dict[int, tuple[int, ...]], num_slices: int) -> RankSpec:
    shard = (index, 2)
    return RankSpec(
        rank=index, roles=("attention", "expert"), slots=slots, shard=shard, leader=0 if index else -1,
        expert_shard=shard if num_slices == 2 else (0, 1),
    )  # fmt: skip


@pytest.mark.parametrize("num_slices", [1, 2])
def test_a_unit_keeps_its_graphs_until_it_loses_a_member(num_slices: int) -> None:
    """Experts that are whole move between the members; of slices each has all, and asks nobody."""
    members = [member(i, EVERY if num_slices == 2 else (HALF, OTHER)[i], num_slices) for i in range(2)]
    rank, workers = make_rank(members[0])
    first = join(rank, 1, True, *members)
    assert isinstance(first, LocalDispatch if num_slices == 2 else ReplicatedDispatch)
    assert join(rank, 2, False, *members) is first
    rank._device = torch.device("cuda")
    assert rank.runs_ahead
    rank._device = torch.device("cpu")
    join(rank, 3, True, *members)
    workers.is_void = True
    join(rank, 4, False, *members)
    assert workers.kept == [False, True, False, False]


def test_graphs_of_a_rank_alone_do_not_outlive_an_epoch_with_peers() -> None:
    """They were given up as it joined the others: what reached its own experts alone is captured anew."""
    both: tuple[Any, Any] = ("attention", "expert")
    alone = RankSpec(rank=0, roles=both, slots=EVERY)
    peer = RankSpec(rank=1, roles=both, slots=EVERY)
    rank, workers = make_rank(alone)
    first = join(rank, 1, False, alone)
    assert join(rank, 2, False, alone) is first and isinstance(first, LocalDispatch)
    assert isinstance(join(rank, 3, False, alone, peer), CollectiveDispatch)
    assert join(rank, 4, False, alone) is first
    assert join(rank, 5, False, alone) is first
    assert workers.kept == [False, True, False, False, True]


class Small:
    """What small steps go through, which can take over from any other."""

    def __init__(self) -> None:
        self.has_taken_over = self.is_closed = False

    def can_take_over(self, before: object) -> bool:
        return True

    def take_over(self, before: object) -> None:
        self.has_taken_over = True

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("how", ["well", "it was interrupted", "it was left", "experts have moved"])
def test_graphs_are_handed_over_where_an_epoch_ended_well_and_experts_are_where_they_were(how: str) -> None:
    both: tuple[Any, Any] = ("attention", "expert")
    specs = tuple(RankSpec(rank=rank, roles=both, slots=EVERY) for rank in (0, 1))
    rank, workers = make_rank(specs[0])
    smalls: list[Any] = [Small(), Small()]
    nothing: Any = None
    for number, small in enumerate(smalls, 1):
        if number == 2:
            workers.has_moved = how == "experts have moved"
            if how == "it was interrupted":
                rank.interrupt(1)
            elif how == "it was left":
                rank.leave()
        dispatch = DispatchBySize(small, nothing, torch.device("cpu"))
        group: Any = Group()
        rank._prepared = NextEpoch(Epoch(epoch=number, ranks=specs), group, dispatch)
        rank.join(number, False)
    assert smalls[1].has_taken_over == (how == "well") == workers.kept[1]
    assert smalls[0].is_closed and not smalls[1].is_closed


class Mark:
    """An event that the device has yet to reach."""

    is_reached = False

    def query(self) -> bool:
        return self.is_reached

    def synchronize(self) -> None:
        self.is_reached = True


def test_a_step_that_samples_nothing_is_done_when_the_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the steps of a long prompt would be launched one after another, as fast as the router plans them."""
    rank, _ = make_rank(RankSpec(rank=0, roles=("attention", "expert"), slots=EVERY))
    join(rank, 1, True, rank._held.spec)  # type: ignore[union-attr]
    event = Mark()
    monkeypatch.setattr("actors.rank.mark", lambda _: event)
    monkeypatch.setattr(Rank, "runs_ahead", True)
    monkeypatch.setattr(Rank, "_launch", lambda *_: None)
    monkeypatch.setattr(Rank, "_expert_tokens", lambda _: {})
    monkeypatch.setattr(Rank, "_count", lambda *_: None)
    rank._group.waited_s = 0.0
    launched = rank.launch(StepPlan(epoch=1, step=1, sequence=1, tokens_of_rank=(9,), rank_plan=RankPlan()))
    assert launched is not None and not launched.is_done
    answer = rank.finish(launched)
    assert answer is not None and answer.tokens == () and event.is_reached and launched.is_done
