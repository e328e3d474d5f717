"""Steps with prompts on a GPU: attention of longer pieces by FlashInfer, planned once per step and page group.

Owns how pieces become the runs that it is planned with; rows of one token take the path of decode steps, which reads
each key once for all queries that share it. Used where FlashInfer's kernels fit the model and its dtype; elsewhere
`attention.py` serves such steps too. Knows nothing of weights.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from actors.attention.batch import StepInputs
from actors.attention.kernel_attention import KernelAttention, Singles
from actors.attention.kv_cache import KvCache
from actors.attention.page_groups import GroupInputs, Piece, write_slots
from actors.checkpoint.config import ModelConfig
from actors.kernels.prefill_attention import WORKSPACE_BYTES, PagedPrefill, PrefillRun


class PlannedGroupBuilder:
    """Builds GroupInputs for one page group, and plans `prefill` for it. `chunk_tokens` 0: rows read their whole
    context.
    """

    def __init__(self, page_tokens: int, chunk_tokens: int, prefill: PagedPrefill, device: torch.device) -> None:
        self.prefill = prefill
        self._page_tokens = page_tokens
        self._chunk_tokens = chunk_tokens
        self._device = device

    def build(self, singles: Sequence[Piece], longer: Sequence[Piece]) -> GroupInputs:
        """As `GroupBuilder.build`."""
        pieces = (*singles, *longer)
        for piece in pieces:
            piece.check_pages(self._page_tokens)
        if longer:
            self.prefill.plan([run for piece in longer for run in self._runs(piece)])
        slots_T = torch.from_numpy(write_slots(self._page_tokens, singles, longer))
        return GroupInputs(
            write_slots_T=slots_T.to(self._device, non_blocking=True), fresh_pages_N=None, decode=(), runs=()
        )

    def _runs(self, piece: Piece) -> Iterator[PrefillRun]:
        """Splits a piece where chunks end."""
        start, chunk = piece.start, self._chunk_tokens
        while start < piece.end:
            context = start - start % chunk if chunk else 0
            stop = min(piece.end, context + chunk) if chunk else piece.end
            ids_N = piece.table.pages[context // self._page_tokens : -(-stop // self._page_tokens)]
            yield PrefillRun(num_queries=stop - start, num_keys=stop - context, page_ids_N=ids_N)
            start = stop


class MixedAttention:
    """The builders of both page groups. `attend` makes `model.Attend` for the step that they built last."""

    def __init__(
        self, config: ModelConfig, attention: KernelAttention, dtype: torch.dtype, cache: KvCache, device: torch.device
    ) -> None:
        self._config = config
        self._attention = attention
        page_tokens, kept = cache.pools.page_tokens, cache.global_LPSHd.dtype
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

        def make(chunk_tokens: int) -> PlannedGroupBuilder:
            prefill = PagedPrefill(attention.heads, page_tokens, dtype, kept)
            prefill.start(device, workspace)
            return PlannedGroupBuilder(page_tokens, chunk_tokens, prefill, device)

        self.global_builder = make(0) if config.global_layers else None
        self.chunked_builder = make(config.chunk_tokens) if config.chunked_layers else None

    def attend(self, layer: int, qkv_TQ: Tensor, inputs: StepInputs) -> Tensor:
        """Attention of the planned step's rows in one layer; see `model.Attend`."""
        attention, is_chunked = self._attention, self._config.is_chunked(layer)
        group = inputs.chunked_inputs if is_chunked else inputs.global_inputs
        builder = self.chunked_builder if is_chunked else self.global_builder
        assert group is not None and builder is not None, "a layer belongs to a group that the batch has"
        rotations_TR2 = torch.view_as_real(inputs.rotations_T1R)[:, 0]
        temperatures_T11 = inputs.temperatures_T11
        temperatures_T = None if temperatures_T11 is None else temperatures_T11.view(-1)
        attention.store(layer, qkv_TQ, group.write_slots_T, rotations_TR2, temperatures_T)
        num_singles = len(inputs.single_seats_B)
        if num_singles == len(qkv_TQ):
            return self._attend_singles(layer, qkv_TQ, inputs)
        q_THd = attention.queries(qkv_TQ)[num_singles:]
        out_TA = builder.prefill.run(q_THd, attention.pages(layer))
        return torch.cat((self._attend_singles(layer, qkv_TQ[:num_singles], inputs), out_TA)) if num_singles else out_TA

    def _attend_singles(self, layer: int, qkv_BQ: Tensor, inputs: StepInputs) -> Tensor:
        singles = Singles(seats_B=inputs.single_seats_B, positions_B=inputs.positions_T[: len(qkv_BQ)])
        return self._attention.attend_singles(layer, qkv_BQ, singles)
