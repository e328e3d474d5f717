"""Each known one-line mistake, put into the model, must be seen by the comparison with transformers.

A mistake that this suite cannot see could be made tomorrow. The list is that of bugs that other implementations had.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from actors.attention import attention, batch, local_model, model
from actors.attention.attention import Attention
from actors.attention.model import AttentionModel, Choice, Gate
from actors.attention.norm import rms_norm
from actors.attention.page_groups import GroupBuilder
from actors.checkpoint.config import ModelConfig
from actors.dispatch.local import LocalDispatch, LocalReceipt
from actors.expert.experts import LayerExperts

CHUNK = 16
TOLERANCE = 1e-3

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mistake:
    """`first_wrong`: the first position whose logits differ, where the mistake says it exactly."""

    name: str
    variants: tuple[str, ...]
    patch: Patch
    first_wrong: int | None = None
    one_by_one: bool = False  # the mistake is about what a single token sees


# --- attention ---------------------------------------------------------------------------------------------------


def sliding_window(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        GroupBuilder, "_context_start", lambda self, p: max(0, p - self._chunk_tokens + 1) if self._chunk_tokens else 0
    )


def chunks_begin_one_early(patch: pytest.MonkeyPatch) -> None:
    def context_start(self: GroupBuilder, position: int) -> int:
        return max(0, (position + 1) // self._chunk_tokens * self._chunk_tokens - 1) if self._chunk_tokens else 0

    patch.setattr(GroupBuilder, "_context_start", context_start)


def temperature_of_p(patch: pytest.MonkeyPatch) -> None:
    original = batch.temperatures
    patch.setattr(batch, "temperatures", lambda positions, floor, scale: original(positions - 1, floor, scale))


def temperature_on_keys_too(patch: pytest.MonkeyPatch) -> None:
    def temper(self: Attention, qkv_THd: Tensor, inputs: Any) -> None:
        if inputs.temperatures_T11 is not None:
            qkv_THd[:, : self._num_heads + self._num_kv_heads].mul_(inputs.temperatures_T11)

    patch.setattr(Attention, "_temper", temper)


def half_split_rope(patch: pytest.MonkeyPatch) -> None:
    def rotate(x_THd: Tensor, rotations_T1R: Tensor) -> None:
        real, imaginary = x_THd.chunk(2, dim=-1)
        turned = torch.complex(real.contiguous(), imaginary.contiguous()) * rotations_T1R
        x_THd.copy_(torch.cat([turned.real, turned.imag], dim=-1))

    patch.setattr(attention, "rotate_", rotate)


def _query_keys(self: Attention, qkv_THd: Tensor) -> Tensor:
    return qkv_THd[:, : self._num_heads + self._num_kv_heads]


def norm_across_heads(patch: pytest.MonkeyPatch) -> None:
    def rotate(self: Attention, qkv_THd: Tensor, inputs: Any) -> None:
        attention.rotate_(_query_keys(self, qkv_THd), inputs.rotations_T1R)
        for part in (qkv_THd[:, : self._num_heads], _query_keys(self, qkv_THd)[:, self._num_heads :]):
            part.copy_(rms_norm(part.flatten(1), None, self._eps).view_as(part))

    patch.setattr(Attention, "_rotate", rotate)


def norm_on_nope_layers(patch: pytest.MonkeyPatch) -> None:
    original = Attention._temper

    def temper(self: Attention, qkv_THd: Tensor, inputs: Any) -> None:
        part = _query_keys(self, qkv_THd)
        part.copy_(rms_norm(part, None, self._eps))
        original(self, qkv_THd, inputs)

    patch.setattr(Attention, "_temper", temper)


def rope_on_nope_layers(patch: pytest.MonkeyPatch) -> None:
    original = Attention._temper

    def temper(self: Attention, qkv_THd: Tensor, inputs: Any) -> None:
        attention.rotate_(_query_keys(self, qkv_THd), inputs.rotations_T1R)
        original(self, qkv_THd, inputs)

    patch.setattr(Attention, "_temper", temper)


def kv_heads_round_robin(patch: pytest.MonkeyPatch) -> None:
    original = Attention._attend

    def attend(self: Attention, q_TKGd: Tensor, *rest: Any) -> Tensor:
        tokens, kv_heads, queries, width = q_TKGd.shape
        shuffled = q_TKGd.reshape(tokens, queries, kv_heads, width).transpose(1, 2)
        out = original(self, shuffled, *rest).view(tokens, kv_heads, queries, width)
        return out.transpose(1, 2).reshape(tokens, -1)

    patch.setattr(Attention, "_attend", attend)


def _other_config(change: Callable[[ModelConfig], ModelConfig]) -> Patch:
    original = local_model.read_model_config
    return lambda patch: patch.setattr(local_model, "read_model_config", lambda path: change(original(path)))


shifted_pattern = _other_config(lambda c: replace(c, rope_layers=tuple(i for i in range(c.num_layers) if i % 4)))
inverted_pattern = _other_config(
    lambda c: replace(c, rope_layers=tuple(i for i in range(c.num_layers) if i not in c.rope_layers))
)
no_temperature = _other_config(lambda c: replace(c, temperature_tuning=False))
no_norm = _other_config(lambda c: replace(c, use_qk_norm=False))
unscaled_rope = _other_config(lambda c: replace(c, rope_scaling=None))


# --- experts -----------------------------------------------------------------------------------------------------


class _ScoreOnOutput(LocalDispatch):
    """Scores are kept for `combine`; `power_in` says how often they scale the input all the same."""

    power_in = 0
    power_out = 1

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor, scores_TK: Tensor, layer: int) -> LocalReceipt:
        self._scores_N1 = scores_TK.flatten()[:, None]
        return super().dispatch(x_TD, expert_ids_TK, scores_TK**self.power_in, layer)

    def combine(self, receipt: Any) -> Tensor:
        y_ND = self._experts(receipt.layer, receipt.rows_ND, receipt.slots_N) * self._scores_N1**self.power_out
        return y_ND.view(-1, receipt.experts_per_token, y_ND.shape[1]).sum(1)


class _ScoreTwice(_ScoreOnOutput):
    power_in = 2
    power_out = 0


class _ScoreOnBoth(_ScoreOnOutput):
    power_in = 1


class _ScoreIgnored(_ScoreOnOutput):
    power_out = 0


def _dispatch(kind: type[LocalDispatch]) -> Patch:
    return lambda patch: patch.setattr(local_model, "LocalDispatch", kind)


def softmax_scores(patch: pytest.MonkeyPatch) -> None:
    def choose(self: Gate, x_TD: Tensor, router_ED: Tensor, *_: Tensor | None) -> Choice:
        values_TK, ids_TK = F.linear(x_TD, router_ED).softmax(1).topk(self._experts_per_token, dim=1)
        return Choice(ids_TK, values_TK)

    patch.setattr(Gate, "__call__", choose)


def renormalised_scores(patch: pytest.MonkeyPatch) -> None:
    original = Gate.__call__

    def choose(self: Gate, *args: Any) -> Choice:
        choice = original(self, *args)
        return Choice(choice.expert_ids_TK, choice.scores_TK / choice.scores_TK.sum(1, keepdim=True))

    patch.setattr(Gate, "__call__", choose)


def gate_and_up_swapped_in_ffns(patch: pytest.MonkeyPatch) -> None:
    original = model.swiglu_ffn
    patch.setattr(
        model, "swiglu_ffn", lambda x, gate_up, *others: original(x, torch.cat(gate_up.chunk(2)[::-1]), *others)
    )


def gate_and_up_swapped_in_experts(patch: pytest.MonkeyPatch) -> None:
    def run_slot(self: LayerExperts, x_ND: Tensor, slot: int) -> Tensor:
        up_NF, gate_NF = F.linear(x_ND, self.weights.gate_up_SND[slot]).chunk(2, dim=1)
        return F.linear(F.silu(gate_NF) * up_NF, self.weights.down_SDF[slot])

    patch.setattr(LayerExperts, "_run_slot", run_slot)


def _moe_with_shared(scale: Callable[[Choice], Tensor | float]) -> Patch:
    def moe(
        self: AttentionModel, i: int, x_TD: Tensor, weights: Any, gating: Any, padding_T1: Any, dispatch: Any
    ) -> Generator[None, None, tuple[Tensor, Tensor]]:
        choice = self._gate(x_TD, self._routers[i], gating[0], padding_T1, gating[1])
        receipt = dispatch.dispatch(x_TD, choice.expert_ids_TK, choice.scores_TK, i)
        yield
        return model.ffn(x_TD, weights.shared) * scale(choice), dispatch.combine(receipt)

    return lambda patch: patch.setattr(AttentionModel, "_moe", moe)


shared_scaled_by_score = _moe_with_shared(lambda choice: choice.scores_TK.sum(1, keepdim=True))
shared_forgotten = _moe_with_shared(lambda choice: 0.0)
nothing_wrong = _moe_with_shared(lambda choice: 1.0)

ALL = ("maverick", "scout", "top2")
MISTAKES = [
    Mistake("sliding window", ALL, sliding_window, first_wrong=CHUNK, one_by_one=True),
    Mistake("chunks begin one early", ALL, chunks_begin_one_early, first_wrong=CHUNK - 1, one_by_one=True),
    Mistake("temperature of p", ALL, temperature_of_p, first_wrong=7),
    Mistake("no temperature", ALL, no_temperature, first_wrong=7),
    Mistake("temperature on keys too", ALL, temperature_on_keys_too, first_wrong=7),
    Mistake("score on output", ALL, _dispatch(_ScoreOnOutput), first_wrong=0),
    Mistake("score on input twice", ALL, _dispatch(_ScoreTwice), first_wrong=0),
    Mistake("score on input and output", ALL, _dispatch(_ScoreOnBoth), first_wrong=0),
    Mistake("score ignored", ALL, _dispatch(_ScoreIgnored), first_wrong=0),
    Mistake("softmax scores", ALL, softmax_scores, first_wrong=0),
    Mistake("renormalised scores", ALL, renormalised_scores, first_wrong=0),
    Mistake("gate and up swapped in dense and shared FFNs", ALL, gate_and_up_swapped_in_ffns, first_wrong=0),
    Mistake("gate and up swapped in experts", ALL, gate_and_up_swapped_in_experts, first_wrong=0),
    Mistake("shared expert scaled by the score", ALL, shared_scaled_by_score, first_wrong=0),
    Mistake("shared expert forgotten", ALL, shared_forgotten, first_wrong=0),
    Mistake("half-split rope", ALL, half_split_rope, first_wrong=1),
    Mistake("unscaled rope", ("scout",), unscaled_rope),
    Mistake("no qk-norm", ("scout",), no_norm, first_wrong=1),
    Mistake("qk-norm across heads", ("scout",), norm_across_heads, first_wrong=1),
    Mistake("qk-norm on NoPE layers", ("scout",), norm_on_nope_layers, first_wrong=1),
    Mistake("RoPE on NoPE layers", ALL, rope_on_nope_layers, first_wrong=1),
    Mistake("pattern shifted to 0, 4, ...", ALL, shifted_pattern, first_wrong=1),
    Mistake("pattern inverted", ALL, inverted_pattern, first_wrong=1),
    Mistake("kv heads round-robin", ALL, kv_heads_round_robin, first_wrong=0),
]
CASES = [
    pytest.param(mistake, variant, id=f"{mistake.name}-{variant}")
    for mistake in MISTAKES
    for variant in mistake.variants
]


def _differences(make_case: Callable, variant: str, one_by_one: bool) -> Tensor:
    """Largest difference at each position of the prompt. Pages of one token, so that a context may begin anywhere."""
    case = make_case(variant)
    num_tokens = 40 if one_by_one else 70
    ours = case.load(page_tokens=1).logits(case.prompts[0][:num_tokens], [1] * num_tokens if one_by_one else None)
    return (ours - case.logits[0][:num_tokens]).abs().amax(1)


@pytest.mark.parametrize("mistake, variant", CASES)
def test_mistake_is_seen(mistake: Mistake, variant: str, make_case: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake.patch(monkeypatch)
    wrong = _differences(make_case, variant, mistake.one_by_one) > TOLERANCE
    assert wrong.any()
    if mistake.first_wrong is not None:
        assert int(wrong.nonzero()[0]) == mistake.first_wrong


def norm_before_rope(patch: pytest.MonkeyPatch) -> None:
    def rotate(self: Attention, qkv_THd: Tensor, inputs: Any) -> None:
        part = _query_keys(self, qkv_THd)
        part.copy_(rms_norm(part, None, self._eps))
        attention.rotate_(part, inputs.rotations_T1R)

    patch.setattr(Attention, "_rotate", rotate)


@pytest.mark.parametrize("harmless", [norm_before_rope, nothing_wrong])
def test_what_is_no_mistake(harmless: Patch, make_case: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm has no weight and rotation keeps norms, so that their order is free. And the patches themselves pass."""
    harmless(monkeypatch)
    assert _differences(make_case, "scout", one_by_one=False).max() < TOLERANCE
