"""Which rank is slow for good: more work is no slowness, and what slows everyone is nobody's fault."""

import itertools
import random
from collections.abc import Callable, Mapping

from hypothesis import given
from hypothesis import strategies as st

from actors.router.pace import FIRST_PAUSE_S, SlowRank, SlowRanks, Window, replace_rank
from actors.types import Pace, RankSpec, Role

FACTOR, AFTER_S = 4.0, 10.0
EXPERT: tuple[Role, ...] = ("expert",)
ATTENTION: tuple[Role, ...] = ("attention",)
COUNTS = st.tuples(st.integers(1, 1000), st.integers(1, 100_000), st.integers(1, 1_000_000))
COSTS = st.tuples(st.floats(1e-5, 1e-1), st.floats(0, 1e-3), st.floats(0, 1e-4))


class Ranks:
    """Ranks that work through steps, each as slow as told."""

    def __init__(self, roles_of: Mapping[int, tuple[Role, ...]], steps_per_s: int = 40) -> None:
        self.roles_of = dict(roles_of)
        self.slow_ranks = SlowRanks()
        self.now_s = 100.0
        self.slowness = dict.fromkeys(roles_of, 1.0)
        self.rows_per_step: dict[int, int] = dict.fromkeys(roles_of, 10)
        self.steps_per_s = steps_per_s
        self._rng = random.Random(7)
        self._done = {rank: Pace(busy_us=0, num_steps=0, num_rows=0) for rank in roles_of}

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> SlowRank | None:
        """Beats come twice a second, questions once. Returns the first answer that names a rank."""
        ends_s = self.now_s + seconds
        while self.now_s < ends_s and not until():
            for _ in range(2):
                self.now_s += 0.5
                for rank in self.roles_of:
                    self._beat(rank)
            found = self.slow_ranks.find(self.roles_of, FACTOR, AFTER_S, self.now_s)
            if found is not None:
                return found
        return None

    def _beat(self, rank: int) -> None:
        before, rows = self._done[rank], self.rows_per_step[rank]
        steps = self.steps_per_s // 2
        busy_us = int(steps * (2000 + 100 * rows) * self.slowness[rank] * self._rng.uniform(0.7, 1.4))
        self._done[rank] = Pace(
            busy_us=before.busy_us + busy_us,
            num_steps=before.num_steps + steps,
            num_rows=before.num_rows + steps * rows,
        )
        self.slow_ranks.note(rank, self._done[rank], 50, self.now_s)


def test_a_rank_that_stays_slow_beside_its_peers_is_found_after_the_delay() -> None:
    ranks = Ranks({0: EXPERT, 1: EXPERT, 2: EXPERT, 3: ATTENTION})
    assert ranks.run(20) is None
    ranks.slowness[1] = 8.0
    began_s = ranks.now_s
    found = ranks.run(60)
    assert found is not None and found.rank == 1 and "its peers" in found.why
    assert AFTER_S <= ranks.now_s - began_s <= AFTER_S + 5


def test_a_new_rank_is_found_without_a_past_of_its_own() -> None:
    ranks = Ranks({0: EXPERT, 1: EXPERT, 2: EXPERT})
    ranks.slowness[2] = 10.0
    found = ranks.run(30)
    assert found is not None and found.rank == 2


def test_a_hiccup_is_not_for_good() -> None:
    ranks = Ranks({0: EXPERT, 1: EXPERT, 2: EXPERT})
    for _ in range(5):
        ranks.slowness[1] = 20.0
        assert ranks.run(AFTER_S - 3) is None
        ranks.slowness[1] = 1.0
        assert ranks.run(10) is None


def test_a_hot_rank_is_not_slow() -> None:
    """One expert rank gets nine tenths of the tokens, so that its steps take many times as long as its peers'."""
    ranks = Ranks({0: EXPERT, 1: EXPERT, 2: EXPERT})
    ranks.rows_per_step = {0: 2000, 1: 100, 2: 100}
    assert ranks.run(60) is None


