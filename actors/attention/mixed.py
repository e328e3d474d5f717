"""Steps with prompts on a GPU: attention of all rows by FlashInfer, planned once per step and page group.

Owns how a step's pieces become the runs that it is planned with. Used where its kernels fit the model and its dtype;
elsewhere `attention.py` serves such steps too. Knows nothing of weights.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from actors.attention.batch import StepInputs
from actors.attention.kv_cache import KvCache
from actors.attention.page_groups import GroupInputs, Piece, write_slots
from actors.checkpoint.config import ModelConfig
from actors.kernels.heads import Heads, store_heads
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
        self.prefill.plan([run for piece in pieces for run in self._runs(piece)])
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

    def __init__(self, config: ModelConfig, cache: KvCache, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._cache = cache
        self._heads = Heads(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qk_norm_eps=config.rms_norm_eps if config.use_qk_norm else None,
        )
        page_tokens, cache_dtype = cache.pools.page_tokens, cache.global_LPSHd.dtype
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

        def make(chunk_tokens: int) -> PlannedGroupBuilder:
            prefill = PagedPrefill(self._heads, page_tokens, dtype, cache_dtype)
            prefill.start(device, workspace)
            return PlannedGroupBuilder(page_tokens, chunk_tokens, prefill, device)

        self.global_builder = make(0) if config.global_layers else None
        self.chunked_builder = make(config.chunk_tokens) if config.chunked_layers else None

    def attend(self, layer: int, qkv_TQ: Tensor, inputs: StepInputs) -> Tensor:
        """Attention of the planned step's rows in one layer; see `model.Attend`."""
        config, cache, heads = self._config, self._cache.layers[layer], self._heads
        is_chunked, rotates = config.is_chunked(layer), layer in config.rope_layers
        group = inputs.chunked_inputs if is_chunked else inputs.global_inputs
        builder = self.chunked_builder if is_chunked else self.global_builder
        assert group is not None and builder is not None, "a layer belongs to a group that the batch has"
        temperatures_T11 = inputs.temperatures_T11
        store_heads(
            qkv_TQ,
            cache.tokens_NHd,
            group.write_slots_T,
            heads,
            torch.view_as_real(inputs.rotations_T1R)[:, 0] if rotates else None,
            None if temperatures_T11 is None else temperatures_T11.view(-1),
        )
        q_THd = qkv_TQ.view(len(qkv_TQ), -1, config.head_dim)[:, : heads.num_heads]
        return builder.prefill.run(q_THd, cache.pages_PSHd)
