"""Growth, loss and recovery over NCCL, under load: the tokens stay those of a run that nothing happened to."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.checkpoint.shape_models import ensure_shape_model
from actors.config import ScalingConfig
from benchmarks.engine import Engine
from benchmarks.workload import Item
from cluster.hardware import parse_machines

VOCAB = 512
RNG = random.Random(7)
ITEMS = [Item([RNG.randrange(VOCAB) for _ in range(RNG.randint(1, 150))], 300) for _ in range(8)]
KEYS = {"dtype": "float32", "max_model_len": 2048, "kv_cache_bytes": 64 << 20, "step_timeout_s": 60.0}

pytestmark = [pytest.mark.gpu(devices=2), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_shape_model("tiny", tmp_path_factory.mktemp("models"))


def run_while(engine: Engine, what: str, begin: Callable[[], None], over: Callable[[], bool]) -> None:
    """Keeps the load up from before something happens until it is over; every answer must be the undisturbed one."""
    undisturbed = [trace.token_ids for trace in engine.run(ITEMS)]
    for first in range(0, len(ITEMS), 3):  # in other company, sums round otherwise: what hangs on that proves nothing
        for number, trace in enumerate(engine.run(ITEMS[first : first + 3]), first):
            assert trace.token_ids == undisturbed[number], f"item {number} is on the edge: choose another"
    began_s = time.monotonic()
    state = {"begun": False, "over_s": 0.0}

    def goes_on() -> bool:
        now_s = time.monotonic() - began_s
        if not state["begun"] and now_s > 2.0:
            state["begun"] = True
            begin()
        if state["begun"] and not state["over_s"] and over():
            state["over_s"] = now_s
        assert now_s < 120, engine.status().detail
        return not state["over_s"] or now_s < state["over_s"] + 1.0

    done = engine.run_closed_loop(ITEMS, len(ITEMS), goes_on)
    assert [trace.problem for _, trace in done if trace.problem] == []
    assert {number for number, trace in done if trace.token_ids != undisturbed[number]} == set()
    gaps = sorted(gap for _, trace in done for gap in trace.gaps_s)
    change = [record for record in engine.router.snapshot["changes"] if not record["problem"]][-1]
    longest_ms, usual_ms = gaps[-1] * 1e3, gaps[len(gaps) // 2] * 1e3
    print(f"\n{what}: {len(done)} answers, longest gap {longest_ms:.0f} ms, median {usual_ms:.1f} ms")
    print(f"last change paused steps {change['pause_s'] * 1e3:.0f} ms and took {change['took_s']:.1f} s")


def has_ranks(engine: Engine, number: int, without: int = -1) -> Callable[[], bool]:
    def holds() -> bool:
        ranks = [entry["rank"] for entry in engine.router.snapshot.get("ranks", [])]
        return engine.router.snapshot.get("serving", False) and len(ranks) == number and without not in ranks

    return holds


def test_growth_from_one_gpu_to_two_and_back_and_the_loss_of_one(checkpoint: Path) -> None:
    with Engine(checkpoint, parse_machines("2xH200"), ["cuda:0", "cuda:1"], layout="colocated", attention_ranks=1,
                expert_slots=8, **KEYS) as engine:  # fmt: skip
        bounds = {number: ScalingConfig(min_experts=number, max_experts=number) for number in (1, 2)}
        run_while(engine, "grow 1 -> 2", lambda: engine.scaler.set_bounds(bounds[2]), has_ranks(engine, 2))
        young = max(engine.fleet.processes)
        run_while(
            engine, "kill -9 one of 2", lambda: os.kill(engine.fleet.processes[young].pid or 0, signal.SIGKILL),
            has_ranks(engine, 2, without=young),
        )  # fmt: skip
        run_while(engine, "shrink 2 -> 1", lambda: engine.scaler.set_bounds(bounds[1]), has_ranks(engine, 1))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda how: how.name)
@pytest.mark.parametrize("victim", [0, 1], ids=["attention", "expert"])
def test_the_only_rank_of_a_role_is_replaced(checkpoint: Path, victim: int, how: signal.Signals) -> None:
    with Engine(checkpoint, parse_machines("2xH200"), ["cuda:0", "cuda:1"], layout="disaggregated", **KEYS) as engine:
        pid = engine.fleet.processes[victim].pid or 0
        run_while(
            engine,
            f"{how.name} of rank {victim} of 1A+1E",
            lambda: os.kill(pid, how),
            has_ranks(engine, 2, without=victim),
        )
