"""Kernels of the expert side on a GPU, against their plain torch references on a CPU, over sizes that do not divide."""

import itertools

import pytest
import torch
from torch import Tensor

from actors.checkpoint.weights import ExpertWeights
from actors.dispatch.beside import ExpertsBeside
from actors.expert.experts import LayerExperts
from actors.kernels import grouped, grouped_tiles, linear, quantize, route
from actors.kernels.grouped import Engine
from actors.kernels.libraries import fbgemm_loaded
from actors.kernels.route import Form, PlacedRows, Placement

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
BF16_STEP = 2**-8  # relative; sums in another order may round to the neighbour
# Rows of each slot: none at all, one, ragged, everything on one, and slots that fill tiles exactly.
COUNTS = [(0, 0, 0, 0), (0, 1, 0, 0), (5, 0, 17, 3), (0, 300, 0, 0), (16, 32, 64, 128)]
ENGINES: dict[Form, list[Engine]] = {
    "plain": ["triton", "torch"],
    "fp8": ["triton", "torch", "fbgemm"],
    "int4": ["triton"],
}


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _weight(form: Form, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    weight = torch.randn(*shape, generator=_rng(seed)) / shape[-1] ** 0.5
    if form == "int4":
        return quantize.quantize_int4(weight)
    if form == "fp8":
        scale = weight.abs().amax(-1) / 448
        return (weight / scale[..., None]).to(torch.float8_e4m3fn), scale
    return weight.to(BF16), None


def _cuda(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.cuda() for tensor in tensors]


def _close(ours: Tensor, expected: Tensor, steps: float = 1.0) -> None:
    """Within `steps` bf16 steps of the largest value; on average much closer."""
    ours, expected = ours.float().cpu(), expected.float()
    limit = steps * BF16_STEP * expected.abs().max().item()
    error = (ours - expected).abs()
    assert error.max().item() <= limit, f"{error.max().item()} > {limit}"
    assert error.mean().item() <= 0.1 * limit or limit == 0


def _rows(form: Form, counts: tuple[int, ...], width: int, padding: int = 3) -> PlacedRows:
    """On the CPU, with rows of NaN behind the placed ones."""
    total = sum(counts)
    x_ND = torch.randn(total + padding, width, generator=_rng(1)).to(BF16)
    counts_S = torch.tensor(counts)
    placement = Placement(torch.arange(total + padding, dtype=torch.int32), counts_S, counts_S.cumsum(0).int())
    rows = route.form_rows(x_ND, form, placement)
    if form != "fp8":
        rows.x_ND[total:] = torch.nan
    return rows


def _rows_on_gpu(rows: PlacedRows) -> PlacedRows:
    assert rows.placement is not None
    place_N, counts_S, ends_S = _cuda(rows.placement.place_N, rows.placement.counts_S, rows.placement.ends_S)
    x_ND, scale_N1 = _cuda(rows.x_ND, rows.scale_N1)
    return PlacedRows(x_ND, scale_N1, Placement(place_N, counts_S, ends_S), rows.dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 5120), (7, 8192), (3, 40)])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_quantized_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x_ND = torch.randn(shape, generator=_rng(0)).to(dtype)
    x_ND[-1] *= 1e-3
    x_ND[0, 1:] = 0
    ours, theirs = quantize.quantize_rows(x_ND.cuda()), quantize.quantize_rows(x_ND)
    assert torch.equal(ours[1].cpu(), theirs[1])
    assert torch.equal(ours[0].cpu().float(), theirs[0].float())
    zeros = quantize.quantize_rows(torch.zeros(2, 64, dtype=dtype, device="cuda"))
    assert torch.equal(zeros[0].float().cpu(), torch.zeros(2, 64))


