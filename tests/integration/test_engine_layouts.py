"""Every layout, real processes and real groups: the tokens that transformers generates, and a clean state after."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import forked_engine
from transformers import AutoModelForCausalLM

from actors.checkpoint.shape_models import ensure_shape_model
from benchmarks.workload import Item

RNG = random.Random(5)
# The tiny shapes' chunk is 32 tokens: lengths around its boundaries, outputs that cross the next.
ITEMS = [Item([RNG.randrange(500) for _ in range(n)], 24) for n in (1, 15, 31, 32, 33, 63, 64, 65, 100, 161)]
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {"layout": "single"},
    "single, prompts in pieces": {"layout": "single", "max_num_batched_tokens": 48},
    "1A+1E": {"layout": "disaggregated"},
    "2A+2E": {"layout": "disaggregated", "attention_ranks": 2, "expert_ranks": 2},
    "1A+2E, two replicas": {"layout": "disaggregated", "expert_ranks": 2, "expert_replicas": 2},
    "colocated": {"layout": "colocated", "attention_ranks": 2},
    "colocated, one attention": {"layout": "colocated", "attention_tp": 2},
    "colocated, one attention, experts in slices": {"layout": "colocated", "attention_tp": 2, "expert_tp": 2},
    "colocated, one attention, replicas": {
        "layout": "colocated",
        "attention_tp": 2,
        "expert_replicas": 2,
        "max_num_batched_tokens": 48,
    },
}


@pytest.fixture(scope="module", params=["tiny", "tiny-scout"])
def expected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A checkpoint, and transformers' greedy tokens one request at a time (it is no oracle for padded batches)."""
    directory = ensure_shape_model(request.param, tmp_path_factory.mktemp("models"))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = []
    for item in ITEMS:
        ids = torch.tensor([item.prompt_ids])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=item.num_outputs,
                min_new_tokens=item.num_outputs, do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        tokens.append(out[0, ids.shape[1] :].tolist())
    return directory, tokens


@pytest.mark.timeout(180)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_tokens_of_transformers(expected: tuple[Path, list[list[int]]], layout: str) -> None:
    directory, tokens = expected
    keys = {"threads_per_rank": 1, "max_model_len": 1024, "kv_cache_bytes": 32 << 20} | LAYOUTS[layout]
    with forked_engine(directory, **keys) as engine:
        traces = engine.run(ITEMS)
        assert not [trace.problem for trace in traces if trace.problem]
        assert [trace.token_ids for trace in traces] == tokens
        status = engine.status()
        assert (status.num_running, status.num_queued, status.kv_used_fraction) == (0, 0, 0.0)


@pytest.mark.timeout(180)
def test_preempted_requests_give_the_same_tokens(expected: tuple[Path, list[list[int]]]) -> None:
    """A cache so small that requests are preempted and computed again."""
    directory, tokens = expected
    with forked_engine(
        directory, layout="single", threads_per_rank=1, max_model_len=256, kv_cache_bytes=1 << 20
    ) as engine:
        traces = engine.run(ITEMS)
        assert [trace.token_ids for trace in traces] == tokens
        assert engine.router.metrics.load is not None
        assert engine.router.status().kv_used_fraction == 0.0
