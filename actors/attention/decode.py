"""Steps in which every request computes one token: captured in CUDA graphs, one per number of rows.

Owns what the device remembers of each seat (its page tables), the static inputs of such a step, and the graphs. The
host writes a few numbers per request and launches one graph; lengths, pages and tokens are read on the device. Knows
nothing of sampling, nor of what a step with prompts computes.
"""

import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.attention.kv_cache import KvCache
from actors.attention.model import AttentionModel
from actors.attention.requests import RequestTable
from actors.attention.rope import inverse_frequencies
from actors.checkpoint.config import ModelConfig
from actors.dispatch.contract import Dispatch
from actors.kernels.decode_attention import DecodeContext, DecodeScratch, decode_attention
from actors.kernels.decode_inputs import (
    CHUNKED_PAGE,
    GLOBAL_PAGE,
    NUM_FIELDS,
    POSITION,
    SEAT,
    TOKEN,
    DecodeRows,
    PageTable,
    RotaryScales,
    fill_decode_rows,
)
from actors.kernels.heads import Heads, store_heads
from actors.types import Work

log = logging.getLogger("corral.attention")

Fields = np.ndarray[Any, np.dtype[np.int32]]

NOTHING = -1  # in the packed inputs: no seat, no token from the host, no page
HOST_BUFFERS = 4  # a step's inputs are read from host memory after its launch: more than steps can be in flight
WARM_UP_RUNS = 2


def bucket_sizes(max_rows: int) -> list[int]:
    """Rows for which graphs are captured, ascending: 1, 2, 4, every 8th to 64, every 16th to 256, then every 64th."""
    steps = itertools.chain((1, 2, 4), range(8, 64, 8), range(64, 256, 16), itertools.count(256, 64))
    sizes = list(itertools.takewhile(lambda size: size < max_rows, steps))
    return [*sizes, max_rows]


