"""The plain references of the expert side, by hand: what the kernels are compared with must itself be right."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from actors.kernels import grouped, linear, quantize, route
from actors.kernels.route import Form
from actors.kernels.triton_here import HAS_TRITON

FP32 = torch.float32


def test_int4_words_by_hand() -> None:
    """Column n of a word in bits 4n.., stored plus 8; one scale for 128 columns."""
    nibbles = [0, 1, 7, 8, 9, 15, 3, 12]
    word = sum(nibble << 4 * n for n, nibble in enumerate(nibbles))
    words_OW = torch.tensor([[word - (1 << 32)] * 16], dtype=torch.int32)  # the last nibble is beyond 7: negative
    weight_OI = quantize.dequantize_int4(words_OW, torch.tensor([[0.5]], dtype=torch.bfloat16), FP32)
    assert weight_OI.shape == (1, 128)
    assert weight_OI[0, :8].tolist() == [-4.0, -3.5, -0.5, 0.0, 0.5, 3.5, -2.5, 2.0]
    assert weight_OI[0, 120:].tolist() == weight_OI[0, :8].tolist()


def test_int4_loses_half_a_step_at_most() -> None:
    weight_SOI = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0))
    words_SOW, scale_SOG = quantize.quantize_int4(weight_SOI)
    assert (words_SOW.shape, scale_SOG.shape) == ((2, 3, 32), (2, 3, 2))
    error = (quantize.dequantize_int4(words_SOW, scale_SOG, FP32) - weight_SOI).abs().unflatten(-1, (2, 128))
    assert (error <= 0.52 * scale_SOG.float()[..., None]).all()  # the scale is rounded to bf16


def test_word_order_by_hand() -> None:
    """The first two columns are nibbles 0 and 4 of word 0, the next two those of word 1."""
    order = quantize.to_word_order(torch.arange(256)[None])[0].tolist()
    assert order[:4] == [0, 4, 8, 12]
    assert order[32:36] == [1, 5, 9, 13]
    assert order[128:130] == [128, 132]
    assert sorted(order) == list(range(256))


def test_placement_by_hand() -> None:
    """Experts 2 and 0 lie in slots 0 and 1, expert 1 elsewhere; one row is padding."""
    placement = route.place(torch.tensor([0, 2, 1, 0, -1, 2]), torch.tensor([1, -1, 0]), 3)
    assert placement.place_N.tolist() == [2, 0, -1, 3, -1, 1]
    assert placement.counts_S.tolist() == [2, 2, 0]
    assert placement.ends_S.tolist() == [2, 4, 4]


@settings(deadline=None, max_examples=40)
@given(
    form=st.sampled_from(["plain", "fp8", "int4"]),
    slots=st.lists(st.integers(-1, 2), min_size=1, max_size=9),
    top_k=st.integers(1, 2),
)
def test_routed_rows_meet_their_own_weights(form: Form, slots: list[int], top_k: int) -> None:
    """Gather, matmul, combine: each token's sum over its experts, with the weights as they are stored."""
    generator = torch.Generator().manual_seed(len(slots))
    ids_N = torch.tensor(slots * top_k)
    x_TD, scores_N = torch.randn(len(slots), 128, generator=generator), torch.rand(len(ids_N), generator=generator)
    exact_SOI = torch.randn(3, 6, 128, generator=generator)
    weight, scale = _stored(form, exact_SOI)
    rows = route.gather_rows(x_TD, ids_N, scores_N, None, 3, form)
    y_TD = route.combine_rows(grouped.grouped_linear(rows, weight, scale), rows.placement, len(slots), FP32)
    expected_TD = torch.zeros(len(slots), 6)
    for n, slot in enumerate(ids_N.tolist()):
        if slot >= 0:
            expected_TD[n // top_k] += _widened(form, weight, scale)[slot] @ (scores_N[n] * x_TD[n // top_k])
    tolerance = 0.06 if form == "fp8" else 1e-5
    assert (y_TD - expected_TD).norm() <= tolerance * expected_TD.norm() + 1e-6


def _stored(form: Form, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    if form == "int4":
        return quantize.quantize_int4(weight)
    if form == "fp8":
        scale = weight.abs().amax(-1) / 448
        return (weight / scale[..., None]).to(torch.float8_e4m3fn), scale
    return weight, None


def _widened(form: Form, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        return weight
    return quantize.dequantize_int4(weight, scale, FP32) if form == "int4" else weight.float() * scale[..., None]


@pytest.mark.parametrize("form", ["plain", "fp8", "int4"])
def test_dense_linears_and_ffn(form: Form) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(4, 128, generator=generator)
    gate_up, down = torch.randn(256, 128, generator=generator) / 11, torch.randn(128, 128, generator=generator) / 11
    stored = [_stored(form, gate_up), _stored(form, down)]
    wide = [_widened(form, *pair) for pair in stored]
    tolerance = 0.06 if form == "fp8" else 1e-5
    expected_TO = x_TD @ wide[0].T
    assert (linear.linear(x_TD, *stored[0]) - expected_TO).norm() <= tolerance * expected_TO.norm()
    gate_TF, up_TF = expected_TO.chunk(2, dim=1)
    expected_TD = (F.silu(gate_TF) * up_TF) @ wide[1].T
    y_TD = linear.swiglu_ffn(x_TD, stored[0][0], stored[1][0], stored[0][1], stored[1][1])
    assert (y_TD - expected_TD).norm() <= tolerance * expected_TD.norm()
    if form == "fp8":  # as a CPU holds it
        assert torch.equal(linear.linear(x_TD, stored[0][0].float(), stored[0][1]), linear.linear(x_TD, *stored[0]))


def test_uniform_choice_takes_experts_in_turn() -> None:
    ids_TK, scores_TK = route.choose_by_logits(torch.zeros(4, 3), 2, FP32, torch.tensor([0, 1, 2, 7]))
    assert ids_TK.tolist() == [[0, 1], [2, 0], [1, 2], [2, 0]]
    assert scores_TK.eq(0.5).all()


def test_choice_by_hand() -> None:
    """Expert 1 likes the first column, 0 the second; padding goes nowhere, whatever it likes."""
    x_TD, router_ED = torch.tensor([[3.0, 1.0], [0.0, 2.0], [9.0, 9.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    ids_TK, scores_TK = route.choose_experts(x_TD, router_ED, 1, None, torch.tensor([[False], [False], [True]]))
    assert ids_TK.tolist() == [[1], [0], [-1]]
    assert torch.equal(scores_TK[:2], torch.tensor([[3.0], [2.0]]).sigmoid())


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@given(
    form=st.sampled_from(["plain", "fp8", "int4"]),
    num_rows=st.integers(1, 96),
    shape=st.sampled_from([(5120, 16384, True), (8192, 5120, False), (1152, 4352, True), (2176, 1152, False)]),
)
def test_sums_are_cut_alike_whatever_the_number_of_slots(
    form: Form, num_rows: int, shape: tuple[int, int, bool]
) -> None:
    """Else an expert would compute other bits when its layer moves to more memory."""
    from actors.kernels.grouped_tiles import choose_few_rows, choose_tiles

    inputs, outputs, is_gate_up = shape
    few = [
        choose_few_rows(form, num_rows, inputs, slots, outputs, swiglu=is_gate_up, is_single=False)
        for slots in range(2, 40)
    ]
    if form != "int4" or num_rows <= 64:
        assert len(set(few)) == 1
    if any(few):
        return
    swiglu = is_gate_up and form != "fp8"
    tiles = [choose_tiles(form, num_rows, inputs, slots, outputs, swiglu=swiglu) for slots in range(2, 40)]
    of_a_part = {(t.split, -(-inputs // t.inputs // t.split) * t.inputs) for t in tiles}
    assert len(of_a_part) == 1
    assert len({t.inputs for t in tiles}) == 1
