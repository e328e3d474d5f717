"""Routed experts: order, padding, counts, fp8 and the grouped path, against one matmul at a time."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from actors.checkpoint.shapes import SHAPES, shape_config
from actors.checkpoint.weights import ExpertWeights, load_experts
from actors.config import PipelineConfig
from actors.expert.experts import LayerExperts, quantize_rows
from actors.expert.worker import ExpertWorker

CPU = torch.device("cpu")
S, D, FF = 4, 24, 40


def _weights(dtype: torch.dtype = torch.float32) -> ExpertWeights:
    generator = torch.Generator().manual_seed(0)
    return ExpertWeights(
        gate_up_SND=torch.randn(S, 2 * FF, D, generator=generator).mul_(0.2).to(dtype),
        down_SDF=torch.randn(S, D, FF, generator=generator).mul_(0.2).to(dtype),
    )


def _fp8_weights() -> ExpertWeights:
    generator = torch.Generator().manual_seed(1)
    return ExpertWeights(
        gate_up_SND=torch.randn(S, 2 * FF, D, generator=generator).mul_(50).to(torch.float8_e4m3fn),
        down_SDF=torch.randn(S, D, FF, generator=generator).mul_(50).to(torch.float8_e4m3fn),
        gate_up_scale_SN=torch.rand(S, 2 * FF, generator=generator) * 0.01,
        down_scale_SD=torch.rand(S, D, generator=generator) * 0.01,
    )


def _rows(num_rows: int) -> Tensor:
    return torch.randn(num_rows, D, generator=torch.Generator().manual_seed(2))


def _one_by_one(weights: ExpertWeights, x_ND: Tensor, slots: list[int]) -> Tensor:
    """In float64, from the definition; rows of padding are zero."""
    y_ND = torch.zeros(x_ND.shape, dtype=torch.float64)
    for n, slot in enumerate(slots):
        if slot >= 0:
            hidden = weights.gate_up_SND[slot].double() @ x_ND[n].double()
            y_ND[n] = weights.down_SDF[slot].double() @ (F.silu(hidden[:FF]) * hidden[FF:])
    return y_ND


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-1, S - 1), max_size=12))
def test_rows_come_back_in_order(slots: list[int]) -> None:
    weights, x_ND = _weights(), _rows(len(slots))
    experts = LayerExperts(weights, torch.float32)
    y_ND = experts(x_ND, torch.tensor(slots, dtype=torch.int64))
    assert y_ND.shape == x_ND.shape
    assert torch.allclose(y_ND.double(), _one_by_one(weights, x_ND, slots), atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-1, S - 1), min_size=1, max_size=12))
def test_placed_rows_give_the_same(slots: list[int]) -> None:
    """The path of GPUs, run here on the kernels' references."""
    weights, x_ND, slots_N = _weights(torch.bfloat16), _rows(len(slots)).bfloat16(), torch.tensor(slots)
    experts = LayerExperts(weights, torch.bfloat16)
    grouped_ND = experts._run_placed(x_ND, slots_N, None, None)
    assert torch.allclose(grouped_ND.double(), _one_by_one(weights, x_ND, slots), atol=0.05)


