"""Perplexity of held-out answers under the served forward: the yardstick for anything that changes the arithmetic.

    python -m benchmarks.demo_model.perplexity                  the demonstration model in float32
    python -m benchmarks.demo_model.perplexity --dtype bfloat16 --label bfloat16
    python -m benchmarks.demo_model.perplexity DIRECTORY --label "FP8 experts"

Owns what is measured: the mean loss of the expected answers' tokens, given the question and the answer so far, and how
many answers the greedy choice would give token by token. Finer than scores: a score of 100 % still has a perplexity.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody knows)

from actors.attention.local_model import LocalModel
from actors.config import PipelineConfig
from benchmarks.demo_model.families import FAMILIES
from benchmarks.demo_model.shape import DIRECTORY
from benchmarks.demo_model.tokens import Encoder
from benchmarks.report import RESULTS, preamble, table, write

NAME = "demo-model-perplexity"

_SEED = 12
_CACHE_BYTES = 64 << 20


@dataclass(slots=True)
class Tally:
    """Sums over the answers of a family."""

    loss: float = 0.0
    num_tokens: int = 0
    num_answers: int = 0
    num_exact: int = 0

    def add(self, logits_TV: Tensor, ids_T: Tensor) -> None:
        """An answer: what each of its tokens was predicted from, and the tokens."""
        self.loss += F.cross_entropy(logits_TV, ids_T, reduction="sum").item()
        self.num_tokens += len(ids_T)
        self.num_answers += 1
        self.num_exact += bool((logits_TV.argmax(dim=1) == ids_T).all())

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.loss + other.loss,
            self.num_tokens + other.num_tokens,
            self.num_answers + other.num_answers,
            self.num_exact + other.num_exact,
        )

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self.num_tokens)


def measure(model: LocalModel, encoder: Encoder, num_questions: int) -> dict[str, Tally]:
    """Held-out phrasings (and operands) of every family, the same for every model."""
    draw, tallies = Random(_SEED), {}
    for family in FAMILIES.values():
        tally = tallies[family.name] = Tally()
        for _ in range(num_questions):
            example = family.make(draw, "phrasings")
            ids, _ = encoder.encode(example.messages)
            start = len(encoder.encode_prompt(example.prompt))
            logits_TV = model.logits(ids[:-1])
            tally.add(logits_TV[start - 1 :], torch.tensor(ids[start:]))
    return tallies


def report(results: dict[str, Any]) -> str:
    """The table of all labels."""
    rows = [
        [name, *(f"{run['perplexity'][name]:.5f}" for run in results.values())]
        for name in next(iter(results.values()))["perplexity"]
    ]
    exact = ["answers exact, %", *(f"{run['exact_percent']:.1f}" for run in results.values())]
    asked = " and ".join(sorted({str(run["questions"]) for run in results.values()}))
    return (
        f"{preamble('Demonstration model: perplexity of held-out answers')}\n"
        f"{asked} held-out questions of each family, under the served forward in one process. Stories are the model's "
        f"free choice, so none of theirs counts as exact.\n\n{table(['family', *results], [*rows, exact])}\n"
    )


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path), default=DIRECTORY)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--label", default="float32", show_default=True, help="What is measured: the column's name.")
@click.option("--questions", type=click.IntRange(min=1), default=100, show_default=True, help="Of each family.")
def main(directory: Path, dtype: str, label: str, questions: int) -> None:
    """Measure DIRECTORY, a checkpoint with the demonstration model's tokenizer."""
    pipeline = PipelineConfig.parse({"model": str(directory), "dtype": dtype, "kv_cache_bytes": _CACHE_BYTES})
    tallies = measure(LocalModel.load(pipeline), Encoder.load(directory), questions)
    everything = sum(tallies.values(), Tally())
    file = RESULTS / f"{NAME}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results[label] = {
        "questions": questions,
        "perplexity": {name: tally.perplexity for name, tally in (tallies | {"all": everything}).items()},
        "exact_percent": 100 * everything.num_exact / (everything.num_answers - tallies["stories"].num_answers),
    }
    write(NAME, report(results), results)
    click.echo(report(results))


if __name__ == "__main__":
    main()
