"""Quantized copies, and the figures by which they are judged."""

import math
from pathlib import Path

import pytest
import torch
from demo_small import SMALL, load
from safetensors.torch import load_file

from actors.attention.local_model import LocalModel
from actors.checkpoint.config import read_model_config
from actors.checkpoint.quantized import quantize_int4, widen_int4
from actors.config import PipelineConfig
from benchmarks.demo_model.perplexity import Document, Score, draw_documents, loss_change, perplexity, score
from benchmarks.demo_model.quality import EXACT, FORMS, Quality, measure, report
from benchmarks.demo_model.quantize import Form, through_int4, write_quantized
from benchmarks.demo_model.shape import DIRECTORY
from benchmarks.demo_model.tokens import Encoder

IDS = list(range(40, 100))


def _score(family: str, num_tokens: int, loss: float) -> Score:
    return Score(
        family=family, num_tokens=num_tokens, loss=loss, divergence=0, num_same=0, overturned=0, is_exact=False
    )


def test_a_group_of_int4_ends_with_its_row() -> None:
    """Sixteen values of the row's own scale, to the nearest; and where groups are whole, what the product stores."""
    generator = torch.Generator().manual_seed(1)
    short_OI = torch.randn(5, 64, generator=generator)
    rounded_OI = through_int4(short_OI)
    scale_O1 = (short_OI.abs().amax(dim=1, keepdim=True) / 7.5).to(torch.bfloat16).float()
    levels_OI = (rounded_OI / scale_O1).round()
    assert torch.equal(levels_OI * scale_O1, rounded_OI) and levels_OI.min() == -8 and levels_OI.max() == 7
    inside_OI = short_OI.abs() <= 7 * scale_O1
    assert ((rounded_OI - short_OI).abs() / scale_O1)[inside_OI].max() <= 0.5 + 1e-5
    long_OI = torch.randn(3, 192, generator=generator)
    expected_OI = widen_int4(*quantize_int4(long_OI[:, :128].contiguous()), torch.float32)
    assert torch.equal(through_int4(long_OI)[:, :128], expected_OI)
    assert torch.equal(through_int4(long_OI)[:, 128:], through_int4(long_OI[:, 128:].contiguous()))


_EXPERTS = {"experts", "shared_expert"}
_EVERYTHING = _EXPERTS | {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("form", "parts"),
    [("fp8", {"experts"}), ("fp8_ffn", _EVERYTHING), ("int4_shared", _EXPERTS), ("int4", _EVERYTHING)],
)
def test_a_form_rounds_what_it_says_and_nothing_else(form: Form, parts: set[str], tmp_path: Path, small: Path) -> None:
    write_quantized(small, tmp_path / form, form)
    before, after = load_file(small / "model.safetensors"), load_file(tmp_path / form / "model.safetensors")
    kept = {name for name in before.keys() & after.keys() if torch.equal(before[name].double(), after[name].double())}
    rounded = before.keys() - kept
    assert {name.partition(".feed_forward.")[2].partition(".")[0] for name in rounded} == parts
    num_of_layer = {"experts": 2, "shared_expert": 3, "gate_proj": 1, "up_proj": 1, "down_proj": 1}
    assert len(rounded) == SMALL.num_layers // 2 * sum(num_of_layer[part] for part in parts)


def test_copies_are_read_back_and_stay_near(tmp_path: Path, trained: LocalModel) -> None:
    """FP8 dense layers are the same numbers whether they are stored or made when the model is loaded."""
    exact = trained.logits(IDS)
    for form, limit in (("fp8", 0.3), ("fp8_ffn", 0.5), ("int4", 1.0)):
        write_quantized(DIRECTORY, tmp_path / form, form)
        assert 0 < (load(tmp_path / form).logits(IDS) - exact).abs().mean() < limit
    assert (
        read_model_config(tmp_path / "fp8_ffn").quantizes_ffn and not read_model_config(tmp_path / "fp8").quantizes_ffn
    )
    values = {"model": str(tmp_path / "fp8"), "kv_cache_bytes": 16 << 20, "quantize_ffn": "fp8"}
    made = LocalModel.load(PipelineConfig.parse(values)).logits(IDS)
    assert torch.equal(made, load(tmp_path / "fp8_ffn").logits(IDS))
    assert not torch.equal(made, load(tmp_path / "fp8").logits(IDS))


def test_a_score_counts_the_answer_only() -> None:
    """Two tokens of which the model gives the first 1/2 and the second 1/4; the reference, another by 0.45."""
    document = Document(family="x", ids=(3, 3, 0, 1), answer_start=2)
    given_TV = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]).log() + 3
    reference_TV = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.7, 0.05]]).log()
    scored = score(document, given_TV, reference_TV)
    assert scored.loss == pytest.approx(math.log(8)) and scored.num_tokens == 2 and not scored.is_exact
    assert scored.num_same == 1 and scored.overturned == pytest.approx(0.45)
    expected = 0.25 * math.log(0.25 / 0.5) + 0.7 * math.log(0.7 / 0.25) + 0.05 * math.log(0.05 / 0.25)
    assert scored.divergence == pytest.approx(expected)
    assert score(document, reference_TV, reference_TV).is_exact


def test_the_error_is_that_of_pairs_within_families() -> None:
    """Neither what documents or families differ in, nor a change that is the same for every token, is an error."""
    reference = [_score(family, 2, loss) for family, loss in (("a", 1.0), ("a", 9.0), ("b", 50.0), ("b", 70.0))]
    same = [_score(r.family, 2, r.loss + 1) for r in reference]
    assert loss_change(same, reference).value == pytest.approx(0.5)
    assert loss_change(same, reference).error == pytest.approx(0, abs=1e-9)
    by_family = [_score(r.family, 2, r.loss + (r.family == "a")) for r in reference]
    assert loss_change(by_family, reference).error == pytest.approx(0, abs=1e-9)
    spread = [_score(r.family, 2, r.loss + change) for r, change in zip(reference, (1, 3, 0, 0), strict=True)]
    change = loss_change(spread, reference)
    assert change.value == pytest.approx(0.5)
    assert change.error == pytest.approx(math.sqrt(2 * 2) / 8)  # two documents of variance 2, over eight tokens
    assert perplexity(reference) == pytest.approx(math.exp(130 / 8))


def test_forms_are_compared_with_the_exact_model(encoder: Encoder) -> None:
    """The exact form differs from itself in nothing; every cell of the report is there."""
    documents = draw_documents(encoder, 2)
    chosen = {name: FORMS[name] for name in (EXACT, "fp8 KV cache", "INT4 routed, shared and dense")}
    qualities = measure(DIRECTORY, documents, chosen)
    exact, cache, int4 = qualities.values()
    assert exact.loss_change.value == exact.divergence.value == exact.overturned == 0 and exact.same_share.value == 1
    assert 0 < cache.divergence.value < 1e-3 and 0 < int4.divergence.value < 1e-2
    assert all(0.97 < quality.same_share.value <= 1 for quality in qualities.values())
    assert all(isinstance(quality, Quality) and quality.exact_share > 0.9 for quality in qualities.values())
    lines = report(qualities, documents, 1.0).splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 4 and {row.count("|") for row in rows} == {10}
