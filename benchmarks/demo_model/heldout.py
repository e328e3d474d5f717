"""How many held-out answers the training forward would give, without decoding: for a look while training.

An answer is counted where the best token at each of its positions is the expected one: exactly the greedy answers that
equal it. Where several answers are right (stories) this says little; the served scores of `score.py` are the real ones.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from benchmarks.demo_model.corpus import Packer, Rows
from benchmarks.demo_model.examples import HELD_OUT_SPLITS
from benchmarks.demo_model.families import FAMILIES
from benchmarks.demo_model.tokens import Encoder

_SEED = 11


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows of held-out questions with their expected answers, one answer to a conversation."""

    rows: Rows
    labels: tuple[str, ...]  # family/split of each conversation, in the order of the rows

    @staticmethod
    def make(encoder: Encoder, length: int, pad_id: int, num_of_each: int) -> "HeldOut":
        """`num_of_each` questions of every family and split."""
        packer, draw = Packer(length, pad_id), Random(_SEED)
        for family in FAMILIES.values():
            for split in HELD_OUT_SPLITS if family.has_operands else HELD_OUT_SPLITS[1:]:
                for _ in range(num_of_each):
                    example = family.make(draw, split)
                    ids, is_target = encoder.encode(example.messages)
                    answer_start = len(encoder.encode_prompt(example.prompt))
                    is_target[:answer_start] = [False] * answer_start
                    packer.add(ids, is_target, f"{family.name}/{split}")
        packer.close_all()
        return HeldOut(packer.rows(), tuple(packer.labels()))

    def score(self, best_ids: Callable[[Tensor, Tensor], Tensor], batch_rows: int = 32) -> dict[str, float]:
        """Shares of right answers by label. best_ids(ids_BL, positions_BL): the likeliest next ids."""
        right, next_label = Counter[str](), iter(self.labels)
        for start in range(0, len(self.rows.ids_NL), batch_rows):
            part = slice(start, start + batch_rows)
            ids_BL = torch.from_numpy(self.rows.ids_NL[part].astype("int64"))
            positions_BL = torch.from_numpy(self.rows.positions_NL[part].astype("int64"))
            is_target_BL = torch.from_numpy(self.rows.is_target_NL[part])
            predicted_BL = best_ids(ids_BL, positions_BL).cpu().roll(1, dims=1)
            is_wrong_BL = (predicted_BL != ids_BL) & is_target_BL
            conversations_BL = (positions_BL == 0).cumsum(dim=1)
            for row in range(len(ids_BL)):
                asked = conversations_BL[row][is_target_BL[row]].unique().tolist()
                failed = set(conversations_BL[row][is_wrong_BL[row]].tolist())
                right.update(label for number in asked if (label := next(next_label)) and number not in failed)
        return {label: right[label] / count for label, count in Counter(self.labels).items()}
