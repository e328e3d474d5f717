"""The ranks of one attention unit as processes with a GPU each: for `gpu_collectives.py` and tests/gpu.

Owns the processes and what they are asked to do. They have the real group and the real shared memory, and neither a
router nor a model.
"""

import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor

from actors.dispatch.group import EpochGroup, RendezvousStore
from actors.dispatch.rows import TokenShape
from actors.dispatch.tensor_parallel import MOST_SUMMED_ROWS, TensorParallel, make_tensor_parallel
from actors.errors import RankError
from actors.kernels.norm import add_rms_norm
from cluster.hardware import visible_name

HOST = "127.0.0.1"
JOIN_TIMEOUT_S = 20.0
ANSWER_TIMEOUT_S = 90.0
TOLERANCE = 0.13  # one rounding more or less of values of up to 16 in bf16
CALLS_PER_GRAPH = 20
REPLAYS = 10


class Member:
    """What a process is asked to do, by the names of methods."""

    def __init__(self, index: int, size: int, device: torch.device, hidden: int, dtype: torch.dtype) -> None:
        self._index, self._size = index, size
        self._device, self._hidden, self._dtype = device, hidden, dtype
        self._group = EpochGroup(device, HOST)
        self._bits: list[float] = []
        shape = TokenShape(hidden=hidden, experts_per_token=1, dtype=dtype, device=device)
        self._tp: TensorParallel = make_tensor_parallel((index, size), shape, MOST_SUMMED_ROWS)

    def join(self, store: str, epoch: int, fresh: bool, timeout_s: float) -> tuple[float, bool]:
        """Seconds that it took, and whether graphs that were captured before are void."""
        began_s = time.monotonic()
        self._group.prepare(store)
        self._group.join(epoch, self._index, self._size, JOIN_TIMEOUT_S, timeout_s)
        voids = self._tp.join(self._group, range(self._size), fresh)
        return time.monotonic() - began_s, voids

    def check_sums(self, num_rows: int, captured: bool) -> str:
        """Empty, or what is wrong. All members draw the same terms from the same seeds."""
        a, b = self._terms(num_rows, 1), self._terms(num_rows, 2)
        h, weight = self._draw((num_rows, self._hidden), 3), self._draw((self._hidden,), 4)
        rounded = [x + y for x, y in zip(a, b, strict=True)]
        total = _ordered_sum(rounded)
        expected_h = h + total
        expected_x = add_rms_norm(expected_h.clone(), (), weight, 1e-5)
        own_a, own_b, own_h = a[self._index], b[self._index], h.clone()

        def work() -> tuple[Tensor, Tensor, Tensor]:
            reduced = self._tp.all_reduce(own_a.clone()).clone()
            residual = own_h.clone()
            self._tp.add_all_reduced(residual, (own_a.clone(), own_b.clone()))
            again = own_h.clone()
            normed = self._tp.add_rms_norm(again, (own_a.clone(), own_b.clone()), weight, 1e-5)
            return reduced, residual, normed

        for got in self._runs(work, captured):
            self._group.synchronize()
            for name, x, expected in zip(
                ("all_reduce", "add", "norm"), got, (_ordered_sum(a), expected_h, expected_x), strict=True
            ):
                error = (x.float() - expected.float()).abs().max().item()
                if not error <= TOLERANCE:
                    return f"{name} of {num_rows} rows is off by {error}"
            self._bits = [x.view(torch.uint8).long().sum().item() for x in got]
        return ""

    def bits(self) -> list[float]:
        """Checksums of what `check_sums` got last."""
        return self._bits

    def check_gather(self, num_rows: int, width: int, captured: bool) -> str:
        terms = [self._draw((num_rows, width), 10 + i) for i in range(self._size)]
        expected = torch.cat(terms, dim=1)
        largest, columns = expected.max(1)

        def work() -> tuple[Tensor, Tensor, Tensor]:
            own = terms[self._index]
            return self._tp.all_gather_columns(own), *self._tp.largest_columns(own)

        for gathered, *found in self._runs(work, captured):
            self._group.synchronize()
            if not torch.equal(gathered, expected):
                return f"gather of {num_rows} rows of {width} differs"
            if not (torch.equal(found[0], largest.float()) and torch.equal(found[1], columns)):
                return f"largest of {num_rows} rows of {width} differs"
        return ""

    def time_us(self, what: str, num_rows: int, width: int = 0) -> float:
        """Microseconds of one call in a graph; -1 where it cannot be captured."""
        x, h = self._draw((num_rows, width or self._hidden), 1), self._draw((num_rows, self._hidden), 2)
        weight = torch.ones(self._hidden, dtype=self._dtype, device=self._device)
        calls: dict[str, Callable[[], Any]] = {
            "all_reduce": lambda: self._tp.all_reduce(x),
            "add_rms_norm": lambda: self._tp.add_rms_norm(h, (x,), weight, 1e-5),
            "norm": lambda: add_rms_norm(h, (x,), weight, 1e-5),
            "nccl": lambda: _nccl_all_reduce(self._group, x),
            "gather": lambda: self._tp.all_gather_columns(x),
            "largest": lambda: self._tp.largest_columns(x),
        }
        try:
            return self._timed_us(calls[what])
        except RuntimeError as e:
            print(f"{what} of {num_rows} rows: {str(e).splitlines()[0][:200]}", flush=True)
            return -1.0

    def run_until_lost(self, num_rows: int, interrupts_after_s: float = 0.0) -> tuple[float, str]:
        """Replays sums until a peer is lost: seconds since the last replay that went well, and the error."""
        x = self._draw((num_rows, self._hidden), 1)
        graph, _ = self._captured(lambda: [self._tp.all_reduce(x) for _ in range(CALLS_PER_GRAPH)])
        if interrupts_after_s:
            threading.Timer(interrupts_after_s, self._group.interrupt).start()
        well_s = time.monotonic()
        try:
            while True:
                graph.replay()
                self._group.synchronize()
                well_s = time.monotonic()
        except RankError as e:
            lost_s = time.monotonic() - well_s
            torch.cuda.synchronize()  # nothing may be left that waits
            ones = torch.ones(64, 64, device=self._device)
            assert float((ones @ ones).sum()) == 64.0**3
            return lost_s, f"blamed {e.rank}: {e.problem} (all ended after {time.monotonic() - well_s:.3f} s)"

    def leave(self) -> None:
        self._group.leave()

    def _terms(self, num_rows: int, seed: int) -> list[Tensor]:
        return [self._draw((num_rows, self._hidden), 1000 * seed + i) for i in range(self._size)]

    def _draw(self, shape: Sequence[int], seed: int) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self._device).to(self._dtype)

    def _runs(self, work: Callable[[], tuple[Tensor, ...]], captured: bool) -> Any:
        if not captured:
            for _ in range(3):
                yield work()
            return
        graph, results = self._captured(work)
        for _ in range(3):
            for x in results:
                x.fill_(-7)
            graph.replay()
            yield results

    def _captured(self, work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        work()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = work()
        return graph, results

    def _timed_us(self, call: Callable[[], Any]) -> float:
        graph, _ = self._captured(lambda: [call() for _ in range(CALLS_PER_GRAPH)])
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / (REPLAYS * CALLS_PER_GRAPH)


def _ordered_sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0].float()
    for term in terms[1:]:
        total = total + term.float()
    return total.to(terms[0].dtype)


