"""Cuts the work of a large step in parts that are computed in turn.

Owns where it is cut, and what is sampled of all together. Knows nothing of what is computed.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from msgspec import structs
from torch import Tensor

from actors.attention.batch import StepInputs
from actors.types import Work

MIN_DIVIDED_ROWS = 6144  # of a step; below, the host takes longer to launch parts than the device to compute them
PART_ROWS = 4096  # of a part at least, but for what cutting at the end of a piece costs
MAX_PARTS = 2  # every part more is more to launch
WHOLE_FRACTION = 8  # a part may be so much smaller or larger if that leaves every piece whole
CUT_TOKENS = 512  # a piece is cut at a multiple of this, where attention is fast (see `mixed.py`)


def divide(work: Sequence[Work]) -> list[list[Work]]:
    """Parts of about as many rows each, in the order of the work. Pages stay with the first part of a piece that is
    cut: all that were granted are in the tables by then.
    """
    num_rows = sum(piece.num_tokens for piece in work)
    parts: list[list[Work]] = []
    rest, num_parts = list(work), _num_parts(num_rows)
    while num_parts > 1:
        part, rest = _split(rest, num_rows // num_parts, num_rows // num_parts // WHOLE_FRACTION)
        parts.append(part)
        num_rows -= sum(piece.num_tokens for piece in part)
        num_parts -= 1
    return [*parts, rest]


def _num_parts(num_rows: int) -> int:
    return 1 if num_rows < MIN_DIVIDED_ROWS else max(2, min(MAX_PARTS, num_rows // PART_ROWS))


def _split(work: list[Work], num_rows: int, slack: int) -> tuple[list[Work], list[Work]]:
    """About `num_rows` of the rows, which are more, and the others: whole pieces if that is not `slack` rows off."""
    ends = list(accumulate(piece.num_tokens for piece in work))
    nearest = min(range(len(ends)), key=lambda i: abs(ends[i] - num_rows))
    if abs(ends[nearest] - num_rows) <= slack:
        return work[: nearest + 1], work[nearest + 1 :]
    cut = next(i for i, end in enumerate(ends) if end > num_rows)
    first, second = _cut(work[cut], num_rows - (ends[cut] - work[cut].num_tokens))
    return [*work[:cut], first], [second, *work[cut + 1 :]]


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