def test_word_order_is_undone_by_the_kernel_that_reads_words() -> None:
    x_NI = torch.randn(3, 1280, generator=_rng(0)).to(BF16)
    assert torch.equal(quantize.to_word_order(x_NI.cuda()).cpu(), quantize.to_word_order(x_NI))


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("in_word_order", [False, True])
def test_swiglu(num_parts: int, in_word_order: bool) -> None:
    parts = torch.randn(num_parts, 9, 2 * 384, generator=_rng(0))
    parts = parts.to(BF16) if num_parts == 1 else parts
    ends_S = torch.tensor([4, 7], dtype=torch.int32)
    ours = quantize.placed_swiglu(parts.cuda(), ends_S.cuda(), BF16, in_word_order=in_word_order)
    _close(ours[:7], quantize.placed_swiglu(parts, ends_S, BF16, in_word_order=in_word_order)[:7])
    q_NF, s_N1 = quantize.placed_swiglu_quantized(parts.cuda(), ends_S.cuda(), BF16)
    expected = quantize.placed_swiglu(parts, None, BF16).float()[:7]
    error = (q_NF.float() * s_N1).cpu()[:7] - expected
    assert error.norm() < 0.04 * expected.norm()  # e4m3 keeps 4 significant bits


@pytest.mark.parametrize(("num_experts", "top_k"), [(16, 1), (128, 1), (6, 2)])
def test_choice(num_experts: int, top_k: int) -> None:
    logits_TE = torch.randn(33, num_experts, generator=_rng(0))
    logits_TE[5] = 0  # ties: the first ones
    ids_TK, scores_TK = route.choose_by_logits(logits_TE.cuda(), top_k, BF16)
    expected_ids, expected_scores = logits_TE.sort(dim=1, descending=True, stable=True)[1][:, :top_k], None
    assert torch.equal(ids_TK.cpu(), expected_ids)
    expected_scores = logits_TE.gather(1, expected_ids).sigmoid().to(BF16)
    _close(scores_TK, expected_scores)
    positions_T = torch.arange(33) * 7
    for ours, theirs in zip(
        route.choose_by_logits(logits_TE.cuda(), top_k, BF16, positions_T.cuda()),
        route.choose_by_logits(logits_TE, top_k, BF16, positions_T),
        strict=True,
    ):
        _close(ours, theirs.float())


def test_gate_logits_are_sums_in_fp32() -> None:
    x_TD, router_ED = torch.randn(9, 640, generator=_rng(0)).to(BF16), torch.randn(16, 640, generator=_rng(1)).to(BF16)
    ours = route.gate_logits(x_TD.cuda(), router_ED.cuda()).cpu()
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, route.gate_logits(x_TD, router_ED), atol=1e-3)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts"), [(1, 16), (37, 6), (256, 16), (257, 16), (5, 128), (40, 128), (200, 128)]
)
def test_gates_in_one_kernel_and_in_two_choose_alike(num_tokens: int, num_experts: int) -> None:
    """A clear winner in each row; padding goes nowhere; the score is the winner's whatever it is."""
    x_TD, router_ED = (
        torch.randn(num_tokens, 5120, generator=_rng(0)),
        torch.randn(num_experts, 5120, generator=_rng(1)),
    )
    best_T = torch.randint(num_experts, (num_tokens,), generator=_rng(2))
    x_TD = ((x_TD + router_ED[best_T]) / 70).to(BF16)
    router_ED = (router_ED / 70).to(BF16)
    is_padding_T1 = torch.rand(num_tokens, 1, generator=_rng(3)) < 0.3
    scratch = route.GateScratch(torch.device("cuda"))
    for padding, lots_T in ((None, None), (is_padding_T1, None), (is_padding_T1, torch.arange(num_tokens) * 7)):
        counts_E, expected_counts_E = torch.ones(2, num_experts, dtype=torch.int64)
        ids_TK, scores_TK = route.choose_experts(
            x_TD.cuda(), router_ED.cuda(), 1, None if lots_T is None else lots_T.cuda(),
            None if padding is None else padding.cuda(), counts_E := counts_E.cuda(), scratch,
        )  # fmt: skip
        expected_ids, expected_scores = route.choose_experts(x_TD, router_ED, 1, lots_T, padding, expected_counts_E)
        assert torch.equal(ids_TK.cpu(), expected_ids)
        assert torch.equal(counts_E.cpu(), expected_counts_E)
        _close(scores_TK, expected_scores)


