"""The messages of a step as views of a rank's buffers, made once for all steps with the same token counts.

Owns which bytes go to whom. Knows nothing of when they are sent.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from actors.dispatch.layout import StepLayout
from actors.dispatch.rows import RowBuffer
from actors.dispatch.transport import Message

Peers = tuple[tuple[int, int], ...]
"""(number of the destination, its rank) of the other ranks that hold slots of a layer."""


class Frame:
    """A step's layout with its messages as views of the buffers. Steps of the same token counts share one."""

    def __init__(
        self,
        tokens_of_rank: tuple[int, ...],
        layout: StepLayout,
        peers_of_layer: Sequence[Peers],
        buffers: Sequence[RowBuffer],
        results_RD: Tensor,
    ) -> None:
        self.tokens_of_rank = tokens_of_rank
        self.layout = layout
        n = layout.block_rows

        # Layers that the same ranks hold share their messages: most often all of them.
        blocks: dict[tuple[int, Peers], list[Message]] = {}

        def messages(rows: Tensor, which: int, peers: Peers) -> list[Message]:
            if (which, peers) not in blocks:
                blocks[which, peers] = [(rank, rows[d * n : (d + 1) * n]) for d, rank in peers]
            return blocks[which, peers]

        turns = [i % len(buffers) for i in range(len(peers_of_layer))]
        pairs = list(zip(turns, peers_of_layer, strict=True))
        self.sends = [messages(buffers[turn].words_NW, turn, peers) for turn, peers in pairs]
        self.awaited = [messages(results_RD, -1, peers) for _, peers in pairs]
        num_counted = len(layout.counted_sources)
        self.headers_in = [results_RD.new_zeros(num_counted, dtype=torch.int64) for _ in buffers]
        self.arrivals: list[list[Message]] = [
            [(s.rank, b.words_NW[s.start : s.start + s.num_rows]) for s in layout.fixed_sources]
            + [(s.rank, headers[i : i + 1]) for i, s in enumerate(layout.counted_sources)]
            for b, headers in zip(buffers, self.headers_in, strict=True)
        ]


def slices(rows: Tensor, counts: tuple[int, ...], peers: Peers) -> list[Message]:
    """The rows of each peer where destinations lie close together, without those that have none."""
    starts = [sum(counts[:d]) for d in range(len(counts))]
    return [(rank, rows[starts[d] : starts[d] + counts[d]]) for d, rank in peers if counts[d]]
