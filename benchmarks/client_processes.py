"""Client processes, so that it is the service which is measured and not one Python process that reads its streams.

Owns the processes and who of them runs which stream. What a stream does is `benchmarks/clients.py`'s.
"""

import asyncio
import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

from benchmarks.clients import loop_grpc, loop_http, loop_router
from benchmarks.load_figures import Answer, Level

GRPC, HTTP, ENGINE = "gRPC", "HTTP", "engine"
ANSWER_TIMEOUT_S = 60.0  # from the end of a level's window


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A model and the path to it: gRPC to host:port, HTTP to http://host:port, or to a bare router at tcp://host:port."""

    path: str  # GRPC, HTTP or ENGINE
    address: str
    model: str = ""


def default_num_processes() -> int:
    """A quarter of the cores, so that the service has the others; eight at most."""
    return max(1, min(8, (os.cpu_count() or 1) // 4))


class ClientProcesses:
    """Use as a context manager."""

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes

    def __enter__(self) -> "ClientProcesses":
        context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
        pairs = [context.Pipe() for _ in range(self._num_processes)]
        self._pipes = [ours for ours, _ in pairs]
        self._processes = [context.Process(target=_work, args=(theirs,), daemon=True) for _, theirs in pairs]
        for process, (_, theirs) in zip(self._processes, pairs, strict=True):
            process.start()
            theirs.close()  # so that a process that ends is noticed
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()

    def run(self, target: Target, level: Level) -> tuple[list[Answer], float]:
        """All answers of a level, and the share of a core that the busiest process took.

        Raises EOFError where a process ended, TimeoutError where one does not answer in time.
        """
        used = self._pipes[: level.num_streams]
        for i, pipe in enumerate(used):
            pipe.send((target, level, range(i, level.num_streams, len(used))))
        answers, busiest = [], 0.0
        for pipe in used:
            if not pipe.poll(level.window.end_s + ANSWER_TIMEOUT_S - time.perf_counter()):
                raise TimeoutError("a client process does not answer")
            of_process, busy = pipe.recv()
            answers += of_process
            busiest = max(busiest, busy)
        return answers, busiest


def _work(pipe: Connection) -> None:
    """A client process: one level after another, until the pipe is closed."""
    while True:
        try:
            target, level, streams = pipe.recv()
        except EOFError:
            return
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        answers = asyncio.run(_loop(target, level, streams))
        pipe.send((answers, (time.process_time() - began_cpu_s) / (time.perf_counter() - began_s)))


async def _loop(target: Target, level: Level, streams: range) -> list[Answer]:
    if target.path == GRPC:
        return await loop_grpc(target.address, level, streams)
    if target.path == HTTP:
        return await loop_http(target.address, target.model, level, streams)
    return await loop_router(target.address, level, streams)
