"""What happens to a token's heads between the fused projection and the softmax, in one pass over memory.

Owns rotation, qk-norm and temperature in place, and the write of keys and values into the paged cache, with the casts
between them. Knows nothing of which layer it is, nor of what a query may see.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.attention.norm import rms_norm
from actors.attention.rope import rotate_
from actors.kernels.triton_here import HAS_TRITON, tl, triton

FP8_MAX = 448.0  # largest finite float8_e4m3fn
_HEADS_PER_PROGRAM = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """A rank's heads of one token: queries, then keys, then values. `qk_norm_eps`: None where nothing is normed."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm_eps: float | None

    @property
    def queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads


def store_heads(
    qkv_TN: Tensor,
    tokens_NHd: Tensor,
    write_slots_T: Tensor,
    heads: Heads,
    rotations_TR2: Tensor | None,
    temperatures_T: Tensor | None,
) -> None:
    """Makes queries and keys ready in place, and puts keys and values where `write_slots_T` says.

    qkv_TN: [T, (Hq + 2 Hkv) * head_dim], rows contiguous. tokens_NHd: [N, 2 Hkv, head_dim], keys first; of qkv's dtype,
    or float8_e4m3fn (saturated, scale 1). write_slots_T: int64, -1 for rows that write nothing. A layer that rotates
    gives rotations_TR2 (fp32 cosine and sine of each interleaved pair), and is then normed where `heads` says so; one
    that does not may give temperatures_T (fp32), by which its queries are multiplied.
    """
    if qkv_TN.is_cuda and HAS_TRITON:
        _with_triton(qkv_TN, tokens_NHd, write_slots_T, heads, rotations_TR2, temperatures_T)
    else:
        _with_torch(qkv_TN, tokens_NHd, write_slots_T, heads, rotations_TR2, temperatures_T)


def _with_torch(
    qkv_TN: Tensor,
    tokens_NHd: Tensor,
    write_slots_T: Tensor,
    heads: Heads,
    rotations_TR2: Tensor | None,
    temperatures_T: Tensor | None,
) -> None:
    qkv_THd = qkv_TN.view(qkv_TN.shape[0], -1, heads.head_dim)
    if rotations_TR2 is not None:
        qk_THd = qkv_THd[:, : heads.num_heads + heads.num_kv_heads]
        rotate_(qk_THd, torch.view_as_complex(rotations_TR2)[:, None])
        if heads.qk_norm_eps is not None:
            qk_THd.copy_(rms_norm(qk_THd, None, heads.qk_norm_eps))
    elif temperatures_T is not None:
        qkv_THd[:, : heads.num_heads].mul_(temperatures_T[:, None, None])
    _store(qkv_THd[:, heads.num_heads :], tokens_NHd, write_slots_T)


def _store(kv_THd: Tensor, tokens_NHd: Tensor, write_slots_T: Tensor) -> None:
    if len(write_slots_T) and int(write_slots_T.min()) < 0:
        is_written_T = write_slots_T >= 0
        kv_THd, write_slots_T = kv_THd[is_written_T], write_slots_T[is_written_T]
    if tokens_NHd.dtype == torch.float8_e4m3fn:
        kv_THd = kv_THd.clamp(-FP8_MAX, FP8_MAX).to(tokens_NHd.dtype).view(torch.uint8)
        tokens_NHd = tokens_NHd.view(torch.uint8)
    tokens_NHd.index_copy_(0, write_slots_T.long(), kv_THd)


if HAS_TRITON:
    from actors.kernels.early_triton import await_inputs, early
    from actors.kernels.heads_triton import as_kept, turned

    @triton.jit  # type: ignore[untyped-decorator]
    def _store_heads_kernel(  # type: ignore[no-untyped-def]
        qkv, tokens, write_slots, rotations, temperatures,
        qkv_stride, slot_stride, rotations_stride, num_heads, num_kv_heads, eps,
        ROTATES: tl.constexpr, NORMS: tl.constexpr, TEMPERS: tl.constexpr, BLOCK_H: tl.constexpr,
        HEAD_DIM: tl.constexpr,
    ):  # fmt: skip
        """One program per token and BLOCK_H heads, which may be of all three kinds."""
        await_inputs()
        token = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        dims = tl.arange(0, HEAD_DIM)
        exists = (head < num_heads + 2 * num_kv_heads)[:, None]
        is_qk = (head < num_heads + num_kv_heads)[:, None]
        dtype = qkv.dtype.element_ty
        at = qkv + token * qkv_stride + head[:, None] * HEAD_DIM + dims[None, :]
        x_Hd = tl.load(at, mask=exists, other=0.0)
        if ROTATES:
            y_Hd = turned(x_Hd, rotations + token * rotations_stride, eps, BLOCK_H, HEAD_DIM, NORMS)
            x_Hd = tl.where(is_qk, y_Hd, x_Hd)
            tl.store(at, x_Hd, mask=is_qk)
        elif TEMPERS:
            is_q = (head < num_heads)[:, None]
            warm_Hd = x_Hd.to(tl.float32) * tl.load(temperatures + token)
            tl.store(at, warm_Hd.to(dtype), mask=is_q)
        slot = tl.load(write_slots + token).to(tl.int64)
        is_kept = exists & (head >= num_heads)[:, None] & (slot >= 0)
        place = tokens + slot * slot_stride + (head - num_heads)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(place, as_kept(x_Hd.to(tl.float32), tokens), mask=is_kept)


def _with_triton(
    qkv_TN: Tensor,
    tokens_NHd: Tensor,
    write_slots_T: Tensor,
    heads: Heads,
    rotations_TR2: Tensor | None,
    temperatures_T: Tensor | None,
) -> None:
    num_tokens = qkv_TN.shape[0]
    if not num_tokens:
        return
    num_blocks = triton.cdiv(heads.num_heads + 2 * heads.num_kv_heads, _HEADS_PER_PROGRAM)
    rotates = rotations_TR2 is not None
    _store_heads_kernel[(num_tokens, num_blocks)](
        qkv_TN, tokens_NHd, write_slots_T,
        qkv_TN if rotations_TR2 is None else rotations_TR2,  # a pointer that is not used, where there is none
        qkv_TN if temperatures_T is None else temperatures_T,
        qkv_TN.stride(0), tokens_NHd.stride(0), 0 if rotations_TR2 is None else rotations_TR2.stride(0),
        heads.num_heads, heads.num_kv_heads, 0.0 if heads.qk_norm_eps is None else heads.qk_norm_eps,
        ROTATES=rotates, NORMS=heads.qk_norm_eps is not None, TEMPERS=not rotates and temperatures_T is not None,
        BLOCK_H=_HEADS_PER_PROGRAM, HEAD_DIM=heads.head_dim, num_warps=4 if heads.head_dim >= 128 else 1, **early(),
    )  # fmt: skip