@pytest.mark.parametrize(("num_rows", "num_slots"), [(1, 4), (255, 32), (1024, 3), (1025, 32), (5000, 128)])
@pytest.mark.parametrize("is_hot", [False, True])
def test_placement(num_rows: int, num_slots: int, is_hot: bool) -> None:
    """Some experts are elsewhere, some rows padding. Small ones are placed by the gathering kernel."""
    ids_N = torch.randint(-1, num_slots + 2, (num_rows,), generator=_rng(0))
    ids_N = ids_N.clamp(max=0) if is_hot else ids_N
    slot_of_E = torch.cat([torch.randperm(num_slots, generator=_rng(1)), torch.tensor([-1, -1])])
    x_ND = torch.randn(num_rows, 64, generator=_rng(2)).to(BF16)
    expected = route.place(ids_N, slot_of_E, num_slots)
    ours = [route.place(ids_N.cuda(), slot_of_E.cuda(), num_slots)]
    rows = route.gather_rows(x_ND.cuda(), ids_N.cuda(), None, slot_of_E.cuda(), num_slots, "plain")
    assert rows.placement is not None
    for placement in (*ours, rows.placement):
        assert torch.equal(placement.place_N.cpu(), expected.place_N)
        assert torch.equal(placement.counts_S.cpu(), expected.counts_S)
        assert torch.equal(placement.ends_S.cpu(), expected.ends_S)
    here = (expected.place_N >= 0).nonzero().flatten()
    assert torch.equal(rows.x_ND.cpu()[expected.place_N[here].long()], x_ND[here])


