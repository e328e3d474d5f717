"""Decode graphs and mixed steps in bf16 on a GPU, against steps without graphs and against a CPU in fp32."""

from pathlib import Path

import pytest
import torch

from actors.attention.local_model import LocalModel
from actors.checkpoint.shape_models import ensure_shape_model
from actors.config import PipelineConfig
from actors.types import Admission, RankPlan, SamplingParams, Work

BATCH, PROMPT, STEPS = 8, 40, 60  # the chunk of 64 tokens ends within both
GREEDY = SamplingParams(max_tokens=10**6, temperature=0.0)
pytestmark = pytest.mark.gpu(devices=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_shape_model("bench-maverick", tmp_path_factory.mktemp("models"))


def load(directory: Path, device: str, **keys: object) -> LocalModel:
    values = {"model": str(directory), "kv_cache_bytes": 64 << 20, "max_model_len": 1024, "max_num_seqs": 16} | keys
    return LocalModel.load(PipelineConfig.parse(values), torch.device(device))


def prompt_ids(idx: int, vocab_size: int, num_tokens: int = PROMPT) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(idx)
    return tuple(torch.randint(vocab_size, (num_tokens,), generator=generator).tolist())


def greedy_tokens(model: LocalModel, batch: int, steps: int = STEPS) -> list[list[int]]:
    """Tokens of `batch` requests that decode side by side after one mixed step each."""
    model.start_epoch()
    size = model.pools.page_tokens
    pages_each = -(-(PROMPT + steps) // size)
    tokens = []
    for idx in range(batch):
        pages = tuple(range(idx * pages_each, (idx + 1) * pages_each))
        ids = prompt_ids(idx, model.config.vocab_size)
        admission = Admission(request_idx=idx, prompt_ids=ids, output_ids=(), sampling=GREEDY)
        work = Work(
            request_idx=idx, start=0, num_tokens=PROMPT, samples=True, global_pages=pages, chunked_pages=pages
        )  # fmt: skip
        (token,) = model.attention.step(RankPlan(admitted=(admission,), work=(work,)))
        tokens.append([token.token_id])
    for step in range(steps - 1):
        work = tuple(Work(request_idx=idx, start=PROMPT + step, num_tokens=1, samples=True) for idx in range(batch))
        for token in model.attention.step(RankPlan(work=work)):
            tokens[token.request_idx].append(token.token_id)
    return tokens


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_graphs_give_the_tokens_of_steps_without_them(checkpoint: Path, kv_cache_dtype: str) -> None:
    eager = load(checkpoint, "cuda:0", dtype="bfloat16", enforce_eager=True, kv_cache_dtype=kv_cache_dtype)
    expected = greedy_tokens(eager, BATCH)
    graphs = load(checkpoint, "cuda:0", dtype="bfloat16", kv_cache_dtype=kv_cache_dtype)
    assert graphs.attention._decode is not None and eager.attention._decode is None
    assert greedy_tokens(graphs, BATCH) == expected


def test_fp32_graphs_give_the_tokens_of_the_cpu(checkpoint: Path) -> None:
    """5 requests run as 8 rows."""
    expected = greedy_tokens(load(checkpoint, "cpu", dtype="float32"), 5)
    assert greedy_tokens(load(checkpoint, "cuda:0", dtype="float32"), 5) == expected


@pytest.mark.parametrize("sizes", [[150], [70, 80], [150 - 20, *[1] * 20]])
def test_bf16_distributions_are_near_those_of_fp32(checkpoint: Path, sizes: list[int]) -> None:
    """Mean divergence over positions; near ties of the gate fall otherwise in bf16, so single positions may be off."""
    exact = load(checkpoint, "cpu", dtype="float32")
    ids = prompt_ids(3, exact.config.vocab_size, 150)
    log_p = exact.logits(ids).log_softmax(-1)
    log_q = load(checkpoint, "cuda:0", dtype="bfloat16").logits(ids, sizes).float().cpu().log_softmax(-1)
    divergence_T = (log_p.exp() * (log_p - log_q)).sum(-1)
    print(f"mean divergence {divergence_T.mean():.5f}, median {divergence_T.median():.6f}")
    assert divergence_T.median() < 0.01
    assert (log_p.argmax(-1) == log_q.argmax(-1)).float().mean() > 0.85
