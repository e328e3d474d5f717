"""The Triton kernels of the attention side, run by Triton's interpreter, give the slow answers.

Triton reads TRITON_INTERPRET when kernels are defined, so they are defined in a process of their own. Casts to bf16
and float8 are left to the tests on a GPU: the interpreter truncates the one, and loses a carry in the other.
"""

from functools import partial

import attention_cases as cases
import pytest
import torch
from interpreter import mend_interpreter, run_interpreted
from torch import Tensor

from actors.kernels import decode_attention, heads, norm, prompt_attention
from actors.kernels.decode_attention import DecodeScratch, NewestTokens, PagedContext, Tile
from actors.kernels.heads import Heads
from actors.kernels.triton_here import HAS_TRITON

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
FP16, FP32 = torch.float16, torch.float32
LENGTHS = cases.DecodeCase(positions=(0, 37, -1, 79, 16))
LONG = cases.DecodeCase(positions=(1, 700), table_width=44)  # more pieces than are joined at once
RING = cases.DecodeCase(positions=(63, 64, 700, 100), chunk_tokens=64, table_width=5)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


def main() -> None:
    mend_interpreter()
    for dtype, num_deltas in ((FP32, 0), (FP16, 1), (FP16, 2)):
        cases.check_norm(_with_triton(), CPU, dtype, 2, 96, num_deltas)
    for dtype, rotates in ((FP32, True), (FP16, True), (FP16, False)):
        cases.check_heads(_with_triton(), CPU, dtype, dtype, cases.TINY, 4, rotates)
    for case in (LENGTHS, RING):
        for num_shares in (1, 30):
            cases.check_decode(_with_triton(), CPU, FP32, FP32, cases.TINY, case, num_shares)
    cases.check_decode(_with_triton(), CPU, FP16, FP8, cases.TINY, LONG, num_shares=40)
    for case, rotates, num_shares in (
        (LENGTHS, True, 30),
        (RING, False, 1),
        (cases.DecodeCase(positions=(33,)), True, 9),
    ):
        cases.check_store_and_attend(_with_triton(), CPU, FP32, FP32, cases.TINY, case, rotates, num_shares)
    for case in cases.PROMPT_CASES[1:3]:
        cases.check_prompts(_with_triton(), CPU, FP32, FP32, cases.TINY, case)
    cases.check_prompts(_with_triton(), CPU, FP16, FP8, cases.TINY, cases.PROMPT_CASES[0])


def _add_rms_norm(h_TD: Tensor, deltas: list[Tensor | None], weight_D: Tensor, eps: float) -> Tensor:
    return norm._with_triton(h_TD, [delta for delta in deltas if delta is not None], weight_D, eps)


def _with_triton() -> cases.Implementation:
    tile = Tile(keys=16, warps=4, stages=1, least_keys=16)
    return cases.Implementation(
        add_rms_norm=_add_rms_norm,
        store_heads=heads._with_triton,
        decode=partial(decode_attention._with_triton, tile=tile),
        store_and_attend=partial(_store_and_attend, tile),
        prompts=prompt_attention._with_triton,
    )


def _store_and_attend(
    tile: Tile, qkv_BN: Tensor, pages_PSHd: Tensor, newest: NewestTokens, context: PagedContext, shape: Heads,
    scratch: DecodeScratch,
) -> Tensor:  # fmt: skip
    qkv_BHd = qkv_BN.view(qkv_BN.shape[0], -1, shape.head_dim)
    return decode_attention._with_triton(qkv_BHd, pages_PSHd, context, shape, scratch, newest, tile)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
