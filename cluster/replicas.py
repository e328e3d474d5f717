"""Which experts a rank should hold, in one layer: how many replicas each expert gets, and where they go.

Owns placement as pure functions of who holds what, room and load. Dispatch spreads an expert's tokens evenly over its
replicas. Knows nothing of epochs or of how experts get to their slots (`cluster/slot_moves.py`).

What counts, in this order: every expert somewhere; every expert on as many ranks as were asked for; the busiest rank
not much busier than the mean, with few experts moved and few replicas more. Slots that balance does not need stay
empty: that is room to take over a lost rank's experts, and to move experts without dropping a replica first.

R ranks, E experts. Source of the greedy count of replicas: DeepSeek's EPLB, https://github.com/deepseek-ai/EPLB.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from actors.errors import LayoutError

BALANCED = 1.05  # the busiest rank's tokens in means; nearer is not worth more experts moved
_WORTHWHILE = 0.99  # more replicas or moves must take the busiest rank's tokens below this share of what they were
_SWAP_COST = 0.01  # means by which the busiest must be less busy after a swap than after a move, which loads one expert

Held = npt.NDArray[np.bool_]  # [R, E], whether rank r holds expert e
Room = npt.NDArray[np.int64]  # [R], slots of rank r, used or not
Tokens = npt.NDArray[np.float64]  # [E], tokens of expert e
Counts = npt.NDArray[np.int64]  # [E], replicas of expert e
Aim = Callable[[Held, Room, Tokens, int], Held]
"""From what ranks hold to what they should; the last argument is the replicas of every expert that were asked for."""


def place_experts(num_experts: int, num_ranks: int, replicas: int = 1) -> tuple[tuple[int, ...], ...]:
    """Experts of each rank, in slot order: `replicas` copies of each, on different ranks, counts even within one.

    Copy after copy, experts are dealt in runs: 128 experts on 3 ranks are 43, 43 and 42. One run of `num_experts`
    slots is cut into as many as there are ranks, so no rank gets an expert twice while replicas <= ranks.
    """
    if replicas > num_ranks:
        raise LayoutError(f"{replicas} replicas of every expert need as many expert ranks, and there are {num_ranks}")
    share, extra = divmod(num_experts * replicas, num_ranks)
    bounds = [rank * share + min(rank, extra) for rank in range(num_ranks + 1)]
    return tuple(tuple(sorted(i % num_experts for i in range(bounds[r], bounds[r + 1]))) for r in range(num_ranks))


def rank_tokens(held_RE: Held, tokens_E: Tokens) -> npt.NDArray[np.float64]:
    """Tokens that each rank gets, [R]. Those of an expert without a holder count nowhere."""
    loads_R: npt.NDArray[np.float64] = held_RE @ _shares(held_RE, tokens_E)
    return loads_R


def completed(held_RE: Held, room_R: Room, tokens_E: Tokens, replicas: int) -> Held:
    """What is held, and what is missing: every expert has a holder, then `replicas` of them where there is room.

    Where slots are short, replicas that are not asked for make room for those that are, and any replica for an expert
    that nobody holds. Without room for one of each expert, some stay without a holder.
    """
    held_RE = held_RE.copy()
    replicas = min(replicas, len(room_R))
    for expert in np.flatnonzero(held_RE.sum(0) == 0)[np.argsort(-tokens_E[held_RE.sum(0) == 0], kind="stable")]:
        _put(held_RE, room_R, tokens_E, int(expert), spare_above=replicas) or _put(
            held_RE, room_R, tokens_E, int(expert), spare_above=1
        )
    blocked: set[int] = set()
    while True:
        counts_E = held_RE.sum(0)
        short = [int(e) for e in np.flatnonzero((counts_E > 0) & (counts_E < replicas)) if int(e) not in blocked]
        if not short:
            return held_RE
        expert = min(short, key=lambda e: (counts_E[e], -tokens_E[e], e))
        if not _put(held_RE, room_R, tokens_E, expert, spare_above=replicas):
            blocked.add(expert)


def balanced(held_RE: Held, room_R: Room, tokens_E: Tokens, replicas: int) -> Held:
    """What ranks should hold so that none is much busier than the mean; what they hold, if there is little to gain.

    Takes the fewest replicas, and nearly the fewest moves, that get within BALANCED of the mean; else the placement
    with the least busy busiest rank that was found. Experts that have holders keep min(`replicas`, holders) of them.
    """
    now = float(rank_tokens(held_RE, tokens_E).max(initial=0.0))
    bound = BALANCED * float(tokens_E.sum()) / max(1, len(room_R))
    if now <= bound:
        return held_RE
    best_RE, best = held_RE, now
    for counts_E in _replica_counts(held_RE, room_R, tokens_E, replicas):
        tried_RE = _arranged(held_RE, room_R, tokens_E, counts_E)
        busiest = float(rank_tokens(tried_RE, tokens_E).max())
        if busiest < _WORTHWHILE * best:
            best_RE, best = tried_RE, busiest
        if best <= bound:
            break
    return best_RE


def _replica_counts(held_RE: Held, room_R: Room, tokens_E: Tokens, replicas: int) -> list[Counts]:
    """Numbers of replicas worth trying, fewest first: one more goes to the expert with most tokens per replica."""
    num_ranks = int((room_R > 0).sum())
    counts_E = np.minimum(held_RE.sum(0), max(1, replicas)).astype(np.int64)
    bound = BALANCED * float(tokens_E.sum()) / len(room_R)
    num_spare = int(room_R.sum() - counts_E.sum())
    steps, fewest = [counts_E.copy()], 0
    for _ in range(num_spare):
        shares_E = np.where(counts_E < num_ranks, tokens_E / np.maximum(counts_E, 1), -1.0)
        expert = int(shares_E.argmax())
        if shares_E[expert] <= 0:
            break
        if shares_E[expert] > bound:
            fewest = len(steps)
        counts_E[expert] += 1
        steps.append(counts_E.copy())
    num_more = len(steps) - 1 - fewest
    return [steps[i] for i in sorted({fewest + num_more * quarter // 4 for quarter in range(5)})]


def _arranged(held_RE: Held, room_R: Room, tokens_E: Tokens, counts_E: Counts) -> Held:
    """A placement with `counts_E` replicas (or fewer, where no rank can take one more), near to `held_RE`."""
    held_RE = held_RE.copy()
    shares_E = tokens_E / np.maximum(counts_E, 1)
    for expert in np.flatnonzero(held_RE.sum(0) > counts_E):
        while held_RE[:, expert].sum() > counts_E[expert]:
            loads_R = np.where(held_RE[:, expert], held_RE @ shares_E, -1.0)
            held_RE[int(loads_R.argmax()), expert] = False
    missing_E = counts_E - held_RE.sum(0)
    for expert in np.argsort(-shares_E, kind="stable"):
        for _ in range(int(missing_E[expert])):
            rank = _free_rank(held_RE, room_R, shares_E, int(expert))
            if rank < 0:
                rank = _vacated(held_RE, room_R, shares_E, int(expert))
            if rank < 0:
                break
            held_RE[rank, expert] = True
    _even_out(held_RE, room_R, _shares(held_RE, tokens_E))
    return held_RE


def _even_out(held_RE: Held, room_R: Room, shares_E: Tokens) -> None:
    """Moves or swaps experts of the busiest rank with others', best first, while that makes the busiest less busy."""
    for _ in range(4 * held_RE.shape[1]):
        loads_R = held_RE @ shares_E
        if loads_R.max() <= BALANCED * loads_R.mean():
            return
        busiest = int(loads_R.argmax())
        swap = _best_swap(held_RE, room_R, shares_E, loads_R, busiest)
        if swap is None:
            return
        other, given, taken = swap
        held_RE[busiest, given], held_RE[other, given] = False, True
        if taken >= 0:
            held_RE[other, taken], held_RE[busiest, taken] = False, True


