"""Steps with prompts on a GPU: rows of one token take the decode kernel, longer pieces torch's attention.

Owns how pieces become runs, and which keys a run reads: its own, where it begins its context, else those in the cache.
On a CPU `attention.py` serves such steps; here the kernels' references compute the same, for tests. Knows nothing of
weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.attention.batch import StepInputs
from actors.attention.kernel_attention import KernelAttention, SeatedRows
from actors.attention.kv_cache import KvCache, as_cached
from actors.attention.page_groups import CachedRuns, FreshRuns, GroupInputs, Piece, PromptRuns, token_slots, write_slots
from actors.attention.requests import PageTable
from actors.attention.upload import upload_array
from actors.checkpoint.config import ModelConfig
from actors.kernels.prefill_attention import PackedRuns, packed_attention, run_attention

# cuDNN's attention is twice as fast as what takes any length, but builds a plan for every length: it gets as much of a
# run as is a multiple of this.
FRESH_TOKENS = 512
MAX_JOINED_TOKENS = 2048  # longer runs fill a GPU alone


@dataclass(frozen=True, slots=True)
class _Span:
    """Tokens [start, stop) of a request, at `row` and after, that see the context from `context` on."""

    table: PageTable
    row: int
    context: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.stop - self.start)


class PromptBuilder:
    """Implements `batch.Builder` for one page group. `chunk_tokens` 0: rows read their whole context."""

    def __init__(self, page_tokens: int, chunk_tokens: int, device: torch.device) -> None:
        self._page_tokens = page_tokens
        self._chunk_tokens = chunk_tokens
        self._device = device

    def build(self, singles: Sequence[Piece], longer: Sequence[Piece]) -> GroupInputs:
        """As `GroupBuilder.build`. What the singles read, the device's own tables say."""
        for piece in (*singles, *longer):
            piece.check_pages(self._page_tokens)
        return GroupInputs(
            write_slots_T=self._upload(write_slots(self._page_tokens, singles, longer)),
            fresh_pages_N=None,  # nothing is read that was not written
            decode=(),
            runs=(),
            prompts=self._prompts(longer) if longer else None,
        )

    def _prompts(self, longer: Sequence[Piece]) -> PromptRuns:
        fresh: list[_Span] = []
        cached: list[_Span] = []
        for span in (span for piece in longer for span in self._spans(piece)):
            is_fresh = span.start == span.context and span.stop - span.start >= FRESH_TOKENS
            (fresh if is_fresh else cached).append(span)
        return PromptRuns(fresh=tuple(_together(fresh)), cached=self._cached(cached) if cached else None)

    def _spans(self, piece: Piece) -> Iterator[_Span]:
        """Cuts a piece where chunks end, and where FRESH_TOKENS last divide a run that begins its context."""
        start, chunk = piece.start, self._chunk_tokens
        while start < piece.end:
            context = start - start % chunk if chunk else 0
            stop = min(piece.end, context + chunk) if chunk else piece.end
            if start == context and stop - start > FRESH_TOKENS:
                stop -= (stop - start) % FRESH_TOKENS
            yield _Span(piece.table, piece.row + start - piece.start, context, start, stop)
            start = stop

    def _cached(self, spans: Sequence[_Span]) -> CachedRuns:
        sizes = tuple((span.stop - span.start, span.stop - span.context) for span in spans)
        ends_2R1 = self._upload(np.cumsum([(0, 0), *sizes], axis=0, dtype=np.int32).T.copy())
        slots = [token_slots(self._page_tokens, span.table, span.context, span.stop) for span in spans]
        return CachedRuns(
            runs=PackedRuns(query_ends_R1=ends_2R1[0], key_ends_R1=ends_2R1[1], sizes=sizes),
            rows=self._rows(spans),
            key_slots_N=self._upload(np.concatenate(slots)),
        )

    def _rows(self, spans: Sequence[_Span]) -> slice | Tensor:
        """A slice where they lie together."""
        rows_T = np.concatenate([np.arange(span.rows.start, span.rows.stop, dtype=np.int64) for span in spans])
        first, last = int(rows_T[0]), int(rows_T[-1])
        return slice(first, last + 1) if last - first == len(rows_T) - 1 else self._upload(rows_T)

    def _upload(self, values: np.ndarray) -> Tensor:  # type: ignore[type-arg]
        return upload_array(values, self._device)


