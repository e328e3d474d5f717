"""Steps that are captured in CUDA graphs, one per number of rows: those in which every request computes one token, and
those that have prompts beside, where they are not too large.

Owns the graphs, and what a step is captured as. The host writes a few numbers per row and launches one graph; lengths,
pages and tokens are read on the device. Knows nothing of sampling, nor of what a larger step computes (`mixed.py`).
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.attention.kernel_attention import KernelAttention, SeatedRows
from actors.attention.logits import Logits
from actors.attention.model import AttentionModel, Stages, run_in_turn
from actors.attention.requests import RequestTable
from actors.attention.rope import inverse_frequencies
from actors.attention.step_fields import SAMPLED_ROW, StepFields, num_rows, write_singles, write_with_prompts
from actors.checkpoint.config import ModelConfig
from actors.config import PipelineConfig
from actors.dispatch.by_size import DispatchBySize
from actors.dispatch.contract import Dispatch
from actors.dispatch.local import LocalDispatch
from actors.dispatch.micro_batches import MicroBatches, rows_of_first
from actors.dispatch.replicated import ReplicatedDispatch
from actors.kernels.step_inputs import SEAT, RotaryScales, StepRows, fill_rows
from actors.laps import Laps
from actors.types import Work

log = logging.getLogger("corral.attention")

MOST_PROMPT_ROWS = 2304  # of a step with prompts that is captured: a GPU takes longer for more than a host to launch it
MOST_CONTEXT = 32768  # tokens that a prompt's row sees in such a step: one program reads them all

ThroughDispatch = tuple[Dispatch, slice]
"""A dispatch, and the rows of a step that go through it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph is captured for."""

    num_rows: int
    has_prompts: bool


def most_prompt_rows(pipeline: PipelineConfig) -> int:
    """Of steps with prompts that are captured. Rows of small pieces are padded."""
    return 0 if pipeline.enforce_eager else min(MOST_PROMPT_ROWS, 2 * pipeline.max_num_batched_tokens)


def most_step_rows(pipeline: PipelineConfig) -> int:
    """Of any step, padding included."""
    return max(pipeline.max_num_batched_tokens, most_prompt_rows(pipeline))


def sizes_of_singles(max_rows: int) -> list[int]:
    """Rows for which steps without prompts are captured, ascending: 1, 2, 4, every 8th to 64, every 16th to 256, then
    every 64th.
    """
    return _until(max_rows, (1, 2, 4), range(8, 64, 8), range(64, 256, 16), itertools.count(256, 64))


def sizes_of_prompts(max_rows: int) -> list[int]:
    """Rows for which steps with prompts are captured, ascending; none if `max_rows` is 0."""
    if not max_rows:
        return []
    return _until(max_rows, (32,), range(64, 256, 64), range(256, 1024, 128), itertools.count(1024, 256))


def _until(most: int, *steps: Iterable[int]) -> list[int]:
    sizes = list(itertools.takewhile(lambda size: size < most, itertools.chain(*steps)))
    return [*sizes, most]


class CapturedSteps:
    """Runs steps of at most `max_singles` requests with one token each, and if `max_rows` is not 0, such with prompts
    beside, of at most `max_rows` rows. On a CPU the same is computed without a graph.

    Graphs read weights, pages and the dispatch's tables where they were when they were captured.
    """

    def __init__(
        self,
        model: AttentionModel,
        config: ModelConfig,
        attention: KernelAttention,
        max_singles: int,
        max_rows: int,
        device: torch.device,
        most_whole_rows: int = 0,
    ) -> None:
        """`most_whole_rows`: unless it is 0, a dispatch may have larger steps run as two halves in turn
        (`dispatch/micro_batches.py`).
        """
        self._most_whole_rows = most_whole_rows
        self._model = model
        self._attention = attention
        self._device = device
        self._max_singles, self._max_rows = max_singles, max_rows
        self._config = config
        self._page_tokens = attention.tables.page_tokens
        floor_scale = config.floor_scale if config.temperature_tuning else 0
        self._scales = RotaryScales(
            frequencies_R=inverse_frequencies(config, device), floor_scale=floor_scale, attn_scale=config.attn_scale
        )
        self._singles = StepFields.of_singles(max_singles, device)
        self._prompts = StepFields.of_prompts(max_rows, device)
        self._shapes = [
            *(Shape(size, False) for size in sizes_of_singles(max_singles)),
            *(Shape(size, True) for size in sizes_of_prompts(max_rows)),
        ]
        self._last_tokens_S = torch.zeros(max_singles, dtype=torch.int64, device=device)
        self._dispatch: Dispatch | None = None
        self._brings_tokens: Sequence[bool] = (True,)
        self._pool: Any = None
        self._graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        self._results: dict[Shape, tuple[Logits, Tensor]] = {}
        self._part_BC = model.empty_logits(max_singles)  # of every graph: they run one after another

    def start_epoch(self, dispatch: Dispatch, last_tokens_S: Tensor, brings_tokens: Sequence[bool] = (True,)) -> None:
        """Steps go through `dispatch` from now on; tokens come from `last_tokens_S`. `brings_tokens`: by position of
        the epoch. Graphs are captured when they are first used.
        """
        self._dispatch = dispatch
        self._brings_tokens = brings_tokens
        self._last_tokens_S = last_tokens_S
        self._graphs.clear()
        self._results.clear()
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None  # it ends with its graphs

    def follow(self, dispatch: Dispatch, brings_tokens: Sequence[bool]) -> None:
        """As `start_epoch`, where graphs that were captured do what `dispatch` does, for as many sources of tokens."""
        self._dispatch = dispatch
        self._brings_tokens = brings_tokens

    def capture_all(self) -> None:
        """Captures all graphs."""
        laps = Laps()
        while self.capture_next():
            pass
        laps.lap(f"{len(self._graphs)} graphs")
        log.info("captured steps: %s", laps)

    def capture_next(self) -> bool:
        """Captures the largest graph that is missing, so that others fit into the memory that it takes; False if there
        is none. Only where the dispatch sends no messages, which can be captured by each rank for itself.
        """
        if self._device.type != "cuda" or not self._is_free_of_messages():
            return False
        missing = [shape for shape in self._shapes if shape not in self._graphs]
        if missing:
            self._capture(max(missing, key=lambda shape: shape.num_rows))
        return bool(missing)

    @torch.inference_mode()
    def rehearse(self, dispatch: Dispatch) -> None:
        """Runs a step of every shape without requests, so that all that is compiled or allocated at first use is."""
        self.start_epoch(dispatch, self._last_tokens_S)
        for shape in self._shapes:
            size = shape.num_rows
            self._forward(shape, [(dispatch, slice(0, size))])
            if 0 < self._most_whole_rows < size and not shape.has_prompts:
                first = rows_of_first(size)
                self._forward(shape, [(dispatch, slice(0, first)), (dispatch, slice(first, size))])

    def takes(self, work: Sequence[Work], most_rows: int) -> bool:
        """Whether a step of this work can run here. `most_rows`: of any rank in the step."""
        return self._shape_of(work, most_rows) is not None

    @torch.inference_mode()
    def run(self, work: Sequence[Work], requests: RequestTable, most_rows: int) -> tuple[Logits, Tensor]:
        """Logits and seats, int64 [B], of a step, in the order of the work that samples. The next one overwrites them.
        Raises ValueError if the work needs tokens or pages that are not there.
        """
        shape = self._shape_of(work, most_rows)
        assert shape is not None, "only steps that it takes are run"
        if self._device.type == "cuda" and shape not in self._graphs:
            self._capture(shape)
        fields, write = (self._prompts, write_with_prompts) if shape.has_prompts else (self._singles, write_singles)
        write(fields.next(), work, requests, self._page_tokens, shape.num_rows)
        if shape.has_prompts:
            self._attention.tables.grant(work, requests)
        fields.send()
        if shape in self._graphs:
            self._graphs[shape].replay()
            logits, seats_B = self._results[shape]
        else:
            logits, seats_B = self._forward(shape, self._begin(shape))
        num_sampled = sum(item.samples for item in work)
        return logits.first(num_sampled), seats_B[:num_sampled]

    def _shape_of(self, work: Sequence[Work], most_rows: int) -> Shape | None:
        if all(item.num_tokens == 1 and item.samples for item in work):
            return self._smallest(max(len(work), most_rows), False)
        fits = all(self._fits(item) for item in work)
        return self._smallest(num_rows(work), True) if fits and self._is_free_of_messages() else None

    def _smallest(self, rows: int, has_prompts: bool) -> Shape | None:
        """That has so many rows."""
        return next((s for s in self._shapes if s.has_prompts == has_prompts and s.num_rows >= rows), None)

    def _fits(self, item: Work) -> bool:
        """Whether a piece of work may be a part of a step with prompts."""
        end, chunk = item.start + item.num_tokens, self._config.chunk_tokens if self._config.chunked_layers else 0
        return item.num_tokens == 1 or (
            end <= MOST_CONTEXT and (not chunk or item.start // chunk == (end - 1) // chunk)
        )

    def _is_free_of_messages(self) -> bool:
        """Whether no other rank needs to know the rows of a step, among which is padding here where there are prompts:
        ranks are told of tokens.
        """
        return isinstance(self._dispatch, LocalDispatch | ReplicatedDispatch)

    def _begin(self, shape: Shape) -> Sequence[ThroughDispatch]:
        """Tells dispatch of the step; says which of its rows go through which dispatch, in turn."""
        assert self._dispatch is not None, "an epoch comes before steps"
        size = shape.num_rows
        self._dispatch.begin_step(tuple(size if brings else 0 for brings in self._brings_tokens))
        if isinstance(self._dispatch, DispatchBySize | MicroBatches):
            return list(self._dispatch.parts(size))
        return [(self._dispatch, slice(0, size))]

    def _forward(self, shape: Shape, parts: Sequence[ThroughDispatch]) -> tuple[Logits, Tensor]:
        """Logits of the rows that are sampled, or may be, and their seats."""
        packed_FB = (self._prompts if shape.has_prompts else self._singles).packed_FB
        rows = StepRows.empty(shape.num_rows, len(self._scales.frequencies_R), self._device, shape.has_prompts)
        tables = self._attention.tables
        fill_rows(rows, packed_FB, self._last_tokens_S, tables.global_table, tables.chunked_table, self._scales)
        attend = self._attend_with_prompts if shape.has_prompts else self._attend
        found = run_in_turn([self._stages(rows.part(of_part), dispatch, attend) for dispatch, of_part in parts])
        h_BD = torch.cat(found) if len(found) > 1 else found[0]
        seats_B = rows.seats_B
        if shape.has_prompts:
            sampled_B = packed_FB[SAMPLED_ROW, : min(shape.num_rows, self._max_singles)]
            h_BD, seats_B = h_BD.index_select(0, sampled_B), packed_FB[SEAT].index_select(0, sampled_B)
        return self._model.write_logits(h_BD, self._part_BC[: len(h_BD)]), seats_B.long()

    def _stages(self, rows: StepRows, dispatch: Dispatch, attend: Callable[[int, Tensor, StepRows], Tensor]) -> Stages:
        return self._model.stages(
            rows.ids_B, rows.positions_B, lambda i, qkv_BQ: attend(i, qkv_BQ, rows), dispatch, rows.is_padding_B1
        )

    def _attend(self, layer: int, qkv_BQ: Tensor, rows: StepRows) -> Tensor:
        singles = SeatedRows(seats_B=rows.seats_B, positions_B=rows.positions_B)
        return self._attention.store_and_attend(
            layer, qkv_BQ, singles, self._slots(layer, rows), rows.rotations_BR2, rows.temperatures_B
        )

    def _attend_with_prompts(self, layer: int, qkv_TQ: Tensor, rows: StepRows) -> Tensor:
        """Rows that see what others write: all is stored before any is read."""
        slots_T = self._slots(layer, rows)
        self._attention.store(layer, qkv_TQ, slots_T, rows.rotations_BR2, rows.temperatures_B)
        most = min(len(qkv_TQ), self._max_singles)
        singles = SeatedRows(seats_B=rows.seats_B[:most], positions_B=rows.single_positions_B[:most])
        return self._attention.attend_with_prompts(
            layer, qkv_TQ, singles, SeatedRows(seats_B=rows.prompt_seats_B, positions_B=rows.positions_B)
        )

    def _slots(self, layer: int, rows: StepRows) -> Tensor:
        return rows.chunked_slots_B if self._config.is_chunked(layer) else rows.global_slots_B

    @torch.inference_mode()
    def _capture(self, shape: Shape) -> None:
        """Runs nothing: every kernel was run before, in `rehearse`."""
        laps, graph = Laps(), torch.cuda.CUDAGraph()
        torch.cuda.current_blas_handle()  # each thread has its own, which cannot be made in a capture
        # Other threads of this process may call CUDA meanwhile (loading does), which must not end the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._results[shape] = self._forward(shape, self._begin(shape))
        self._graphs[shape] = graph
        laps.lap("captured")
        what = "with" if shape.has_prompts else "without"
        log.info("a step of %d rows %s prompts: %s", shape.num_rows, what, laps)
