"""A rank that answers every beat and yet holds up every step, because its process may use little of a core."""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked import forked_engine

from actors.checkpoint.shape_models import ensure_shape_model
from benchmarks.engine import Engine
from benchmarks.workload import Item

RNG = random.Random(11)
ITEMS = [Item([RNG.randrange(250) for _ in range(24)], 40) for _ in range(8)]
PERIOD_US, QUOTA_US = 100_000, 2_000  # with less, the eight steps that are compared would take long
FOUND_WITHIN_S = 90.0
V1, V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")


@contextmanager
def throttled() -> Iterator[Callable[[int], None]]:
    """Gives a function that allows a process 2% of a core. Skips where this machine has no such limits."""
    name = f"corral-test-{os.getpid()}"
    folder, limits = (
        (V1 / name, {"cpu.cfs_period_us": str(PERIOD_US), "cpu.cfs_quota_us": str(QUOTA_US)})
        if (V1 / "cpu.cfs_quota_us").exists() or (V1 / "tasks").exists()
        else (V2 / name, {"cpu.max": f"{QUOTA_US} {PERIOD_US}"})
    )
    try:
        folder.mkdir()
    except OSError as e:
        pytest.skip(f"cgroups cannot be made here: {e}")
    try:
        try:
            for file, value in limits.items():
                (folder / file).write_text(value)
        except OSError as e:
            pytest.skip(f"cgroups limit no CPU time here: {e}")
        yield lambda pid: (folder / "cgroup.procs").write_text(str(pid)) and None
    finally:
        folder.rmdir()


@pytest.mark.timeout(240)
def test_a_throttled_expert_rank_is_replaced_under_load(tmp_path: Path) -> None:
    directory = ensure_shape_model("tiny", tmp_path)
    scaling = {"rebalance": False, "slow_rank_s": 3.0}
    with throttled() as throttle, forked_engine(
        directory, layout="disaggregated", expert_ranks=3, threads_per_rank=1, max_model_len=512,
        kv_cache_bytes=32 << 20, scaling=scaling,
    ) as engine:  # fmt: skip
        expected = [trace.token_ids for trace in engine.run(ITEMS)]
        slow = max(engine.fleet.processes)  # a number that only an expert rank has
        engine.run_closed_loop(ITEMS, 4, until(time.monotonic() + 1.5))
        assert slow in engine.fleet.processes, "it was as fast as its peers until now"
        throttle(engine.fleet.processes[slow].pid or 0)
        began_s = time.monotonic()
        in_time = until(began_s + FOUND_WITHIN_S)
        done = engine.run_closed_loop(ITEMS, 4, lambda: slow in engine.fleet.processes and in_time())
        assert slow not in engine.fleet.processes, engine.router.snapshot["ranks"]
        print(f"replaced after {time.monotonic() - began_s:.1f} s")
        in_time = until(time.monotonic() + 5.0)
        while f"rank {slow} is slow" not in reasons(engine):
            assert in_time(), reasons(engine)
            time.sleep(0.1)
        assert not [trace.problem for _, trace in done if trace.problem]
        assert all(trace.token_ids == expected[number] for number, trace in done)
        assert engine.status().kv_used_fraction == 0.0


def reasons(engine: Engine) -> str:
    """Why changes were made, as the router tells people, of about a second ago."""
    return "; ".join(change["why"] for change in engine.router.snapshot["changes"] if not change["problem"])


def until(ends_s: float) -> Callable[[], bool]:
    return lambda: time.monotonic() < ends_s
