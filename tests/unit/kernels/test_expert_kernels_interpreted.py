"""The Triton kernels of the expert side, run by Triton's interpreter, give the references' answers.

In a process of its own (see test_attention_interpreted), and in fp32: the interpreter has no bf16 products, and loses
a carry when it casts to float8. INT4 is unpacked by shifts here; tests/gpu has the assembly.
"""

import pytest
import torch
from interpreter import mend_interpreter, run_interpreted
from torch import Tensor

from actors.kernels import grouped, quantize, route
from actors.kernels.route import Form, PlacedRows, Placement
from actors.kernels.triton_here import HAS_TRITON

FORMS: dict[Form, int] = {"plain": 0, "fp8": 1, "int4": 2}


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


def _same(ours: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    ours, expected = ours.float(), expected.float()
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-30)


def check_rows() -> None:
    from actors.kernels.quantize_triton import launch_rows, launch_swiglu

    x_ND = torch.randn(3, 256)
    x_ND[1] = 0
    scale_N1, y_ND = torch.empty(3, 1), torch.empty(3, 256, dtype=torch.float8_e4m3fn)
    launch_rows(x_ND, y_ND, scale_N1, FORMS["fp8"])
    expected = quantize.quantize_rows(x_ND)
    assert torch.equal(scale_N1, expected[1])
    assert (y_ND.float() == expected[0].float()).float().mean() > 0.9  # see above: carries
    launch_rows(x_ND, ordered_ND := torch.empty_like(x_ND), None, FORMS["int4"])
    assert torch.equal(ordered_ND, quantize.to_word_order(x_ND))
    for num_parts, in_word_order in ((1, False), (2, True)):
        parts, ends_S = torch.randn(num_parts, 5, 2 * 256), torch.tensor([1, 3], dtype=torch.int32)
        y_NF = torch.full((5, 256), 7.0)
        launch_swiglu(parts, y_NF, None, ends_S, torch.float32, FORMS["int4" if in_word_order else "plain"])
        _same(y_NF[:3], quantize.placed_swiglu(parts, ends_S, torch.float32, in_word_order=in_word_order)[:3])
        assert y_NF[3:].eq(7).all()  # beyond the placed rows


def check_choice() -> None:
    """From logits; and from rows, of which some share a program, and whose width does not fill the last program."""
    from actors.kernels.gate_triton import launch_choose, launch_gate

    logits_TE = torch.randn(5, 6)
    logits_TE[3] = 1
    logits_TE[4, 2] = torch.nan
    clean_TE = logits_TE.nan_to_num(-1e9)
    is_padding_T1 = torch.tensor([[False], [True], [False], [False], [False]])
    for top_k, padding_T1 in ((1, is_padding_T1), (2, None)):
        ids_TK, scores_TK = torch.empty(5, top_k, dtype=torch.int64), torch.empty(5, top_k)
        launch_choose(logits_TE, None, padding_T1, ids_TK, scores_TK, None)
        expected_ids = clean_TE.sort(dim=1, descending=True, stable=True)[1][:, :top_k]
        _same(scores_TK, clean_TE.gather(1, expected_ids).sigmoid())
        assert torch.equal(ids_TK, expected_ids if padding_T1 is None else expected_ids.masked_fill(padding_T1, -1))
    for num_tokens, num_experts, top_k in ((1, 6, 1), (18, 20, 2)):
        x_TD, router_ED = torch.randn(num_tokens, 300), torch.randn(num_experts, 300)
        padding_T1 = torch.arange(num_tokens)[:, None] % 5 == 3
        ids_TK, scores_TK = torch.empty(num_tokens, top_k, dtype=torch.int64), torch.empty(num_tokens, top_k)
        num_done, counts_E = torch.zeros(2, dtype=torch.int32), torch.zeros(num_experts, dtype=torch.int64)
        for lots_T in (None, torch.arange(num_tokens) * 3):
            launch_gate(x_TD, router_ED, num_done, lots_T, padding_T1, ids_TK, scores_TK, counts_E.zero_())
            expected_counts_E = torch.zeros_like(counts_E)
            expected = route.choose_experts(x_TD, router_ED, top_k, lots_T, padding_T1, expected_counts_E)
            assert torch.equal(ids_TK, expected[0]) and torch.equal(counts_E, expected_counts_E)
            _same(scores_TK, expected[1])
            assert not num_done.any()


