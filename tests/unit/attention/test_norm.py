"""RMS norm by hand, in each precision."""

import pytest
import torch

from actors.attention.norm import RowNorm, rms_norm

CPU = torch.device("cpu")


def test_by_hand() -> None:
    """Mean square of (1, 7) is 25, so that the rows are fifths."""
    y = RowNorm(2, 0.0, torch.float32, CPU)(torch.tensor([[1.0, 7.0], [-7.0, 1.0]]), torch.tensor([1.0, 10.0]))
    assert torch.allclose(y, torch.tensor([[0.2, 14.0], [-1.4, 2.0]]))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_eps_lies_under_the_root(scale: float) -> None:
    x_TD = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)) * scale
    weight_D = torch.linspace(-2, 2, 96)
    exact = x_TD.double() / (x_TD.double().square().mean(1, keepdim=True) + 1e-5).sqrt() * weight_D.double()
    ours = RowNorm(96, 1e-5, torch.float32, CPU)(x_TD, weight_D)
    assert torch.allclose(ours.double(), exact, rtol=1e-5, atol=1e-9)
    assert torch.allclose(rms_norm(x_TD, weight_D, 1e-5).double(), exact, rtol=1e-5, atol=1e-9)


def test_half_precision_is_normed_in_fp32_and_weighted_in_its_own() -> None:
    """(1.0078 cast to bf16) times (1.0078) rounds once more; fp32 throughout would give another last bit."""
    x_TD = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight_D = torch.randn(96, generator=torch.Generator().manual_seed(1)).bfloat16()
    normed = x_TD.float() * (x_TD.float().square().mean(1, keepdim=True) + 1e-5).rsqrt()
    ours = RowNorm(96, 1e-5, torch.bfloat16, CPU)(x_TD, weight_D)
    assert torch.equal(ours, normed.bfloat16() * weight_D)
    assert not torch.equal(ours, (normed * weight_D.float()).bfloat16())
