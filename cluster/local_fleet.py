"""Ranks as processes of this machine, without Ray: for benchmarks of the bare engine and for tests.

Owns their processes. The ranks are the real ones (`actors/rank_loop.py`); only where they live differs.
"""

import multiprocessing
import multiprocessing.connection
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

import torch

from actors.errors import UnavailableError
from actors.rank import Rank
from actors.rank_loop import RankLoop
from actors.types import RankSpec
from cluster.rank_environment import RANK_ENVIRONMENT

START_TIMEOUT_S = 120.0
FIRST_LEASE_S = 60.0


def _live(rank: int, device: str, threads: int, host: str, pipe: multiprocessing.connection.Connection) -> None:
    if threads:
        torch.set_num_threads(threads)
    loop = RankLoop(Rank(rank, torch.device(device), host), host, FIRST_LEASE_S)
    pipe.send(loop.start())
    loop.run()


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
    """Implements `actors.router.fleet.Fleet`. `devices[rank]` is "cpu" or "cuda:N"."""

    def __init__(self, devices: Sequence[str], threads_per_rank: int, host: str = "127.0.0.1") -> None:
        self._devices = devices
        self._threads = threads_per_rank
        self._host = host
        self._context = multiprocessing.get_context("spawn")
        self.processes: dict[int, BaseProcess] = {}
        self._endpoints: dict[int, str] = {}

    def ensure(self, specs: Sequence[RankSpec]) -> dict[int, str]:
        pipes = {spec.rank: self._start(spec.rank) for spec in specs if not self._lives(spec.rank)}
        for rank, pipe in pipes.items():
            if not pipe.poll(START_TIMEOUT_S):
                raise UnavailableError(f"rank {rank} did not start within {START_TIMEOUT_S:.0f} s")
            try:
                self._endpoints[rank] = pipe.recv()
            except EOFError as e:
                raise UnavailableError(f"rank {rank} died as it started") from e
        return {spec.rank: self._endpoints[spec.rank] for spec in specs}

    def lost(self) -> list[tuple[int, str]]:
        gone = [(rank, process) for rank, process in self.processes.items() if not process.is_alive()]
        for rank, _ in gone:
            del self.processes[rank]
        return [(rank, f"its process ended with code {process.exitcode}") for rank, process in gone]

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join(10)
        self.processes.clear()

    def _lives(self, rank: int) -> bool:
        return rank in self.processes and self.processes[rank].is_alive()

    def _start(self, rank: int) -> multiprocessing.connection.Connection:
        ours, theirs = self._context.Pipe(duplex=False)
        kind, _, number = self._devices[rank].partition(":")
        environment = dict(RANK_ENVIRONMENT)
        if kind == "cuda":  # as in a Ray actor: a rank sees its own GPU and no other
            environment["CUDA_VISIBLE_DEVICES"] = number
        device = "cuda:0" if kind == "cuda" else kind
        process = self._context.Process(
            target=_live, args=(rank, device, self._threads, self._host, theirs), daemon=True
        )
        with _environment(environment):  # a spawned process takes it from us, before it imports anything
            process.start()
        theirs.close()
        self.processes[rank] = process
        return ours
