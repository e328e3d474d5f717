"""A partition of the data plane: two ranks whose packets to each other are lost, while both hear the router.

It runs in a network namespace of its own, where routing rules swallow the packets, so root is needed.
"""

import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from forked import forked_engine

from actors.checkpoint.shape_models import ensure_shape_model
from benchmarks.engine import Engine
from benchmarks.workload import Item

ROOT = Path(__file__).parents[2]
# The local table comes first unless it is moved, and packets of this host would see no rule before it.
IN_NAMESPACE = ["unshare", "--net", "sh", "-c"]
PREPARE = "ip link set lo up && ip rule add pref 100 lookup local && ip rule del pref 0"
ATTENTION, EXPERT = 0, 2
GROUP_TIMEOUT_S, CUT_S = 1.0, 1.9  # two epochs are lost: after three without a token requests are given up


def is_possible() -> bool:
    """Whether this process may make such a namespace."""
    probe = f"{PREPARE} && ip rule add pref 10 ipproto tcp sport 1 dport 2 blackhole && ss -Ht"
    try:
        return subprocess.run([*IN_NAMESPACE, probe], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not is_possible(), reason="needs root, and routing rules by port")
def test_requests_go_on_token_for_token() -> None:
    program = f'{PREPARE} && exec "{sys.executable}" "{__file__}"'
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([*IN_NAMESPACE, program], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


def main() -> None:
    rng = random.Random(1)
    items = [Item([rng.randrange(250) for _ in range(24)], 60) for _ in range(8)]
    with tempfile.TemporaryDirectory() as folder, forked_engine(
        ensure_shape_model("tiny", Path(folder)), layout="disaggregated", attention_ranks=1, expert_ranks=2,
        threads_per_rank=1, max_model_len=512, kv_cache_bytes=32 << 20, group_timeout_s=GROUP_TIMEOUT_S,
    ) as engine:  # fmt: skip
        expected = [trace.token_ids for trace in engine.run(items)]
        pids = {rank: process.pid for rank, process in engine.fleet.processes.items()}
        cut = Cut(engine)
        traces = engine.run(items)
        cut.heal()
        assert not [trace.problem for trace in traces if trace.problem]
        assert [trace.token_ids for trace in traces] == expected
        assert engine.router.metrics.epochs_lost, "nothing was cut"
        assert {rank: process.pid for rank, process in engine.fleet.processes.items()} == pids
        assert engine.status().kv_used_fraction == 0.0


class Cut:
    """Every connection between the two ranks is lost for CUT_S, those that they make meanwhile too."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._ends_s = time.monotonic() + CUT_S
        self._lost: set[tuple[str, str]] = set()
        self._lose()
        assert self._lost, "the ranks have no connection"
        self._thread = threading.Thread(target=self._go_on)
        self._thread.start()

    def heal(self) -> None:
        self._ends_s = 0.0
        self._thread.join()

    def _go_on(self) -> None:
        while time.monotonic() < self._ends_s:
            self._lose()
            time.sleep(0.05)

    def _lose(self) -> None:
        processes = self._engine.fleet.processes
        for pair in connections(*(processes[rank].pid or 0 for rank in (ATTENTION, EXPERT))) - self._lost:
            self._lost.add(pair)
            for source, target in (pair, pair[::-1]):
                rule = ["pref", "10", "ipproto", "tcp", "sport", source, "dport", target, "blackhole"]
                subprocess.run(["ip", "rule", "add", *rule], check=True)


def connections(a: int, b: int) -> set[tuple[str, str]]:
    """Ports of both ends of each connection between two processes."""
    lines = subprocess.check_output(["ss", "-Htnp"], text=True).splitlines()
    owner = {}
    for line in lines:
        if found := re.search(r":(\d+)\s+\S+:(\d+)\s.*pid=(\d+)", line):
            owner[found[1], found[2]] = int(found[3])
    return {(x, y) for (x, y), pid in owner.items() if pid == a and owner.get((y, x)) == b}


if __name__ == "__main__":
    main()
