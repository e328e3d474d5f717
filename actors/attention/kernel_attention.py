"""Attention by kernels: what decode steps and mixed steps have in common on a GPU.

Owns how a layer's heads are stored, and how rows of one token read what is stored, from the device's own page tables.
On a CPU the kernels' references compute the same, for tests. Knows nothing of how a step is laid out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.attention.kv_cache import KvCache
from actors.attention.seat_tables import SeatTables
from actors.checkpoint.config import ModelConfig
from actors.kernels.decode_attention import (
    DecodeScratch,
    NewestTokens,
    PagedContext,
    decode_attention,
    store_and_attend,
)
from actors.kernels.heads import Heads, store_heads
from actors.kernels.prompt_attention import prompt_attention
from actors.kernels.step_inputs import PageTable


@dataclass(frozen=True, slots=True, kw_only=True)
class SeatedRows:
    """Seats (int32, -1: not a row of this kind) and positions of rows of one token each, or of pieces of prompts."""

    seats_B: Tensor
    positions_B: Tensor


class KernelAttention:
    """All layers of one rank, over its cache."""

    def __init__(
        self, config: ModelConfig, cache: KvCache, tables: SeatTables, max_singles: int, device: torch.device
    ) -> None:
        self.tables = tables
        self.heads = Heads(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qk_norm_eps=config.rms_norm_eps if config.use_qk_norm else None,
        )
        self._config = config
        self._cache = cache
        self._scratch = DecodeScratch(self.heads, max_singles, device)

    def store(
        self, layer: int, qkv_TQ: Tensor, slots_T: Tensor, rotations_TR2: Tensor, temperatures_T: Tensor | None
    ) -> None:
        """Makes queries and keys ready in place, and puts keys and values into the cache. See `store_heads`."""
        rotations, temperatures = self._what_turns(layer, rotations_TR2, temperatures_T)
        store_heads(qkv_TQ, self._cache.layers[layer].tokens_NHd, slots_T, self.heads, rotations, temperatures)

    def queries(self, qkv_TQ: Tensor) -> Tensor:
        """q_THd of rows, a view."""
        return qkv_TQ.view(qkv_TQ.shape[0], -1, self.heads.head_dim)[:, : self.heads.num_heads]

    def attend_singles(self, layer: int, qkv_BQ: Tensor, singles: SeatedRows) -> Tensor:
        """[B, heads * head_dim]: each row over all that its request has stored (of its chunk, in chunked layers)."""
        pages_PSHd, context = self._cache.layers[layer].pages_PSHd, self._context(layer, singles)
        return decode_attention(self.queries(qkv_BQ), pages_PSHd, context, self.heads, self._scratch)

    def attend_with_prompts(self, layer: int, qkv_TQ: Tensor, singles: SeatedRows, prompts: SeatedRows) -> Tensor:
        """[T, heads * head_dim]: `attend_singles` of the first rows, those of `singles`, and the rows of prompts
        likewise. Rows that are neither are of no meaning.
        """
        pages_PSHd, q_THd = self._cache.layers[layer].pages_PSHd, self.queries(qkv_TQ)
        out_TA = qkv_TQ.new_empty(len(qkv_TQ), self.heads.num_heads * self.heads.head_dim)
        most = len(singles.seats_B)
        context = self._context(layer, singles)
        decode_attention(q_THd[:most], pages_PSHd, context, self.heads, self._scratch, out_TA[:most])
        prompt_attention(q_THd, pages_PSHd, self._context(layer, prompts), self.heads, out_TA)
        return out_TA

    def store_and_attend(
        self,
        layer: int,
        qkv_BQ: Tensor,
        singles: SeatedRows,
        slots_B: Tensor,
        rotations_BR2: Tensor,
        temperatures_B: Tensor,
    ) -> Tensor:
        """`store` and `attend_singles` of the same rows at once."""
        rotations, temperatures = self._what_turns(layer, rotations_BR2, temperatures_B)
        newest = NewestTokens(write_slots_B=slots_B, rotations_BR2=rotations, temperatures_B=temperatures)
        pages_PSHd, context = self._cache.layers[layer].pages_PSHd, self._context(layer, singles)
        return store_and_attend(qkv_BQ, pages_PSHd, newest, context, self.heads, self._scratch)

    def _what_turns(
        self, layer: int, rotations_TR2: Tensor, temperatures_T: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if layer in self._config.rope_layers:
            return rotations_TR2, None
        return None, temperatures_T if self._config.temperature_tuning else None

    def _context(self, layer: int, singles: SeatedRows) -> PagedContext:
        is_chunked = self._config.is_chunked(layer)
        return PagedContext(
            seats_B=singles.seats_B,
            positions_B=singles.positions_B,
            table=self._table(is_chunked),
            chunk_tokens=self._config.chunk_tokens if is_chunked else 0,
        )

    def _table(self, is_chunked: bool) -> PageTable:
        table = self.tables.chunked_table if is_chunked else self.tables.global_table
        assert table is not None, "a layer belongs to a group that has pages"
        return table
