"""The references of the attention-side kernels, which are what runs on a CPU, give the slow answers."""

import attention_cases as cases
import pytest
import torch

from actors.kernels.norm import add_rms_norm

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("num_deltas", [0, 1, 2])
@pytest.mark.parametrize(("dtype", "width"), [(FP32, 96), (BF16, 96), (BF16, 5120)])
def test_norm(dtype: torch.dtype, width: int, num_deltas: int) -> None:
    cases.check_norm(cases.PUBLIC, CPU, dtype, 3, width, num_deltas)


def test_norm_refuses_what_it_cannot_add() -> None:
    h_TD = torch.zeros(1, 16)
    with pytest.raises(ValueError, match="3 additions"):
        add_rms_norm(h_TD, [h_TD, h_TD, h_TD], h_TD[0], 1e-5)


@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize(("dtype", "cache_dtype"), [(FP32, FP32), (BF16, BF16), (BF16, FP8)])
def test_heads(dtype: torch.dtype, cache_dtype: torch.dtype, rotates: bool) -> None:
    cases.check_heads(cases.PUBLIC, CPU, dtype, cache_dtype, cases.TINY, 4, rotates)


@pytest.mark.parametrize(("dtype", "cache_dtype"), [(FP32, FP32), (BF16, FP8)])
@pytest.mark.parametrize(
    "case",
    [
        cases.DecodeCase(positions=(0, 37, -1, 15, 16)),
        cases.DecodeCase(positions=(63, 64, 65, 700), chunk_tokens=64, table_width=4),
        cases.DecodeCase(positions=(100,), chunk_tokens=64, table_width=5),  # a ring that a chunk does not divide
    ],
)
def test_decode(dtype: torch.dtype, cache_dtype: torch.dtype, case: cases.DecodeCase) -> None:
    cases.check_decode(cases.PUBLIC, CPU, dtype, cache_dtype, cases.TINY, case)


@pytest.mark.parametrize(("dtype", "cache_dtype"), [(FP32, FP32), (BF16, FP8)])
@pytest.mark.parametrize("case", cases.PROMPT_CASES)
def test_prompts(dtype: torch.dtype, cache_dtype: torch.dtype, case: cases.PromptCase) -> None:
    cases.check_prompts(cases.PUBLIC, CPU, dtype, cache_dtype, cases.TINY, case)
