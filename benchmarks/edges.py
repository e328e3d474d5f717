"""Which answers hang on the last bits of a sum.

Sums round differently in other company and after a recovery, which computes in one piece what was computed token by
token. Where two tokens are as good as equally likely, or the drawn number falls on the boundary between two, that
decides. Such answers prove nothing about what was lost or repeated, so comparisons leave them out, and say how many.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from actors.attention.local_model import LocalModel
from actors.attention.philox import uniforms
from actors.config import PipelineConfig
from benchmarks.workload import Item

LEAST_MARGIN = 1e-4  # between the two highest logits
LEAST_DISTANCE = 2e-6  # of the drawn number from a boundary, in probability


class EdgeFinder:
    """A copy of the model, to look at the logits behind answers of temperature 0 or 1."""

    def __init__(self, directory: Path) -> None:
        pipeline = PipelineConfig(model=str(directory), kv_cache_bytes=64 << 20, max_model_len=1024)
        self._model = LocalModel.load(pipeline)

    def on_the_edge(self, item: Item, token_ids: list[int], seed: int | None) -> bool:
        """Whether any token of an answer was a close call. `seed` None is greedy, else temperature 1."""
        start = len(item.prompt_ids) - 1
        logits_NV = self._model.logits([*item.prompt_ids, *token_ids[:-1]])[start:]
        if seed is None:
            best_N2 = logits_NV.topk(2).values
            return bool((best_N2[:, 0] - best_N2[:, 1]).min() < LEAST_MARGIN)
        count = len(token_ids)
        drawn_N = uniforms(np.full(count, seed, dtype=np.uint64), np.arange(count, dtype=np.uint64))
        boundaries_NV = torch.softmax(logits_NV.double(), 1).cumsum(1)
        return bool((boundaries_NV - torch.from_numpy(drawn_N)[:, None]).abs().min() < LEAST_DISTANCE)


def without_edges(
    directory: Path, answers: Mapping[int, list[int]], items: list[Item], seeded: bool
) -> dict[int, list[int]]:
    """The answers, by item, that are no close call. With `seeded`, odd items are of temperature 1 and their number."""
    finder = EdgeFinder(directory)
    return {
        number: token_ids
        for number, token_ids in answers.items()
        if not finder.on_the_edge(items[number], token_ids, number if seeded and number % 2 else None)
    }
