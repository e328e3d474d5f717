"""Which part of a stored tensor goes where: the words in which layouts tell the reader what to read.

Knows nothing of files being read, and needs no torch to be imported, so that a process that only checks a checkpoint
stays small.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.checkpoint.headers import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some rows of a stored tensor, and where they go. A row runs along the last dimension; all others are flattened.

    `target` has the stored values' order: target[i, j] takes row first_row + i, column j. It may be any strided view
    (a transposed one turns the weight around), of any dtype, on any device.
    """

    info: TensorInfo
    first_row: int
    target: "Tensor"  # [num_rows, columns]

    @property
    def row_bytes(self) -> int:
        return int(self.target.shape[1]) * self.info.item_bytes

    @property
    def num_bytes(self) -> int:
        return int(self.target.shape[0]) * self.row_bytes

    def blocks(self, max_bytes: int) -> Iterator["Piece"]:
        """The same piece in parts of at most `max_bytes` (or one row)."""
        step = max(1, max_bytes // max(1, self.row_bytes))
        for row in range(0, int(self.target.shape[0]), step):
            yield Piece(info=self.info, first_row=self.first_row + row, target=self.target[row : row + step])


def whole(info: TensorInfo, target: "Tensor") -> Piece:
    """All of a stored tensor of one or two dimensions into `target`, which has its shape."""
    return Piece(info=info, first_row=0, target=target if target.dim() == 2 else target.unsqueeze(0))
