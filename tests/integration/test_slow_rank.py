"""A rank that answers every beat and yet holds up every step, because its process gets a tenth of the time it needs."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.checkpoint.shape_models import ensure_shape_model
from benchmarks.engine import Engine
from benchmarks.workload import Item

RNG = random.Random(11)
ITEMS = [Item([RNG.randrange(250) for _ in range(24)], 40) for _ in range(8)]
STOPPED_S, RUNNING_S = 0.036, 0.004
FOUND_WITHIN_S = 60.0


class Brake(threading.Thread):
    """Stops a process and lets it go on, in turns, until it is gone."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self.began_s = time.monotonic()

    def run(self) -> None:
        try:
            while True:
                os.kill(self._pid, signal.SIGSTOP)
                time.sleep(STOPPED_S)
                os.kill(self._pid, signal.SIGCONT)
                time.sleep(RUNNING_S)
        except ProcessLookupError:
            return


@pytest.mark.timeout(240)
def test_a_slowed_expert_rank_is_replaced_under_load(tmp_path: Path) -> None:
    directory = ensure_shape_model("tiny", tmp_path)
    scaling = {"rebalance": False, "slow_rank_s": 2.0, "slow_rank_factor": 3.0}
    with Engine(directory, layout="disaggregated", expert_ranks=3, threads_per_rank=1, max_model_len=512,
                kv_cache_bytes=32 << 20, scaling=scaling) as engine:  # fmt: skip
        expected = [trace.token_ids for trace in engine.run(ITEMS)]
        slow = max(engine.fleet.processes)  # a number that only an expert rank has
        engine.run_closed_loop(ITEMS, 4, until(time.monotonic() + 4.0))
        assert slow in engine.fleet.processes, "it was as fast as its peers until now"
        brake = Brake(engine.fleet.processes[slow].pid or 0)
        brake.start()
        ends_s = time.monotonic() + FOUND_WITHIN_S
        done = engine.run_closed_loop(ITEMS, 4, lambda: slow in engine.fleet.processes and time.monotonic() < ends_s)
        assert slow not in engine.fleet.processes, engine.router.snapshot["ranks"]
        print(f"replaced after {time.monotonic() - brake.began_s:.1f} s")
        time.sleep(1.5)  # the snapshot is about a second old
        whys = [change["why"] for change in engine.router.snapshot["changes"] if not change["problem"]]
        assert any(f"rank {slow} is slow" in why for why in whys), whys
        assert not [trace.problem for _, trace in done if trace.problem]
        assert all(trace.token_ids == expected[number] for number, trace in done)
        assert engine.status().kv_used_fraction == 0.0
    brake.join(10)
    assert not brake.is_alive()


def until(ends_s: float) -> Callable[[], bool]:
    return lambda: time.monotonic() < ends_s
