"""What quantized forms cost the demonstration model: perplexity and greedy choices beside the exact model's.

    python -m benchmarks.demo_model.quality                     the table
    python -m benchmarks.demo_model.quality --write             and keeps it in benchmarks/results/quantized-quality.*

Owns which forms are compared: weights and KV cache, alone and together, through the served forward on a CPU. It
computes in float32 unless a row says otherwise, so that only the form differs.
"""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from actors.attention.local_model import LocalModel
from actors.checkpoint.config import INT4_GROUP
from actors.config import PipelineConfig
from benchmarks.demo_model.families import FAMILIES
from benchmarks.demo_model.perplexity import (
    Document,
    Mean,
    Score,
    draw_documents,
    loss_change,
    mean_per_token,
    perplexity,
    score,
)
from benchmarks.demo_model.quantize import Form, write_quantized
from benchmarks.demo_model.shape import DIRECTORY, SHAPE
from benchmarks.demo_model.tokens import Encoder
from benchmarks.report import preamble, table, write

NAME = "quantized-quality"
EXACT = "float32"
ALL_FP8 = "FP8 routed, shared and dense; fp8 KV cache"
ALL_INT4 = "INT4 routed, shared and dense; fp8 KV cache"

_FREE = "stories"  # the model's free choice: none of their answers is the only right one
_CACHE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A form of the model: which copy of the checkpoint, None being the original, and how it is served."""

    copy: Form | None = None
    pipeline: dict[str, Any] = field(default_factory=dict)


_FP8_KV = {"kv_cache_dtype": "fp8"}

FORMS: dict[str, Served] = {
    EXACT: Served(pipeline={"dtype": "float32"}),
    "bfloat16": Served(pipeline={"dtype": "bfloat16"}),
    "fp8 KV cache": Served(pipeline=_FP8_KV),
    "FP8 routed experts": Served(copy="fp8"),
    "FP8 routed experts; fp8 KV cache": Served(copy="fp8", pipeline=_FP8_KV),
    "FP8 routed, shared and dense, as stored": Served(copy="fp8_ffn"),
    "FP8 routed as stored, shared and dense by quantize_ffn": Served(copy="fp8", pipeline={"quantize_ffn": "fp8"}),
    ALL_FP8: Served(copy="fp8_ffn", pipeline=_FP8_KV),
    "INT4 routed and shared": Served(copy="int4_shared"),
    "INT4 routed and shared; fp8 KV cache": Served(copy="int4_shared", pipeline=_FP8_KV),
    "INT4 routed, shared and dense": Served(copy="int4"),
    ALL_INT4: Served(copy="int4", pipeline=_FP8_KV),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One form beside the exact model, over the same documents. `loss_change` and `divergence` in nats per token."""

    perplexity: float
    perplexity_of_families: dict[str, float]
    perplexity_without_stories: float
    loss_change: Mean
    divergence: Mean
    same_share: Mean  # of the tokens, those with the same greedy choice
    num_changed_without_stories: int  # tokens with another greedy choice that are in no story
    overturned: (
        float  # probability by which the exact model preferred its choice to the one that took its place, at most
    )
    exact_share: float  # of the answers that are no stories, those that greedy decoding would give

    @staticmethod
    def of(scores: Sequence[Score], exact: Sequence[Score]) -> "Quality":
        determined = [s for s in scores if s.family != _FREE]
        return Quality(
            perplexity=perplexity(scores),
            perplexity_of_families={name: perplexity([s for s in scores if s.family == name]) for name in FAMILIES},
            perplexity_without_stories=perplexity(determined),
            loss_change=loss_change(scores, exact),
            divergence=mean_per_token(scores, [s.divergence for s in scores]),
            same_share=mean_per_token(scores, [s.num_same for s in scores]),
            num_changed_without_stories=sum(s.num_tokens - s.num_same for s in determined),
            overturned=max(s.overturned for s in scores),
            exact_share=sum(s.is_exact for s in determined) / len(determined),
        )

    @property
    def perplexity_change_percent(self) -> Mean:
        """Of the exact model's perplexity, with its standard error."""
        factor = math.exp(self.loss_change.value)
        return Mean(100 * (factor - 1), 100 * factor * self.loss_change.error)

    def as_dict(self) -> dict[str, Any]:
        change = self.perplexity_change_percent
        return {
            "perplexity": self.perplexity,
            "perplexity_change_percent": {"value": change.value, "standard_error": change.error},
            "perplexity_without_stories": self.perplexity_without_stories,
            "divergence_nats": {"value": self.divergence.value, "standard_error": self.divergence.error},
            "same_choice_share": {"value": self.same_share.value, "standard_error": self.same_share.error},
            "changed_choices_without_stories": self.num_changed_without_stories,
            "largest_overturned_probability": self.overturned,
            "exact_answer_share": self.exact_share,
            "perplexity_of_families": self.perplexity_of_families,
        }


