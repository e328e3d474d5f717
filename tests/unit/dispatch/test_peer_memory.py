"""Ranks that have met others before and ranks that have not meet each other."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch._C import _distributed_c10d as c10d
from torch.distributed import HashStore, PrefixStore

from actors.dispatch.peer_memory import MeetingStore, SharedMemory

SECOND = timedelta(seconds=1)


def gather(store: MeetingStore, number: int, rank: int, world: int) -> list[bytes]:
    """What torch does to gather a value from every rank, by a key with the process's count of such gatherings.

    Through another store, as there: calls come from native code.
    """
    outer = PrefixStore("outer", store)
    outer.set(f"Memory/{number}/{rank}", f"value {rank}")
    return outer.multi_get([f"Memory/{number}/{peer}" for peer in range(world)])


def test_the_count_of_earlier_meetings_does_not_matter() -> None:
    shared = HashStore()

    def meet(rank: int, met_before: int) -> list[list[bytes]]:
        store = MeetingStore(PrefixStore("epoch3", shared), SECOND)
        store.meet(rank, 3)
        return [gather(store, met_before + i, rank, 3) for i in range(2)]

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(meet, range(3), (0, 14, 2)))
    assert found == [[[b"value 0", b"value 1", b"value 2"]] * 2] * 3


def test_who_waits_for_a_rank_that_does_not_come_waits_for_a_time() -> None:
    store = MeetingStore(HashStore(), timedelta(milliseconds=50))
    with pytest.raises(RuntimeError):
        store.meet(0, 2)
    with pytest.raises(RuntimeError):
        store.multi_get(["Memory/0/1"])


def test_values_that_are_no_text_arrive() -> None:
    store = MeetingStore(HashStore(), SECOND)
    outer = PrefixStore("outer", store)
    outer.set("Memory/5/0", bytes(range(256)))  # type: ignore[arg-type]
    assert outer.get("Memory/5/0") == bytes(range(256))
    assert (outer.add("Memory/6", 2), outer.add("Memory/6", 3)) == (2, 5)
    assert store.check(["outer/Memory/5/0"]) and not store.check(["outer/Memory/7/0"])


def test_a_group_without_a_backend_is_found_by_its_name() -> None:
    """What mapping relies on: no default group, no backend."""
    group = c10d.ProcessGroup(HashStore(), 1, 3)
    c10d._register_process_group("corral-test", group)
    found = c10d._resolve_process_group("corral-test")
    assert (found.rank(), found.size()) == (1, 3)
    c10d._unregister_process_group("corral-test")
    with pytest.raises(RuntimeError):
        c10d._resolve_process_group("corral-test")


def test_threads_share_what_has_the_same_name() -> None:
    first, second = SharedMemory.of_world(2, torch.device("cpu"))
    mine, theirs, other = first.map("a", 8), second.map("a", 8), second.map("b", 8)
    mine.buffers[1][3] = 7
    assert theirs.buffers[1].tolist() == [0, 0, 0, 7, 0, 0, 0, 0]
    assert mine.bases.tolist() == theirs.bases.tolist() == [buffer.data_ptr() for buffer in mine.buffers]
    assert not other.buffers[1].any()
