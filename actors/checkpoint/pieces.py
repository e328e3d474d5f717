"""Which part of a stored tensor goes where: the words in which layouts tell the reader what to read.

Knows nothing of files being read, and needs no torch to be imported, so that a process that only checks a checkpoint
stays small.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.checkpoint.headers import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

LEAST_SLICE_BYTES = 4096  # a page: less of a row than this costs as much to read as the whole row,
LONG_ROW_BYTES = 16384  # unless the row is as long as this


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some rows of a stored tensor, and where they go. A row runs along the last dimension; all others are flattened.

    `target` has the stored values' order: target[i, j] takes row first_row + i, column first_column + j. It may be any
    strided view (a transposed one turns the weight around), of any dtype, on any device.
    """

    info: TensorInfo
    first_row: int
    target: "Tensor"  # [num_rows, columns]
    first_column: int = 0

    @property
    def num_rows(self) -> int:
        return int(self.target.shape[0])

    @property
    def stored_row_bytes(self) -> int:
        """Of a whole row, as it lies in the file."""
        return self.info.shape[-1] * self.info.item_bytes

    @property
    def row_bytes(self) -> int:
        """Of the part of a row that is wanted."""
        return int(self.target.shape[1]) * self.info.item_bytes

    @property
    def is_contiguous(self) -> bool:
        """Whether the wanted rows are whole, so that they lie side by side in the file."""
        return self.row_bytes == self.stored_row_bytes

    @property
    def reads_slices(self) -> bool:
        """Whether only the wanted part of each row is read; else rows are read whole, and cut in memory."""
        is_long = self.row_bytes >= LEAST_SLICE_BYTES or self.stored_row_bytes >= LONG_ROW_BYTES
        return not self.is_contiguous and is_long

    @property
    def num_bytes(self) -> int:
        """What is read from the file."""
        return self.num_rows * (self.row_bytes if self.reads_slices else self.stored_row_bytes)

    def blocks(self, max_bytes: int) -> Iterator["Piece"]:
        """The same piece in parts of at most `max_bytes` (or one row)."""
        step = max(1, max_bytes // max(1, self.num_bytes // max(1, self.num_rows)))
        for row in range(0, self.num_rows, step):
            rows = self.target[row : row + step]
            yield Piece(info=self.info, first_row=self.first_row + row, target=rows, first_column=self.first_column)


def whole(info: TensorInfo, target: "Tensor") -> Piece:
    """All of a stored tensor into `target`, which has its shape but for dimensions of one."""
    rows = math.prod(info.shape[:-1])
    return Piece(info=info, first_row=0, target=target.reshape(rows, -1) if target.dim() != 2 else target)
