"""Cuts the work of a large step in two parts that are computed in turn.

Owns where it is cut, and what is sampled of both together. Knows nothing of what is computed.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from msgspec import structs
from torch import Tensor

from actors.attention.batch import StepInputs
from actors.types import Work

MIN_DIVIDED_ROWS = 2048  # of a step; in smaller parts matmuls and sums take no less time
WHOLE_FRACTION = 8  # parts may be so much of a step unequal if that leaves every piece whole
CUT_TOKENS = 512  # a piece is cut at a multiple of this, where attention is fast (see `mixed.py`)


def divide(work: Sequence[Work]) -> list[list[Work]]:
    """One part or two of about as many rows each, in the order of the work. Pages stay with the first half of a piece
    that is cut: all that were granted are in the tables by then.
    """
    ends = list(accumulate(piece.num_tokens for piece in work))
    num_rows = ends[-1]
    if num_rows < MIN_DIVIDED_ROWS:
        return [list(work)]
    middle = num_rows // 2
    nearest = min(range(len(ends)), key=lambda i: abs(ends[i] - middle))
    if 2 * WHOLE_FRACTION * abs(ends[nearest] - middle) <= num_rows:
        return [list(work[: nearest + 1]), list(work[nearest + 1 :])]
    cut = next(i for i, end in enumerate(ends) if end > middle)
    first, second = _cut(work[cut], middle - (ends[cut] - work[cut].num_tokens))
    return [[*work[:cut], first], [second, *work[cut + 1 :]]]


def _cut(piece: Work, num_tokens: int) -> tuple[Work, Work]:
    """After about so many tokens of a piece, which has more."""
    at = piece.start + num_tokens
    rounded = at - at % CUT_TOKENS
    at = rounded if rounded > piece.start else at
    first = structs.replace(piece, num_tokens=at - piece.start, samples=False)
    left = piece.start + piece.num_tokens - at
    return first, structs.replace(piece, start=at, num_tokens=left, global_pages=(), chunked_pages=())


def sampled_rows(parts: Sequence[StepInputs]) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """Of parts whose rows lie one after another: the requests that are sampled, their rows, and their memory rows."""
    first, rows = 0, []
    for part in parts:
        own_B = part.sampled_rows_B
        rows.append((torch.arange(part.num_tokens, device=part.ids_T.device) if own_B is None else own_B) + first)
        first += part.num_tokens
    requests = tuple(request_idx for part in parts for request_idx in part.sampled)
    return requests, torch.cat(rows), torch.cat([part.memory_rows_B for part in parts])