def test_of_two_ranks_the_one_that_leaves_its_own_past_behind_is_slow() -> None:
    ranks = Ranks({0: EXPERT, 1: ATTENTION})
    assert ranks.run(20) is None
    ranks.slowness[0] = 10.0
    found = ranks.run(30)
    assert found is not None and found.rank == 0 and "it used to" in found.why


def test_what_slows_all_ranks_is_nobodys_fault() -> None:
    for roles_of in ({0: EXPERT, 1: ATTENTION}, {0: EXPERT, 1: EXPERT, 2: EXPERT}, {0: (*ATTENTION, *EXPERT)}):
        ranks = Ranks(roles_of)
        assert ranks.run(20) is None
        ranks.slowness = dict.fromkeys(roles_of, 10.0)
        assert ranks.run(60) is None


def test_without_steps_nobody_is_judged() -> None:
    ranks = Ranks({0: EXPERT, 1: EXPERT, 2: EXPERT})
    ranks.slowness[1] = 10.0
    assert ranks.run(AFTER_S - 3) is None
    ranks.steps_per_s = 0
    assert ranks.run(60) is None


def test_slow_by_microseconds_is_not_worth_a_change() -> None:
    ranks = Ranks({0: EXPERT, 1: EXPERT, 2: EXPERT})
    ranks.slowness = {0: 0.01, 1: 0.1, 2: 0.01}
    assert ranks.run(60) is None


def test_a_factor_of_zero_finds_nobody() -> None:
    ranks = Ranks({0: EXPERT, 1: EXPERT, 2: EXPERT})
    ranks.slowness[1] = 100.0
    for _ in range(60):
        ranks.run(0.5, until=lambda: True)
        ranks.now_s += 1.0
        for rank in ranks.roles_of:
            ranks._beat(rank)
        assert ranks.slow_ranks.find(ranks.roles_of, 0.0, AFTER_S, ranks.now_s) is None


def test_where_each_successor_is_slow_too_replacements_become_rare() -> None:
    ranks = Ranks({0: EXPERT, 1: EXPERT, 2: EXPERT})
    ranks.slowness[1] = 10.0
    times = []
    while len(times) < 4:
        assert ranks.run(2000) is not None
        times.append(ranks.now_s)
        ranks.slow_ranks.replaced(ranks.now_s)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps[0] >= FIRST_PAUSE_S and all(later >= 1.8 * gap for gap, later in itertools.pairwise(gaps))


@given(COUNTS, COUNTS, COSTS, st.floats(0.1, 100))
def test_no_mixture_of_work_looks_slower_than_the_rank_is(
    ours: tuple[int, int, int], theirs: tuple[int, int, int], costs: tuple[float, float, float], slowness: float
) -> None:
    def window(counts: tuple[int, int, int], times: float) -> Window:
        busy_s = times * sum(count * cost for count, cost in zip(counts, costs, strict=True))
        return Window(busy_s=busy_s, num_steps=counts[0], num_rows=counts[1], num_pages=counts[2])

    assert window(ours, slowness).times(window(theirs, 1.0)) <= slowness * (1 + 1e-9)


def test_the_successor_takes_the_slots_and_the_unit_of_the_rank_it_replaces() -> None:
    spec = RankSpec(rank=4, roles=("expert",), slots={1: (0, 1)})
    other = RankSpec(rank=7, roles=("attention",))
    assert replace_rank((spec, other), 4, 9) == (other, RankSpec(rank=9, roles=("expert",), slots={1: (0, 1)}))
    leader = RankSpec(rank=0, roles=("attention",), shard=(0, 2))
    follower = RankSpec(rank=1, roles=("attention",), shard=(1, 2), leader=0)
    replaced = replace_rank((leader, follower), 0, 5)
    assert [(s.rank, s.shard, s.leader, s.unit) for s in replaced] == [(1, (1, 2), 5, 5), (5, (0, 2), -1, 5)]
