"""Tokens drawn by temperature alone: a pass over the logits for their weight, and one for the token.

Owns which arithmetic it is: `attention/distribution.py` in plain torch, whose integers need no order of adding, so that
columns may lie anywhere. Knows nothing of requests.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from actors.attention.distribution import distances, draw, unit, weights_at
from actors.kernels.triton_here import HAS_TRITON


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """R of B rows that draw. `row_R`: int64. `largest_B`: fp32, of each whole row. `temperature_R`: fp32, above 0.
    `uniform_R`: float64 in [0, 1). `least_R`: int64 or None; weights below it count as none.
    """

    row_R: Tensor
    largest_B: Tensor
    temperature_R: Tensor
    uniform_R: Tensor
    least_R: Tensor | None

    @staticmethod
    def any_of(x_BV: Tensor, least_R: Tensor | None) -> "Draws":
        """One draw from row 0, of no meaning."""
        one = torch.ones(1, dtype=torch.float32, device=x_BV.device)
        row_R, uniform_R = torch.zeros_like(one, dtype=torch.int64), torch.zeros_like(one, dtype=torch.float64)
        return Draws(
            row_R=row_R, largest_B=one.expand(len(x_BV)), temperature_R=one, uniform_R=uniform_R, least_R=least_R
        )

    def of_rows(self) -> "Draws":
        """For those rows alone, in their order."""
        rows_R = torch.arange(len(self.row_R), device=self.row_R.device)
        return replace(self, row_R=rows_R, largest_B=self.largest_B.index_select(0, self.row_R))


def draw_tokens(x_BV: Tensor, draws: Draws) -> Tensor:
    """int64 [R]: columns, as `distribution.draw` has them. A row whose largest is not finite gives any."""
    if x_BV.is_cuda and HAS_TRITON and len(draws.row_R):
        from actors.kernels.draw_triton import launch_draw

        return launch_draw(x_BV, draws, x_BV.shape[1])
    x_RV = x_BV.index_select(0, draws.row_R).float()
    weight_RV = weights_at(distances(x_RV, draws.temperature_R), unit(x_RV.shape[1]))
    if draws.least_R is not None:
        weight_RV = weight_RV.masked_fill(weight_RV < draws.least_R[:, None], 0)
    return draw(weight_RV, draws.uniform_R)