@pytest.mark.parametrize("form", ["plain", "fp8", "int4"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_gathered_rows_are_scaled_first_and_quantized_then(form: Form, top_k: int) -> None:
    T, D, S = 11, 256, 4
    x_TD, scores_N = torch.randn(T, D, generator=_rng(0)).to(BF16), torch.rand(T * top_k, generator=_rng(1)).to(BF16)
    ids_N = torch.randint(0, 6, (T * top_k,), generator=_rng(2))
    slot_of_E = torch.tensor([2, -1, 0, 1, 3, -1])
    expected = route.gather_rows(x_TD, ids_N, scores_N, slot_of_E, S, form)
    ours = route.gather_rows(x_TD.cuda(), ids_N.cuda(), scores_N.cuda(), slot_of_E.cuda(), S, form)
    assert expected.placement is not None
    total = int(expected.placement.ends_S[-1])
    assert torch.equal(ours.x_ND[:total].float().cpu(), expected.x_ND[:total].float())
    if ours.scale_N1 is not None and expected.scale_N1 is not None:
        assert torch.equal(ours.scale_N1[:total].cpu(), expected.scale_N1[:total])
    parts = torch.randn(2, T * top_k, D, generator=_rng(3))
    _close(
        route.combine_rows(parts.cuda(), ours.placement, T, BF16),
        route.combine_rows(parts, expected.placement, T, BF16),
    )


CASES = [(form, engine) for form, engines in ENGINES.items() for engine in engines]


@pytest.mark.parametrize(("form", "engine"), CASES)
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_matmuls(form: Form, engine: Engine, counts: tuple[int, ...]) -> None:
    if engine == "fbgemm" and not fbgemm_loaded():
        pytest.skip("FBGEMM is not installed")
    total = sum(counts)
    for inputs, outputs in ((256, 208), (1152, 80), (1024, 208)):
        rows, (weight, scale) = _rows(form, counts, inputs), _weight(form, len(counts), outputs, inputs)
        expected = grouped.grouped_linear(rows, weight, scale)[0]
        weight_gpu, scale_gpu = _cuda(weight, scale)
        assert weight_gpu is not None
        parts = grouped.grouped_linear(_rows_on_gpu(rows), weight_gpu, scale_gpu, engine)
        if total:
            _close(parts.float().sum(0)[:total], expected[:total], steps=2)


@pytest.mark.parametrize("inputs", [256, 1024])
@pytest.mark.parametrize(("form", "engine"), CASES)
def test_grouped_swiglu(form: Form, engine: Engine, inputs: int) -> None:
    if engine == "fbgemm" and not fbgemm_loaded():
        pytest.skip("FBGEMM is not installed")
    counts = (5, 0, 17, 3)
    rows, (weight, scale) = _rows(form, counts, inputs), _weight(form, 4, 2 * 384, inputs)
    expected = grouped.grouped_swiglu(rows, weight, scale)
    weight_gpu, scale_gpu = _cuda(weight, scale)
    assert weight_gpu is not None
    ours = grouped.grouped_swiglu(_rows_on_gpu(rows), weight_gpu, scale_gpu, engine)
    if form == "fp8":
        assert ours.scale_N1 is not None
        assert expected.scale_N1 is not None
        a, b = (ours.x_ND.float() * ours.scale_N1).cpu()[:25], (expected.x_ND.float() * expected.scale_N1)[:25]
        assert (a - b).norm() < 0.02 * b.norm()  # one bf16 step before quantization may tip one of e4m3 after it
    else:
        _close(ours.x_ND[:25], expected.x_ND[:25], steps=2)


@pytest.mark.parametrize("form", ["plain", "int4"])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 8])
def test_few_rows(form: Form, num_rows: int) -> None:
    """By the kernels of few rows, which are chosen for these widths."""
    x_TI = torch.randn(num_rows, 1024, generator=_rng(0)).to(BF16)
    (gate_up, gate_up_scale), (down, down_scale) = _weight(form, 4096, 1024), _weight(form, 1792, 2048, seed=2)
    on_gpu = _cuda(gate_up, down, gate_up_scale, down_scale)
    for inputs, outputs, swiglu in ((1024, 4096, True), (2048, 1792, False)):
        tiles = grouped_tiles.choose_few_rows(form, num_rows, inputs, outputs, swiglu=swiglu, is_single=True)
        assert tiles is not None
    ours = linear.swiglu_ffn(x_TI.cuda(), *on_gpu)  # type: ignore[arg-type]
    expected = linear.swiglu_ffn(x_TI, gate_up, down, gate_up_scale, down_scale).float()
    assert (ours.cpu().float() - expected).norm() <= 0.015 * expected.norm()
    ours = linear.linear(x_TI.cuda(), on_gpu[0], on_gpu[2])  # type: ignore[arg-type]
    _close(ours, linear.linear(x_TI, gate_up, gate_up_scale), steps=3)


@pytest.mark.parametrize("form", ["plain", "int4"])
def test_a_row_gets_the_same_bits_among_others(form: Form) -> None:
    """From two rows on; the sums of one alone are cut in other ways."""
    (gate_up, gate_up_scale), (down, down_scale) = _weight(form, 4096, 1024), _weight(form, 1792, 2048, seed=2)
    on_gpu = _cuda(gate_up, down, gate_up_scale, down_scale)
    x_TI = torch.randn(8, 1024, generator=_rng(0)).to(BF16).cuda()
    all_rows, two_rows = (linear.swiglu_ffn(x, *on_gpu) for x in (x_TI, x_TI[6:]))  # type: ignore[arg-type]
    assert torch.equal(all_rows[6:], two_rows)