def check_lots() -> None:
    from actors.kernels.gate_triton import launch_lots

    positions_T = torch.tensor([0, 5, 5, 1 << 20, 9])
    launch_lots(positions_T, lots_MT := torch.empty(3, 5, dtype=torch.int64))
    assert torch.equal(lots_MT, route.draw_lots(positions_T, 3))


def check_placement() -> None:
    from actors.kernels.route_triton import launch_place

    for num_rows, num_slots in ((700, 5), (1, 4), (300, 128)):
        ids_N = torch.randint(-1, num_slots + 3, (num_rows,))
        slot_of_E = torch.cat([torch.randperm(num_slots), torch.tensor([-1, -1, -1])])
        expected = route.place(ids_N, slot_of_E, num_slots)
        ours = route._empty_placement(ids_N, num_slots)
        launch_place(ids_N, slot_of_E, ours.place_N, ours.counts_S, ours.ends_S)
        _same_placement(ours, expected)


def _same_placement(ours: Placement, expected: Placement) -> None:
    assert torch.equal(ours.place_N, expected.place_N)
    assert torch.equal(ours.counts_S, expected.counts_S)
    assert torch.equal(ours.ends_S, expected.ends_S)


def check_gathering(form: Form, top_k: int) -> None:
    from actors.kernels.route_triton import launch_combine, launch_gather

    T, D, S = 7, 256, 4
    x_TD, scores_N, ids_N = torch.randn(T, D), torch.rand(T * top_k), torch.randint(-1, 6, (T * top_k,))
    slot_of_E = torch.tensor([2, -1, 0, 1, 3, -1])
    expected = route.gather_rows(x_TD, ids_N, scores_N, slot_of_E, S, form)
    assert expected.placement is not None
    for is_placed in (False, True):
        ours = expected.placement if is_placed else route._empty_placement(ids_N, S)
        places = ours.place_N, ours.counts_S, ours.ends_S
        y_ND, total = torch.empty_like(expected.x_ND), int(expected.placement.ends_S[-1])
        launch_gather(x_TD, scores_N, ids_N, slot_of_E, places, y_ND, None, FORMS[form], is_placed)
        _same_placement(ours, expected.placement)
        assert torch.equal(y_ND[:total], expected.x_ND[:total])
    parts, y_TD = torch.randn(2, T * top_k, D), torch.empty(T, D)
    launch_combine(parts, expected.placement.place_N, y_TD)
    _same(y_TD, route.combine_rows(parts, expected.placement, T, torch.float32))
    launch_combine(parts[:, :T].contiguous(), None, y_TD)
    _same(y_TD, parts[:, :T].sum(0))


