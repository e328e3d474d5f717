"""Cases of the attention-side kernels, each beside a slow double-precision answer that shares no code with them.

Run on a CPU through the references, on a CPU through Triton's interpreter, and on a GPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.kernels import decode_attention, heads, norm, prompt_attention
from actors.kernels.decode_attention import DecodeScratch, NewestTokens, PagedContext
from actors.kernels.heads import Heads
from actors.kernels.prompt_attention import TILE_ROWS
from actors.kernels.step_inputs import PageTable

TINY = Heads(num_heads=10, num_kv_heads=2, head_dim=16, qk_norm_eps=1e-5)
SCOUT = Heads(num_heads=40, num_kv_heads=8, head_dim=128, qk_norm_eps=1e-5)
SCOUT_QUARTER = Heads(num_heads=10, num_kv_heads=2, head_dim=128, qk_norm_eps=1e-5)
# Relative to values of about 1: results are rounded once to the dtype, bf16 intermediate casts cost another rounding.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """The functions under test; `decode` has the signature of `decode_attention`."""

    add_rms_norm: Callable[..., Tensor]
    store_heads: Callable[..., None]
    decode: Callable[..., Tensor]
    store_and_attend: Callable[..., Tensor]
    prompts: Callable[..., None]


PUBLIC = Implementation(
    add_rms_norm=norm.add_rms_norm,
    store_heads=heads.store_heads,
    decode=decode_attention.decode_attention,
    store_and_attend=decode_attention.store_and_attend,
    prompts=prompt_attention.prompt_attention,
)


def check_norm(
    do: Implementation, device: torch.device, dtype: torch.dtype, num_rows: int, width: int, num_deltas: int
) -> None:
    generator = torch.Generator().manual_seed(num_rows * width + num_deltas)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    h_TD, weight_D = make(num_rows, width), make(width)
    deltas = [make(num_rows, width + 16)[:, :width] for _ in range(num_deltas)]  # rows of another stride than h's
    total_TD = h_TD.double()
    if deltas:
        added_TD = deltas[0] if num_deltas == 1 else (deltas[0].double() + deltas[1].double()).to(dtype)
        total_TD = (total_TD + added_TD.double()).to(dtype).double()
    expected_TD = total_TD / (total_TD.square().mean(1, keepdim=True) + 1e-5).sqrt()

    on_device = h_TD.to(device)
    given = [delta.to(device) for delta in deltas] + [None] * (2 - num_deltas)
    x_TD = do.add_rms_norm(on_device, given, weight_D.to(device), 1e-5)
    assert x_TD.dtype == dtype
    torch.testing.assert_close(on_device.cpu().double(), total_TD, rtol=1e-6, atol=1e-6)  # every rounding as promised
    tolerance = TOLERANCES[dtype] / 3
    torch.testing.assert_close(x_TD.cpu().double(), expected_TD * weight_D.double(), rtol=tolerance, atol=tolerance)


def check_heads(
    do: Implementation,
    device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    shape: Heads,
    num_tokens: int,
    rotates: bool,
) -> None:
    generator = torch.Generator().manual_seed(num_tokens + 7 * rotates)
    num_all, head_dim = shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim
    qkv_THd = torch.randn(num_tokens, num_all, head_dim, generator=generator).to(dtype)
    qkv_THd[-1:, -1, 0] = 1000.0  # more than float8 holds
    angles_TR = torch.rand(num_tokens, head_dim // 2, generator=generator) * 100
    rotations_TR2 = torch.stack((angles_TR.cos(), angles_TR.sin()), -1)
    temperatures_T = torch.rand(num_tokens, generator=generator) + 1
    num_slots = 3 * num_tokens + 1
    slots_T = torch.randperm(num_slots, generator=generator)[:num_tokens]
    slots_T[1::3] = -1
    tokens_NHd = torch.full((num_slots, 2 * shape.num_kv_heads, head_dim), 0.5).to(cache_dtype)

    expected_THd = _ready_heads(qkv_THd, shape, rotations_TR2 if rotates else None, temperatures_T)
    kept = expected_THd[:, shape.num_heads :].to(dtype).float()
    expected_NHd = torch.full(tokens_NHd.shape, 0.5)
    for token, slot in enumerate(slots_T.tolist()):
        if slot >= 0:
            expected_NHd[slot] = kept[token]

    qkv_TN, on_device = qkv_THd.flatten(1).to(device), tokens_NHd.to(device)
    do.store_heads(
        qkv_TN, on_device, slots_T.to(device), shape,
        rotations_TR2.to(device) if rotates else None, None if rotates else temperatures_T.to(device),
    )  # fmt: skip
    tolerance = TOLERANCES[dtype] / 2
    torch.testing.assert_close(qkv_TN.cpu().view_as(qkv_THd).double(), expected_THd, rtol=tolerance, atol=tolerance)
    stored_NHd = on_device.cpu().float()
    if cache_dtype == torch.float8_e4m3fn:
        expected_NHd, tolerance = expected_NHd.clamp(-448, 448), 0.13  # three bits of mantissa, and the dtype's own
    torch.testing.assert_close(stored_NHd, expected_NHd, rtol=tolerance, atol=tolerance)


def _ready_heads(qkv_THd: Tensor, shape: Heads, rotations_TR2: Tensor | None, temperatures_T: Tensor) -> Tensor:
    """Double precision throughout but for the cast between rotation and norm."""
    ready_THd = qkv_THd.double()
    if rotations_TR2 is None:
        ready_THd[:, : shape.num_heads] *= temperatures_T.double()[:, None, None]
        return ready_THd
    num_qk = shape.num_heads + shape.num_kv_heads
    cos_TR, sin_TR = rotations_TR2.double().unbind(-1)
    even, odd = qkv_THd[:, :num_qk, 0::2].double(), qkv_THd[:, :num_qk, 1::2].double()
    ready_THd[:, :num_qk, 0::2] = even * cos_TR[:, None] - odd * sin_TR[:, None]
    ready_THd[:, :num_qk, 1::2] = even * sin_TR[:, None] + odd * cos_TR[:, None]
    if shape.qk_norm_eps is not None:
        rounded = ready_THd[:, :num_qk].to(qkv_THd.dtype).double()
        ready_THd[:, :num_qk] = rounded / (rounded.square().mean(-1, keepdim=True) + shape.qk_norm_eps).sqrt()
    return ready_THd


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCase:
    """Positions of the rows (-1: padding), and how their pages lie."""

    positions: tuple[int, ...]
    page_tokens: int = 16
    chunk_tokens: int = 0
    table_width: int = 8


def check_decode(
    do: Implementation,
    device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    shape: Heads,
    case: DecodeCase,
    num_shares: int | None = None,
) -> None:
    generator = torch.Generator().manual_seed(sum(case.positions))
    num_rows, page_tokens = len(case.positions), case.page_tokens
    num_seats = num_rows + 2
    table_SW = torch.full((num_seats, case.table_width), 1 << 30, dtype=torch.int32)  # what is not granted is far away
    seats = torch.randperm(num_seats, generator=generator)[:num_rows]
    starts = [p - p % case.chunk_tokens if case.chunk_tokens else 0 for p in case.positions]
    needed = [sorted({n // page_tokens for n in range(a, p + 1)}) for a, p in zip(starts, case.positions, strict=True)]
    free = torch.randperm(1 + sum(map(len, needed)), generator=generator).tolist()
    num_pages = len(free)
    shape_PSHd = (num_pages, page_tokens, 2 * shape.num_kv_heads, shape.head_dim)
    pages_PSHd = torch.randn(shape_PSHd, generator=generator).to(cache_dtype)
    for row, (numbers, position) in enumerate(zip(needed, case.positions, strict=True)):
        for number in numbers:
            table_SW[seats[row], number % case.table_width] = free.pop()
        if position >= 0 and cache_dtype != torch.float8_e4m3fn:
            last = int(table_SW[seats[row], numbers[-1] % case.table_width])
            pages_PSHd[last, position % page_tokens + 1 :] = torch.nan  # what the page's last owner left
    qkv_BHd = torch.randn(num_rows, shape.num_heads + 5, shape.head_dim, generator=generator).to(dtype)
    q_BHd = qkv_BHd[:, : shape.num_heads]
    expected_BHd = torch.zeros(q_BHd.shape, dtype=torch.float64)
    for row, (start, position) in enumerate(zip(starts, case.positions, strict=True)):
        for head in range(shape.num_heads if position >= 0 else 0):
            kv_head = head // shape.queries_per_kv
            where = [(int(table_SW[seats[row], n // page_tokens % case.table_width]), n % page_tokens)
                     for n in range(start, position + 1)]  # fmt: skip
            at_P, at_S = torch.tensor(where).unbind(1)
            k_Ld = pages_PSHd[at_P, at_S, kv_head].double()
            v_Ld = pages_PSHd[at_P, at_S, shape.num_kv_heads + kv_head].double()
            scores_L = k_Ld @ q_BHd[row, head].double() / math.sqrt(shape.head_dim)
            expected_BHd[row, head] = scores_L.softmax(0) @ v_Ld

    positions_B = torch.tensor(case.positions)
    seats_B = torch.where(positions_B < 0, -1, seats).int()
    context = PagedContext(
        seats_B=seats_B.to(device),
        positions_B=positions_B.to(device),
        table=PageTable(pages_SW=table_SW.to(device), page_tokens=page_tokens),
        chunk_tokens=case.chunk_tokens,
    )
    scratch = DecodeScratch(shape, num_rows, device, num_shares)
    q_on_device = qkv_BHd.to(device)[:, : shape.num_heads]
    pages_on_device = pages_PSHd.to(device)
    for _ in range(2):  # the second launch finds the counters as the first left them
        out_BA = do.decode(q_on_device, pages_on_device, context, shape, scratch)
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(out_BA.cpu().double(), expected_BHd.flatten(1), rtol=tolerance, atol=tolerance)
    assert not scratch.num_finished.any()


def check_store_and_attend(
    do: Implementation,
    device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    shape: Heads,
    case: DecodeCase,
    rotates: bool,
    num_shares: int | None = None,
) -> None:
    """Against the references of its two halves, which have slow answers of their own; and what is kept."""
    generator = torch.Generator().manual_seed(len(case.positions))
    num_rows, page_tokens, width = len(case.positions), case.page_tokens, case.table_width
    pages_PSHd = torch.randn(num_rows * width, page_tokens, 2 * shape.num_kv_heads, shape.head_dim, generator=generator)
    pages_PSHd = pages_PSHd.to(cache_dtype)
    table_SW = torch.randperm(num_rows * width, generator=generator).view(num_rows, width).int()
    positions_B = torch.tensor(case.positions)
    seats_B = torch.where(positions_B < 0, -1, torch.arange(num_rows)).int()
    page_B = table_SW[torch.arange(num_rows), positions_B.clamp(min=0) // page_tokens % width]
    slots_B = torch.where(positions_B < 0, -1, page_B * page_tokens + positions_B % page_tokens)
    num_all = shape.num_heads + 2 * shape.num_kv_heads
    qkv_BN = torch.randn(num_rows, num_all * shape.head_dim, generator=generator).to(dtype)
    angles_BR = torch.rand(num_rows, shape.head_dim // 2, generator=generator) * 100
    rotations_BR2 = torch.stack((angles_BR.cos(), angles_BR.sin()), -1) if rotates else None
    temperatures_B = None if rotates else torch.rand(num_rows, generator=generator) + 1

    results = []
    for function, where in ((decode_attention.store_and_attend, torch.device("cpu")), (do.store_and_attend, device)):
        kept_PSHd = pages_PSHd.clone().to(where)
        newest = NewestTokens(
            write_slots_B=slots_B.to(where),
            rotations_BR2=None if rotations_BR2 is None else rotations_BR2.to(where),
            temperatures_B=None if temperatures_B is None else temperatures_B.to(where),
        )
        context = PagedContext(
            seats_B=seats_B.to(where), positions_B=positions_B.to(where),
            table=PageTable(pages_SW=table_SW.to(where), page_tokens=page_tokens), chunk_tokens=case.chunk_tokens,
        )  # fmt: skip
        scratch = DecodeScratch(shape, num_rows, where, num_shares)
        out_BA = function(qkv_BN.clone().to(where), kept_PSHd, newest, context, shape, scratch)
        results.append((out_BA.cpu().double(), kept_PSHd.cpu().float()))
    (expected_BA, expected_PSHd), (out_BA, kept_PSHd) = results
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out_BA, expected_BA, rtol=tolerance, atol=tolerance)
    near = 0.13 if cache_dtype == torch.float8_e4m3fn else tolerance / 2
    torch.testing.assert_close(kept_PSHd, expected_PSHd, rtol=near, atol=near)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCase:
    """Pieces of requests: first position and number of tokens. `num_singles` rows lie before them."""

    pieces: tuple[tuple[int, int], ...]
    num_singles: int = 0
    page_tokens: int = 16
    chunk_tokens: int = 0
    table_width: int = 8


def check_prompts(
    do: Implementation,
    device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    shape: Heads,
    case: PromptCase,
) -> None:
    """Rows of prompts get the slow answer, all others are left alone."""
    generator = torch.Generator().manual_seed(sum(map(sum, case.pieces)))
    num_seats, width, page_tokens = len(case.pieces) + 2, case.table_width, case.page_tokens
    pages_PSHd = torch.randn(
        num_seats * width, page_tokens, 2 * shape.num_kv_heads, shape.head_dim, generator=generator
    ).to(cache_dtype)
    table_SW = torch.randperm(num_seats * width, generator=generator).view(num_seats, width).int()
    if cache_dtype != torch.float8_e4m3fn:
        for seat, (start, num_tokens) in enumerate(case.pieces):  # what the page's last owner left
            page = int(table_SW[seat, (start + num_tokens - 1) // page_tokens % width])
            pages_PSHd[page, (start + num_tokens - 1) % page_tokens + 1 :] = torch.nan
    firsts, row = [], case.num_singles
    for _, num_tokens in case.pieces:
        firsts.append(-(-row // TILE_ROWS) * TILE_ROWS)
        row = firsts[-1] + num_tokens
    num_rows = row + 3
    seats_T = torch.full((num_rows,), -1, dtype=torch.int32)
    positions_T = torch.zeros(num_rows, dtype=torch.int64)
    qkv_THd = torch.randn(num_rows, shape.num_heads + 5, shape.head_dim, generator=generator).to(dtype)
    expected_THd = torch.full((num_rows, shape.num_heads, shape.head_dim), 7.0, dtype=torch.float64)
    for seat, ((start, num_tokens), first) in enumerate(zip(case.pieces, firsts, strict=True)):
        seats_T[first : first + num_tokens] = seat
        positions_T[first : first + num_tokens] = torch.arange(start, start + num_tokens)
        begin = start - start % case.chunk_tokens if case.chunk_tokens else 0
        where = torch.arange(begin, start + num_tokens)
        kv_LHd = pages_PSHd[table_SW[seat][where // page_tokens % width].long(), where % page_tokens].double()
        k_HLd, v_HLd = kv_LHd.repeat_interleave(shape.queries_per_kv, 1).transpose(0, 1).chunk(2)
        q_HQd = qkv_THd[first : first + num_tokens, : shape.num_heads].double().transpose(0, 1)
        scores_HQL = q_HQd @ k_HLd.transpose(1, 2) / math.sqrt(shape.head_dim)
        unseen_QL = where[None] > torch.arange(start, start + num_tokens)[:, None]
        shares_HQL = scores_HQL.masked_fill(unseen_QL, -math.inf).softmax(-1)
        expected_THd[first : first + num_tokens] = (shares_HQL @ v_HLd).transpose(0, 1)
    context = PagedContext(
        seats_B=seats_T.to(device), positions_B=positions_T.to(device),
        table=PageTable(pages_SW=table_SW.to(device), page_tokens=page_tokens), chunk_tokens=case.chunk_tokens,
    )  # fmt: skip
    out_TA = torch.full((num_rows, shape.num_heads * shape.head_dim), 7.0, dtype=dtype, device=device)
    do.prompts(qkv_THd.to(device)[:, : shape.num_heads], pages_PSHd.to(device), context, shape, out_TA)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out_TA.cpu().double(), expected_THd.flatten(1), rtol=tolerance, atol=tolerance)


PROMPT_CASES = (
    PromptCase(pieces=((0, 5),)),
    PromptCase(pieces=((0, 16), (30, 33), (0, 2)), num_singles=3),
    PromptCase(pieces=((64, 17), (100, 27), (0, 64)), chunk_tokens=64, table_width=4),
    PromptCase(pieces=((700, 68), (640, 128)), num_singles=17, chunk_tokens=128, table_width=9),  # more than a chunk
)
