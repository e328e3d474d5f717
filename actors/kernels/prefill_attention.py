"""Attention of several tokens of a request at once, each of which sees the keys up to its own.

Owns which of torch's kernels computes what. Knows nothing of pages, nor of requests.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody knows)
from torch.nn.attention import SDPBackend, sdpa_kernel

_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRuns:
    """Runs of queries that lie one after another, as do the keys of each: its last query sees all of them.

    `query_ends_R1` and `key_ends_R1` (int32, R + 1) are where runs end, after a 0; `sizes`: the same as numbers of
    queries and keys of each run, on the host.
    """

    query_ends_R1: Tensor
    key_ends_R1: Tensor
    sizes: tuple[tuple[int, int], ...]


def run_attention(q_QHd: Tensor, k_NHd: Tensor, v_NHd: Tensor, num_runs: int = 1) -> Tensor:
    """[Q, Hq * d] of one run, whose last query sees all N keys, or of several of the same size. Rows may be strided.

    cuDNN's is the fastest of torch's kernels where N = Q, but builds a plan for every new Q and number of runs in every
    thread.
    """
    q_BHQd, k_BHNd, v_BHNd = (x.unflatten(0, (num_runs, -1)).transpose(1, 2) for x in (q_QHd, k_NHd, v_NHd))
    # The one fused kernel that has fp32 has no grouped queries, and fails where Q < N ("misaligned address").
    backends = [SDPBackend.MATH] if q_QHd.dtype == torch.float32 and q_QHd.is_cuda else _FASTEST_FIRST
    is_square = len(q_QHd) == len(k_NHd)
    with sdpa_kernel(backends, set_priority=True):
        out_BHQd = F.scaled_dot_product_attention(
            q_BHQd, k_BHNd, v_BHNd,
            attn_mask=None if is_square else _sees_to_its_own(q_BHQd.shape[2], k_BHNd.shape[2], q_QHd.device),
            is_causal=is_square,
            enable_gqa=q_BHQd.shape[1] != k_BHNd.shape[1],
        )  # fmt: skip
    return out_BHQd.transpose(1, 2).flatten(2).flatten(0, 1)


def _sees_to_its_own(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """[Q, N] of bools. torch.nn.attention.bias has it too, and brings torch's compiler: a second for each process."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


def packed_attention(q_THd: Tensor, k_NHd: Tensor, v_NHd: Tensor, runs: PackedRuns) -> Tensor:
    """[T, Hq * d] of `runs`, all in one launch where there is a kernel for it. Rows may be strided."""
    if q_THd.is_cuda and q_THd.dtype in (torch.bfloat16, torch.float16):
        most_queries, most_keys = (max(sizes) for sizes in zip(*runs.sizes, strict=True))
        # What torch.nn.attention.varlen calls. Causal from the end.
        out_THd: Tensor = torch.ops.aten._flash_attention_forward(
            q_THd, k_NHd, v_NHd, runs.query_ends_R1, runs.key_ends_R1, most_queries, most_keys,
            0.0, True, False, scale=q_THd.shape[-1] ** -0.5,
        )[0]  # fmt: skip
        return out_THd.flatten(1)
    queries = q_THd.split([num_queries for num_queries, _ in runs.sizes])
    keys, values = (x_NHd.split([num_keys for _, num_keys in runs.sizes]) for x_NHd in (k_NHd, v_NHd))
    return torch.cat([run_attention(*run) for run in zip(queries, keys, values, strict=True)])
