"""Device memory that the ranks of an epoch map into each other.

Owns allocation, meeting, and the lifetime of the mappings. Knows nothing of what is written there. Uses torch's
symmetric memory without torch's default group, so that epochs may follow one another in a process.

What a rank maps stays valid as long as it is mapped: when a peer dies, its memory lives on until the last of the others
lets go of it, so writes to a dead rank go nowhere and harm nobody.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch.distributed.distributed_c10d import Store

from actors.dispatch.group import DeviceWaits, EpochGroup
from actors.errors import RankError
from actors.laps import Laps

log = logging.getLogger("corral.dispatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """Every rank's memory as this rank reaches it; what was mapped is gone when the last reference to this is.

    `buffers[rank]`: uint8 [num_bytes], all of the same size, zeros at first. `bases`: their addresses, int64 [world] on
    the same device. `keeper` holds the mapping.
    """

    buffers: tuple[Tensor, ...]
    bases: Tensor
    keeper: Any


class PeerMemory(Protocol):
    """Where a rank gets such memory from."""

    rank: int

    def attach(self, waits: DeviceWaits) -> None:
        """Has waits on the device end with the group that the memory belongs to, if there is one."""
        ...

    def map(self, name: str, num_bytes: int, own: Tensor | None = None) -> Mapping:
        """Collective: every rank calls it with the same name, once, and size. Raises RankError.

        `own`: memory that this rank mapped with others before, to be mapped again, as it is; else it is new.
        """
        ...

    def largest(self, name: str, number: int) -> int:
        """Of the numbers that all ranks name. Collective, with a name that is used once. Raises RankError."""
        ...


class SymmetricMemory:
    """Memory of the GPUs of one host, mapped over NVLink or PCIe, among the ranks of a group that was joined.

    Meeting takes a second or two the first time in a process. It is bounded by `timeout_s`, but for the exchange of
    file descriptors once all ranks have met: a rank that dies in those milliseconds leaves the others waiting.
    """

    def __init__(self, group: EpochGroup, device: torch.device, timeout_s: float) -> None:
        self.rank = group.rank
        self._group = group
        self._device = device
        self._timeout_s = timeout_s

    def attach(self, waits: DeviceWaits) -> None:
        self._group.attach(waits)

    def map(self, name: str, num_bytes: int, own: Tensor | None = None) -> Mapping:
        # Multicast objects are never made: a fault with one takes the whole host's GPUs out of service. And ranks that
        # see one device each all call it by the same number, which torch takes for the same device.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        try:
            with torch.cuda.device(self._device):
                return self._map(name, num_bytes, own)
        except RuntimeError as e:
            reason = str(e).partition("\n")[0][:300]
            raise RankError(self.rank, f"could not map the memory of its peers: {reason}") from e

    def largest(self, name: str, number: int) -> int:
        store = self._group.namespace(f"{name}/numbers")
        store.set_timeout(timedelta(seconds=self._timeout_s))
        try:
            store.set(str(self.rank), str(number))
            return max(int(store.get(str(rank))) for rank in range(self._group.world))
        except RuntimeError as e:
            raise RankError(self.rank, f"peers did not answer: {str(e).partition(chr(10))[0][:300]}") from e

    def _map(self, name: str, num_bytes: int, own: Tensor | None) -> Mapping:
        laps, symmetric = Laps(), c10d._SymmetricMemory
        if own is None:
            own = symmetric.empty_strided_p2p((num_bytes,), (1,), torch.uint8, self._device)
            own.zero_()
            torch.cuda.current_stream(self._device).synchronize()  # peers may write as soon as they have it
        laps.lap("allocated")
        store = MeetingStore(self._group.namespace(name), timedelta(seconds=self._timeout_s))
        store.meet(self._group.rank, self._group.world)
        laps.lap("all here")
        group_name = f"corral-{self._group.epoch}-{name}"
        with _named_group(group_name, store, self._group.rank, self._group.world):
            handle = symmetric.rendezvous(own, group_name)
        laps.lap("rendezvous")
        views = [
            own if rank == self._group.rank else handle.get_buffer(rank, (num_bytes,), torch.uint8)
            for rank in range(self._group.world)
        ]
        mapping = _mapping(views, (own, handle))
        laps.lap("views")
        log.info("mapped %d bytes of each of %d ranks: %s", num_bytes, self._group.world, laps)
        return mapping


class _named_group:  # noqa: N801 (a context manager)
    """A group of no backend that torch finds by its name, which is all that meeting asks of a group."""

    def __init__(self, name: str, store: Store, rank: int, world: int) -> None:
        self._name: Any = name  # torch types it as a name of its own
        self._store = store  # kept alive here: torch's group holds the native half of it alone
        self._group = c10d.ProcessGroup(store, rank, world)

    def __enter__(self) -> None:
        c10d._register_process_group(self._name, self._group)

    def __exit__(self, *_: object) -> None:
        c10d._unregister_process_group(self._name)


class MeetingStore(Store):
    """A store through which ranks with different pasts can meet.

    torch numbers the keys of symmetric memory by how often the process has met before, so that a young rank and an old
    one would wait for different keys. Here the numbers count from the first one that is seen. Waits let other threads
    run, and end after `timeout`.
    """

    def __init__(self, inner: Store, timeout: timedelta) -> None:
        super().__init__()
        self._inner = inner
        self._timeout = timeout
        self._first_number: int | None = None

    def meet(self, rank: int, world: int) -> None:
        """Waits until all ranks are here. Raises RuntimeError."""
        self._inner.set(f"here/{rank}", "1")
        self._inner.wait([f"here/{peer}" for peer in range(world)], self._timeout)

    def set(self, key: str, value: str) -> None:
        self._inner.set(self._renumbered(key), value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._inner.get(self._renumbered(key))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.wait(keys)
        return self._inner.multi_get([self._renumbered(key) for key in keys])

    def add(self, key: str, amount: int) -> int:
        return self._inner.add(self._renumbered(key), amount)

    def check(self, keys: list[str]) -> bool:
        return self._inner.check([self._renumbered(key) for key in keys])

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:  # type: ignore[override]
        self._inner.wait([self._renumbered(key) for key in keys], self._timeout if timeout is None else timeout)

    def _renumbered(self, key: str) -> str:
        """name/12/... as name/0/..., if 12 was the first number."""
        parts = key.split("/")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at is None:
            return key
        number = int(parts[at])
        if self._first_number is None:
            self._first_number = number
        parts[at] = str(number - self._first_number)
        return "/".join(parts)


class SharedMemory:
    """The like for ranks that are threads of one process, on any device: for tests, and where there is but one rank.

    Make one per rank with `of_world`.
    """

    def __init__(self, rank: int, world: int, device: torch.device, made: dict[str, tuple[Tensor, ...]]) -> None:
        self.rank = rank
        self._world = world
        self._device = device
        self._made = made

    @classmethod
    def of_world(cls, world: int, device: torch.device) -> Sequence["SharedMemory"]:
        made: dict[str, tuple[Tensor, ...]] = {}
        return [cls(rank, world, device, made) for rank in range(world)]

    def attach(self, waits: DeviceWaits) -> None:
        """Belongs to no group."""

    def map(self, name: str, num_bytes: int, own: Tensor | None = None) -> Mapping:
        """Always new."""
        fresh = torch.zeros(self._world, num_bytes, dtype=torch.uint8, device=self._device).unbind()
        return _mapping(self._made.setdefault(name, fresh), None)

    def largest(self, name: str, number: int) -> int:
        """Where all name the same."""
        return number


def _mapping(buffers: Sequence[Tensor], keeper: Any) -> Mapping:
    bases = torch.tensor([buffer.data_ptr() for buffer in buffers], device=buffers[0].device)
    return Mapping(buffers=tuple(buffers), bases=bases, keeper=keeper)
