"""Process groups that belong to an epoch.

Owns the rendezvous store, how ranks meet there, and the rule that a lost or hung peer ends the group within its
timeout. Never touches torch's default group, so groups may follow one another in a process. Knows nothing of what is
sent. Ranks are positions in the epoch's list of members.
"""

import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, Store

from actors.dispatch.transport import UNKNOWN_RANK, GlooTransport, Message, NcclTransport, Posted, Transport
from actors.errors import RankError

STORE_TIMEOUT_S = 30.0
BACKLOG = 1024  # ranks that connect at once
DEFAULT_TIMEOUT_S = 5.0
MEETING_POLL_S = 0.002
REFUSED = "refused"  # a key of an epoch, once one of its ranks cannot come


class RendezvousStore:
    """The store at which the ranks of every epoch meet. Groups outlive it; only joining needs it."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._store: TCPStore | None = None

    def start(self) -> None:
        """Listens on a free port of `host` alone. Raises OSError."""
        # Left to itself it would listen on all of the node's addresses, and it asks nobody who they are.
        with socket.create_server((self._host, 0), backlog=BACKLOG) as listener:
            port = listener.getsockname()[1]
            self._store = TCPStore(
                self._host,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=STORE_TIMEOUT_S),
                master_listen_fd=os.dup(listener.fileno()),  # the store closes it
            )

    @property
    def endpoint(self) -> str:
        """host:port. Raises RuntimeError before `start`."""
        if self._store is None:
            raise RuntimeError("the rendezvous store was not started")
        return f"{self._host}:{self._store.port}"

    def stop(self) -> None:
        """Stops listening. Groups that were formed go on."""
        self._store = None


class DeviceWaits(Protocol):
    """Waits for peers that run on the device, outside of the group's own messages."""

    @property
    def blamed(self) -> int | None:
        """The rank that one of them was given up for; None if there is none, as far as the host can see."""
        ...

    def abort(self) -> None:
        """Ends those that run, and all to come, within microseconds. From any thread."""
        ...


class Transfer:
    """Sends and receives in flight. Wait for it once; the group may cut it short."""

    __slots__ = ("_group", "_tensors", "posted")

    def __init__(self, group: "EpochGroup", posted: list[Posted], tensors: Any) -> None:
        self._group = group
        self._tensors = tensors  # kept alive until they have left or arrived
        self.posted = posted

    def wait(self) -> None:
        """Returns when all has been sent and received. Raises RankError naming the first peer that failed."""
        self._group._finish(self)


@dataclass(slots=True)
class _Meetings:
    """What groups of one process share: the connection to the store, and what was tried there."""

    address: str
    endpoint: str = ""
    store: TCPStore | None = None
    gloo_device: Any = None
    last_epoch: int = -1  # that was tried at this store


