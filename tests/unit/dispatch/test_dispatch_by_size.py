"""Every rank chooses the same dispatch for a step, and steps of both kinds may follow one another."""

import pytest
import torch
from test_collective import LAYERS, LAYOUTS, NUM_EXPERTS, Model, SlotCompute, random_step, ranks_of_world

from actors.dispatch.by_size import DispatchBySize
from actors.dispatch.collective import CollectiveDispatch
from actors.dispatch.contract import build_routing_table
from actors.dispatch.peer_memory import SharedMemory
from actors.dispatch.rows import TokenShape
from actors.dispatch.symmetric import SymmetricDispatch

CPU = torch.device("cpu")
SHAPE = TokenShape(hidden=16, experts_per_token=1, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("name", ["1A+1E", "colocated 2"])
def test_steps_of_both_kinds_equal_the_reference(name: str) -> None:
    """8 tokens are the most that a rank may bring to a small step; the last one is small on one rank alone."""
    layout = LAYOUTS[name]
    routing = build_routing_table(layout.slots, LAYERS, NUM_EXPERTS, CPU)
    model = Model(NUM_EXPERTS, 16)
    reference = model.reference(NUM_EXPERTS)
    memories = SharedMemory.of_world(2, CPU)
    sizes = [(3, 5), (20, 9), (8, 8), (0, 0), (1, 0), (9, 2)]
    steps = [random_step(layout, size, 1, 16, seed) for seed, size in enumerate(sizes)]
    with ranks_of_world(2) as ranks:

        def work(rank: int) -> list[bool]:
            compute = SlotCompute(model, layout.slots[rank]) if rank in layout.slots else None
            small = SymmetricDispatch(memories[rank], routing, compute, layout.attention, SHAPE, 10.0, max_tokens=8)
            large = CollectiveDispatch(ranks.groups[rank], routing, compute, layout.attention, SHAPE)
            small.start()
            dispatch = DispatchBySize(small, large, CPU)
            for step in steps:
                counts = tuple(len(step[0][r].x_TD) if r in step[0] else 0 for r in range(2))
                if rank not in step[0]:
                    dispatch.serve_step(counts)
                    continue
                dispatch.begin_step(counts)
                for layer, tokens in zip(LAYERS, step, strict=True):
                    y_TD = dispatch.combine(dispatch.dispatch(*tokens[rank], layer))
                    torch.testing.assert_close(y_TD, reference.combine(reference.dispatch(*tokens[rank], layer)))
            dispatch.check()
            dispatch.close()
            return [small.fits(size) for size in sizes]

        assert ranks.run(work) == [[True, False, True, True, True, False]] * 2