def _best_swap(
    held_RE: Held, room_R: Room, shares_E: Tokens, loads_R: npt.NDArray[np.float64], busiest: int
) -> tuple[int, int, int] | None:
    """(other rank, expert that it gets, expert that it gives or -1) which leave the busier of the two least busy."""
    given_G = np.flatnonzero(held_RE[busiest] & (shares_E > 0))
    free_R = held_RE.sum(1) < room_R
    others_P, taken_P = np.nonzero(np.column_stack((free_R, held_RE & ~held_RE[busiest])))  # column 0: nothing taken
    if not len(given_G) or not len(others_P):
        return None
    moved_GP = shares_E[given_G][:, None] - np.concatenate(([0.0], shares_E))[taken_P]
    after_GP = np.maximum(loads_R[busiest] - moved_GP, loads_R[others_P] + moved_GP)
    after_GP[:, taken_P > 0] += _SWAP_COST * loads_R.mean()
    after_GP[held_RE[others_P][:, given_G].T] = np.inf
    g, p = divmod(int(after_GP.argmin()), len(others_P))
    if after_GP[g, p] >= loads_R[busiest] * (1 - 1e-9):
        return None
    return int(others_P[p]), int(given_G[g]), int(taken_P[p]) - 1


def _put(held_RE: Held, room_R: Room, tokens_E: Tokens, expert: int, spare_above: int) -> bool:
    """Gives `expert` one more holder, in place of a replica of an expert that has more than `spare_above` if it must.

    Changes `held_RE`; whether it could.
    """
    rank = _free_rank(held_RE, room_R, _shares(held_RE, tokens_E), expert)
    if rank < 0:
        counts_E, shares_E = held_RE.sum(0), _shares(held_RE, tokens_E)
        evictable_RE = held_RE & (counts_E > max(1, spare_above)) & ~held_RE[:, [expert]]
        if not evictable_RE.any():
            return False
        cost_RE = np.where(evictable_RE, shares_E, np.inf)
        rank, evicted = divmod(int(cost_RE.argmin()), held_RE.shape[1])
        held_RE[rank, evicted] = False
    held_RE[rank, expert] = True
    return True


def _free_rank(held_RE: Held, room_R: Room, shares_E: Tokens, expert: int) -> int:
    """The least busy rank that could take `expert` now, of equals the one with fewest experts; -1 if there is none."""
    filled_R = held_RE.sum(1)
    open_R = np.flatnonzero((filled_R < room_R) & ~held_RE[:, expert])
    if not len(open_R):
        return -1
    loads_R = held_RE[open_R] @ shares_E
    return int(open_R[np.lexsort((filled_R[open_R], loads_R))[0]])


def _vacated(held_RE: Held, room_R: Room, shares_E: Tokens, expert: int) -> int:
    """A rank without `expert` that has room after one of its experts went to a rank with a free slot; -1 if none.

    Changes `held_RE`.
    """
    free_R = np.flatnonzero(held_RE.sum(1) < room_R)
    for rank in np.argsort(held_RE @ shares_E, kind="stable"):
        if held_RE[rank, expert]:
            continue
        for free in free_R:
            movable = np.flatnonzero(held_RE[rank] & ~held_RE[free])
            if len(movable):
                moved = movable[shares_E[movable].argmin()]
                held_RE[rank, moved], held_RE[free, moved] = False, True
                return int(rank)
    return -1


def _shares(held_RE: Held, tokens_E: Tokens) -> Tokens:
    """Tokens of each replica."""
    shares_E: Tokens = tokens_E / np.maximum(held_RE.sum(0), 1)
    return shares_E