def _fp8_by_definition(weights: ExpertWeights, x_D: Tensor, slot: int) -> Tensor:
    """(q_x . q_w) * s_t * scale[o] twice, in float64 but for the quantization itself, one number at a time."""

    def linear(x_I: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
        scale = max(abs(v) for v in x_I.tolist()) / 448
        quantized_I = (x_I.double() / scale).clamp(-448, 448).to(torch.float32).to(torch.float8_e4m3fn)
        return (weight_OI.double() @ quantized_I.double()) * scale * scale_O.double()

    assert weights.gate_up_scale_SN is not None
    assert weights.down_scale_SD is not None
    hidden = linear(x_D, weights.gate_up_SND[slot], weights.gate_up_scale_SN[slot])
    return linear(F.silu(hidden[:FF]) * hidden[FF:], weights.down_SDF[slot], weights.down_scale_SD[slot])


def test_fp8_experts_by_definition() -> None:
    """Within the step of one e4m3 rounding that the last bit of fp32 may tip in one of 40 inner values."""
    weights, x_ND, slots = _fp8_weights(), _rows(9), [3, 0, 1, 1, 2, 0, 3, 3, 1]
    y_ND = LayerExperts(weights, torch.float32)(x_ND, torch.tensor(slots))
    expected = torch.stack([_fp8_by_definition(weights, x_ND[n], slot) for n, slot in enumerate(slots)])
    assert (y_ND - expected).abs().max() < 0.005 * expected.abs().max()
    assert (y_ND - expected).abs().median() < 1e-5 * expected.abs().max()


def test_fp8_activations_are_quantized_and_not_only_weights() -> None:
    weights = _fp8_weights()
    assert weights.gate_up_scale_SN is not None
    assert weights.down_scale_SD is not None
    widened = replace(
        weights,
        gate_up_SND=weights.gate_up_SND.float() * weights.gate_up_scale_SN[..., None],
        down_SDF=weights.down_SDF.float() * weights.down_scale_SD[..., None],
        gate_up_scale_SN=None,
        down_scale_SD=None,
    )
    x_ND, slots_N = _rows(9), torch.tensor([3, 0, 1, 1, 2, 0, 3, 3, 1])
    quantized_ND = LayerExperts(weights, torch.float32)(x_ND, slots_N)
    exact_ND = LayerExperts(widened, torch.float32)(x_ND, slots_N)
    error = ((quantized_ND - exact_ND).norm() / exact_ND.norm()).item()
    assert 0.005 < error < 0.08  # e4m3 keeps 4 significant bits: a few per cent per value


def test_quantized_rows_by_hand() -> None:
    """The largest value becomes 448; a row of zeros stays zeros."""
    quantized_ND, scales_N1 = quantize_rows(torch.tensor([[4.48, -2.24, 0.01], [0.0, 0.0, 0.0]]))
    assert scales_N1[0].item() == pytest.approx(0.01)
    assert quantized_ND.float().tolist() == [[448.0, -224.0, 1.0], [0.0, 0.0, 0.0]]


def test_rows_of_zeros_stay_finite_in_fp8() -> None:
    y_ND = LayerExperts(_fp8_weights(), torch.float32)(torch.zeros(3, D), torch.tensor([0, 1, 2]))
    assert torch.equal(y_ND, torch.zeros(3, D))


def test_slots_that_hold_the_same_expert_compute_the_same() -> None:
    config = shape_config(SHAPES["tiny"])
    worker = ExpertWorker.load(config, PipelineConfig(load="dummy"), {1: (5, 2, 5), 3: (0,)}, CPU)
    x_ND = torch.randn(6, config.hidden_size)
    y_ND = worker(1, x_ND, torch.tensor([0, 1, 2, 2, 0, -1]))
    assert torch.allclose(worker(1, x_ND[:1], torch.tensor([2])), y_ND[:1], atol=1e-6)  # slots 0 and 2 are replicas


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([-1, 1, 3]), min_size=1, max_size=12))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_in_empty_slots_reaches_no_row(dtype: torch.dtype, slots: list[int]) -> None:
    """Memory of empty slots is never initialized; here it is poison. Both the loop and the path of GPUs."""
    weights, x_ND, slots_N = _weights(dtype), _rows(len(slots)).to(dtype), torch.tensor(slots)
    poisoned = replace(weights, gate_up_SND=weights.gate_up_SND.clone(), down_SDF=weights.down_SDF.clone())
    for stack in (poisoned.gate_up_SND, poisoned.down_SDF):
        stack[[0, 2]] = torch.nan
    clean, empty = LayerExperts(weights, dtype), LayerExperts(poisoned, dtype)
    assert torch.equal(empty(x_ND, slots_N), clean(x_ND, slots_N))
    if dtype == torch.bfloat16:
        assert torch.equal(empty._run_placed(x_ND, slots_N, None, None), clean._run_placed(x_ND, slots_N, None, None))


@pytest.mark.parametrize("stored", ["fused", "per_expert", "fp8"])
def test_worker_loads_what_its_slots_name(stored: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    from actors.checkpoint.index import validate_checkpoint
    from actors.checkpoint.make_model import make_model

    directory = tmp_path_factory.mktemp(stored)
    make_model(directory, SHAPES["tiny"], experts=stored, seed=3)  # type: ignore[arg-type]
    config, pipeline = shape_config(SHAPES["tiny"], experts=stored), PipelineConfig(model=str(directory))  # type: ignore[arg-type]
    worker = ExpertWorker.load(config, pipeline, {1: (6, 1), 5: (7,)}, CPU)
    everything = load_experts(validate_checkpoint(directory), config, {1: tuple(range(8))}, torch.float32, CPU)
    whole = LayerExperts(everything[1], torch.float32)
    x_ND = torch.randn(5, config.hidden_size)
    assert torch.equal(worker(1, x_ND, torch.tensor([1, 0, 0, 1, 1])), whole(x_ND, torch.tensor([1, 6, 6, 1, 1])))
    assert worker.weight_bytes > 0
