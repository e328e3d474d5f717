"""Serve's own Python proxy as the front, metrics for Prometheus, overload, deadlines, and a sudden end, on one small
service.
"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from service import Service, launch, stop

from cluster.session import family_of
from protos import inference_pb2, inference_pb2_grpc


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One rank, auto's choice on a CPU, behind Serve's Python proxy, with room for two requests and a queue of two."""
    flags = ["--front", "proxy", "--max-num-seqs", "2", "--max-queued-requests", "2", "--threads-per-rank", "1"]
    running = launch(tmp_path_factory.mktemp("proxied"), "shape:tiny", flags)
    yield running
    if running.process.poll() is None:
        stop(running)


def generate(max_tokens: int, timeout_ms: int = 0) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        text="hello",
        sampling=inference_pb2.Sampling(temperature=0),
        stopping=inference_pb2.Stopping(max_tokens=max_tokens, ignore_eos=True),
        timeout_ms=timeout_ms,
    )


def test_the_python_proxy_answers_http_and_grpc_alike(proxied: Service) -> None:
    body = {"model": proxied.model, "prompt": "hello", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    reply = httpx.post(f"{proxied.url}/v1/completions", json=body | {"return_token_ids": True}, timeout=30)
    with grpc.insecure_channel(proxied.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        whole = stub.Generate(generate(12), timeout=30)
        chunks = list(stub.GenerateStream(generate(12), timeout=30))
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    ids = reply.json()["choices"][0]["token_ids"]
    assert len(ids) == 12
    assert list(whole.choices[0].token_ids) == ids == [i for chunk in chunks for i in chunk.token_ids]
    assert whole.choices[0].text == reply.json()["choices"][0]["text"] == "".join(chunk.text for chunk in chunks)


def test_a_deadline_ends_a_request_on_time(proxied: Service) -> None:
    with grpc.insecure_channel(proxied.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(generate(3000, timeout_ms=300), timeout=60)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - began < 5


def test_over_its_limits_the_service_refuses_at_once_and_says_when_to_come_back(proxied: Service) -> None:
    """Two run, two wait: of ten, six are refused, over either front, and the others are answered."""
    outcomes: list[tuple[str, float]] = []
    lock = threading.Lock()

    def ask(number: int) -> None:
        if number % 2:
            body = {"model": proxied.model, "prompt": "x", "max_tokens": 600, "ignore_eos": True}
            reply = httpx.post(f"{proxied.url}/v1/completions", json=body, timeout=90)
            outcome = str(reply.status_code), float(reply.headers.get("retry-after", 0))
        else:
            with grpc.insecure_channel(proxied.grpc_address) as channel:
                try:
                    inference_pb2_grpc.InferenceStub(channel).Generate(generate(600), timeout=90)
                    outcome = "200", 0.0
                except grpc.RpcError as e:
                    pushback = dict(e.trailing_metadata() or ()).get("grpc-retry-pushback-ms", "0")
                    outcome = (
                        ("429" if e.code() is grpc.StatusCode.RESOURCE_EXHAUSTED else str(e.code())),
                        float(pushback),
                    )
        with lock:
            outcomes.append(outcome)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(code for code, _ in outcomes) == ["200"] * 4 + ["429"] * 6
    assert all(retry > 0 for code, retry in outcomes if code == "429")


@pytest.mark.timeout(90)
def test_metrics_are_there_for_prometheus(proxied: Service) -> None:
    wanted = (
        "ray_corral_time_to_first_token_seconds_count",
        "ray_corral_inter_token_latency_seconds_count",
        "ray_corral_requests_running",
        "ray_corral_requests_queued",
        "ray_corral_kv_used_fraction",
        "ray_corral_batch_tokens",
        "ray_corral_expert_tokens_total",
        "ray_corral_generated_tokens_total",
    )
    ends_s = time.monotonic() + 45
    while missing := [name for name in wanted if name not in proxied.metrics()]:
        assert time.monotonic() < ends_s, f"not published: {missing}"
        time.sleep(1)
    while (generated := proxied.metric("ray_corral_generated_tokens_total")) < 36:  # what is read is seconds old
        assert time.monotonic() < ends_s, f"{generated} tokens were counted"
        time.sleep(1)
    assert proxied.metric("ray_corral_expert_tokens_total") > 0


@pytest.mark.timeout(180)
def test_a_killed_proxy_is_back_in_seconds_and_what_was_open_leaves_nothing(proxied: Service) -> None:
    """Serve tells nobody that a proxy died: its requests run to their end."""
    with grpc.insecure_channel(proxied.grpc_address) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).GenerateStream(generate(600), timeout=60)
        next(call)
        proxied.kill("ray::ProxyActor")
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert proxied.wait_healthy(20) < 20
    proxied.wait_idle(20)


@pytest.mark.timeout(180)
def test_a_service_that_is_killed_can_be_cleaned_up(proxied: Service) -> None:
    """Most of it goes at once; Ray's agents look after their parent now and then, and `corral stop` need not wait.

    The last of these tests: there is no service after it.
    """
    session = proxied.session
    family = family_of(session)
    assert len(family) > 5
    proxied.process.kill()
    proxied.process.wait()
    time.sleep(1)
    assert "gone without a stop" in proxied.corral("status")
    assert "nothing of it is left" in proxied.corral("stop")
    assert not [process for process in family if process.is_alive]
    assert not Path(session.scratch).exists()
