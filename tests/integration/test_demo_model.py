"""The demonstration model behind the whole service: one attention rank, its sixteen experts on two others."""

import asyncio
from collections.abc import Iterator

import pytest
from service import Service, launch, stop

from benchmarks.demo_model.score import ask_all, count, draw_questions
from cluster.commands.clients import GrpcClient, HttpClient, Message, Options
from cluster.commands.talk import QUESTIONS

ANSWERS = (
    "Llama 4 Maverick has 128 routed experts.",
    "15 + 20 = 35, and March has 31 days: 35 - 31 = 4, so it is 4 April.",
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    flags = ["--layout", "disaggregated", "--expert-ranks", "2", "--threads-per-rank", "1"]
    running = launch(tmp_path_factory.mktemp("demo"), "demo", flags)
    yield running
    stop(running)


def test_it_answers_held_out_questions_of_every_family(demo: Service) -> None:
    """Two of each family and split. A token that went to a wrong expert, or to none, would spoil most answers."""
    questions = draw_questions(2)
    scores = count(questions, asyncio.run(ask_all(demo.url, questions, concurrency=8)))
    assert len(scores) == 21 and sum(scores.values()) / len(scores) >= 0.93, scores


def test_it_answers_the_quickstart_over_both_wires(demo: Service) -> None:
    """With the sampling that its generation_config.json recommends, as `make serve` asks."""
    for client in (HttpClient(demo.url), GrpcClient(demo.grpc_address)):
        answers = [
            "".join(piece.text for piece in client.stream([Message(role="user", content=question)], Options(seed=0)))
            for question in QUESTIONS
        ]
        assert tuple(answers[:2]) == ANSWERS
        assert "horse" in answers[2] and answers[2].endswith(".")
