"""Ranks that share one GPU and map each other's memory, each with a stream: what a test of peer kernels runs."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from actors.kernels.peer_end import Layout, PeerEnd

CUDA = torch.device("cuda")

P = TypeVar("P", bound=PeerEnd)
R = TypeVar("R")


class RanksOfOneGpu(Generic[P]):
    """What they wait for is sent by kernels on other streams, which must all find room on the GPU."""

    def __init__(self, kind: type[P], layout: Layout, timeout_s: float = 5.0) -> None:
        buffers = tuple(torch.zeros(layout.num_bytes, dtype=torch.uint8, device=CUDA) for _ in range(layout.world))
        self.streams = [torch.cuda.Stream() for _ in range(layout.world)]
        ends: dict[str, Any] = {"layout": layout, "buffers": buffers, "timeout_s": timeout_s}
        self.ranks = [
            kind(
                rank=rank,
                bases=torch.tensor([buffer.data_ptr() for buffer in buffers], device=CUDA),
                state=torch.zeros(layout.state_words, dtype=torch.int64, device=CUDA),
                host=torch.zeros(2, dtype=torch.int64, pin_memory=True),
                **ends,
            )
            for rank in range(layout.world)
        ]

    def launch(self, call: Callable[[P], R], num_ranks: int | None = None) -> list[R]:
        """What `call` of the first ranks returns, each on its stream; nothing is waited for."""
        torch.cuda.synchronize()
        results = []
        for peers, stream in list(zip(self.ranks, self.streams, strict=True))[:num_ranks]:
            with torch.cuda.stream(stream):
                results.append(call(peers))
        return results