class SeatTables:
    """Page tables of every seat on the device, for both groups. A chunked table holds one chunk and is a ring."""

    def __init__(self, config: ModelConfig, cache: KvCache, num_seats: int, max_model_len: int) -> None:
        pools, device = cache.pools, cache.global_LPSHd.device
        longest = min(-(-max_model_len // pools.page_tokens), pools.global_pages) if config.global_layers else 0
        chunk = config.chunk_tokens // pools.page_tokens if config.chunked_layers else 0
        self.global_table = self._make(num_seats, longest, pools.page_tokens, device)
        self.chunked_table = self._make(num_seats, chunk, pools.page_tokens, device)

    @staticmethod
    def _make(num_seats: int, width: int, page_tokens: int, device: torch.device) -> PageTable | None:
        if not width:
            return None
        pages_SW = torch.zeros(num_seats, width, dtype=torch.int32, device=device)
        return PageTable(pages_SW=pages_SW, page_tokens=page_tokens)

    def grant(self, work: Sequence[Work], requests: RequestTable) -> None:
        """Enters the pages that work brings, which the requests' own tables have already."""
        rows = [(requests[item.request_idx], item) for item in work]
        _enter(self.global_table, [(s.memory_row, s.global_table.num_pages, w.global_pages) for s, w in rows])
        _enter(self.chunked_table, [(s.memory_row, s.chunked_table.num_pages, w.chunked_pages) for s, w in rows])


def _enter(table: PageTable | None, grants: Sequence[tuple[int, int, Sequence[int]]]) -> None:
    """Each grant is a seat, its number of pages now, and the last of them."""
    if table is None:
        return
    width = table.pages_SW.shape[1]
    places: list[int] = []
    pages: list[int] = []
    for seat, num_pages, granted in grants:
        kept = granted[-width:]
        pages += kept
        places += [seat * width + number % width for number in range(num_pages - len(kept), num_pages)]
    if pages:
        both_2N = torch.tensor([places, pages], dtype=torch.int64, pin_memory=table.pages_SW.is_cuda)
        places_N, pages_N = both_2N.to(table.pages_SW.device, non_blocking=True)
        table.pages_SW.view(-1).index_copy_(0, places_N, pages_N.int())


class DecodeSteps:
    """Runs decode steps of at most `max_rows` requests. On a CPU the same is computed without a graph.

    Graphs read weights, pages and the dispatch's tables where they were when `start_epoch` captured them.
    """

    def __init__(
        self,
        model: AttentionModel,
        config: ModelConfig,
        cache: KvCache,
        max_rows: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self.tables = SeatTables(config, cache, max_rows, max_model_len)
        self._model = model
        self._config = config
        self._cache = cache
        self._heads = Heads(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qk_norm_eps=config.rms_norm_eps if config.use_qk_norm else None,
        )
        self._scratch = DecodeScratch(self._heads, max_rows, device)
        self._device = device
        self._max_rows = max_rows
        frequencies_R = inverse_frequencies(config, device)
        floor_scale = config.floor_scale if config.temperature_tuning else 0
        self._scales = RotaryScales(frequencies_R=frequencies_R, floor_scale=floor_scale, attn_scale=config.attn_scale)
        self._packed_FB = torch.full((NUM_FIELDS, max_rows), NOTHING, dtype=torch.int32, device=device)
        self._on_host = [
            torch.full((NUM_FIELDS, max_rows), NOTHING, dtype=torch.int32, pin_memory=device.type == "cuda")
            for _ in range(HOST_BUFFERS)
        ]
        self._turn = 0
        self._sizes = bucket_sizes(max_rows)
        self._last_tokens_S = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._dispatch: Dispatch | None = None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._rows: dict[int, DecodeRows] = {}
        self._logits_BV = model.empty_logits(max_rows)  # of every graph: they run one after another

    def start_epoch(self, dispatch: Dispatch, last_tokens_S: Tensor) -> None:
        """Steps go through `dispatch` from now on, which must not need the host; tokens come from `last_tokens_S`."""
        self._dispatch = dispatch
        self._last_tokens_S = last_tokens_S
        self._graphs.clear()
        self._rows.clear()
        if self._device.type == "cuda":
            self._capture_all()

    def takes(self, work: Sequence[Work]) -> bool:
        """Whether a step of this work can run here."""
        return len(work) <= self._max_rows and all(item.num_tokens == 1 and item.samples for item in work)

    @torch.inference_mode()
    def run(self, work: Sequence[Work], requests: RequestTable) -> tuple[Tensor, Tensor]:
        """Logits [B, V] in the model's dtype and seats, int64 [B], of a step, in the order of the work. The next one
        overwrites them. Raises ValueError if the work needs tokens or pages that are not there.
        """
        num_rows = len(work)
        size = next(size for size in self._sizes if size >= num_rows)
        host_FB = self._on_host[self._turn]
        self._turn = (self._turn + 1) % HOST_BUFFERS
        self._write(host_FB.numpy(), work, requests, size)
        self._packed_FB.copy_(host_FB, non_blocking=True)
        if size in self._graphs:
            self._graphs[size].replay()
            rows = self._rows[size]
        else:
            rows = self._forward(size)
        return self._logits_BV[:num_rows], rows.seats_B[:num_rows].long()

    def _write(self, fields: Fields, work: Sequence[Work], requests: RequestTable, size: int) -> None:
        page_tokens, num_rows = self._cache.pools.page_tokens, len(work)
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

    def _forward(self, size: int) -> DecodeRows:
        assert self._dispatch is not None, "an epoch comes before steps"
        rows = DecodeRows.empty(size, len(self._scales.frequencies_R), self._device)
        tables = self.tables
        fill_decode_rows(
            rows, self._packed_FB, self._last_tokens_S, tables.global_table, tables.chunked_table, self._scales
        )
        self._dispatch.begin_step((size,))
        h_BD = self._model.forward(
            rows.ids_B, rows.positions_B, lambda i, qkv_BQ: self._attend(i, qkv_BQ, rows), self._dispatch,
            rows.is_padding_B1,
        )  # fmt: skip
        self._model.write_logits(h_BD, self._logits_BV[:size])
        return rows

    def _attend(self, layer: int, qkv_BQ: Tensor, rows: DecodeRows) -> Tensor:
        config, cache, heads = self._config, self._cache.layers[layer], self._heads
        is_chunked = config.is_chunked(layer)
        table = self.tables.chunked_table if is_chunked else self.tables.global_table
        assert table is not None, "a layer belongs to a group that has pages"
        rotates = layer in config.rope_layers
        tempers = self._scales.floor_scale > 0 and not rotates
        store_heads(
            qkv_BQ,
            cache.tokens_NHd,
            rows.chunked_slots_B if is_chunked else rows.global_slots_B,
            heads,
            rows.rotations_BR2 if rotates else None,
            rows.temperatures_B if tempers else None,
        )
        context = DecodeContext(
            seats_B=rows.seats_B,
            positions_B=rows.positions_B,
            table=table,
            chunk_tokens=config.chunk_tokens if is_chunked else 0,
        )
        q_BHd = qkv_BQ.view(len(qkv_BQ), -1, config.head_dim)[:, : heads.num_heads]
        return decode_attention(q_BHd, cache.pages_PSHd, context, heads, self._scratch)

    def _capture_all(self) -> None:
        """Largest first, so that the others fit into the memory that it took."""
        began_s = time.monotonic()
        pool = torch.cuda.graph_pool_handle()
        self._packed_FB.fill_(NOTHING)
        self._packed_FB[POSITION].zero_()
        for size in reversed(self._sizes):
            self._capture(size, pool)
        torch.cuda.synchronize(self._device)
        log.info("captured decode steps of %s rows in %.1f s", self._sizes, time.monotonic() - began_s)

    @torch.inference_mode()
    def _capture(self, size: int, pool: Any) -> None:
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                self._forward(size)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process may call CUDA meanwhile (loading does), which must not end the capture.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._rows[size] = self._forward(size)
        self._graphs[size] = graph