def _layer(form: Form, num_slots: int, hidden: int, width: int) -> tuple[ExpertWeights, ExpertWeights]:
    gate_up, gate_up_scale = _weight(form, num_slots, 2 * width, hidden)
    down, down_scale = _weight(form, num_slots, hidden, width, seed=5)
    on_cpu = ExpertWeights(gate_up_SND=gate_up, down_SDF=down, gate_up_scale_SN=gate_up_scale, down_scale_SD=down_scale)
    on_gpu = ExpertWeights(
        gate_up_SND=gate_up.cuda(),
        down_SDF=down.cuda(),
        gate_up_scale_SN=None if gate_up_scale is None else gate_up_scale.cuda(),
        down_scale_SD=None if down_scale is None else down_scale.cuda(),
    )
    return on_cpu, on_gpu


@pytest.mark.parametrize("form", ["plain", "fp8", "int4"])
@pytest.mark.parametrize("num_tokens", [1, 19, 700])
def test_layer_equals_the_cpu_and_its_graph(form: Form, num_tokens: int) -> None:
    """Captured with one routing, replayed with others: all tokens to one expert, and to experts that are elsewhere."""
    on_cpu, on_gpu = _layer(form, 4, 256, 384)
    cpu, gpu = LayerExperts(on_cpu, BF16), LayerExperts(on_gpu, BF16)
    slot_of_E = torch.tensor([3, 0, -1, 1, 2])
    x_TD = torch.randn(num_tokens, 256, generator=_rng(7)).to(BF16)
    scores_TK = torch.rand(num_tokens, 1, generator=_rng(8)).to(BF16)
    ids_TK = torch.randint(0, 5, (num_tokens, 1), generator=_rng(9))
    x_gpu, ids_gpu, scores_gpu, table = x_TD.cuda(), ids_TK.cuda(), scores_TK.cuda(), slot_of_E.cuda()
    gpu.routed(x_gpu, ids_gpu, scores_gpu, table)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y_gpu = gpu.routed(x_gpu, ids_gpu, scores_gpu, table)
    for ids in (ids_TK, torch.zeros_like(ids_TK), torch.full_like(ids_TK, 2), torch.full_like(ids_TK, -1)):
        ids_gpu.copy_(ids)
        graph.replay()
        expected = cpu.routed(x_TD, ids, scores_TK, slot_of_E)
        assert torch.equal(y_gpu, gpu.routed(x_gpu, ids_gpu, scores_gpu, table))
        error, size = (y_gpu.cpu().float() - expected.float()).norm(), expected.float().norm()
        assert error <= (0.03 if form == "fp8" else 0.01) * size
    slots_N = slot_of_E[ids_TK.flatten()]
    ours, theirs = gpu(x_gpu, slots_N.cuda()).cpu().float(), cpu(x_TD, slots_N).float()
    assert (ours - theirs).norm() <= (0.03 if form == "fp8" else 0.01) * theirs.norm()
    assert torch.equal(ours[slots_N < 0], torch.zeros_like(ours[slots_N < 0]))


@pytest.mark.parametrize(
    ("form", "num_tokens"), list(itertools.product(["plain", "fp8", "int4"], [0, 1, 8, 33, 130, 600]))
)
def test_dense_linears(form: Form, num_tokens: int) -> None:
    x_TI = torch.randn(num_tokens, 256, generator=_rng(0)).to(BF16)
    (gate_up, gate_up_scale), (down, down_scale) = _weight(form, 2 * 384, 256), _weight(form, 256, 384, seed=2)
    on_gpu = _cuda(gate_up, down, gate_up_scale, down_scale)
    ours = linear.linear(x_TI.cuda(), on_gpu[0], on_gpu[2])  # type: ignore[arg-type]
    assert ours.shape == (num_tokens, 768)
    ffn = linear.swiglu_ffn(x_TI.cuda(), *on_gpu)  # type: ignore[arg-type]
    if num_tokens:
        _close(ours, linear.linear(x_TI, gate_up, gate_up_scale), steps=3)
        expected = linear.swiglu_ffn(x_TI, gate_up, down, gate_up_scale, down_scale).float()
        assert (ffn.cpu().float() - expected).norm() <= (0.03 if form == "fp8" else 0.015) * expected.norm()