def measure(directory: Path, documents: Sequence[Document], forms: dict[str, Served]) -> dict[str, Quality]:
    """Every form of the checkpoint in `directory`, the first of which is the reference."""
    reference: list[Tensor] = []
    scores: dict[str, list[Score]] = {}
    with tempfile.TemporaryDirectory() as copies:
        for name, form in forms.items():
            model = _load(form, directory, Path(copies))
            if not reference:
                reference = [document.logits(model) for document in documents]
            scores[name] = [
                score(document, document.logits(model), reference_TV)
                for document, reference_TV in zip(documents, reference, strict=True)
            ]
    exact = next(iter(scores.values()))
    return {name: Quality.of(of_form, exact) for name, of_form in scores.items()}


def _load(form: Served, directory: Path, copies: Path) -> LocalModel:
    """The model in this form; its copy is made where none was before."""
    source = directory
    if form.copy is not None:
        source = copies / form.copy
        if not source.exists():
            write_quantized(directory, source, form.copy)
    values = {"model": str(source), "dtype": "float32", "kv_cache_bytes": _CACHE_BYTES} | form.pipeline
    return LocalModel.load(PipelineConfig.parse(values))


def report(qualities: dict[str, Quality], documents: Sequence[Document], elapsed_s: float) -> str:
    """The table, and what its columns are."""
    header = ("form", "perplexity", "change, %", "without stories", "divergence, 1e-3 nats", "same choice, %",
              "changed without stories", "overturned, %", "answers exact, %")  # fmt: skip
    rows = [_row(name, quality) for name, quality in qualities.items()]
    num_tokens = sum(len(document.ids) - document.answer_start for document in documents)
    longest_tokens = max(len(document.ids) for document in documents)
    return (
        f"{preamble('Demonstration model: quality of quantized forms')}\n"
        f"{len(documents) // len(FAMILIES)} held-out questions of each of {len(FAMILIES)} families, {num_tokens:,} "
        f"tokens of expected answers in documents of up to {longest_tokens} tokens. Each is predicted from the "
        "question and the answer so far by the served forward in one process, in float32 unless the row says "
        f"otherwise; {elapsed_s:.0f} s in all.\n\n"
        f"{table(header, rows)}\n\n{_NOTES}\n"
    )


def _row(name: str, quality: Quality) -> tuple[str, ...]:
    return (
        name,
        f"{quality.perplexity:.5f}",
        _pair(quality.perplexity_change_percent, 1, 3),
        f"{quality.perplexity_without_stories:.5f}",
        _pair(quality.divergence, 1e3, 3),
        _pair(quality.same_share, 100, 2),
        str(quality.num_changed_without_stories),
        f"{100 * quality.overturned:.1f}",
        f"{100 * quality.exact_share:.1f}",
    )


_NOTES = f"""\
- Standard errors are over documents, each paired with itself under float32, as many of each family.
- change: of the perplexity, beside float32. divergence: Kullback-Leibler from float32's distribution over the next
  token, the mean over tokens. same choice: tokens whose likeliest candidate is float32's.
- without stories: those are the model's free choice, most of all loss is theirs, and none counts as exact.
- changed without stories: tokens with another likeliest candidate, in all other families. overturned: the most
  probability by which float32 preferred its candidate to the one that took its place.
- bfloat16 rounds the logits too: of candidates that float32 holds nearly equal, as in stories, many become equal, and
  the first one is taken.
- FP8 weights have a scale per output channel, and their inputs are rounded to FP8 with a scale per token; the FP8 KV
  cache is float8_e4m3fn without scales. Attention, routers, embedding and head are never rounded.
- INT4 is w4a16: symmetric, to the nearest, groups of {INT4_GROUP} inputs with a bfloat16 scale. The down-projections of
  routed and shared experts have {SHAPE.expert_width} inputs: one group that ends with the row. The rounded numbers were
  served from a plain checkpoint, since widths that are no whole groups cannot be stored packed.
- A model of width {SHAPE.hidden_size}: the table orders the forms and would show a wrong one. It is no estimate of
  what they cost a large model."""


def _pair(mean: Mean, factor: float, digits: int) -> str:
    return f"{factor * mean.value:.{digits}f} ± {factor * mean.error:.{digits}f}"


@click.command()
@click.option("--questions", type=click.IntRange(min=2), default=50, show_default=True, help="Of each family.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Steps are too small for 2.")
@click.option("--write", "writes", is_flag=True, help="Keep the table in benchmarks/results.")
def main(questions: int, threads: int, writes: bool) -> None:
    """Compare the quantized forms of the demonstration model."""
    torch.set_num_threads(threads)
    began_s = time.monotonic()
    documents = draw_documents(Encoder.load(DIRECTORY), questions)
    qualities = measure(DIRECTORY, documents, FORMS)
    shown = report(qualities, documents, time.monotonic() - began_s)
    click.echo(shown)
    if writes:
        values = {name: quality.as_dict() for name, quality in qualities.items()}
        write(NAME, shown, {"questions_of_family": questions, "forms": values})


if __name__ == "__main__":
    main()
