"""Triton kernels of how `route.py` chooses experts, and their launches: logits, choice, count, and lots.

Owns how the router's numbers are dealt among programs. Knows nothing of slots, nor of what experts compute.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, type-arg, misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.kernels.early_triton import await_inputs, early
from actors.kernels.route import GATE_TOKENS

# Inputs of a program: of many rows as of one, so that a row's sums have one order. H200, 128 experts, us: 4.4 (1 row),
# 4.7 (8), 5.5 (32), where two launches and what lies between took 7.4 to 8.2; at 128 rows they are as fast as this.
GATE_INPUTS = 512
LOTS_BLOCK = 256


@triton.jit
def write_choices(
    logits, lots_ptr, is_padding_ptr, ids_ptr, scores_ptr, counts_ptr, tokens, num_tokens, num_experts,
    TOP_K: tl.constexpr, UNIFORM: tl.constexpr, PADDED: tl.constexpr, COUNTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The TOP_K largest of BLOCK logits in each row, the first of equals, and their sigmoids. A NaN is never chosen."""
    experts = tl.arange(0, BLOCK)[None, :]
    exists = tokens < num_tokens
    logits = tl.where((experts < num_experts) & (logits == logits), logits, -float("inf"))
    free = (tokens[:, None] >= 0) & (experts < num_experts)
    is_kept = exists
    if PADDED:
        is_kept = exists & (tl.load(is_padding_ptr + tokens, mask=exists, other=1) == 0)
    for k in tl.static_range(TOP_K):
        if UNIFORM:
            lots = tl.load(lots_ptr + tokens, mask=exists, other=0)
            chosen = ((lots * TOP_K + k) % num_experts).to(tl.int32)
            value = tl.sum(tl.where(experts == chosen[:, None], logits, 0.0), 1)
        else:
            value = tl.max(tl.where(free, logits, -float("inf")), 1)
            chosen = tl.min(tl.where(free & (logits == value[:, None]), experts, BLOCK), 1)
            free = free & (experts != chosen[:, None])
        score = 1.0 / (1.0 + tl.exp(-value))
        tl.store(scores_ptr + tokens * TOP_K + k, score.to(scores_ptr.dtype.element_ty), mask=exists)
        tl.store(ids_ptr + tokens * TOP_K + k, tl.where(is_kept, chosen, -1).to(tl.int64), mask=exists)
        if COUNTED:
            one = tl.full(chosen.shape, 1, tl.int64)
            tl.atomic_add(counts_ptr + tl.where(is_kept, chosen, 0), one, mask=is_kept, sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens"])
def choose_kernel(
    logits_ptr, lots_ptr, is_padding_ptr, ids_ptr, scores_ptr, counts_ptr, num_tokens, num_experts,
    TOP_K: tl.constexpr, UNIFORM: tl.constexpr, PADDED: tl.constexpr, COUNTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token."""
    await_inputs()
    tokens = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    experts = tl.arange(0, BLOCK)[None, :]
    at = logits_ptr + tokens[:, None] * num_experts + experts
    logits = tl.load(at, mask=experts < num_experts, other=-float("inf"))
    write_choices(
        logits, lots_ptr, is_padding_ptr, ids_ptr, scores_ptr, counts_ptr, tokens, num_tokens, num_experts,
        TOP_K, UNIFORM, PADDED, COUNTED, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def gate_kernel(
    x_ptr, router_ptr, parts_ptr, num_done_ptr, lots_ptr, is_padding_ptr, ids_ptr, scores_ptr, counts_ptr,
    num_tokens, num_experts, width,
    TOP_K: tl.constexpr, UNIFORM: tl.constexpr, PADDED: tl.constexpr, COUNTED: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, INPUTS: tl.constexpr, SPLITS: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """One program per INPUTS columns, EXPERTS experts and TOKENS tokens. The last one of some tokens adds up what all
    left, in the order of columns, and chooses for the first JOINED of them: there are no more. A token's answer does
    not depend on others.
    """
    split = tl.program_id(0)
    first = tl.program_id(2).to(tl.int64) * TOKENS
    tokens = first + tl.arange(0, TOKENS)
    experts = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    columns = split * INPUTS + tl.arange(0, INPUTS)
    inside = (columns < width)[None, :]
    router_at = router_ptr + experts[:, None] * width + columns[None, :]
    router = tl.load(router_at, mask=(experts < num_experts)[:, None] & inside, other=0.0)
    await_inputs()
    x_at = x_ptr + tokens[:, None] * width + columns[None, :]
    x = tl.load(x_at, mask=(tokens < num_tokens)[:, None] & inside, other=0.0)
    part = tl.dot(x, tl.trans(router), input_precision="ieee")
    is_there = (tokens < num_tokens)[:, None] & (experts < num_experts)[None, :]
    tl.store(
        parts_ptr + (split * num_tokens.to(tl.int64) + tokens)[:, None] * num_experts + experts[None, :], part, is_there
    )
    tl.debug_barrier()
    counter = num_done_ptr + tl.program_id(2)
    if tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) * tl.num_programs(1) - 1:
        tl.store(counter, 0)
        joined = first + tl.arange(0, JOINED)
        all_experts = tl.arange(0, BLOCK)[None, :]
        is_joined = (joined < num_tokens)[:, None] & (all_experts < num_experts)
        logits = tl.zeros((JOINED, BLOCK), tl.float32)
        for other in tl.static_range(SPLITS):
            at = parts_ptr + (other * num_tokens.to(tl.int64) + joined)[:, None] * num_experts + all_experts
            logits += tl.load(at, mask=is_joined, other=0.0)
        write_choices(
            logits, lots_ptr, is_padding_ptr, ids_ptr, scores_ptr, counts_ptr, joined, num_tokens, num_experts,
            TOP_K, UNIFORM, PADDED, COUNTED, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def lots_kernel(positions_ptr, lots_ptr, num_tokens, BLOCK: tl.constexpr):
    """One program per layer and BLOCK tokens. See `route.draw_lots`."""
    await_inputs()
    layer = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < num_tokens
    lots = tl.load(positions_ptr + tokens, mask=inside, other=0) * 2654435761 + tokens * 40503 + layer * 2246822519
    lots = ((lots ^ (lots >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF
    lots = ((lots ^ (lots >> 13)) * 0x2C1B3C6D) & 0x7FFFFFFF
    tl.store(lots_ptr + layer * num_tokens + tokens, lots, mask=inside)


def launch_choose(
    logits_TE: Tensor, lots_T: Tensor | None, is_padding_T1: Tensor | None, ids_TK: Tensor, scores_TK: Tensor,
    counts_E: Tensor | None,
) -> None:  # fmt: skip
    num_tokens, num_experts = logits_TE.shape
    choose_kernel[(num_tokens,)](
        logits_TE, lots_T, _as_bytes(is_padding_T1), ids_TK, scores_TK, counts_E, num_tokens, num_experts,
        TOP_K=ids_TK.shape[1], UNIFORM=lots_T is not None, PADDED=is_padding_T1 is not None,
        COUNTED=counts_E is not None, BLOCK=triton.next_power_of_2(num_experts), num_warps=1, **early(),
    )  # fmt: skip


def launch_gate(
    x_TD: Tensor, router_ED: Tensor, num_done: Tensor, lots_T: Tensor | None, is_padding_T1: Tensor | None,
    ids_TK: Tensor, scores_TK: Tensor, counts_E: Tensor | None,
) -> None:  # fmt: skip
    """`num_done`: int32, a zero for every GATE_TOKENS tokens."""
    num_tokens, (num_experts, width) = x_TD.shape[0], router_ED.shape
    experts, warps = (16, 4) if num_tokens <= GATE_TOKENS else (32, 8)
    splits = triton.cdiv(width, GATE_INPUTS)
    parts = torch.empty(splits * num_tokens * num_experts, dtype=torch.float32, device=x_TD.device)
    gate_kernel[(splits, triton.cdiv(num_experts, experts), triton.cdiv(num_tokens, GATE_TOKENS))](
        x_TD, router_ED, parts, num_done, lots_T, _as_bytes(is_padding_T1), ids_TK, scores_TK, counts_E,
        num_tokens, num_experts, width,
        TOP_K=ids_TK.shape[1], UNIFORM=lots_T is not None, PADDED=is_padding_T1 is not None,
        COUNTED=counts_E is not None, BLOCK=triton.next_power_of_2(num_experts), TOKENS=GATE_TOKENS, EXPERTS=experts,
        INPUTS=GATE_INPUTS, SPLITS=splits, JOINED=1 if num_tokens == 1 else GATE_TOKENS, num_warps=warps, **early(),
    )  # fmt: skip


def launch_lots(positions_T: Tensor, lots_MT: Tensor) -> None:
    num_layers, num_tokens = lots_MT.shape
    grid = num_layers, triton.cdiv(num_tokens, LOTS_BLOCK)
    lots_kernel[grid](positions_T, lots_MT, num_tokens, BLOCK=LOTS_BLOCK, **early())


def _as_bytes(is_padding_T1: Tensor | None) -> Tensor | None:
    return None if is_padding_T1 is None else is_padding_T1.contiguous().view(torch.int8)