def _together(spans: Sequence[_Span]) -> Iterator[FreshRuns]:
    """Joins equal ones that lie one after another, two or four or eight ... at a time: every number, too, is a plan."""
    first = 0
    while first < len(spans):
        rows = spans[first].rows
        length, num_alike = rows.stop - rows.start, 1
        for span in spans[first + 1 :]:
            if (span.rows.start, span.rows.stop) != (rows.start + num_alike * length, rows.stop + num_alike * length):
                break
            if length > MAX_JOINED_TOKENS:
                break
            num_alike += 1
        num_runs = 1 << (num_alike.bit_length() - 1)
        yield FreshRuns(slice(rows.start, rows.start + num_runs * length), num_runs)
        first += num_runs


class MixedAttention:
    """The builders of both page groups, and `model.Attend` for what they build."""

    def __init__(self, config: ModelConfig, attention: KernelAttention, cache: KvCache, device: torch.device) -> None:
        self._config = config
        self._attention = attention
        self._layers = cache.layers
        page_tokens, chunk_tokens = cache.pools.page_tokens, config.chunk_tokens
        self.global_builder = PromptBuilder(page_tokens, 0, device) if config.global_layers else None
        self.chunked_builder = PromptBuilder(page_tokens, chunk_tokens, device) if config.chunked_layers else None

    def attend(self, layer: int, qkv_TQ: Tensor, inputs: StepInputs) -> Tensor:
        """Attention of a step's rows in one layer; see `model.Attend`."""
        group = inputs.chunked_inputs if self._config.is_chunked(layer) else inputs.global_inputs
        assert group is not None, "a layer belongs to a group that the batch has"
        rotations_TR2 = torch.view_as_real(inputs.rotations_T1R)[:, 0]
        temperatures_T11 = inputs.temperatures_T11
        temperatures_T = None if temperatures_T11 is None else temperatures_T11.view(-1)
        self._attention.store(layer, qkv_TQ, group.write_slots_T, rotations_TR2, temperatures_T)
        if group.prompts is None:
            return self._singles(layer, qkv_TQ, inputs)
        return self._all(layer, qkv_TQ, inputs, group.prompts)

    def _all(self, layer: int, qkv_TQ: Tensor, inputs: StepInputs, prompts: PromptRuns) -> Tensor:
        num_singles, cached = len(inputs.single_seats_B), prompts.cached
        if not num_singles and len(prompts.fresh) + (cached is not None) == 1:  # its result is the step's
            if cached is not None:
                return self._cached(layer, qkv_TQ, cached)
            return self._fresh(layer, qkv_TQ, prompts.fresh[0].num_runs)
        heads = self._attention.heads
        out_TA = qkv_TQ.new_empty(len(qkv_TQ), heads.num_heads * heads.head_dim)
        if num_singles:
            out_TA[:num_singles] = self._singles(layer, qkv_TQ[:num_singles], inputs)
        for fresh in prompts.fresh:
            out_TA[fresh.rows] = self._fresh(layer, qkv_TQ[fresh.rows], fresh.num_runs)
        if cached is not None:
            out_TA[cached.rows] = self._cached(layer, qkv_TQ[cached.rows], cached)
        return out_TA

    def _singles(self, layer: int, qkv_BQ: Tensor, inputs: StepInputs) -> Tensor:
        singles = SeatedRows(seats_B=inputs.single_seats_B, positions_B=inputs.positions_T[: len(qkv_BQ)])
        return self._attention.attend_singles(layer, qkv_BQ, singles)

    def _fresh(self, layer: int, qkv_QN: Tensor, num_runs: int) -> Tensor:
        heads = self._attention.heads
        kv_QHd = qkv_QN.view(len(qkv_QN), -1, heads.head_dim)[:, heads.num_heads :]
        k_QHd, v_QHd = as_cached(kv_QHd, self._layers[layer].pages_PSHd.dtype).split(heads.num_kv_heads, dim=1)
        return run_attention(self._attention.queries(qkv_QN), k_QHd, v_QHd, num_runs)

    def _cached(self, layer: int, qkv_QN: Tensor, cached: CachedRuns) -> Tensor:
        kv_NHd = self._layers[layer].read_tokens(cached.key_slots_N, qkv_QN.dtype)
        k_NHd, v_NHd = kv_NHd.split(self._attention.heads.num_kv_heads, dim=1)
        return packed_attention(self._attention.queries(qkv_QN), k_NHd, v_NHd, cached.runs)
