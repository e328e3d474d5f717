"""A request whose ranks die each time that it is computed, with real processes."""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import zmq
from forked import forked_engine

from actors.checkpoint.shape_models import ensure_shape_model
from actors.router.suspects import LEAST_S, MOST_LOSSES
from actors.types import Beat, RouterStatus
from actors.wire import FROM_ROUTER, TO_ROUTER, open_socket
from benchmarks.engine import Engine
from benchmarks.workload import Item

RNG = random.Random(3)
LONG = Item([RNG.randrange(250) for _ in range(3000)], 4)  # 750 steps until its first token
SHORT = Item(LONG.prompt_ids[:20], 4)
PAUSE_S = 0.3


@contextmanager
def ranks_that_die_when_they_compute(engine: Engine) -> Iterator[None]:
    """Asks the router every 50 ms whether a request runs, and kills the ranks if so; then not for PAUSE_S."""
    is_over = Event()

    def watch() -> None:
        context: zmq.Context[Any] = zmq.Context()
        socket = open_socket(context, zmq.DEALER)
        socket.connect(engine.endpoint)
        while not is_over.wait(0.05):
            socket.send(TO_ROUTER.encode(Beat()))
            status = FROM_ROUTER.decode(socket.recv())
            if isinstance(status, RouterStatus) and status.serving and status.num_running:
                for process in list(engine.fleet.processes.values()):
                    os.kill(process.pid or 0, signal.SIGKILL)
                time.sleep(PAUSE_S)
        context.destroy(linger=0)

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def test_it_is_given_up_and_the_next_one_is_served(tmp_path: Path) -> None:
    directory = ensure_shape_model("tiny", tmp_path)
    with forked_engine(directory, layout="single", max_model_len=4096, max_num_batched_tokens=4) as engine:
        expected = engine.run([SHORT])[0].token_ids
        with ranks_that_die_when_they_compute(engine):
            (trace,) = engine.run([LONG])
        assert "not tried again" in trace.problem and not trace.token_ids
        (trace,) = engine.run([SHORT])
        assert not trace.problem and trace.token_ids == expected
        metrics = engine.router.metrics
        most_losses = MOST_LOSSES + LEAST_S / PAUSE_S  # those of LEAST_S may be too many
        assert metrics.requests_given_up == 1 and MOST_LOSSES <= metrics.epochs_lost <= most_losses