def check_matmuls(form: Form) -> None:
    """A slot without rows, one of two tiles, rows beyond the counted ones, outputs that do not fill a tile."""
    from actors.kernels.grouped_triton import Tiles, launch_grouped

    N, inputs, counts_S = 30, 256, torch.tensor([5, 0, 20])
    placement = Placement(torch.arange(N, dtype=torch.int32), counts_S, counts_S.cumsum(0).int())
    rows = route.form_rows(torch.randn(N, inputs), form, placement)
    everything = PlacedRows(rows.x_ND, rows.scale_N1, None, rows.dtype)
    for outputs, is_swiglu, split in ((80, False, 1), (80, False, 2), (512, True, 1)):
        if is_swiglu and form == "fp8":
            continue
        weight, scale = random_weight(form, (3, outputs, inputs))
        y_PNO = torch.full((split, N, outputs // 2 if is_swiglu else outputs), 7.0)
        tiles = Tiles(outputs=64, rows=16, inputs=128, split=split, group=1 if split == 2 else 1 << 20)
        options = {"swiglu": is_swiglu, "word_order": is_swiglu and form == "int4"}
        launch_grouped(rows.x_ND, rows.scale_N1, weight, scale, counts_S, y_PNO, FORMS[form], tiles, **options)
        if is_swiglu:
            expected_NO = grouped.grouped_swiglu(rows, weight, scale).x_ND
        else:
            expected_NO = grouped.grouped_linear(rows, weight, scale)[0]
        _same(y_PNO.sum(0)[:25], expected_NO[:25])
        assert y_PNO[:, 25:].eq(7).all()
        if is_swiglu:
            continue
        one_scale = None if scale is None else scale[2:]
        launch_grouped(rows.x_ND, rows.scale_N1, weight[2:], one_scale, None, y_PNO, FORMS[form], tiles)
        _same(y_PNO.sum(0), grouped.grouped_linear(everything, weight[2:], one_scale)[0])


def check_few_rows(form: Form) -> None:
    """As above; four warps take turns with the inputs, of which the last step has too few where the form allows it."""
    from actors.kernels.few_rows_triton import FewRowsTiles, launch_few_rows

    inputs = 1024 if form == "int4" else 288
    N, counts_S = 24, torch.tensor([5, 0, 14])
    placement = Placement(torch.arange(N, dtype=torch.int32), counts_S, counts_S.cumsum(0).int())
    rows = route.form_rows(torch.randn(N, inputs), form, placement)
    everything = PlacedRows(rows.x_ND, rows.scale_N1, None, rows.dtype)
    for outputs, is_swiglu, split in ((80, False, 1), (80, False, 2), (512, True, 1)):
        block_inputs = 128 if form == "int4" else 32
        tiles = FewRowsTiles(outputs=32, rows=8, inputs=block_inputs, warps=4, stages=2, split=split)
        weight, scale = random_weight(form, (3, outputs, inputs))
        y_PNO = torch.full((split, N, outputs // 2 if is_swiglu else outputs), 7.0)
        options = {"swiglu": is_swiglu, "word_order": is_swiglu and form == "int4"}
        launch_few_rows(rows.x_ND, weight, scale, counts_S, y_PNO, FORMS[form], tiles, **options)
        assert y_PNO[:, 19:].eq(7).all()
        if is_swiglu:
            _same(y_PNO[0, :19], grouped.grouped_swiglu(rows, weight, scale).x_ND[:19])
            continue
        _same(y_PNO.sum(0)[:19], grouped.grouped_linear(rows, weight, scale)[0, :19])
        one_scale = None if scale is None else scale[2:]
        launch_few_rows(rows.x_ND, weight[2:], one_scale, None, y_PNO, FORMS[form], tiles)
        _same(y_PNO.sum(0), grouped.grouped_linear(everything, weight[2:], one_scale)[0])


def check_one_row() -> None:
    """Inputs that do not fill the last step, and outputs that do not fill the last program."""
    from actors.kernels.one_row_triton import OneRowTiles, launch_one_row

    rows = PlacedRows(torch.randn(1, 144), None, None, torch.float32)
    tiles = OneRowTiles(outputs=4, inputs=64, unroll=2, warps=4)
    for outputs, is_swiglu in ((30, False), (36, True)):
        weight, y_NO = torch.randn(1, outputs, 144), torch.full((1, 40), 7.0)
        launch_one_row(rows.x_ND, weight[0], y_NO, tiles, swiglu=is_swiglu)
        expected = grouped.grouped_swiglu(rows, weight, None).x_ND if is_swiglu else rows.x_ND @ weight[0].T
        _same(y_NO[:, : expected.shape[1]], expected)
        assert y_NO[:, expected.shape[1] :].eq(7).all()


def random_weight(form: Form, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    weight = torch.randn(shape)
    if form == "int4":
        return quantize.quantize_int4(weight)
    if form == "fp8":
        scale = weight.abs().amax(-1) / 448
        return (weight / scale[..., None]).to(torch.float8_e4m3fn), scale
    return weight, None


def main() -> None:
    torch.manual_seed(0)
    mend_interpreter()
    check_rows()
    check_choice()
    check_lots()
    check_placement()
    check_gathering("plain", 1)
    check_gathering("int4", 2)
    for form in FORMS:
        check_matmuls(form)
    check_few_rows("plain")
    check_few_rows("int4")
    check_one_row()


if __name__ == "__main__":
    main()
