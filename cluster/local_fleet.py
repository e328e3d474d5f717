"""Ranks as processes of this machine, without Ray: for benchmarks of the bare engine and for tests.

Owns their processes. The ranks are the real ones (`actors/rank_loop.py`); only where they live differs.
"""

import faulthandler
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from actors.rank import Rank
from actors.rank_loop import RankLoop
from actors.router.fleet import FleetNews, RankDown, RankUp
from actors.types import RankEndpoints, Role
from cluster.hardware import visible_name
from cluster.rank_environment import RANK_ENVIRONMENT

log = logging.getLogger("corral.fleet")

FIRST_LEASE_S = 60.0


LOG_FORMAT = "%(asctime)s.%(msecs)03d %(name)s %(message)s"


def _live(
    rank: int, device: str, threads: int, host: str, pipe: multiprocessing.connection.Connection, log_file: str
) -> None:
    if log_file:
        _write_log(log_file)
    if threads:
        torch.set_num_threads(threads)
    loop = RankLoop(Rank(rank, torch.device(device), host), FIRST_LEASE_S)
    pipe.send(loop.start())
    loop.run()


def _write_log(path: str) -> None:
    """What is logged goes to `path`, and what all threads are doing whenever SIGUSR1 asks for it."""
    file = Path(path).open("a", buffering=1)  # noqa: SIM115 (as long as the process lives)
    logging.basicConfig(stream=file, level=logging.INFO, format=LOG_FORMAT, datefmt="%H:%M:%S")
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR1, file)
    log.info("begins")


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class LocalFleet:
    """Implements `actors.router.fleet.Fleet`. `devices` are those that ranks may take, "cpu" or "cuda:N" each: a GPU
    belongs to one rank at a time, a CPU to any number. `logs`: a folder for a file of each rank's, rank-N.log; on
    SIGUSR1 a rank writes its threads' stacks there.
    """

    def __init__(
        self, devices: Sequence[str], threads_per_rank: int, host: str = "127.0.0.1", logs: Path | None = None
    ) -> None:
        self._devices = devices
        self._threads = threads_per_rank
        self._host = host
        self._logs = logs
        # That ranks are started from.
        self.context: SpawnContext | ForkServerContext = multiprocessing.get_context("spawn")
        self.processes: dict[int, BaseProcess] = {}
        self._device_of: dict[int, str] = {}
        self._starting: dict[int, multiprocessing.connection.Connection] = {}
        self._endpoints: dict[int, RankEndpoints] = {}
        self._news: list[FleetNews] = []

    def find(self) -> tuple[int, ...]:
        self._news += [RankUp(rank=rank, endpoints=endpoints) for rank, endpoints in self._endpoints.items()]
        return tuple(self.processes)

    def start(self, rank: int, roles: Sequence[Role]) -> None:
        device = self._free_device()
        if device is None:
            self._news.append(RankDown(rank=rank, cause="no device is free"))
            return
        self._device_of[rank] = device
        self._starting[rank] = self._spawn(rank, device)

    def has_room(self, roles: Sequence[Role]) -> bool:
        return self._free_device() is not None

    def _free_device(self) -> str | None:
        taken = set(self._device_of.values())
        return next((d for d in self._devices if d == "cpu" or d not in taken), None)

    def kill(self, rank: int) -> None:
        process = self.processes.get(rank)
        if process is not None:
            process.kill()

    def news(self) -> list[FleetNews]:
        for rank, pipe in list(self._starting.items()):
            if pipe.poll():
                self._take(rank, pipe)
        for rank, process in list(self.processes.items()):
            if not process.is_alive():
                self._forget(rank)
                self._news.append(RankDown(rank=rank, cause=f"its process ended with code {process.exitcode}"))
        news, self._news = self._news, []
        return news

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.join(10)
        self.processes.clear()

    def _take(self, rank: int, pipe: multiprocessing.connection.Connection) -> None:
        del self._starting[rank]
        try:
            endpoints: RankEndpoints = pipe.recv()
        except EOFError:
            return  # it died as it started; its process tells
        self._endpoints[rank] = endpoints
        self._news.append(RankUp(rank=rank, endpoints=endpoints))

    def _forget(self, rank: int) -> None:
        del self.processes[rank], self._device_of[rank]
        self._starting.pop(rank, None)
        self._endpoints.pop(rank, None)

    def _spawn(self, rank: int, device: str) -> multiprocessing.connection.Connection:
        ours, theirs = self.context.Pipe(duplex=False)
        kind, _, number = device.partition(":")
        environment = dict(RANK_ENVIRONMENT)
        if kind == "cuda":  # as in a Ray actor: a rank sees its own GPU and no other
            environment["CUDA_VISIBLE_DEVICES"] = visible_name(int(number))
        process = self.context.Process(
            target=_live,
            args=(
                rank,
                "cuda:0" if kind == "cuda" else kind,
                self._threads,
                self._host,
                theirs,
                "" if self._logs is None else str(self._logs / f"rank-{rank}.log"),
            ),
            daemon=True,
        )
        with _environment(environment):  # a spawned process takes it from us, before it imports anything
            process.start()
        theirs.close()
        self.processes[rank] = process
        return ours
