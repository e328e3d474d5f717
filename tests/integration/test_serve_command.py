"""`corral serve --detach`, `status`, `ask`, `chat`, `stop` as a person types them, amid the traces of other Rays.

What is served is the demonstration model: one attention rank, its sixteen experts on two others.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from service import free_port

from benchmarks.demo_model.score import ask_all, count, draw_questions
from cluster.commands.clients import GrpcClient, HttpClient, Message, Options
from cluster.commands.talk import QUESTIONS
from cluster.session import StateFolder, family_of

pytestmark = pytest.mark.timeout(240)

ANSWERS = (
    "Llama 4 Maverick has 128 routed experts.",
    "15 + 20 = 35, and March has 31 days: 35 - 31 = 4, so it is 4 April.",
)


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
        self.url = f"http://127.0.0.1:{self.http_port}"

    def types(self, *arguments: str, text: str | None = None) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "cluster.cli", *arguments]
        return subprocess.run(
            command, env=self.environment, input=text, capture_output=True, text=True, check=False, timeout=180
        )

    def serve(self, *flags: str) -> "subprocess.CompletedProcess[str]":
        ports = ["--port", str(self.http_port), "--grpc-port", str(self.grpc_port)]
        return self.types("serve", *ports, "--threads-per-rank", "1", "--detach", *flags)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """Somebody whose service runs, until the last test of it."""
    someone = Operator(tmp_path_factory.mktemp("operator"))
    started = someone.serve("--layout", "disaggregated", "--expert-ranks", "2")
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        assert "ready after" in started.stdout
        yield someone
    finally:
        someone.types("stop")


def test_its_status_is_told_to_people_and_to_programs(served: Operator) -> None:
    with ThreadPoolExecutor() as pool:
        status, figures = pool.map(lambda flags: served.types("status", *flags).stdout, ([], ["--json"]))
    assert f"http://127.0.0.1:{served.http_port}" in status and " ready\n" in status
    assert "serving" in status and "attention" in status and "expert" in status and "first start" in status
    assert json.loads(figures)["serving"] and len(json.loads(figures)["ranks"]) == 3


def test_it_is_asked_and_talked_to(served: Operator) -> None:
    asked = served.types("ask", "--max-tokens", "5", "Hello?")
    assert asked.returncode == 0, asked.stderr
    http_answer, grpc_answer = asked.stdout.split("HTTP http://")[1].split("gRPC 127")
    assert "5 tokens in" in http_answer and "5 tokens in" in grpc_answer
    assert http_answer.splitlines()[1:-1] == grpc_answer.splitlines()[1:-1]  # the same seed, the same text

    chatted = served.types("chat", "--max-tokens", "3", "--grpc", f"127.0.0.1:{served.grpc_port}", text="Hi\nAgain\n")
    assert chatted.returncode == 0 and chatted.stdout.count("3 tokens in") == 2


def test_it_answers_held_out_questions_of_every_family(served: Operator) -> None:
    """Two of each family and split. A token that went to a wrong expert, or to none, would spoil most answers."""
    questions = draw_questions(2)
    scores = count(questions, asyncio.run(ask_all(served.url, questions, concurrency=8)))
    assert len(scores) == 21 and sum(scores.values()) / len(scores) >= 0.93, scores


def test_it_answers_the_quickstart_over_both_wires(served: Operator) -> None:
    """With the sampling that its generation_config.json recommends, as `make serve` asks."""
    for client in (HttpClient(served.url), GrpcClient(f"127.0.0.1:{served.grpc_port}")):
        answers = [
            "".join(piece.text for piece in client.stream([Message(role="user", content=question)], Options(seed=0)))
            for question in QUESTIONS
        ]
        assert tuple(answers[:2]) == ANSWERS
        assert "horse" in answers[2] and answers[2].endswith(".")


def test_a_second_service_on_its_port_is_refused(served: Operator) -> None:
    second = served.serve()
    assert second.returncode == 1 and "is served by process" in second.stderr


def test_a_stop_leaves_nothing_of_it(served: Operator) -> None:
    """The last of those that need the service."""
    session = served.state.read()
    assert session is not None and session.is_alive
    family = family_of(session)
    assert len(family) > 5
    stopped = served.types("stop")
    assert stopped.returncode == 0 and "nothing of it is left" in stopped.stdout
    assert "had to be killed" not in stopped.stdout
    assert not [process for process in family if process.is_alive]
    assert not Path(session.scratch).exists() and not served.state.path.exists()
    assert served.types("status").stdout.startswith("nothing is served here")


def test_what_cannot_be_served_is_said_before_anything_starts(tmp_path: Path) -> None:
    operator = Operator(tmp_path)
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
