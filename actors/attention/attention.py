"""Attention of one layer over paged keys and values.

Owns the arithmetic between the fused projection and the output projection: rotation, norm, temperature, the write
into the cache and the softmax over what each row may see. What it may see was decided in `page_groups.py`. Keys and
values are never repeated for grouped queries. This is plain torch, which is what a CPU runs; a GPU's is in `decode.py`
and `mixed.py`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody knows)

from actors.attention.batch import StepInputs
from actors.attention.kv_cache import KvCache, LayerCache, as_cached, as_integers
from actors.attention.norm import rms_norm
from actors.attention.page_groups import DecodeGroup, GroupInputs, PageRun, Run, bottom_right_mask
from actors.attention.rope import rotate_
from actors.checkpoint.config import ModelConfig


class Attention:
    """What all layers share; the layer itself is told by its cache and two flags."""

    def __init__(self, config: ModelConfig) -> None:
        self._num_heads = config.num_heads
        self._num_kv_heads = config.num_kv_heads
        self._queries_per_kv = config.queries_per_kv
        self._head_dim = config.head_dim
        self._eps = config.rms_norm_eps
        self._use_qk_norm = config.use_qk_norm

    def __call__(
        self, qkv_TN: Tensor, inputs: StepInputs, group: GroupInputs, cache: LayerCache, uses_rope: bool
    ) -> Tensor:
        """qkv_TN: [T, (Hq + 2 Hkv) * head_dim], overwritten. Writes the step's keys and values into `cache`.

        Returns [T, Hq * head_dim], before the output projection. T is at least 1.
        """
        qkv_THd = qkv_TN.view(qkv_TN.shape[0], -1, self._head_dim)
        if uses_rope:
            self._rotate(qkv_THd, inputs)
        else:
            self._temper(qkv_THd, inputs)
        kv_THd = as_cached(qkv_THd[:, self._num_heads :], cache.pages_PSHd.dtype)
        cache.write(group.write_slots_T, kv_THd)
        # Query head h reads kv head h // G.
        q_THd = qkv_THd[:, : self._num_heads]
        q_TKGd = q_THd.view(-1, self._num_kv_heads, self._queries_per_kv, self._head_dim)
        return self._attend(q_TKGd, kv_THd, group, cache)

    def _rotate(self, qkv_THd: Tensor, inputs: StepInputs) -> None:
        qk_THd = qkv_THd[:, : self._num_heads + self._num_kv_heads]
        rotate_(qk_THd, inputs.rotations_T1R)
        if self._use_qk_norm:
            qk_THd.copy_(rms_norm(qk_THd, None, self._eps))

    def _temper(self, qkv_THd: Tensor, inputs: StepInputs) -> None:
        if inputs.temperatures_T11 is not None:
            qkv_THd[:, : self._num_heads].mul_(inputs.temperatures_T11)

    def _attend(self, q_TKGd: Tensor, kv_THd: Tensor, group: GroupInputs, cache: LayerCache) -> Tensor:
        if group.whole_decode is not None:
            return self._decode(q_TKGd, group.whole_decode, cache)
        if group.whole_run is not None:
            return self._run(q_TKGd, kv_THd, group.whole_run, cache)
        out_TN = q_TKGd.new_empty(q_TKGd.shape[0], self._num_heads * self._head_dim)
        for decode in group.decode:
            out_TN[decode.rows] = self._decode(q_TKGd[decode.rows], decode, cache)
        for run in group.runs:
            out_TN[run.rows] = self._run(q_TKGd[run.rows], kv_THd[run.rows], run, cache)
        return out_TN

    def _decode(self, q_BKGd: Tensor, decode: DecodeGroup, cache: LayerCache) -> Tensor:
        """The queries that share a kv head stand where a sequence's positions would: they read the same keys."""
        kv_BLHd = _read_pages(cache, decode.pages, decode.num_rows, q_BKGd.dtype)[:, : decode.num_keys]
        k_BKLd = kv_BLHd[:, :, : self._num_kv_heads].transpose(1, 2)
        v_BKLd = kv_BLHd[:, :, self._num_kv_heads :].transpose(1, 2)
        out_BKGd = F.scaled_dot_product_attention(q_BKGd, k_BKLd, v_BKLd, attn_mask=decode.mask_B11L)
        return out_BKGd.flatten(1)

    def _run(self, q_QKGd: Tensor, kv_QHd: Tensor, run: Run, cache: LayerCache) -> Tensor:
        """kv heads stand where a batch would, and each one's keys are seen by its G query heads through stride 0."""
        pages = run.pages
        kv_LHd = kv_QHd if pages is None else _read_pages(cache, pages, 1, kv_QHd.dtype)[0, : run.num_keys]
        kv_HLd = kv_LHd.transpose(0, 1)
        shape = (self._num_kv_heads, self._queries_per_kv, run.num_keys, self._head_dim)
        out_KGQd = F.scaled_dot_product_attention(
            q_QKGd.permute(1, 2, 0, 3),
            kv_HLd[: self._num_kv_heads, None].expand(shape),
            kv_HLd[self._num_kv_heads :, None].expand(shape),
            attn_mask=_run_mask(run, q_QKGd),
            is_causal=run.pages is None,
        )
        return out_KGQd.permute(2, 0, 1, 3).flatten(1)


class StepAttention:
    """Implements `model.Attend` for the rows of one step."""

    def __init__(self, attention: Attention, config: ModelConfig, inputs: StepInputs, cache: KvCache) -> None:
        self._attention = attention
        self._config = config
        self._inputs = inputs
        self._cache = cache
        # Padding may read what a page's last owner left: it must be finite, for 0 * NaN is NaN.
        for group, pages_LPSHd in (
            (inputs.global_inputs, cache.global_LPSHd),
            (inputs.chunked_inputs, cache.chunked_LPSHd),
        ):
            if group is not None and group.fresh_pages_N is not None:
                as_integers(pages_LPSHd).index_fill_(1, group.fresh_pages_N, 0)

    def __call__(self, layer: int, qkv_TQ: Tensor) -> Tensor:
        inputs, config = self._inputs, self._config
        group = inputs.chunked_inputs if config.is_chunked(layer) else inputs.global_inputs
        assert group is not None, "a layer belongs to a group that the batch has"
        return self._attention(qkv_TQ, inputs, group, self._cache.layers[layer], layer in config.rope_layers)


def _run_mask(run: Run, like: Tensor) -> Tensor | None:
    if run.pages is None or run.num_queries == 1 or run.mask_QL is not None:
        return run.mask_QL
    return bottom_right_mask(run.num_queries, run.num_keys, like.dtype, like.device)


def _read_pages(cache: LayerCache, pages: PageRun, num_rows: int, dtype: torch.dtype) -> Tensor:
    """[num_rows, tokens of the pages, 2 Hkv, head_dim]: a view where the pages lie together, else a copy."""
    if pages.first is not None:
        pages_PSHd = cache.pages_PSHd[pages.first : pages.first + pages.num_pages].to(dtype)
    else:
        pages_PSHd = cache.read(pages.ids_N, dtype)
    return pages_PSHd.view(num_rows, -1, *pages_PSHd.shape[2:])
