"""Grouped sends and receives over one raw process-group object.

Owns what differs between gloo and NCCL: how a group is formed, posted to, timed and torn down. Knows nothing of epochs
or of what the messages mean.
"""

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import AllreduceOptions, ProcessGroupGloo, Store

from actors.laps import Laps

log = logging.getLogger("corral.dispatch")

Message = tuple[int, Tensor]
"""(peer's rank, contiguous tensor to send or to receive into)."""

Posted = tuple[int, Any]
"""(peer to blame, or UNKNOWN_RANK where it may be any of several; torch's work object)."""

UNKNOWN_RANK = -1
TAILED_BYTES = 64 * 1024
TAIL_NUMEL = 8
CLOSING_TAG = 2**31 - 1
CLOSING_TIMEOUT = timedelta(milliseconds=1)
NO_TIMEOUT_S = 86_400.0
DEVICE_LAG_S = 0.5  # kernels that wait give up by themselves, and know for whom: a step may have come to them late
CONNECT_TIMEOUT_S = 10.0
SPIN_S = 0.002
POLL_S = 0.0001


class Transport(Protocol):
    """One formed group. Every method raises RuntimeError when a peer is lost or a timeout passes."""

    preposts: bool
    """Whether a receive may be posted long before its message is sent, and then costs nothing."""

    def connect(self) -> None:
        """Does now what the first messages to each peer would do. Every rank calls it."""
        ...

    def post(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> list[Posted]:
        """Starts all of it, waits for none of it."""
        ...

    def wait(self, work: Any) -> None:
        """Makes the tensors of `work` safe to use: for the host on CPU, for the current stream on CUDA."""
        ...

    def all_reduce(self, x: Tensor) -> bool:
        """Sums x over all ranks in place, on the current stream. False, and nothing done, where post does as well."""
        ...

    def await_event(self, event: Any) -> None:
        """Blocks until the device has reached a recorded CUDA event, at most the timeout."""
        ...

    def synchronize(self) -> None:
        """Blocks until the device has done all that was queued on the current stream, so that it can be read."""
        ...

    def interrupt(self) -> None:
        """Makes whoever waits in another thread fail at once. The group is of no use afterwards, but for `close`."""
        ...

    def close(self) -> None:
        """Lets go of every connection, so that peers notice. All works must have been dropped before."""
        ...


class GlooTransport:
    """Pairs of sockets. A receive that is posted before its send spares the sender a round trip.

    When a peer dies, gloo wakes those who wait for a message that has not begun to arrive, but not who waits for one
    that arrives in part. So a large message has a tail that is sent after it and waited for before it.
    """

    preposts = True

    def __init__(
        self, store: Store, rank: int, world: int, device: Any, join_timeout_s: float, timeout_s: float
    ) -> None:
        gloo: Any = ProcessGroupGloo
        options = gloo._Options()
        options._timeout = timedelta(seconds=join_timeout_s)
        options._devices = [device]
        self._timeout = timedelta(seconds=timeout_s)
        self._pg: Any = gloo(store, rank, world, options)

    def connect(self) -> None:
        """All pairs are connected."""

    def post(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> list[Posted]:
        posted: list[Posted] = []
        for post, messages in ((self._pg.recv, receives), (self._pg.send, sends)):
            for peer, tensor in messages:
                if tensor.nbytes < TAILED_BYTES:
                    posted.append((peer, post([tensor], peer, tag)))
                else:
                    flat = tensor.view(-1)
                    body = post([flat[:-TAIL_NUMEL]], peer, tag)
                    posted.append((peer, post([flat[-TAIL_NUMEL:]], peer, tag)))
                    posted.append((peer, body))
        return posted

    def wait(self, work: Any) -> None:
        work.wait(self._timeout)

    def all_reduce(self, x: Tensor) -> bool:
        """Gloo's own would wait without noticing whoever dies."""
        return False

    def await_event(self, event: Any) -> None:
        """Host memory is always current."""

    def synchronize(self) -> None:
        """Host memory is always current."""

    def interrupt(self) -> None:
        # abort() wakes nobody and closes nothing, nor does the destructor while anybody holds a work. But a receive
        # whose time is up closes all sockets of its group: this one does, as nobody sends it anything.
        pg = self._pg
        if pg is not None and pg.size() > 1:
            with contextlib.suppress(RuntimeError):  # the timeout that is wanted, or a group that had failed before
                pg.recv([torch.zeros(1)], (pg.rank() + 1) % pg.size(), CLOSING_TAG).wait(CLOSING_TIMEOUT)

    def close(self) -> None:
        self.interrupt()
        self._pg = None


class NcclTransport:
    """One communicator of all ranks; what is posted together is one NCCL group.

    NCCL runs what is posted in order, so a receive that is posted early would hold back everything behind it. Its
    kernels wait for a lost peer for ever: `synchronize` is the wait with a timeout, and aborts the communicator.
    """

    preposts = False

    def __init__(
        self, store: Store, rank: int, world: int, device: torch.device, join_timeout_s: float, timeout_s: float
    ) -> None:
        # torch's watchdog must neither end this process nor race our own abort: timeouts are ours (`synchronize`).
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
        from torch.distributed.distributed_c10d import ProcessGroupNCCL  # absent where torch has no CUDA

        laps = Laps()
        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=NO_TIMEOUT_S)
        self._device = device
        self._timeout_s = timeout_s
        self._waited: deque[Any] = deque()  # an event after each wait: the timeout is of one wait, not of a step
        self._interrupted = False
        self._aborting = threading.Lock()
        nccl: Any = ProcessGroupNCCL
        self._pg: Any = nccl(store, rank, world, options)
        # Communicators are made by their first operation, which all ranks must take part in: it belongs to joining.
        self._pg.allreduce([torch.zeros(1, device=device)], AllreduceOptions()).wait()
        self._synchronize(join_timeout_s)
        laps.lap("communicator")
        log.info("NCCL among %d: %s", world, laps)

    def connect(self) -> None:
        laps, rank, world = Laps(), self._formed().rank(), self._formed().size()
        peers = [peer for peer in range(world) if peer != rank]
        sent, received = torch.zeros(1, device=self._device), torch.zeros(world, device=self._device)
        for _, work in self.post([(p, sent) for p in peers], [(p, received[p : p + 1]) for p in peers], 0):
            self.wait(work)
        self._synchronize(CONNECT_TIMEOUT_S)
        laps.lap("connections")
        log.info("NCCL among %d: %s", world, laps)

    def post(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> list[Posted]:
        if not sends and not receives:
            return []
        pg = self._formed()
        pg._start_coalescing()  # ungrouped, each pair of ranks would get a communicator of its own
        for peer, tensor in receives:
            pg.recv([tensor], peer, tag)
        for peer, tensor in sends:
            pg.send([tensor], peer, tag)
        work = pg._end_coalescing()
        peers = {peer for peer, _ in (*sends, *receives)}
        return [(peers.pop() if len(peers) == 1 else UNKNOWN_RANK, work)]

    def wait(self, work: Any) -> None:
        work.wait()
        self._waited.append(self._mark())

    def all_reduce(self, x: Tensor) -> bool:
        self._formed().allreduce([x], AllreduceOptions()).wait()
        self._waited.append(self._mark())
        return True

    def await_event(self, event: Any) -> None:
        self._waited.append(event)
        self._await_all(self._timeout_s + DEVICE_LAG_S)

    def synchronize(self) -> None:
        self._synchronize(self._timeout_s + DEVICE_LAG_S)

    def interrupt(self) -> None:
        # A host that reads from the device has no timeout of its own: it goes on when the kernels that wait do, with
        # whatever is in their buffers, and learns of it when it synchronizes next.
        self._interrupted = True
        self._abort()

    def close(self) -> None:
        self._waited.clear()
        self._abort()

    def _formed(self) -> Any:
        pg = self._pg
        if pg is None:
            raise RuntimeError("the epoch is over")
        return pg

    def _abort(self) -> None:
        """Ends what runs and what is queued, soon: NCCL takes its time to end its threads and to free its memory, and
        waits for the device meanwhile. Nobody else does.
        """
        with self._aborting:
            pg, self._pg = self._pg, None
        if pg is not None:
            threading.Thread(target=_end, args=(pg,), name="abort", daemon=True).start()

    def _synchronize(self, timeout_s: float) -> None:
        self._waited.append(self._mark())
        self._await_all(timeout_s)

    def _await_all(self, timeout_s: float) -> None:
        while self._waited:
            event = self._waited.popleft()
            start_s = time.monotonic()
            while not self._interrupted and not event.query():
                waited_s = time.monotonic() - start_s
                if waited_s > timeout_s:
                    raise RuntimeError(f"the device was still waiting for a peer after {timeout_s} s")
                if waited_s > SPIN_S:
                    time.sleep(POLL_S)
        if self._interrupted:
            raise RuntimeError("the epoch is over")

    def _mark(self) -> Any:
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def _end(pg: Any) -> None:
    laps = Laps()
    pg.abort()
    laps.lap("aborted")
    log.info("NCCL communicator: %s", laps)
