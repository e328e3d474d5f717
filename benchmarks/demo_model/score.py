"""Scores of the demonstration model on held-out questions, through the HTTP API of a running service.

    corral serve --detach && python -m benchmarks.demo_model.score
    python -m benchmarks.demo_model.quantize fp8 /tmp/demo-fp8 && corral serve /tmp/demo-fp8 --detach
    python -m benchmarks.demo_model.score --label "FP8 experts"

Owns asking and counting; what is right is the families' business. Scores of several labels are kept side by side in
benchmarks/results/demo-model.json, and shown in demo-model.md.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import click
import httpx

from benchmarks.demo_model.examples import HELD_OUT_SPLITS, Example, Split
from benchmarks.demo_model.families import FAMILIES
from benchmarks.report import RESULTS, preamble, table, write

NAME = "demo-model"
LISTED_FROM = 0.95  # a family below this in a split is not one that the model can do

_SEED = 13
_MAX_TOKENS = 256
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out example and the split it was drawn from."""

    split: Split
    example: Example

    @property
    def label(self) -> str:
        return f"{self.example.family}/{self.split}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What the service said."""

    text: str
    num_tokens: int


def draw_questions(num_of_each: int) -> list[Question]:
    """So many of every family and split: the same ones for everyone who is asked."""
    draw, questions = Random(_SEED), []
    for family in FAMILIES.values():
        for split in HELD_OUT_SPLITS if family.has_operands else HELD_OUT_SPLITS[1:]:
            questions += [Question(split, family.make(draw, split)) for _ in range(num_of_each)]
    return questions


def count(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, float]:
    """Shares of right answers by family/split."""
    right: dict[str, list[bool]] = {}
    for question, answer in zip(questions, answers, strict=True):
        is_right = FAMILIES[question.example.family].is_right(question.example, answer.text)
        right.setdefault(question.label, []).append(is_right)
    return {label: sum(flags) / len(flags) for label, flags in right.items()}


async def ask_all(url: str, questions: Sequence[Question], concurrency: int) -> list[Answer]:
    """Greedy answers, so many asked for at a time. Raises httpx.HTTPError."""
    gate = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client:
        model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]

        async def ask(question: Question) -> Answer:
            messages = [{"role": m.role, "content": m.content} for m in question.example.prompt]
            body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": _MAX_TOKENS}
            async with gate:
                reply = (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()
            return Answer(reply["choices"][0]["message"]["content"], reply["usage"]["completion_tokens"])

        return list(await asyncio.gather(*(ask(question) for question in questions)))


def report(results: dict[str, Any]) -> str:
    """The table of all labels."""
    labels = list(results)
    header = ["family", *(f"{label}: {split}" for label in labels for split in HELD_OUT_SPLITS)]
    rows = []
    for family in FAMILIES.values():
        scores = (
            results[label]["scores"].get(f"{family.name}/{split}") for label in labels for split in HELD_OUT_SPLITS
        )
        rows.append([family.title, *("" if score is None else f"{100 * score:.1f} %" for score in scores)])
    runs = "\n".join(
        f"- {label}: {run['questions']} questions of each family and split, {run['tokens']} tokens at "
        f"{run['tokens_per_s']:.0f} tokens/s with {run['concurrency']} at a time"
        for label, run in results.items()
    )
    return (
        f"{preamble('Demonstration model: held-out scores')}\n"
        "Greedy answers over `/v1/chat/completions` of `corral serve`. operands: trained phrasings, operands that were "
        "never trained; phrasings: neither was. Facts have no operands.\n\n"
        f"{table(header, rows)}\n\n{runs}\n"
    )


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True)
@click.option("--label", default="bfloat16", show_default=True, help="What is served: the column's name.")
@click.option(
    "--questions", type=click.IntRange(min=1), default=200, show_default=True, help="Of each family and split."
)
@click.option("--concurrency", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--wrong", "num_wrong", type=click.IntRange(min=0), default=0, help="Show so many wrong answers.")
def main(url: str, label: str, questions: int, concurrency: int, num_wrong: int) -> None:
    """Score the demonstration model that is served at URL."""
    asked = draw_questions(questions)
    began_s = time.monotonic()
    answers = asyncio.run(ask_all(url, asked, concurrency))
    elapsed_s = time.monotonic() - began_s
    scores, tokens = count(asked, answers), sum(answer.num_tokens for answer in answers)
    file = RESULTS / f"{NAME}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results[label] = {
        "questions": questions,
        "concurrency": concurrency,
        "tokens": tokens,
        "tokens_per_s": round(tokens / elapsed_s, 1),
        "scores": {key: round(score, 4) for key, score in scores.items()},
    }
    write(NAME, report(results), results)
    _show_wrong(asked, answers, num_wrong)
    for key, score in scores.items():
        click.echo(f"{100 * score:6.1f} %  {key}" + ("" if score >= LISTED_FROM else "  (too low to be listed)"))


def _show_wrong(asked: Sequence[Question], answers: Sequence[Answer], num_wrong: int) -> None:
    wrong = (
        (question, answer)
        for question, answer in zip(asked, answers, strict=True)
        if not FAMILIES[question.example.family].is_right(question.example, answer.text)
    )
    for _, (question, answer) in zip(range(num_wrong), wrong, strict=False):
        example = question.example
        click.echo(f"{question.label}: {example.prompt[-1].content!r}\n  {example.answer!r}\n  {answer.text!r}")


if __name__ == "__main__":
    main()