@pytest.mark.parametrize("form", ["plain", "fp8", "int4"])
def test_experts_beside_the_shared_one_compute_what_they_compute_alone(form: Form) -> None:
    """Layers in a row, as a decode graph has them: each reads what the one before added up, and frees it."""
    device, num_layers = torch.device("cuda"), 6
    layers = _Layers([LayerExperts(_layer(form, 4, 256, 384)[1], BF16) for _ in range(num_layers)])
    shared = [_cuda(*_weight(form, 256, 256, seed=9 + i)) for i in range(num_layers)]
    beside, alone = ExpertsBeside(layers, device), ExpertsBeside(layers, torch.device("cpu"))
    x_TD = torch.randn(9, 256, generator=_rng(7)).to(BF16).cuda()
    ids_TK, scores_TK = torch.randint(0, 4, (9, 1), generator=_rng(8)).cuda(), torch.rand(9, 1).to(BF16).cuda()
    table = torch.tensor([3, 0, 1, 2], device=device)

    def forward(experts: ExpertsBeside) -> Tensor:
        h_TD = x_TD
        for i, (weight, scale) in enumerate(shared):
            receipt = experts.start(i, h_TD * 1.0, ids_TK, scores_TK + 0, table)  # inputs that only the receipt holds
            shared_TD = linear.linear(h_TD, weight, scale)  # type: ignore[arg-type]
            h_TD = shared_TD + experts.finish(receipt)
            h_TD = h_TD / h_TD.float().norm(dim=1, keepdim=True).to(BF16)
        return h_TD

    expected_TD = forward(alone)
    assert torch.equal(forward(beside), expected_TD)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TD = forward(beside)
    for seed in range(3):
        x_TD.copy_(torch.randn(9, 256, generator=_rng(seed)))
        for _ in range(10):
            graph.replay()
        assert torch.equal(y_TD, forward(alone))


class _Layers:
    """ExpertCompute of a few layers."""

    def __init__(self, layers: list[LayerExperts]) -> None:
        self._layers = layers

    def __call__(self, layer: int, x_ND: Tensor, slots_N: Tensor) -> Tensor:
        return self._layers[layer](x_ND, slots_N)

    def routed(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, scores_TK: Tensor, slot_of_E: Tensor) -> Tensor:
        return self._layers[layer].routed(x_TD, expert_ids_TK, scores_TK, slot_of_E)


def test_an_expert_computes_the_same_bits_among_more_slots() -> None:
    """As a layer has them after it moved to more memory."""
    on_gpu = _layer("plain", 7, 1152, 2176)[1]
    few = ExpertWeights(gate_up_SND=on_gpu.gate_up_SND[:3].clone(), down_SDF=on_gpu.down_SDF[:3].clone())
    x_ND, slots_N = torch.randn(16, 1152, generator=_rng(0)).to(BF16).cuda(), torch.tensor([0, 2] * 8, device="cuda")
    assert torch.equal(LayerExperts(few, BF16)(x_ND, slots_N), LayerExperts(on_gpu, BF16)(x_ND, slots_N))


def test_fp32_experts_on_a_gpu_are_fp32() -> None:
    """Tiny models are compared with transformers in fp32."""
    weights = ExpertWeights(
        gate_up_SND=torch.randn(4, 80, 24, generator=_rng(0)) * 0.2, down_SDF=torch.randn(4, 24, 40, generator=_rng(1))
    )
    on_gpu = ExpertWeights(gate_up_SND=weights.gate_up_SND.cuda(), down_SDF=weights.down_SDF.cuda())
    x_ND, slots_N = torch.randn(9, 24, generator=_rng(2)), torch.tensor([3, 0, 1, 1, -1, 0, 3, 3, 1])
    ours = LayerExperts(on_gpu, torch.float32)(x_ND.cuda(), slots_N.cuda()).cpu()
    assert torch.allclose(ours, LayerExperts(weights, torch.float32)(x_ND, slots_N), atol=1e-4)
