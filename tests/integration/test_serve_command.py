"""`corral serve --detach`, `status`, `ask`, `chat`, `stop` as a person types them, amid the traces of other Rays."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from service import free_port

from cluster.session import Process, StateFolder, family_of

pytestmark = pytest.mark.timeout(240)


class Operator:
    """A person with a state folder of their own, an old Ray token at home, and RAY_ADDRESS set to a cluster."""

    def __init__(self, home: Path) -> None:
        self.http_port, self.grpc_port = free_port(), free_port()
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text("0" * 64)
        self.environment = os.environ | {
            "HOME": str(home),
            "XDG_STATE_HOME": str(home / "state"),
            "RAY_ADDRESS": "127.0.0.1:1",
            "RAY_AUTH_TOKEN": "of somebody else",
            "http_proxy": "http://127.0.0.1:1",
        }
        self.state = StateFolder(self.http_port, self.environment)

    def types(self, *arguments: str, text: str | None = None) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "cluster.cli", *arguments]
        return subprocess.run(
            command, env=self.environment, input=text, capture_output=True, text=True, check=False, timeout=180
        )

    def serve(self, *flags: str) -> "subprocess.CompletedProcess[str]":
        ports = ["--port", str(self.http_port), "--grpc-port", str(self.grpc_port)]
        return self.types("serve", *ports, "--threads-per-rank", "1", "--detach", *flags)

    def family(self) -> frozenset[Process]:
        session = self.state.read()
        assert session is not None
        return family_of(session)


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    someone = Operator(tmp_path)
    yield someone
    someone.types("stop")


def test_a_service_from_start_to_stop(operator: Operator) -> None:
    started = operator.serve()
    assert started.returncode == 0, started.stdout + started.stderr
    assert "ready after" in started.stdout
    family, session = operator.family(), operator.state.read()
    assert session is not None and session.is_alive and len(family) > 5

    status = operator.types("status").stdout
    assert f"http://127.0.0.1:{operator.http_port}" in status and " ready\n" in status
    assert "serving" in status and "attention, expert" in status and "first start" in status
    figures = json.loads(operator.types("status", "--json").stdout)
    assert figures["serving"] and len(figures["ranks"]) == 1

    asked = operator.types("ask", "--max-tokens", "5", "Hello?")
    assert asked.returncode == 0, asked.stderr
    http_answer, grpc_answer = asked.stdout.split("HTTP http://")[1].split("gRPC 127")
    assert "5 tokens in" in http_answer and "5 tokens in" in grpc_answer
    assert http_answer.splitlines()[1:-1] == grpc_answer.splitlines()[1:-1]  # the same seed, the same text

    chatted = operator.types(
        "chat", "--max-tokens", "3", "--grpc", f"127.0.0.1:{operator.grpc_port}", text="Hi\nAgain\n"
    )
    assert chatted.returncode == 0 and chatted.stdout.count("3 tokens in") == 2

    second = operator.serve()
    assert second.returncode == 1 and "is served by process" in second.stderr

    stopped = operator.types("stop")
    assert stopped.returncode == 0 and "nothing of it is left" in stopped.stdout
    assert "had to be killed" not in stopped.stdout
    assert not [process for process in family if process.is_alive]
    assert not Path(session.scratch).exists() and not operator.state.path.exists()
    assert operator.types("status").stdout.startswith("nothing is served here")


def test_a_service_that_is_killed_can_be_cleaned_up(operator: Operator) -> None:
    """Most of it goes at once; Ray's agents look after their parent now and then, and `corral stop` need not wait."""
    assert operator.serve("--front", "proxy").returncode == 0
    family, session = operator.family(), operator.state.read()
    assert session is not None
    os.kill(session.pid, signal.SIGKILL)
    time.sleep(1)
    assert "gone without a stop" in operator.types("status").stdout
    assert "nothing of it is left" in operator.types("stop").stdout
    assert not [process for process in family if process.is_alive]
    assert not Path(session.scratch).exists()


def test_what_cannot_be_served_is_said_before_anything_starts(operator: Operator, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", operator.http_port))
        listener.listen()
        busy = operator.serve()
    assert busy.returncode == 1 and f"127.0.0.1:{operator.http_port} cannot be used" in busy.stderr
    absent = operator.serve(str(tmp_path / "nothing"))
    assert absent.returncode == 1 and "config.json" in absent.stderr, absent.stderr
    huge = operator.serve("shape:maverick", "--load", "dummy", "--kv-cache-bytes", str(10**15))
    assert huge.returncode == 1 and "GB" in huge.stderr and "fits" in huge.stderr, huge.stderr
    assert operator.state.read() is None
