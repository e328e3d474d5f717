"""An epoch that a rank prepares beside the steps of the one before: its peers reached, its group formed, its dispatch
made.

Owns what of an epoch can be had before it is joined, and how that is given up. Knows nothing of requests or plans.
"""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actors.config import PipelineConfig
from actors.dispatch.by_size import DispatchBySize, Small
from actors.dispatch.collective import CollectiveDispatch
from actors.dispatch.contract import ExpertCompute, RoutingTable
from actors.dispatch.group import EpochGroup
from actors.dispatch.micro_batches import MicroBatches, room_of_half
from actors.dispatch.peer_memory import SymmetricMemory
from actors.dispatch.rows import TokenShape
from actors.dispatch.symmetric import SymmetricDispatch
from actors.errors import RankError, UnreachableError
from actors.laps import Laps
from actors.types import Epoch

REACH_TIMEOUT_S = 1.0  # to open a connection to a peer

BetweenRanks = CollectiveDispatch | DispatchBySize


@dataclass(frozen=True, slots=True)
class NextEpoch:
    """What can be joined. `dispatch`: between its ranks; None where a rank is alone, or in an attention unit."""

    epoch: Epoch
    group: EpochGroup
    dispatch: BetweenRanks | None

    def drop(self) -> None:
        """Lets go of it; peers notice."""
        self.group.leave()
        if isinstance(self.dispatch, DispatchBySize):
            self.dispatch.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A rank's part in the dispatch between ranks. `experts`: its own, if it has any. `before`: the dispatch of the
    epoch before, whose graphs may go on.
    """

    routing: RoutingTable
    experts: ExpertCompute | None
    shape: TokenShape
    before: BetweenRanks | None


def reach_peers(rank: int, epoch: Epoch) -> None:
    """Opens a connection to each peer once: a cut is found here, with a name, and not in the group, without.

    Raises UnreachableError.
    """
    deaf = []
    for spec, endpoint in zip(epoch.ranks, epoch.endpoints, strict=False):
        if spec.rank == rank:
            continue
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        try:
            socket.create_connection((host, int(port)), REACH_TIMEOUT_S).close()
        except OSError:
            deaf.append(spec.rank)
    if deaf:
        raise UnreachableError(rank, tuple(deaf))


def form(
    epoch: Epoch,
    position: int,
    group: EpochGroup,
    pipeline: PipelineConfig,
    part: Part | None,
    hurries: bool,
    is_over: Callable[[], bool],
) -> tuple[NextEpoch, Laps]:
    """The group of the epoch, and the dispatch through it where there is a `part` in one. Collective; on the current
    stream. `hurries`: connections that a first step need not wait for are left to those that need them. Raises
    RankError.
    """
    laps, size = Laps(), len(epoch.ranks)
    if size > 1:
        group.join(epoch.epoch, position, size, pipeline.join_timeout_s, pipeline.group_timeout_s, is_over)
        if not hurries:
            group.connect()
        laps.lap("group")
    dispatch = None
    if part is not None:
        try:
            dispatch = _between_ranks(epoch, group, pipeline, part)
        except RankError:
            group.leave()
            raise
        laps.lap("dispatch")
    return NextEpoch(epoch, group, dispatch), laps


def _between_ranks(epoch: Epoch, group: EpochGroup, pipeline: PipelineConfig, part: Part) -> BetweenRanks:
    """Through the group; small steps through each other's memory, where all ranks are GPUs of one host."""
    sources, shape = epoch.positions_of("attention"), part.shape
    collective = CollectiveDispatch(group, part.routing, part.experts, sources, shape)
    hosts = {endpoint.rpartition(":")[0] for endpoint in epoch.endpoints}
    if shape.device.type != "cuda" or len(hosts) > 1 or pipeline.enforce_eager:
        return collective
    small = _small(group, pipeline, part, sources)
    small.start()
    return DispatchBySize(small, collective, shape.device)


def _small(group: EpochGroup, pipeline: PipelineConfig, part: Part, sources: Sequence[int]) -> Small:
    memory = SymmetricMemory(group, part.shape.device, pipeline.join_timeout_s)
    old, max_tokens = part.before.small if isinstance(part.before, DispatchBySize) else None, pipeline.max_num_seqs

    def through_memory(max_tokens: int, name: str, before: Small | None) -> SymmetricDispatch:
        return SymmetricDispatch(
            memory, part.routing, part.experts, sources, part.shape, pipeline.group_timeout_s, max_tokens, name,
            before if isinstance(before, SymmetricDispatch) else None,
        )  # fmt: skip

    most_whole_rows = pipeline.most_whole_rows
    if not most_whole_rows:
        return through_memory(max_tokens, "whole", old)
    halves, room = (
        old.halves if isinstance(old, MicroBatches) else (None, None),
        room_of_half(max_tokens, most_whole_rows),
    )
    first, second = (through_memory(room, f"half {i}", half) for i, half in enumerate(halves, 1))
    return MicroBatches(first, second, max_tokens, most_whole_rows)
