"""What a step's rows are sampled from, of which a rank may hold only some columns.

Owns that logits travel between ranks only where a row needs all of them: who is greedy needs the largest. Knows nothing
of requests. All ranks of a unit ask for the same rows in the same order.

Shapes: B rows, R of them, V vocabulary, C columns of this rank.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.kernels.largest import largest


@dataclass(frozen=True, slots=True)
class Logits:
    """`largest_B` (fp32) and `greedy_B` (int64) are of whole rows, as `kernels/largest.py` has them.

    `gather` makes [R, C] to [R, V].
    """

    part_BC: Tensor
    largest_B: Tensor
    greedy_B: Tensor
    gather: Callable[[Tensor], Tensor]

    @staticmethod
    def of(logits_BV: Tensor) -> "Logits":
        """Of rows that are here whole, of any float dtype."""
        if logits_BV.dtype == torch.float64:
            logits_BV = logits_BV.float()
        return Logits(logits_BV, *largest(logits_BV), _as_it_is)

    def first(self, num_rows: int) -> "Logits":
        """Without the padding behind."""
        return Logits(self.part_BC[:num_rows], self.largest_B[:num_rows], self.greedy_B[:num_rows], self.gather)

    def rows(self, row_R: Tensor) -> Tensor:
        """fp32 [R, V] of rows (int64): a copy."""
        return self.gather(self.part_BC.index_select(0, row_R)).float()


def _as_it_is(part_RV: Tensor) -> Tensor:
    return part_RV
