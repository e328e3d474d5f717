"""A real service for tests: `corral serve` in a process of its own, with its private Ray."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster.session import Session, StateFolder

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 40.0
_PORTS = set(range(5000, 6300))  # nothing in Ray has its default here
_DRAW = random.SystemRandom()  # not what a test may have seeded


def free_port() -> int:
    """Nothing listens on it. It is below those that Linux gives to who wants any: else one of a starting service's
    forty listeners might get it before the one that it is meant for. And it is none of the block that a service
    takes for its own Ray, as one of `free_block` might be.
    """
    for port in _DRAW.sample(sorted(_PORTS), len(_PORTS)):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("", port))
            _PORTS.remove(port)
            return port
    raise AssertionError("no port is free")


@dataclass
class Service:
    """A running pipeline and how to reach and hurt it."""

    process: subprocess.Popen[bytes]
    log: Path
    model: str
    http_port: int
    grpc_port: int
    metrics_port: int
    ready_s: float = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "XDG_STATE_HOME": str(self.log.parent / "state")}

    @property
    def session(self) -> Session:
        session = StateFolder(self.http_port, self._environment).read()
        assert session is not None
        return session

    @property
    def scratch(self) -> Path:
        return Path(self.session.scratch)

    def corral(self, *arguments: str) -> str:
        """What `corral ARGUMENTS` prints for the person that this service belongs to."""
        command = [sys.executable, "-m", "cluster.cli", *arguments]
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=60).stdout

    def pids(self, name: str) -> list[int]:
        """Processes of this service whose title contains `name` (Ray titles workers ray::Class.method)."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        found = []
        for process in family:
            try:
                if any(name in part for part in process.cmdline()[:1]) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except psutil.NoSuchProcess:
                continue
        return found

    def kill(self, name: str) -> int:
        """kill -9 of the one process of that name."""
        (pid,) = self.pids(name)
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_healthy(self, timeout_s: float) -> float:
        """Seconds until /health answers 200."""
        began = time.monotonic()
        while time.monotonic() - began < timeout_s:
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return time.monotonic() - began
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not healthy within {timeout_s} s:\n{self.log.read_text()[-4000:]}")

    def health(self) -> dict[str, Any]:
        """What the router said last; up to a second old."""
        return dict(httpx.get(f"{self.url}/health", timeout=10).json())

    def wait_busy(self, num_requests: int, timeout_s: float = 10.0) -> None:
        """Until so many requests run. Nothing that came before is told of afterwards."""
        self._wait_health(lambda state: state["requests_running"] == num_requests, timeout_s)

    def wait_idle(self, timeout_s: float = 10.0) -> None:
        """Until nothing runs, nothing waits, and no page of KV cache is owned."""
        names = ("requests_running", "requests_queued", "kv_used_fraction")
        self._wait_health(lambda state: not any(state[name] for name in names), timeout_s)

    def _wait_health(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float) -> None:
        ends_s = time.monotonic() + timeout_s
        while not condition(state := self.health()):
            assert time.monotonic() < ends_s, state
            time.sleep(0.1)

    def metrics(self) -> str:
        """What Prometheus would scrape; up to 10 s old."""
        return httpx.get(f"http://127.0.0.2:{self.metrics_port}/metrics", timeout=5).text

    def metric(self, name: str) -> float:
        """The sum of a metric's samples over all labels."""
        lines = [line for line in self.metrics().splitlines() if line.startswith((name + "{", name + " "))]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


def launch(tmp: Path, model: str, flags: list[str], env: dict[str, str] | None = None) -> Service:
    """Starts `corral serve` and waits until it answers."""
    http_port, grpc_port, metrics_port = free_port(), free_port(), free_port()
    log = tmp / "serve.log"
    command = [sys.executable, "-m", "cluster.cli", "serve", model, "--port", str(http_port)]
    command += ["--grpc-port", str(grpc_port), "--metrics-port", str(metrics_port), *flags]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp / "state"), **(env or {})}
    process = subprocess.Popen(command, stdout=log.open("wb"), stderr=subprocess.STDOUT, env=environment)
    service = Service(process, log, model.removeprefix("shape:"), http_port, grpc_port, metrics_port)
    try:
        service.ready_s = service.wait_healthy(START_TIMEOUT_S)
    except BaseException:
        process.terminate()
        raise
    return service


def stop(service: Service) -> None:
    """Ends the service as an operator would, and asserts that no process of it is left."""
    family = psutil.Process(service.process.pid).children(recursive=True)
    service.process.send_signal(signal.SIGTERM)
    try:
        assert service.process.wait(STOP_TIMEOUT_S) == 0, service.log.read_text()[-4000:]
    finally:
        _, left = psutil.wait_procs(family, timeout=10)
        for process in left:
            process.kill()
    assert not left, f"left behind: {[p.cmdline() for p in left]}"
