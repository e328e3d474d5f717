"""The sampler on CUDA gives the CPU's tokens and never waits for the device before it is asked to."""

import pytest
import torch

from actors.attention.sampler import SampledBatch, Sampler
from actors.types import SamplingParams

pytestmark = pytest.mark.gpu

VOCAB_SIZE = 202048
CUDA = torch.device("cuda")
FEATURES: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.2, "top_k": 40, "num_logprobs": 5},
    {"temperature": 1.0, "top_k": 2000, "top_p": 0.95, "min_p": 0.001},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 0.9, "presence_penalty": 1.0, "logit_bias": ((5, 4.0),)},
    {"temperature": 0.9, "min_tokens": 2, "stop_token_ids": (1, 2, 3)},
]


def run(device: torch.device, logits_BV: torch.Tensor, num_steps: int) -> list[SampledBatch]:
    sampler = Sampler(VOCAB_SIZE, device)
    request_idxs = list(range(len(logits_BV)))
    for request_idx in request_idxs:
        features = FEATURES[request_idx % len(FEATURES)]
        sampler.admit(request_idx, (1, 2), (3,), SamplingParams(max_tokens=9, seed=request_idx << 40, **features))
    return [sampler.sample(logits_BV.roll(step, dims=1), request_idxs) for step in range(num_steps)]


@pytest.mark.parametrize("num_requests", [1, 3, 64])
def test_tokens_equal_the_cpus_without_a_wait(num_requests: int) -> None:
    logits_BV = (torch.randn(num_requests, VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 3).bfloat16()
    on_device = logits_BV.to(CUDA)
    run(CUDA, on_device, 1)[0].to_tokens()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = run(CUDA, on_device, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, expected in zip(batches, run(torch.device("cpu"), logits_BV, 3), strict=True):
        for got, want in zip(ours.to_tokens(), expected.to_tokens(), strict=True):
            assert got.token_id == want.token_id
            assert got.logprob == pytest.approx(want.logprob, abs=1e-4)
            assert [i for i, _ in got.top_logprobs] == [i for i, _ in want.top_logprobs]


def test_broken_rows_do_not_bring_the_device_down() -> None:
    logits_BV = torch.randn(24, VOCAB_SIZE, device=CUDA)
    logits_BV[8:16, 100] = torch.nan
    logits_BV[16:24] = -torch.inf
    for batch in run(CUDA, logits_BV, 2):
        assert all(0 <= token.token_id < VOCAB_SIZE for token in batch.to_tokens())
    torch.cuda.synchronize()
