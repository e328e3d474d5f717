"""Small steps by one dispatch, larger ones by another.

Owns the choice, which every rank makes alike from the step's token counts, and the graphs by which a rank without
tokens serves small steps. Knows nothing of how either dispatch works.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from actors.dispatch.collective import CollectiveDispatch
from actors.dispatch.contract import Dispatch, Receipt
from actors.dispatch.micro_batches import MicroBatches
from actors.dispatch.symmetric import SymmetricDispatch

log = logging.getLogger("corral.dispatch")

Small = SymmetricDispatch | MicroBatches


class DispatchBySize:
    """Steps that fit go by `small`, which can be captured, and all others by `large`. Both are of the same epoch.

    `small` is started already. On CUDA the caller waits for the device before it believes a result, as with `small`;
    `serve_step` waits itself. The experts must be capturable where steps fit.
    """

    def __init__(self, small: Small, large: CollectiveDispatch, device: torch.device) -> None:
        self._small = small
        self._large = large
        self._serving = ServingGraphs(small) if device.type == "cuda" else None
        self._is_small = False

    @property
    def is_capturable(self) -> bool:
        """Whether the step that was begun is a small one."""
        return self._is_small

    def end_step(self) -> None:
        """See `Dispatch`."""
        if self._is_small:
            self._small.end_step()

    def parts(self, num_rows: int) -> list[tuple[Dispatch, slice]]:
        """How a rank with `num_rows` tokens may run the step that was begun: which of them go through which dispatch,
        in this order in every layer. See `MicroBatches`.
        """
        if self._is_small and isinstance(self._small, MicroBatches):
            return list(self._small.parts(num_rows))
        return [(self, slice(0, num_rows))]

    def begin_step(self, tokens_of_rank: tuple[int, ...]) -> None:
        """See `Dispatch`; decides which of the two does the step."""
        self._is_small = self._small.fits(tokens_of_rank)
        self._chosen.begin_step(tokens_of_rank)

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor, scores_TK: Tensor, layer: int) -> Receipt:
        return self._chosen.dispatch(x_TD, expert_ids_TK, scores_TK, layer)

    def combine(self, receipt: Any) -> Tensor:
        return self._chosen.combine(receipt)

    def serve_step(self, tokens_of_rank: tuple[int, ...]) -> None:
        """A whole step of a rank that brings no tokens. Raises RankError."""
        if not self._small.fits(tokens_of_rank):
            self._large.serve_step(tokens_of_rank)
            return
        if self._serving is None:
            self._small.serve_step(tokens_of_rank)
        else:
            self._serving.serve_step(tokens_of_rank)
        self._small.wait()

    @property
    def small(self) -> Small:
        """What small steps go through."""
        return self._small

    def take_over(self, before: "DispatchBySize") -> bool:
        """Takes the place of the one of the epoch before, whose graphs go on; False, and nothing done, where they
        cannot. The device is idle.
        """
        if not self._small.can_take_over(before._small):
            return False
        self._small.take_over(before._small)
        if before._serving is not None:
            self._serving = before._serving
            self._serving.follow(self._small)
        return True

    def check(self) -> None:
        """Raises RankError if a wait of a small step was given up in what the device has done so far."""
        self._small.check()

    def close(self) -> None:
        self._small.close()

    @property
    def _chosen(self) -> Small | CollectiveDispatch:
        return self._small if self._is_small else self._large


class ServingGraphs:
    """Serves the steps of a rank without tokens, each size of block, whole or divided, by a graph once it was run
    without one.

    The graphs go with the dispatch, or with the one that has taken over from it: nobody may replay them once it is
    closed.
    """

    def __init__(self, dispatch: Small) -> None:
        self._dispatch = dispatch
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph | None] = {}  # None: run once
        self._pool: Any = None

    def follow(self, dispatch: Small) -> None:
        """The one that has taken over from the one that was captured."""
        self._dispatch = dispatch

    def serve_step(self, tokens_of_rank: tuple[int, ...]) -> None:
        """Queues the step on the current stream. See `SymmetricDispatch.wait`."""
        self._dispatch.begin_step(tokens_of_rank)
        kind = self._dispatch.block_rows, isinstance(self._dispatch, MicroBatches) and self._dispatch.is_divided
        if kind not in self._graphs:  # what the experts use is made and loaded now, not in the capture
            self._graphs[kind] = None
            self._dispatch.serve_layers()
            return
        graph = self._graphs[kind] or self._capture()
        self._graphs[kind] = graph
        graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._dispatch.serve_layers()
        log.info("a step of others, in blocks of %d rows: captured", self._dispatch.block_rows)
        return graph
