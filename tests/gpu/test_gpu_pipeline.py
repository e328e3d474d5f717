"""The same pipeline on GPUs gives the tokens that the CPU gives: the tiny model in fp32, real router and ranks."""

import random
from pathlib import Path
from typing import Any

import grpc
import pytest
from service import launch, stop

from actors.checkpoint.shape_models import ensure_shape_model
from benchmarks.engine import Engine
from benchmarks.workload import Item
from cluster.hardware import parse_machines
from protos import inference_pb2, inference_pb2_grpc

VOCAB = 512
RNG = random.Random(7)
# Lengths around the chunk of 32 tokens, and one of several chunks; outputs that cross boundaries.
ITEMS = [Item([RNG.randrange(VOCAB) for _ in range(n)], 40) for n in (1, 31, 32, 33, 64, 150)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_shape_model("tiny", tmp_path_factory.mktemp("models"))


def tokens_of(directory: Path, machines: str, devices: list[str], **keys: object) -> dict[str, list[list[int]]]:
    """Greedy and seeded tokens of all items, sent at once."""
    with Engine(directory, parse_machines(machines), devices, dtype="float32", max_model_len=2048,
                kv_cache_bytes=64 << 20, step_timeout_s=60.0, **keys) as engine:  # fmt: skip
        greedy = engine.run(ITEMS)
        seeded = engine.run(ITEMS, temperature=0.8, top_p=0.9, seed=11)
    assert not [trace.problem for trace in greedy + seeded if trace.problem]
    return {"greedy": [t.token_ids for t in greedy], "seeded": [t.token_ids for t in seeded]}


@pytest.fixture(scope="module")
def cpu_tokens(checkpoint: Path) -> dict[str, list[list[int]]]:
    return tokens_of(checkpoint, "cpu", ["cpu"], layout="single", threads_per_rank=4)


@pytest.mark.gpu(devices=1)
@pytest.mark.timeout(300)
def test_one_gpu_gives_the_tokens_of_the_cpu(checkpoint: Path, cpu_tokens: dict[str, list[list[int]]]) -> None:
    assert tokens_of(checkpoint, "1xH200", ["cuda:0"], layout="single") == cpu_tokens


@pytest.mark.gpu(devices=2)
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "keys",
    [
        {"layout": "disaggregated"},
        {"layout": "disaggregated", "enforce_eager": True},  # over NCCL alone
        {"layout": "colocated", "attention_ranks": 2},
        {"layout": "colocated", "attention_tp": 2},
        {"layout": "colocated", "attention_tp": 2, "expert_slots": 6},
        {"layout": "colocated", "attention_tp": 2, "expert_tp": 2},
    ],
    ids=lambda keys: " ".join(map(str, keys.values())),
)
def test_two_gpus_give_the_tokens_of_the_cpu(
    checkpoint: Path, cpu_tokens: dict[str, list[list[int]]], keys: dict[str, Any]
) -> None:
    assert tokens_of(checkpoint, "2xH200", ["cuda:0", "cuda:1"], **keys) == cpu_tokens


@pytest.mark.gpu(devices=2)
@pytest.mark.timeout(300)
def test_long_prompts_in_parts_give_the_tokens_of_the_cpu(checkpoint: Path) -> None:
    """A step of 8,000 tokens and one of the rest, among single rows: sums of some rows run beside the others'."""
    items = [Item([RNG.randrange(VOCAB) for _ in range(n)], 6) for n in (5, 3000, 2500, 2500, 1900)]
    pipelines: list[tuple[str, list[str], dict[str, Any]]] = [
        ("cpu", ["cpu"], {"layout": "single", "threads_per_rank": 4}),
        ("2xH200", ["cuda:0", "cuda:1"], {"layout": "colocated", "attention_tp": 2}),
    ]
    tokens = []
    for machines, devices, keys in pipelines:
        with Engine(checkpoint, parse_machines(machines), devices, dtype="float32", max_model_len=4096,
                    max_num_batched_tokens=8000, kv_cache_bytes=64 << 20, step_timeout_s=60.0,
                    **keys) as engine:  # fmt: skip
            traces = engine.run(items)
        assert not [trace.problem for trace in traces if trace.problem]
        tokens.append([trace.token_ids for trace in traces])
    assert tokens[0] == tokens[1]


@pytest.mark.gpu(devices=2)
@pytest.mark.timeout(300)
def test_steps_in_halves_give_the_tokens_of_whole_steps(checkpoint: Path) -> None:
    """More requests at once than a step may have before it is divided."""
    items = ITEMS * 4
    tokens = []
    for micro_batches in (1, 2):
        with Engine(checkpoint, parse_machines("2xH200"), ["cuda:0", "cuda:1"], dtype="float32", max_model_len=2048,
                    kv_cache_bytes=64 << 20, step_timeout_s=60.0, layout="disaggregated",
                    micro_batches=micro_batches, micro_batch_rows=16) as engine:  # fmt: skip
            traces = engine.run(items)
        assert not [trace.problem for trace in traces if trace.problem]
        tokens.append([trace.token_ids for trace in traces])
    assert tokens[0] == tokens[1]


@pytest.mark.gpu(devices=2)
@pytest.mark.timeout(400)
def test_a_request_over_grpc_is_answered_from_two_gpus(tmp_path: Path, cpu_tokens: dict[str, list[list[int]]]) -> None:
    flags = ["--layout", "disaggregated", "--device", "cuda", "--dtype", "float32", "--max-model-len", "2048"]
    service = launch(tmp_path, "shape:tiny", flags)
    try:
        with grpc.insecure_channel(service.grpc_address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            for item, expected in zip(ITEMS, cpu_tokens["greedy"], strict=True):
                request = inference_pb2.GenerateRequest(
                    token_ids=inference_pb2.TokenIds(ids=item.prompt_ids),
                    sampling=inference_pb2.Sampling(temperature=0),
                    stopping=inference_pb2.Stopping(max_tokens=item.num_outputs, ignore_eos=True),
                )
                chunks = list(stub.GenerateStream(request, timeout=60))
                assert [i for chunk in chunks for i in chunk.token_ids] == expected
    finally:
        stop(service)
