"""The training corpus: conversations as token ids, packed into rows of one length, several to a row.

Owns the packing and its reproducibility: part k of a seed has the same rows, whoever makes it and in whichever order.
Knows nothing of models.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt

from benchmarks.demo_model.conversations import draw_conversation
from benchmarks.demo_model.tokens import Encoder

ROWS_OF_PART = 256
_NUM_OPEN = 24  # rows that are filled at once: a longer conversation waits for none, a short one finds a gap


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """N rows of L tokens. A position counts from its conversation's first token, which has 0; so has padding.

    ids_NL uint16, positions_NL uint16, is_target_NL bool: whether the token is to be predicted.
    """

    ids_NL: npt.NDArray[np.uint16]
    positions_NL: npt.NDArray[np.uint16]
    is_target_NL: npt.NDArray[np.bool_]

    def save(self, file: Path) -> None:
        np.savez(file, ids=self.ids_NL, positions=self.positions_NL, is_target=self.is_target_NL)

    @staticmethod
    def load(file: Path) -> "Rows":
        with np.load(file, allow_pickle=False) as arrays:
            return Rows(ids_NL=arrays["ids"], positions_NL=arrays["positions"], is_target_NL=arrays["is_target"])

    @staticmethod
    def join(parts: "Sequence[Rows]") -> "Rows":
        return Rows(
            ids_NL=np.concatenate([part.ids_NL for part in parts]),
            positions_NL=np.concatenate([part.positions_NL for part in parts]),
            is_target_NL=np.concatenate([part.is_target_NL for part in parts]),
        )


@dataclass(frozen=True, slots=True)
class _Sequence:
    ids: list[int]
    is_target: list[bool]
    label: str


class Packer:
    """Puts token sequences side by side into rows of `length` tokens; what is longer is cut."""

    def __init__(self, length: int, pad_id: int) -> None:
        self._length = length
        self._pad_id = pad_id
        self._open: list[list[_Sequence]] = []
        self._used: list[int] = []
        self._closed: list[list[_Sequence]] = []

    @property
    def num_closed(self) -> int:
        """Rows that are full."""
        return len(self._closed)

    def add(self, ids: list[int], is_target: list[bool], label: str = "") -> None:
        ids, is_target = ids[: self._length], is_target[: self._length]
        row = next((i for i, used in enumerate(self._used) if used + len(ids) <= self._length), None)
        if row is None:
            if len(self._open) == _NUM_OPEN:
                self._close(max(range(_NUM_OPEN), key=self._used.__getitem__))
            self._open.append([])
            self._used.append(0)
            row = len(self._open) - 1
        self._open[row].append(_Sequence(ids, is_target, label))
        self._used[row] += len(ids)

    def close_all(self) -> None:
        while self._open:
            self._close(0)

    def rows(self, num_rows: int | None = None) -> Rows:
        """The closed rows, in order, at most `num_rows` of them."""
        chosen = self._closed[:num_rows]
        shape = len(chosen), self._length
        rows = Rows(
            ids_NL=np.full(shape, self._pad_id, dtype=np.uint16),
            positions_NL=np.zeros(shape, dtype=np.uint16),
            is_target_NL=np.zeros(shape, dtype=np.bool_),
        )
        for i, sequences in enumerate(chosen):
            start = 0
            for sequence in sequences:
                place = i, slice(start, start + len(sequence.ids))
                rows.ids_NL[place], rows.is_target_NL[place] = sequence.ids, sequence.is_target
                rows.positions_NL[place] = np.arange(len(sequence.ids))
                start += len(sequence.ids)
        return rows

    def labels(self) -> list[str]:
        """Labels of the sequences in the order in which `rows` has them, which is not that of `add`."""
        return [sequence.label for sequences in self._closed for sequence in sequences]

    def _close(self, row: int) -> None:
        self._closed.append(self._open.pop(row))
        self._used.pop(row)


def make_part(part: int, *, seed: int, length: int, directory: Path, pad_id: int) -> Rows:
    """ROWS_OF_PART rows of training conversations, tokenized by the tokenizer of `directory`."""
    draw, encoder, packer = Random(f"{seed}/{part}"), Encoder.load(directory), Packer(length, pad_id)
    while packer.num_closed < ROWS_OF_PART:
        packer.add(*encoder.encode(draw_conversation(draw)))
    return packer.rows(ROWS_OF_PART)


def make_corpus(
    num_rows: int,
    *,
    seed: int,
    length: int,
    directory: Path,
    pad_id: int,
    processes: int,
    report: Callable[[int], None] = lambda _: None,
) -> Rows:
    """At least `num_rows` rows, in whole parts. report(rows made so far)."""
    num_parts = -(-num_rows // ROWS_OF_PART)
    make = partial(make_part, seed=seed, length=length, directory=directory, pad_id=pad_id)
    parts: list[Rows] = []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for part in pool.imap(make, range(num_parts)):
            parts.append(part)
            report(len(parts) * ROWS_OF_PART)
    return Rows.join(parts)
