"""What a step's rows are sampled from, of which a rank may hold only some columns.

Owns that logits travel between ranks only where a row needs all of them: who is greedy needs the largest, and who draws
by temperature alone each rank's sum. Knows nothing of requests. All ranks of a unit ask for the same rows in the same
order.

Shapes: B rows, R of them, V vocabulary, C columns of this rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from actors.kernels.draw import Draws, draw_tokens
from actors.kernels.largest import largest


@dataclass(frozen=True, slots=True)
class Logits:
    """`largest_B` (fp32) and `greedy_B` (int64) are of whole rows, as `kernels/largest.py` has them.

    `gather` makes [R, C] to [R, V]; `draws` makes tokens of the columns and what rows draw with (`kernels/draw.py`).
    """

    part_BC: Tensor
    largest_B: Tensor
    greedy_B: Tensor
    gather: Callable[[Tensor], Tensor]
    draws: Callable[[Tensor, Draws], Tensor]

    @staticmethod
    def of(logits_BV: Tensor) -> "Logits":
        """Of rows that are here whole, of any float dtype."""
        if logits_BV.dtype == torch.float64:
            logits_BV = logits_BV.float()
        return Logits(logits_BV, *largest(logits_BV), _as_it_is, draw_tokens)

    def first(self, num_rows: int) -> "Logits":
        """Without the padding behind."""
        part_BC, largest_B, greedy_B = (x[:num_rows] for x in (self.part_BC, self.largest_B, self.greedy_B))
        return replace(self, part_BC=part_BC, largest_B=largest_B, greedy_B=greedy_B)

    def rows(self, row_R: Tensor) -> Tensor:
        """fp32 [R, V] of rows (int64): a copy."""
        return self.gather(self.part_BC.index_select(0, row_R)).float()

    def rehearse(self) -> None:
        """Draws, so that what is compiled for it is."""
        for least_R in (None, torch.ones(1, dtype=torch.int64, device=self.part_BC.device)):
            self.draws(self.part_BC, Draws.any_of(self.part_BC, least_R))

    def draw(self, row_R: Tensor, temperature_R: Tensor, uniform_R: Tensor, least_R: Tensor | None) -> Tensor:
        """int64 [R]: tokens of rows (int64) by temperature alone, from weights that are `least_R` at least."""
        draws = Draws(
            row_R=row_R, largest_B=self.largest_B, temperature_R=temperature_R, uniform_R=uniform_R, least_R=least_R
        )
        return self.draws(self.part_BC, draws)


def _as_it_is(part_RV: Tensor) -> Tensor:
    return part_RV
