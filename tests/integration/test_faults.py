"""kill -9 of each process of the pipeline: its requests end with UNAVAILABLE in time, and the service comes back."""

import threading
import time
from collections.abc import Iterator

import grpc
import httpx
import pytest
from service import Service, launch, stop

from protos import inference_pb2, inference_pb2_grpc

ENDS_WITHIN_S = 5.0
BACK_WITHIN_S = 60.0


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of its own, since others would notice."""
    flags = ["--layout", "disaggregated", "--attention-ranks", "1", "--expert-ranks", "1", "--threads-per-rank", "1"]
    running = launch(tmp_path_factory.mktemp("victim"), "shape:tiny", flags)
    yield running
    stop(running)


def endless(max_tokens: int = 3000) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        text="once upon a time",
        sampling=inference_pb2.Sampling(temperature=0),
        stopping=inference_pb2.Stopping(max_tokens=max_tokens, ignore_eos=True),
    )


class Stream(threading.Thread):
    """Reads one gRPC stream to its end, and notes how and when it ended."""

    def __init__(self, channel: grpc.Channel) -> None:
        super().__init__(daemon=True)
        self._call = inference_pb2_grpc.InferenceStub(channel).GenerateStream(endless(), timeout=120)
        self.token_ids: list[int] = []
        self.flowing = threading.Event()
        self.code: grpc.StatusCode | None = None
        self.problem = ""
        self.ended_s = 0.0

    def run(self) -> None:
        try:
            for chunk in self._call:
                assert chunk.token_index == len(self.token_ids), "indices neither skip nor repeat"
                self.token_ids += chunk.token_ids
                self.flowing.set()
            self.code = grpc.StatusCode.OK
        except grpc.RpcError as e:
            self.code, self.problem = e.code(), e.details()
        self.ended_s = time.monotonic()


def answer(service: Service) -> list[int]:
    body = {"prompt": "hello", "max_tokens": 8, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
    reply = httpx.post(f"{service.url}/v1/completions", json={"model": service.model, **body}, timeout=60)
    assert reply.status_code == 200, reply.text
    ids = reply.json()["choices"][0]["token_ids"]
    assert len(ids) == 8
    return list(ids)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("process", ["ray::ExpertActor", "ray::AttentionActor", "ray::ServeReplica:corral:Router"])
def test_a_killed_process_ends_its_requests_and_the_service_comes_back(victim: Service, process: str) -> None:
    expected = answer(victim)
    with grpc.insecure_channel(victim.grpc_address) as channel:
        streams = [Stream(channel) for _ in range(4)]
        for stream in streams:
            stream.start()
        for stream in streams:
            assert stream.flowing.wait(60)
        killed_s = time.monotonic()
        pid = victim.kill(process)
        for stream in streams:
            stream.join(ENDS_WITHIN_S + 10)
            assert stream.code is grpc.StatusCode.UNAVAILABLE, (stream.code, stream.problem)
            assert stream.ended_s - killed_s < ENDS_WITHIN_S
            assert "Traceback" not in stream.problem and len(stream.problem) < 200
    victim.wait_healthy(BACK_WITHIN_S)
    assert answer(victim) == expected, "the same tokens after the recovery"
    assert victim.pids(process) != [pid]


@pytest.mark.timeout(240)
def test_a_killed_ingress_breaks_its_connections_and_its_requests_are_cancelled(victim: Service) -> None:
    with grpc.insecure_channel(victim.grpc_address) as channel:
        stream = Stream(channel)
        stream.start()
        assert stream.flowing.wait(60)
        victim.kill("ray::ServeReplica:corral:Ingress")
        stream.join(30)
        assert stream.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL)
    victim.wait_healthy(BACK_WITHIN_S)
    answer(victim)
    wait_for_no_pages(victim)


@pytest.mark.timeout(120)
def test_clients_that_vanish_leave_no_page_behind(victim: Service) -> None:
    victim.wait_healthy(BACK_WITHIN_S)
    channels = [grpc.insecure_channel(victim.grpc_address) for _ in range(3)]
    streams = [Stream(channel) for channel in channels]
    for stream in streams:
        stream.start()
    body = {"model": victim.model, "prompt": "x", "max_tokens": 3000, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{victim.url}/v1/completions", json=body, timeout=60) as reply:
        for line in reply.iter_lines():
            if line.startswith("data:"):
                break
        for stream in streams:
            assert stream.flowing.wait(60)
        for channel in channels:
            channel.close()
    wait_for_no_pages(victim)


def wait_for_no_pages(service: Service, timeout_s: float = 40.0) -> None:
    """The router publishes each second and Ray's agent about each five: poll."""
    ends_s = time.monotonic() + timeout_s
    while time.monotonic() < ends_s:
        running = service.metric("ray_corral_requests_running")
        if running == 0 and service.metric("ray_corral_kv_used_fraction") == 0:
            return
        time.sleep(0.5)
    raise AssertionError(f"{running} requests still run, or hold pages")
