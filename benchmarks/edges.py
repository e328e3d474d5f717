"""Whether two answers differ by more than the last bits of a sum.

Sums round differently in other company and after a recovery, which computes in one piece what was computed token by
token. Where two tokens are as good as equally likely, or the drawn number falls on the boundary between two, that
decides, and everything after differs. Such close calls say nothing about what was lost or repeated.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from actors.attention.local_model import LocalModel
from actors.attention.philox import uniforms
from actors.config import PipelineConfig
from benchmarks.workload import Item

LOGIT_MARGIN = 1e-3  # between two logits that rounding may put in either order
PROBABILITY_MARGIN = 2e-5  # of the drawn number from the boundary between two tokens


class CloseCalls:
    """A copy of the model, to look at the probabilities behind answers of temperature 0 or 1."""

    def __init__(self, directory: Path) -> None:
        pipeline = PipelineConfig(model=str(directory), kv_cache_bytes=64 << 20, max_model_len=1024)
        self._model = LocalModel.load(pipeline)

    def explains(self, item: Item, one: Sequence[int], other: Sequence[int], seed: int | None) -> bool:
        """Whether the first token in which the answers differ was a close call. `seed` None is greedy, else
        temperature 1. False where one is merely shorter.
        """
        pairs = zip(one, other, strict=False)
        where = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if where is None:
            return False
        logits_V = self._model.logits([*item.prompt_ids, *one[:where]])[-1].double()
        low, high = sorted((one[where], other[where]))
        if seed is None:
            best = float(logits_V.max())
            return best - float(logits_V[[low, high]].min()) < LOGIT_MARGIN
        drawn = float(uniforms(np.array([seed], dtype=np.uint64), np.array([where], dtype=np.uint64))[0])
        ends_V = torch.softmax(logits_V, 0).cumsum(0)  # where shares end; each begins where the last ended
        begins = float(ends_V[high - 1])
        return abs(float(ends_V[low]) - drawn) < PROBABILITY_MARGIN and abs(begins - drawn) < PROBABILITY_MARGIN