class EpochGroup:
    """This process's place in the group of one epoch after another.

    Groups of one process share the store's client and gloo's device, which are made once: make the first one so, and
    others, that are formed while it serves, by `beside`. `address` is this host's own IP address.
    """

    def __init__(self, device: torch.device, address: str) -> None:
        self._device = device
        self._meetings = _Meetings(address)
        self._transport: Transport | None = None
        self._in_flight: set[Transfer] = set()
        self._device_waits: list[DeviceWaits] = []
        self.waited_s = 0.0  # in all, for peers and for the device
        self.epoch = -1
        self.rank = UNKNOWN_RANK
        self.world = 0
        self.operation_timeout_s = DEFAULT_TIMEOUT_S
        self.preposts = False

    def beside(self) -> "EpochGroup":
        """A place in the group of another epoch, which may be formed in another thread while this one is in use."""
        group = EpochGroup(self._device, self._meetings.address)
        group._meetings = self._meetings
        return group

    def prepare(self, store_endpoint: str) -> None:
        """Connects to the store at host:port unless it is connected already. Raises RankError."""
        meetings = self._meetings
        if meetings.gloo_device is None and self._device.type == "cpu":
            # By address: found by name, it would be resolved, and that can take seconds.
            meetings.gloo_device = ProcessGroupGloo.create_device(hostname=meetings.address)
        if store_endpoint == meetings.endpoint and self._store_answers():
            return
        host, _, port = store_endpoint.rpartition(":")
        try:
            # One client per process and store: each connect resolves names backwards, which can stall for seconds.
            meetings.store = TCPStore(
                host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=STORE_TIMEOUT_S)
            )
        except (RuntimeError, ValueError) as e:
            raise RankError(self.rank, f"no rendezvous store answers at {store_endpoint!r}: {_first_line(e)}") from e
        meetings.endpoint, meetings.last_epoch = store_endpoint, -1

    def join(
        self,
        epoch: int,
        rank: int,
        world: int,
        timeout_s: float,
        operation_timeout_s: float = DEFAULT_TIMEOUT_S,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        """Forms the group of `epoch` with `world` ranks, leaving any other group that this object has been in.

        Epoch numbers ascend and are tried once per store: what an earlier try left there would look like a rank that
        joins. `operation_timeout_s` bounds every wait of the group. Raises RankError (with this rank) if not all ranks
        come within `timeout_s`, if one of them calls `refuse` instead, if `is_over`, or if a later epoch was tried.
        """
        self.leave()
        meetings = self._meetings
        if meetings.store is None:
            raise RankError(rank, f"epoch {epoch} was joined before it was prepared")
        if epoch <= meetings.last_epoch:
            raise RankError(rank, f"epoch {epoch} is over; the last was {meetings.last_epoch}")
        meetings.last_epoch = epoch
        store = PrefixStore(f"epoch{epoch}", meetings.store)
        store.set_timeout(timedelta(seconds=timeout_s))
        self.epoch, self.rank, self.world = epoch, rank, world
        self.operation_timeout_s = operation_timeout_s
        try:
            # Neither backend gives up soon where somebody does not come, so nobody starts alone.
            _meet(store, rank, world, timeout_s, is_over)
            self._transport = self._form(store, rank, world, timeout_s, operation_timeout_s)
        except RuntimeError as e:
            raise RankError(rank, f"the group of epoch {epoch} did not form: {_first_line(e)}") from e
        self.preposts = self._transport.preposts

    def connect(self) -> None:
        """Has what the first messages between ranks would wait for done now. Collective. Raises RankError."""
        try:
            self._formed().connect()
        except RuntimeError as e:
            raise self._fail_by_device(e) from e

    def refuse(self, epoch: int) -> None:
        """Tells those who join `epoch` not to wait: this rank does not come. Raises RankError."""
        if self._meetings.store is None:
            return
        try:
            PrefixStore(f"epoch{epoch}", self._meetings.store).set(REFUSED, "1")
        except RuntimeError as e:
            raise RankError(self.rank, f"the rendezvous store does not answer: {_first_line(e)}") from e

    def attach(self, waits: DeviceWaits) -> None:
        """Has these waits end with the group, and the group fail with them. Until the group is left."""
        self._device_waits.append(waits)

    def namespace(self, name: str) -> Store:
        """A part of the store for what the ranks of this epoch agree on beside the group. Raises RankError."""
        if self._transport is None or self._meetings.store is None:
            raise RankError(self.rank, f"is in no group (the last was of epoch {self.epoch})")
        return PrefixStore(f"epoch{self.epoch}/{name}", self._meetings.store)

    def leave(self) -> None:
        """Ends the group, if there is one. Peers that wait for this rank get an error at once."""
        for transfer in self._in_flight:
            transfer.posted.clear()  # a work keeps its sockets open, whoever still holds the transfer
        self._in_flight.clear()
        self._device_waits.clear()
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    def interrupt(self) -> None:
        """Has whoever waits in this group fail at once. From any thread; the group is of no use afterwards."""
        for waits in list(self._device_waits):
            waits.abort()
        transport = self._transport
        if transport is not None:
            transport.interrupt()

    def post(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> Transfer:
        """Starts all sends and receives together. Messages of a pair and tag arrive in order; tags are below 2**31.

        A receive's tensor has the sent one's exact size. Raises RankError.
        """
        transport = self._formed()
        try:
            transfer = Transfer(self, transport.post(sends, receives, tag), (sends, receives))
        except RuntimeError as e:
            raise self._fail(UNKNOWN_RANK, e) from e
        self._in_flight.add(transfer)
        return transfer

    def synchronize(self) -> None:
        """Waits for the device, at most the timeout: call it before the host reads what depends on peers.

        On CUDA it is this call that notices lost peers. Raises RankError.
        """
        began_s = time.perf_counter()
        try:
            self._formed().synchronize()
        except RuntimeError as e:
            raise self._fail_by_device(e) from e
        self.waited_s += time.perf_counter() - began_s
        self._check_device_waits()

    def await_event(self, event: Any) -> None:
        """Waits for a recorded CUDA event as `synchronize` does for all that was queued. Raises RankError."""
        try:
            self._formed().await_event(event)
        except RuntimeError as e:
            raise self._fail_by_device(e) from e
        self._check_device_waits()

    def all_reduce(self, x: Tensor) -> bool:
        """Sums x over all ranks in place where the backend does that well; says whether it did. Raises RankError."""
        try:
            return self._formed().all_reduce(x)
        except RuntimeError as e:
            raise self._fail(UNKNOWN_RANK, e) from e

    def _check_device_waits(self) -> None:
        blamed = self._blamed()
        if blamed is not None:
            raise self._fail(blamed, RuntimeError("a kernel has waited for it in vain"))

    def _fail_by_device(self, error: RuntimeError) -> RankError:
        blamed = self._blamed()
        return self._fail(UNKNOWN_RANK if blamed is None else blamed, error)

    def _blamed(self) -> int | None:
        return next((w.blamed for w in self._device_waits if w.blamed is not None), None)

    def _finish(self, transfer: Transfer) -> None:
        transport, posted = self._formed(), transfer.posted
        idx, began_s = 0, time.perf_counter()
        try:
            while idx < len(posted):
                transport.wait(posted[idx][1])
                idx += 1
        except RuntimeError as e:
            raise self._fail(posted[idx][0], e) from e
        self.waited_s += time.perf_counter() - began_s
        posted.clear()
        self._in_flight.discard(transfer)

    def _formed(self) -> Transport:
        if self._transport is None:
            raise RankError(self.rank, f"is in no group (the last was of epoch {self.epoch})")
        return self._transport

    def _fail(self, peer: int, error: RuntimeError) -> RankError:
        """Ends the group, so that peers that wait for this rank learn of it without a timeout of their own."""
        for waits in self._device_waits:  # what is queued on the device would wait for each of its peers in turn
            waits.abort()
        traceback.clear_frames(error.__traceback__)  # their locals hold works, and so the sockets
        self.leave()
        return RankError(peer, f"lost in epoch {self.epoch}: {_first_line(error)}")

    def _form(self, store: Store, rank: int, world: int, join_s: float, operation_s: float) -> Transport:
        if self._device.type == "cuda":
            return NcclTransport(store, rank, world, self._device, join_s, operation_s)
        return GlooTransport(store, rank, world, self._meetings.gloo_device, join_s, operation_s)

    def _store_answers(self) -> bool:
        store = self._meetings.store
        try:
            return store is not None and store.check(["alive"]) in (True, False)
        except RuntimeError:
            return False


def _meet(store: Store, rank: int, world: int, timeout_s: float, is_over: Callable[[], bool]) -> None:
    """Waits until all ranks are here. Raises RuntimeError."""
    store.set(f"here/{rank}", "1")
    everyone, ends_s = [f"here/{peer}" for peer in range(world)], time.monotonic() + timeout_s
    while not store.check(everyone):
        if is_over() or store.check([REFUSED]):
            raise RuntimeError("it is over" if is_over() else "somebody does not come")
        if time.monotonic() > ends_s:
            raise RuntimeError(f"not all of {world} ranks came within {timeout_s} s")
        time.sleep(MEETING_POLL_S)


def _first_line(error: BaseException) -> str:
    """What happened, without gloo's advice on what it may mean."""
    return str(error).partition("\n")[0].partition(". This is typically")[0][:300]