def _nccl_all_reduce(group: EpochGroup, x: Tensor) -> None:
    """The group's own collective, without the bookkeeping that a capture does not allow."""
    from torch.distributed.distributed_c10d import AllreduceOptions

    transport: Any = group._transport
    transport._pg.allreduce([x], AllreduceOptions()).wait()


def _live(
    index: int, size: int, device: str, hidden: int, dtype: torch.dtype, pipe: multiprocessing.connection.Connection
) -> None:
    torch.cuda.set_device(device)
    member = Member(index, size, torch.device(device), hidden, dtype)
    while True:
        name, arguments = pipe.recv()
        try:
            pipe.send(getattr(member, name)(*arguments))
        except Exception as e:
            pipe.send(e)
            raise


class UnitOfRanks:
    """`size` processes. `isolated`: each sees one GPU alone, as a Ray actor does; else all, and uses its own."""

    def __init__(self, size: int, hidden: int, dtype: torch.dtype, isolated: bool) -> None:
        self.size = size
        self._hidden, self._dtype, self._isolated = hidden, dtype, isolated
        self._context = multiprocessing.get_context("spawn")
        self._store = RendezvousStore(HOST)
        self._epoch = 0
        self.processes: list[BaseProcess] = []
        self._pipes: list[multiprocessing.connection.Connection] = []

    def start(self) -> None:
        self._store.start()
        for index in range(self.size):
            process, pipe = self._spawn(index)
            self.processes.append(process)
            self._pipes.append(pipe)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)
        self._store.stop()

    def join(self, fresh: bool = True, timeout_s: float = 5.0) -> list[Any]:
        self._epoch += 1
        return self.ask("join", self._store.endpoint, self._epoch, fresh, timeout_s)

    def ask(self, name: str, *arguments: Any) -> list[Any]:
        """What all members answer, at work at once."""
        self.begin(name, *arguments)
        return [self.answer(index) for index in range(self.size)]

    def begin(self, name: str, *arguments: Any) -> None:
        for pipe in self._pipes:
            pipe.send((name, arguments))

    def answer(self, index: int) -> Any:
        """Raises what the member raised, TimeoutError, or EOFError where it is dead."""
        if not self._pipes[index].poll(ANSWER_TIMEOUT_S):
            raise TimeoutError(f"member {index} does not answer")
        answer = self._pipes[index].recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def replace(self, index: int) -> None:
        """Another process in the place of one that was killed."""
        self.processes[index].join(10)
        self.processes[index], self._pipes[index] = self._spawn(index)

    def _spawn(self, index: int) -> tuple[BaseProcess, multiprocessing.connection.Connection]:
        ours, theirs = self._context.Pipe()
        device = "cuda:0" if self._isolated else f"cuda:{index}"
        before = dict(os.environ)
        os.environ["NCCL_NVLS_ENABLE"] = "0"
        if self._isolated:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible_name(index)
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        try:
            arguments = (index, self.size, device, self._hidden, self._dtype, theirs)
            process = self._context.Process(target=_live, args=arguments, daemon=True)
            process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        return process, ours
