"""The Triton kernels that push rows, run by the interpreter over areas of one process, do what the plain form does.

Triton reads TRITON_INTERPRET when kernels are defined, so they are defined in a process of their own. Programs run one
after another there, and so do ranks: all sources push, all destinations serve, all sources combine.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from interpreter import run_interpreted
from torch import Tensor

from actors.kernels import peer_rows
from actors.kernels.peer_areas import SLOT_BITS, AreaLayout, Exchange, LayerRoutes, PeerAreas, Turn
from actors.kernels.triton_here import HAS_TRITON

NUM_EXPERTS, REPLICAS, NUM_LAYERS = 5, 2, 3


class Case(NamedTuple):
    sources: tuple[int, ...]
    destinations: tuple[int, ...]
    hidden: int
    k: int
    tokens: tuple[int, ...]
    dtype: torch.dtype


CASES = [
    Case((0,), (1, 2), 16, 1, (5,), torch.float32),
    Case((0, 1), (0, 1), 13, 2, (3, 0), torch.float16),
    Case((0, 1), (2, 3), 24, 3, (2, 1), torch.float32),
]


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


def make_exchanges(case: Case) -> list[Exchange]:
    sources, destinations = case.sources, case.destinations
    layout = AreaLayout(
        hidden=case.hidden, dtype=case.dtype, capacity=16, num_sources=len(sources), num_destinations=len(destinations)
    )
    world = max(*sources, *destinations) + 1
    buffers = torch.zeros(world, layout.num_bytes, dtype=torch.uint8).unbind()
    areas = PeerAreas(layout=layout, buffers=buffers, bases=torch.tensor([buffer.data_ptr() for buffer in buffers]))
    return [
        Exchange(
            areas=areas,
            rank=rank,
            source=sources.index(rank) if rank in sources else -1,
            destination=destinations.index(rank) if rank in destinations else -1,
            source_ranks_S=torch.tensor(sources, dtype=torch.int32),
            destination_ranks_P=torch.tensor(destinations, dtype=torch.int32),
            state=(state := torch.zeros(3, dtype=torch.int64)),
            partner_state=state,
            host=torch.zeros(2, dtype=torch.int64),
            timeout_s=0.1,
        )
        for rank in range(world)
    ]


def run_layers(form: ModuleType, case: Case) -> list[Tensor]:
    """All that some layers show of themselves, the same tokens every time that it is called."""
    exchanges, rng = make_exchanges(case), torch.Generator().manual_seed(case.hidden)
    seen: list[Tensor] = []
    for layer in range(NUM_LAYERS):
        keys_ER = torch.randint(len(case.destinations), (NUM_EXPERTS, REPLICAS), generator=rng) << SLOT_BITS
        keys_ER |= torch.randint(4, keys_ER.shape, generator=rng)
        replicas_E = torch.randint(1, REPLICAS + 1, (NUM_EXPERTS,), generator=rng)
        turn = Turn(block_rows=8, parity=layer % 2, lag=1)
        chosen: dict[int, Tensor] = {}
        for rank, num_tokens in zip(case.sources, case.tokens, strict=True):
            routes = LayerRoutes(keys_ER=keys_ER, num_replicas_E=replicas_E, first=rank + layer)
            ids_TK = torch.rand(num_tokens, NUM_EXPERTS, generator=rng).argsort(1)[:, : case.k]
            ids_TK[:1] = -1
            x_TD = torch.randn(num_tokens, case.hidden, generator=rng).to(case.dtype)
            scores_TK = torch.rand(num_tokens, case.k, generator=rng).to(case.dtype)
            chosen[rank] = form.push_rows(exchanges[rank], turn, routes, x_TD, ids_TK, scores_TK)
        for rank in case.destinations:
            x_ND, slots_N = form.await_rows(exchanges[rank], turn)
            form.push_results(exchanges[rank], turn, (x_ND * (slots_N[:, None] + 2)).to(case.dtype), slots_N)
            seen += [slots_N, x_ND.where(slots_N[:, None] >= 0, 0)]
        seen += [form.combine_results(exchanges[rank], turn, chosen[rank], case.k) for rank in case.sources]
        seen += chosen.values()
    return seen + [exchange.state for exchange in exchanges] + [exchange.host for exchange in exchanges]


def check_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor], case: Case) -> None:
    assert len(ours) == len(theirs)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), f"{case}, tensor {number}: {a} is not {b}"


def check_nobody_comes(form: ModuleType) -> None:
    """The destination ends its wait, takes no rows, and blames the first source; later waits are not even begun."""
    exchange = make_exchanges(CASES[2])[3]
    for parity in (0, 1):
        _, slots_N = form.await_rows(exchange, Turn(block_rows=8, parity=parity, lag=1))
        assert slots_N.tolist() == [-1] * 16 and exchange.given_up == 0


def main() -> None:
    from actors.kernels import peer_rows_triton

    for case in CASES:
        plain = run_layers(peer_rows, case)
        check_equal(run_layers(peer_rows_triton, case), plain, case)
        assert any(tensor.abs().sum() for tensor in plain if tensor.dtype == case.dtype)
    for form in (peer_rows, peer_rows_triton):
        check_nobody_comes(form)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
