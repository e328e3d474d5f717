"""`serve deploy` once more with other keys: ranks that live take them over, and what is open goes on where it can."""

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ray_head import RayHead, ray_head

pytestmark = pytest.mark.cluster  # a minute and a Ray of its own: run by `make test-cluster`
WITHIN_S = 60.0
TOKENS = 1200
PIPELINE: dict[str, Any] = {
    "model": "shape:tiny", "served_model_name": "m", "layout": "disaggregated", "device": "cpu", "threads_per_rank": 1,
    "expert_ranks": 2, "max_model_len": 2048,
}  # fmt: skip
RANKS = ("ray::AttentionActor", "ray::ExpertActor")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    with ray_head(tmp_path_factory.mktemp("head")) as running:
        running.deploy(PIPELINE)
        running.wait_healthy(WITHIN_S)
        yield running


def complete(head: RayHead, max_tokens: int) -> httpx.Response:
    body = {"model": "m", "prompt": "hello", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{head.url}/v1/completions", json={**body, "return_token_ids": True}, timeout=100)


def token_ids(reply: httpx.Response) -> list[int]:
    assert reply.status_code == 200, reply.text
    return list(reply.json()["choices"][0]["token_ids"])


class Asking(threading.Thread):
    """One call after another in the background, so that a deployment finds one open whenever it comes."""

    def __init__(self, head: RayHead) -> None:
        super().__init__(daemon=True)
        self._head = head
        self._enough = threading.Event()
        self.replies: list[httpx.Response] = []

    def run(self) -> None:
        while not self._enough.is_set():
            self.replies.append(complete(self._head, TOKENS))

    def result(self) -> list[httpx.Response]:
        self._enough.set()
        self.join(100)
        assert self.replies and not self.is_alive()
        return self.replies


def rank_pids(head: RayHead) -> list[int]:
    return [pid for kind in RANKS for pid in head.pids(kind)]


def deploy_again(head: RayHead, pipeline: dict[str, Any]) -> None:
    before = set(head.pids("ServeReplica:corral:Router"))
    head.deploy(pipeline)
    head.wait_until(lambda: bool(now := head.pids("ServeReplica:corral:Router")) and not before & set(now), WITHIN_S)
    head.wait_healthy(WITHIN_S)


@pytest.mark.timeout(240)
def test_other_keys_are_taken_over_by_the_ranks_and_open_calls_go_on(head: RayHead) -> None:
    """How long somebody waits, and how many expert ranks there are, is nothing that a rank holds."""
    undisturbed, ranks = token_ids(complete(head, TOKENS)), rank_pids(head)
    asking = Asking(head)
    asking.start()
    deploy_again(head, PIPELINE | {"max_queued_requests": 100, "step_timeout_s": 8.0, "expert_ranks": 3})
    assert all(token_ids(reply) == undisturbed for reply in asking.result())
    head.wait_until(lambda: len(rank_pids(head)) == 4, WITHIN_S)
    assert set(ranks) <= set(rank_pids(head)), "a rank was replaced"


@pytest.mark.timeout(240)
def test_another_model_gets_other_ranks_and_open_calls_end(head: RayHead) -> None:
    before, ranks = token_ids(complete(head, 8)), rank_pids(head)
    asking = Asking(head)
    asking.start()
    deploy_again(head, PIPELINE | {"model": "shape:tiny-scout", "expert_ranks": 1})
    assert any(reply.status_code == 503 and "another model" in reply.text for reply in asking.result())
    assert token_ids(complete(head, 8)) != before
    head.wait_until(lambda: len(rank_pids(head)) == 2, WITHIN_S)
    assert not set(ranks) & set(rank_pids(head))
