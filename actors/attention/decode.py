"""Steps in which every request computes one token: captured in CUDA graphs, one per number of rows.

Owns the static inputs of such a step, and the graphs. The host writes a few numbers per request and launches one graph;
lengths, pages and tokens are read on the device. Knows nothing of sampling, nor of what a step with prompts computes.
"""

import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.attention.kernel_attention import KernelAttention, Singles
from actors.attention.logits import Logits
from actors.attention.model import AttentionModel, Stages, run_in_turn
from actors.attention.requests import RequestTable
from actors.attention.rope import inverse_frequencies
from actors.checkpoint.config import ModelConfig
from actors.dispatch.by_size import DispatchBySize
from actors.dispatch.contract import Dispatch
from actors.dispatch.micro_batches import MicroBatches, rows_of_first
from actors.kernels.decode_inputs import (
    CHUNKED_PAGE,
    GLOBAL_PAGE,
    NUM_FIELDS,
    POSITION,
    SEAT,
    TOKEN,
    DecodeRows,
    RotaryScales,
    fill_decode_rows,
)
from actors.laps import Laps
from actors.types import Work

log = logging.getLogger("corral.attention")

Fields = np.ndarray[Any, np.dtype[np.int32]]

Part = tuple[Dispatch, slice]
"""A dispatch, and the rows of a step that go through it."""

NOTHING = -1  # in the packed inputs: no seat, no token from the host, no page
HOST_BUFFERS = 4  # a step's inputs are read from host memory after its launch: more than steps can be in flight


def bucket_sizes(max_rows: int) -> list[int]:
    """Rows for which graphs are captured, ascending: 1, 2, 4, every 8th to 64, every 16th to 256, then every 64th."""
    steps = itertools.chain((1, 2, 4), range(8, 64, 8), range(64, 256, 16), itertools.count(256, 64))
    sizes = list(itertools.takewhile(lambda size: size < max_rows, steps))
    return [*sizes, max_rows]


