"""Two ranks that share one attention: seeded tokens are a single rank's, also when a member dies on the way."""

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from forked import forked_engine

from actors.checkpoint.shape_models import ensure_shape_model
from benchmarks.engine import Engine
from benchmarks.workload import Item

RNG = random.Random(11)
ITEMS = [Item([RNG.randrange(500) for _ in range(n)], 40) for n in (3, 31, 40, 70)]
KEYS = {"threads_per_rank": 1, "max_model_len": 512, "kv_cache_bytes": 16 << 20, "max_num_batched_tokens": 64}
SAMPLING = {"temperature": 0.8, "seed": 7}
KILL_AFTER_S = 0.3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_shape_model("tiny", tmp_path_factory.mktemp("models"))


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("expert_tp", "lost_shards"),
    [(1, (1, 0)), (2, (0,))],  # the one that follows, then the one that leads; slices have no replicas to copy from
)
def test_members_come_and_go_and_the_tokens_stay(
    checkpoint: Path, expert_tp: int, lost_shards: tuple[int, ...]
) -> None:
    with forked_engine(checkpoint, layout="single", **KEYS) as engine:
        expected = [trace.token_ids for trace in engine.run(ITEMS, **SAMPLING)]
    with forked_engine(checkpoint, attention_tp=2, expert_tp=expert_tp, **KEYS) as engine:
        assert [trace.token_ids for trace in engine.run(ITEMS, **SAMPLING)] == expected
        for shard in lost_shards:
            members = await_members(engine)
            victim = next(rank["rank"] for rank in members if tuple(rank["shard"]) == (shard, 2))
            before = engine.status().epoch
            timer = threading.Timer(KILL_AFTER_S, engine.fleet.processes[victim].kill)
            timer.start()
            began_s, runs = time.monotonic(), 0
            while engine.status().epoch == before or not runs:
                traces = engine.run(ITEMS, **SAMPLING)
                assert not [trace.problem for trace in traces if trace.problem]
                assert [trace.token_ids for trace in traces] == expected
                runs += 1
                assert time.monotonic() - began_s < 60
            timer.join()
            assert victim not in [rank["rank"] for rank in await_members(engine)]
        status = engine.status()
        assert (status.num_running, status.num_queued, status.kv_used_fraction) == (0, 0, 0.0)


def await_members(engine: Engine) -> list[dict[str, Any]]:
    """The ranks of the epoch that serves now. The state for people is about a second old."""
    ends_s = time.monotonic() + 20
    while not (seen := engine.router.snapshot).get("serving") or seen["epoch"] != engine.status().epoch:
        assert time.monotonic() < ends_s
        time.sleep(0.1)
    members: list[dict[str, Any]] = seen["ranks"]
    return members
