"""Groups of two ranks, both in this process: what a rank that leaves does to one that waits for it."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from actors.dispatch.group import EpochGroup, RendezvousStore
from actors.errors import RankError

CPU = torch.device("cpu")
TIMEOUT_S = 10.0
AT_ONCE_S = 3.0
LARGE_BYTES = 512 * 1024 * 1024  # more than the sockets' buffers hold


@pytest.fixture
def pair() -> Iterator[tuple[EpochGroup, EpochGroup]]:
    store = RendezvousStore("127.0.0.1")
    with pytest.raises(RuntimeError, match="not started"):
        _ = store.endpoint
    store.start()
    groups = EpochGroup(CPU, "127.0.0.1"), EpochGroup(CPU, "127.0.0.1")
    join(groups, store.endpoint, 1)
    yield groups
    for group in groups:
        group.leave()
    store.stop()


def join(groups: tuple[EpochGroup, EpochGroup], endpoint: str, epoch: int) -> None:
    def work(rank: int) -> None:
        groups[rank].prepare(endpoint)
        groups[rank].join(epoch, rank, 2, TIMEOUT_S, TIMEOUT_S)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))


@pytest.mark.parametrize("num_bytes", [8, 64 * 1024 - 1, 64 * 1024, 1_000_003])
def test_messages_arrive_whole(pair: tuple[EpochGroup, EpochGroup], num_bytes: int) -> None:
    sent = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    received = torch.zeros_like(sent)
    arriving = pair[1].post((), [(0, received)], 5)
    pair[0].post([(1, sent)], (), 5).wait()
    arriving.wait()
    assert torch.equal(sent, received)


def test_messages_of_a_tag_keep_their_order_and_tags_do_not_mix(pair: tuple[EpochGroup, EpochGroup]) -> None:
    received = {tag: [torch.zeros(1) for _ in range(3)] for tag in (1, 2)}
    leaving = pair[0].post([(1, torch.tensor([1.0 + i])) for i in range(3)], (), 1)
    also_leaving = pair[0].post([(1, torch.tensor([11.0 + i])) for i in range(3)], (), 2)
    for tag in (2, 1):
        pair[1].post((), [(0, x) for x in received[tag]], tag).wait()
    leaving.wait()
    also_leaving.wait()
    assert received == {1: [1, 2, 3], 2: [11, 12, 13]}


def test_a_rank_that_leaves_frees_who_waits_for_it(pair: tuple[EpochGroup, EpochGroup]) -> None:
    arriving = pair[0].post((), [(1, torch.zeros(4))], 0)
    pending = pair[1].post((), [(0, torch.zeros(4))], 0)
    pair[1].leave()
    start_s = time.monotonic()
    with pytest.raises(RankError, match="rank 1: lost in epoch 1"):
        arriving.wait()
    assert time.monotonic() - start_s < AT_ONCE_S
    with pytest.raises(RankError, match="in no group"):
        pending.wait()


def test_leaving_frees_peers_even_if_somebody_holds_a_work(pair: tuple[EpochGroup, EpochGroup]) -> None:
    arriving = pair[0].post((), [(1, torch.zeros(4))], 0)
    held = list(pair[1].post((), [(0, torch.zeros(4))], 0).posted)
    pair[1].leave()
    start_s = time.monotonic()
    with pytest.raises(RankError, match="rank 1: lost in epoch 1"):
        arriving.wait()
    assert time.monotonic() - start_s < AT_ONCE_S
    assert held


def test_a_rank_that_leaves_in_the_midst_of_a_message_frees_its_receiver(pair: tuple[EpochGroup, EpochGroup]) -> None:
    received = torch.zeros(LARGE_BYTES, dtype=torch.uint8)
    arriving = pair[0].post((), [(1, received)], 0)
    pair[1].post([(0, torch.ones(LARGE_BYTES, dtype=torch.uint8))], (), 0)
    while not received[0]:
        pass
    pair[1].leave()
    assert not received[-9], "the message arrived whole before the test could cut it"
    start_s = time.monotonic()
    with pytest.raises(RankError, match="rank 1: lost in epoch 1"):
        arriving.wait()
    assert time.monotonic() - start_s < AT_ONCE_S


def test_who_notices_a_loss_leaves_so_that_others_notice_too(pair: tuple[EpochGroup, EpochGroup]) -> None:
    """Rank 0 fails on its own; nobody calls leave."""
    waiting = pair[1].post((), [(0, torch.zeros(1))], 0)
    with pytest.raises(RankError):
        pair[0].post([(1, torch.zeros(2).to_sparse())], (), 0)  # whatever torch refuses to send
    start_s = time.monotonic()
    with pytest.raises(RankError, match="rank 0: lost"):
        waiting.wait()
    assert time.monotonic() - start_s < AT_ONCE_S


def test_epochs_are_tried_once(pair: tuple[EpochGroup, EpochGroup]) -> None:
    with pytest.raises(RankError, match="epoch 1 is over; the last was 1"):
        pair[0].join(1, 0, 2, 1.0)


@pytest.mark.parametrize("num_bytes", [16, 1_000_000])
def test_a_rank_that_waits_for_a_silent_peer_can_be_told_to_stop(
    pair: tuple[EpochGroup, EpochGroup], num_bytes: int
) -> None:
    """From another thread, long before the timeout; the peer lives and sends nothing."""
    arriving = pair[0].post((), [(1, torch.zeros(num_bytes, dtype=torch.uint8))], 0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(arriving.wait)
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        start_s = time.monotonic()
        pair[0].interrupt()
        with pytest.raises(RankError):
            waiting.result(AT_ONCE_S)
    assert time.monotonic() - start_s < AT_ONCE_S
    with pytest.raises(RankError, match="in no group"):
        pair[0].post((), [(1, torch.zeros(1))], 0)
    pair[0].interrupt()  # a group that is gone: nothing to do


def test_the_next_group_is_formed_beside_the_one_in_use(pair: tuple[EpochGroup, EpochGroup]) -> None:
    """A receive that was posted before it was formed arrives after that, and both carry messages."""
    received = torch.zeros(2, 4)
    arriving = pair[0].post((), [(1, received[0])], 0)
    after = pair[0].beside(), pair[1].beside()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: after[rank].join(2, rank, 2, TIMEOUT_S, TIMEOUT_S), range(2)))
    also_arriving = after[0].post((), [(1, received[1])], 0)
    for group, number in ((after[1], 2.0), (pair[1], 1.0)):
        group.post([(0, torch.full((4,), number))], (), 0).wait()
    arriving.wait()
    pair[0].leave()
    also_arriving.wait()
    assert received[:, 0].tolist() == [1.0, 2.0]
    for group in after:
        group.leave()


def test_who_waits_for_a_rank_that_does_not_come_is_told(pair: tuple[EpochGroup, EpochGroup]) -> None:
    """By the rank itself, or by whoever knows that the epoch is over."""
    is_over = threading.Event()
    ways = (lambda: pair[1].beside().refuse(2), "somebody does not come"), (is_over.set, "it is over")
    for epoch, (tell, problem) in enumerate(ways, 2):
        with ThreadPoolExecutor(1) as pool:
            joining = pool.submit(pair[0].beside().join, epoch, 0, 2, TIMEOUT_S, TIMEOUT_S, is_over.is_set)
            with pytest.raises(TimeoutError):
                joining.result(0.2)
            start_s = time.monotonic()
            tell()
            with pytest.raises(RankError, match=problem):
                joining.result(AT_ONCE_S)
        assert time.monotonic() - start_s < AT_ONCE_S
