"""Writes the model card, deploy/demo-model/README.md, and its pictures, from the training log and the scores.

    python -m benchmarks.demo_model.card

Owns which numbers the card shows: all of them are read or measured, none is typed. Its words are card.md.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import click
import torch
from safetensors import safe_open

from actors.attention.local_model import LocalModel
from actors.checkpoint.stored_names import SINGLE_FILE
from actors.config import PipelineConfig
from benchmarks.demo_model.examples import HELD_OUT_SPLITS
from benchmarks.demo_model.families import FAMILIES
from benchmarks.demo_model.pictures import expert_map, loss_curve
from benchmarks.demo_model.quality import ALL_FP8, ALL_INT4, EXACT
from benchmarks.demo_model.quality import NAME as QUALITY
from benchmarks.demo_model.score import LISTED_FROM, NAME
from benchmarks.demo_model.shape import DIRECTORY
from benchmarks.demo_model.tokens import Encoder
from benchmarks.report import RESULTS, table

_WORDS = Path(__file__).with_name("card.md")
_QUESTIONS_OF_MAP = 20
_SEED = 21
_CACHE_BYTES = 32 << 20


def log_lines() -> list[dict[str, Any]]:
    """The training log."""
    return [json.loads(line) for line in (RESULTS / f"{NAME}-training.jsonl").read_text().splitlines()]


def expert_loads(directory: Path) -> dict[str, list[list[float]]]:
    """Tokens by family, layer and expert of held-out questions with their answers, as multiples of an equal share."""
    model = LocalModel.load(PipelineConfig.parse({"model": str(directory), "kv_cache_bytes": _CACHE_BYTES}))
    encoder, draw, loads = Encoder.load(directory), Random(_SEED), {}
    everything_ME = torch.zeros(len(model.config.moe_layers), model.config.num_experts, dtype=torch.float64)
    for family in FAMILIES.values():
        for _ in range(_QUESTIONS_OF_MAP):
            model.logits(encoder.encode(family.make(draw, "phrasings").messages)[0])
        model.attention.request_expert_tokens()
        tokens_ME = torch.tensor(list(model.attention.take_expert_tokens().values()), dtype=torch.float64)
        loads[family.name] = _multiples(tokens_ME)
        everything_ME += tokens_ME / tokens_ME.sum()
    return loads | {"all alike": _multiples(everything_ME)}


def _multiples(tokens_ME: torch.Tensor) -> list[list[float]]:
    shares_ME = tokens_ME / tokens_ME.sum(dim=1, keepdim=True)
    multiples: list[list[float]] = (shares_ME * shares_ME.shape[1]).tolist()
    return multiples


def _example_rows() -> Iterator[tuple[str, str, str]]:
    draw = Random(_SEED)
    for family in FAMILIES.values():
        example = family.make(draw, "phrasings")
        yield family.title, _cell(example.prompt[-1].content), _cell(example.answer)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _score_rows(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Families in which every score of every label is high enough."""
    for family in FAMILIES.values():
        keys = [f"{family.name}/{split}" for split in HELD_OUT_SPLITS]
        scores = [run["scores"].get(key) for run in results.values() for key in keys]
        if all(score is None or score >= LISTED_FROM for score in scores):
            yield family.title, *("" if score is None else f"{100 * score:.1f}" for score in scores)


def _perplexity_change(quality: dict[str, Any]) -> str:
    change = quality["perplexity_change_percent"]
    return f"{change['value']:.2f} ± {change['standard_error']:.2f}"


def write_card(directory: Path) -> None:
    """Writes README.md, loss.svg and experts.svg into `directory`."""
    log, results = log_lines(), json.loads((RESULTS / f"{NAME}.json").read_text())
    qualities = json.loads((RESULTS / f"{QUALITY}.json").read_text())["forms"]
    losses = [line for line in log if "loss" in line]
    loads = expert_loads(directory)
    (directory / "loss.svg").write_text(loss_curve([row["step"] for row in losses], [row["loss"] for row in losses]))
    (directory / "experts.svg").write_text(expert_map(loads))
    header = ("family", *(f"{label}: {split}, %" for label in results for split in HELD_OUT_SPLITS))
    everything = [share for layer in loads["all alike"] for share in layer]
    with safe_open(directory / SINGLE_FILE, "pt") as weights:
        num_parameters = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118 (no mapping)
    words = _WORDS.read_text().format(
        parameters=f"{num_parameters:,}",
        megabytes=f"{(directory / SINGLE_FILE).stat().st_size / 1e6:.1f}",
        steps=f"{losses[-1]['step']:,}",
        seconds=f"{losses[-1]['elapsed_s']:.0f}",
        loss=f"{losses[-1]['loss']:.3f}",
        least=f"{min(everything):.2f}",
        most=f"{max(everything):.2f}",
        most_of_family=f"{max(share for load in loads.values() for layer in load for share in layer):.1f}",
        questions=next(iter(results.values()))["questions"],
        perplexity=f"{qualities[EXACT]['perplexity']:.3f}",
        fp8_change=_perplexity_change(qualities[ALL_FP8]),
        int4_change=_perplexity_change(qualities[ALL_INT4]),
        examples=table(("family", "a held-out question", "the expected answer"), list(_example_rows())),
        scores=table(header, list(_score_rows(results))),
    )
    (directory / "README.md").write_text(words)


@click.command()
def main() -> None:
    """Write the demonstration model's card and pictures."""
    write_card(DIRECTORY)
    click.echo(f"{DIRECTORY / 'README.md'}")


if __name__ == "__main__":
    main()
