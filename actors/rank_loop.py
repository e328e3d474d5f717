"""The life of a rank: commands in, answers out, until nobody renews its lease.

Owns the command socket and the lease. What a command does is `rank.py`'s. One router at a time: answers go to
whoever spoke last, so a router that restarts takes over by speaking.
"""

import logging
import threading
import time
from typing import Any

import zmq

from actors.config import PipelineConfig
from actors.errors import CheckpointError, ConfigError, CorralError
from actors.rank import Rank
from actors.types import Beat, Failed, FromRank, Join, Joined, Load, Loaded, Prepare, Prepared, Progress, StepPlan
from actors.wire import FROM_RANK, TO_RANK, bind_any, open_socket

log = logging.getLogger("corral.rank")

POLL_MS = 500
PROGRESS_S = 0.5


class RankLoop:
    """Serves one rank's commands. `start` binds and returns the endpoint; `run` returns when the lease runs out or
    `stop` was called.
    """

    def __init__(self, rank: Rank, host: str, lease_s: float) -> None:
        self._rank = rank
        self._host = host
        self._lease_s = lease_s
        self._context: zmq.Context[Any] = zmq.Context()
        self._router = b""
        self._heard_s = time.monotonic()
        self._stopping = threading.Event()

    def start(self) -> str:
        self._socket = open_socket(self._context, zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        return bind_any(self._socket, self._host)

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        """Handles commands one by one, in order."""
        try:
            while not self._stopping.is_set() and self._lease_holds():
                if self._socket.poll(POLL_MS):
                    self._handle(self._receive())
        finally:
            self._rank.leave()
            self._context.destroy(linger=0)

    def _lease_holds(self) -> bool:
        silent_s = time.monotonic() - self._heard_s
        if silent_s <= self._lease_s:
            return True
        log.warning("no router for %.0f s: the lease is over", silent_s)
        return False

    def _receive(self) -> Any:
        self._router, data = self._socket.recv_multipart()
        self._heard_s = time.monotonic()
        return TO_RANK.decode(data)

    def _handle(self, message: Any) -> None:
        try:
            match message:
                case Beat():
                    return
                case StepPlan():
                    result = self._rank.step(message)
                    if result is not None:
                        self._answer(result)
                case Load(pipeline=pipeline):
                    self._answer(self._load(message, PipelineConfig.parse(pipeline)))
                case Prepare(epoch=epoch):
                    self._rank.prepare(epoch)
                    self._answer(Prepared(rank=self._rank.rank, epoch=epoch.epoch))
                case Join(epoch=number):
                    self._rank.join(number)
                    self._answer(Joined(rank=self._rank.rank, epoch=number))
        except CorralError as e:
            self._answer(self._failure(message, str(e), isinstance(e, CheckpointError | ConfigError)))
        except Exception as e:
            # The router must hear of it, whatever it was; then the process dies with its cause in the log.
            self._answer(self._failure(message, f"{type(e).__name__}: {e}", False))
            raise

    def _load(self, message: Load, pipeline: PipelineConfig) -> Loaded:
        """Loads in a thread of its own, so that progress is told and the lease renewed meanwhile."""
        self._lease_s = pipeline.lease_s
        outcome: list[Loaded | BaseException] = []
        done = (0, 0)

        def report(done_bytes: int, total_bytes: int) -> None:
            nonlocal done
            done = (done_bytes, total_bytes)

        def load() -> None:
            try:
                outcome.append(self._rank.load(message.spec, pipeline, report))
            except BaseException as e:
                outcome.append(e)
                raise

        thread = threading.Thread(target=load, name="load", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(PROGRESS_S if done[1] else 0.02)
            if thread.is_alive() and done[1]:
                self._answer(Progress(rank=self._rank.rank, done_bytes=done[0], total_bytes=done[1]))
        self._heard_s = time.monotonic()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def _failure(self, message: Any, problem: str, fatal: bool) -> Failed:
        epoch = message.epoch.epoch if isinstance(message, Prepare) else getattr(message, "epoch", 0)
        return Failed(rank=self._rank.rank, epoch=epoch, problem=problem, fatal=fatal)

    def _answer(self, message: FromRank) -> None:
        self._socket.send_multipart([self._router, FROM_RANK.encode(message)])