class DecodeSteps:
    """Runs decode steps of at most `max_rows` requests. On a CPU the same is computed without a graph.

    Graphs read weights, pages and the dispatch's tables where they were when they were captured.
    """

    def __init__(
        self,
        model: AttentionModel,
        config: ModelConfig,
        attention: KernelAttention,
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
        self._max_rows = max_rows
        self._config = config
        self._page_tokens = attention.tables.page_tokens
        floor_scale = config.floor_scale if config.temperature_tuning else 0
        self._scales = RotaryScales(
            frequencies_R=inverse_frequencies(config, device), floor_scale=floor_scale, attn_scale=config.attn_scale
        )
        self._packed_FB = torch.full((NUM_FIELDS, max_rows), NOTHING, dtype=torch.int32, device=device)
        self._on_host = [
            torch.full((NUM_FIELDS, max_rows), NOTHING, dtype=torch.int32, pin_memory=device.type == "cuda")
            for _ in range(HOST_BUFFERS)
        ]
        self._turn = 0
        self._sizes = bucket_sizes(max_rows)
        self._last_tokens_S = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._dispatch: Dispatch | None = None
        self._brings_tokens: Sequence[bool] = (True,)
        self._pool: Any = None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._results: dict[int, tuple[Logits, DecodeRows]] = {}
        self._part_BC = model.empty_logits(max_rows)  # of every graph: they run one after another

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
        """Captures all graphs, largest first, so that the others fit into the memory that it took."""
        if self._device.type != "cuda":
            return
        began_s = time.monotonic()
        for size in reversed(self._sizes):
            self._capture(size)
        torch.cuda.synchronize(self._device)
        log.info("captured decode steps of %s rows in %.1f s", self._sizes, time.monotonic() - began_s)

    @torch.inference_mode()
    def rehearse(self, dispatch: Dispatch) -> None:
        """Runs a step of every size without requests, so that all that is compiled or allocated at first use is."""
        self.start_epoch(dispatch, self._last_tokens_S)
        self._packed_FB.fill_(NOTHING)
        self._packed_FB[POSITION].zero_()
        for size in self._sizes:
            self._forward(size, [(dispatch, slice(0, size))])
            if 0 < self._most_whole_rows < size:
                first = rows_of_first(size)
                self._forward(size, [(dispatch, slice(0, first)), (dispatch, slice(first, size))])

    def takes(self, work: Sequence[Work], most_rows: int) -> bool:
        """Whether a step of this work can run here. `most_rows`: of any rank in the step."""
        return max(len(work), most_rows) <= self._max_rows and all(w.num_tokens == 1 and w.samples for w in work)

    @torch.inference_mode()
    def run(self, work: Sequence[Work], requests: RequestTable, most_rows: int) -> tuple[Logits, Tensor]:
        """Logits and seats, int64 [B], of a step, in the order of the work. The next one overwrites them. Raises
        ValueError if the work needs tokens or pages that are not there.
        """
        num_rows = len(work)
        size = next(size for size in self._sizes if size >= max(num_rows, most_rows))
        if self._device.type == "cuda" and size not in self._graphs:
            self._capture(size)
        host_FB = self._on_host[self._turn]
        self._turn = (self._turn + 1) % HOST_BUFFERS
        self._write(host_FB.numpy(), work, requests, size)
        self._packed_FB.copy_(host_FB, non_blocking=True)
        if size in self._graphs:
            self._graphs[size].replay()
            logits, rows = self._results[size]
        else:
            logits, rows = self._forward(size, self._begin(size))
        return logits.first(num_rows), rows.seats_B[:num_rows].long()

    def _write(self, fields: Fields, work: Sequence[Work], requests: RequestTable, size: int) -> None:
        page_tokens, num_rows = self._page_tokens, len(work)
        columns = []
        for item in work:
            state, start = requests[item.request_idx], item.start
            state.check(item)
            state.check_pages(item, page_tokens)
            token = int(state.ids[start]) if start < len(state.ids) else NOTHING
            global_page = item.global_pages[-1] if item.global_pages else NOTHING
            chunked_page = item.chunked_pages[-1] if item.chunked_pages else NOTHING
            columns.append((state.memory_row, start, token, global_page, chunked_page))
        fields[:, :num_rows] = np.array(columns, dtype=np.int32).T
        fields[SEAT, num_rows:size] = NOTHING
        fields[POSITION, num_rows:size] = 0
        fields[[TOKEN, GLOBAL_PAGE, CHUNKED_PAGE], num_rows:size] = NOTHING

    def _begin(self, size: int) -> Sequence[Part]:
        """Tells dispatch of a step of `size` rows; says which of them go through which dispatch, in turn."""
        assert self._dispatch is not None, "an epoch comes before steps"
        self._dispatch.begin_step(tuple(size if brings else 0 for brings in self._brings_tokens))
        if isinstance(self._dispatch, DispatchBySize | MicroBatches):
            return list(self._dispatch.parts(size))
        return [(self._dispatch, slice(0, size))]

    def _forward(self, size: int, parts: Sequence[Part]) -> tuple[Logits, DecodeRows]:
        rows = DecodeRows.empty(size, len(self._scales.frequencies_R), self._device)
        tables = self._attention.tables
        fill_decode_rows(
            rows, self._packed_FB, self._last_tokens_S, tables.global_table, tables.chunked_table, self._scales
        )
        found = run_in_turn([self._stages(rows.part(of_part), dispatch) for dispatch, of_part in parts])
        h_BD = torch.cat(found) if len(found) > 1 else found[0]
        return self._model.write_logits(h_BD, self._part_BC[:size]), rows

    def _stages(self, rows: DecodeRows, dispatch: Dispatch) -> Stages:
        return self._model.stages(
            rows.ids_B, rows.positions_B, lambda i, qkv_BQ: self._attend(i, qkv_BQ, rows), dispatch, rows.is_padding_B1
        )

    def _attend(self, layer: int, qkv_BQ: Tensor, rows: DecodeRows) -> Tensor:
        is_chunked = self._config.is_chunked(layer)
        slots_B = rows.chunked_slots_B if is_chunked else rows.global_slots_B
        singles = Singles(seats_B=rows.seats_B, positions_B=rows.positions_B)
        return self._attention.store_and_attend(
            layer, qkv_BQ, singles, slots_B, rows.rotations_BR2, rows.temperatures_B
        )

    @torch.inference_mode()
    def _capture(self, size: int) -> None:
        """Runs nothing: every kernel was run before, in `rehearse`."""
        laps, graph = Laps(), torch.cuda.CUDAGraph()
        # Other threads of this process may call CUDA meanwhile (loading does), which must not end the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._results[size] = self._forward(size, self._begin(size))
        self._graphs[size] = graph
        laps.lap("captured")
        log.info("a decode step of %d rows: %s", size, laps)
