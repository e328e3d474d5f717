"""How long ranks take for their part of steps, and which one has fallen behind for good.

Owns the comparison and its hysteresis, with time passed in. Knows nothing of messages, nor of how a rank is replaced.

The yardstick are the other ranks of the same roles, where there are two at least; else the rank's own past, as long as
only one rank falls behind its own: what slows all of them is no rank's fault.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low

from msgspec import structs

from actors.types import Pace, RankSpec, Role

WINDOW_S = 3.0  # a window is this long at least, so that what strikes now and then evens out,
WINDOW_STEPS = 8  # and has as many steps
FRESH_S = 9.0  # an older window says nothing about now
MIN_PEERS = 2  # of two ranks that differ, nobody knows who is right
MIN_PAST_WINDOWS, MAX_PAST_WINDOWS = 10, 32
MIN_EXCESS_S = 0.001  # per step: less is not worth a change, however many times as long it is
CALM = 0.5  # of the factor: a rank below it is as it should be
FIRST_PAUSE_S, LONGEST_PAUSE_S = 60.0, 3600.0  # between two replacements: on a slow host the next rank is slow as well


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What a rank did in a stretch of time, and how long it worked on it, waits for others left out.

    `num_pages` counts the pages of KV cache in use, once for every step: attention reads as much.
    """

    busy_s: float
    num_steps: int
    num_rows: int
    num_pages: int

    def times(self, other: "Window") -> float:
        """How many times as long as in `other` it took, by step, by row or by page, whichever is least.

        More work is no slowness: where time is so much per step, per row and per page, summed, the result is at most
        the ratio of two ranks' speeds, however their work differs.
        """
        if not other.busy_s:
            return 0.0
        counts = (
            (self.num_steps, other.num_steps), (self.num_rows, other.num_rows), (self.num_pages, other.num_pages),
        )  # fmt: skip
        return min((self.busy_s * theirs / (other.busy_s * ours) for ours, theirs in counts if ours), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowRank:
    """A rank that should be replaced, and why, in one line for people."""

    rank: int
    why: str


@dataclass(slots=True)
class _Record:
    """What is known of one rank."""

    seen: Pace
    began: Pace  # of the window that is being filled
    since_s: float
    num_pages: int = 0  # since then
    window: Window | None = None
    window_s: float = 0.0  # when it ended
    past: deque[Window] = field(default_factory=lambda: deque(maxlen=MAX_PAST_WINDOWS))
    slow_since_s: float | None = None

    def is_slow_for_s(self, times: float, factor: float) -> float:
        """For how long it has been slow, by its windows and not by the clock; below 0 if it is not.

        It begins at `factor` times as long as it should take, and ends well below.
        """
        excess_s = self.window.busy_s / self.window.num_steps * (1 - 1 / times) if self.window and times > 1 else 0.0
        if times < CALM * factor or excess_s < MIN_EXCESS_S:
            self.slow_since_s = None
        elif times >= factor and self.slow_since_s is None:
            self.slow_since_s = self.window_s
        return -1.0 if self.slow_since_s is None or times < factor else self.window_s - self.slow_since_s


class SlowRanks:
    """Give it what ranks report with `note`, and ask with `find` about once a second."""

    def __init__(self) -> None:
        self._records: dict[int, _Record] = {}
        self._pause_s = FIRST_PAUSE_S
        self._paused_until_s = float("-inf")

    def note(self, rank: int, pace: Pace, num_pages: int, now_s: float) -> None:
        """`num_pages` of KV cache are in use on the rank."""
        record = self._records.get(rank)
        if record is None:
            self._records[rank] = _Record(pace, pace, now_s)
            return
        record.num_pages += num_pages * (pace.num_steps - record.seen.num_steps)
        record.seen = pace
        num_steps = pace.num_steps - record.began.num_steps
        if now_s - record.since_s < WINDOW_S or num_steps < WINDOW_STEPS:
            return
        record.window = Window(
            busy_s=(pace.busy_us - record.began.busy_us) / 1e6,
            num_steps=num_steps,
            num_rows=pace.num_rows - record.began.num_rows,
            num_pages=record.num_pages,
        )
        record.window_s = record.since_s = now_s
        record.began, record.num_pages = pace, 0

    def busy_ms(self, rank: int) -> float:
        """Per step, of late; 0 where nothing is known."""
        record = self._records.get(rank)
        window = record.window if record else None
        return 1e3 * window.busy_s / window.num_steps if window else 0.0

    def find(
        self, roles_of: Mapping[int, Sequence[Role]], factor: float, after_s: float, now_s: float
    ) -> SlowRank | None:
        """The rank of `roles_of` that has taken `factor` times as long as it should for `after_s`, if there is one.

        Call `replaced` once something is done about it. A factor of 0 finds nobody.
        """
        self._records = {rank: record for rank, record in self._records.items() if rank in roles_of}
        measured = self._measure(roles_of, factor, now_s)
        found: list[tuple[float, int]] = []
        for rank, record in self._records.items():
            times, _ = measured.get(rank, (0.0, ""))
            if record.is_slow_for_s(times, factor) >= after_s:
                found.append((times, rank))
        if not found or not factor or now_s < self._paused_until_s:
            return None
        times, rank = max(found)
        why = f"rank {rank} is slow: {times:.1f} times as long per step as {measured[rank][1]}"
        return SlowRank(rank=rank, why=why)

    def replaced(self, now_s: float) -> None:
        """Something is being done about the rank that was found; nobody else is found for a while."""
        is_again = now_s - self._paused_until_s < 10 * self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S) if is_again else FIRST_PAUSE_S
        self._paused_until_s = now_s + self._pause_s

    def _measure(
        self, roles_of: Mapping[int, Sequence[Role]], factor: float, now_s: float
    ) -> dict[int, tuple[float, str]]:
        """By rank: how many times as long as it should it takes, and as whom. Ranks without a measure are absent."""
        fresh = {
            rank: record.window
            for rank, record in self._records.items()
            if record.window is not None and now_s - record.window_s <= FRESH_S
        }
        beside_past = {rank: self._beside_its_past(rank, window, factor) for rank, window in fresh.items()}
        measured: dict[int, tuple[float, str]] = {}
        for rank, window in fresh.items():
            peers = [w for other, w in fresh.items() if other != rank and roles_of[other] == roles_of[rank]]
            if len(peers) >= MIN_PEERS:
                measured[rank] = median_low(window.times(peer) for peer in peers), "its peers"
            elif (times := beside_past[rank]) is not None and self._others_are_calm(
                rank, beside_past, roles_of, factor
            ):
                measured[rank] = times, "it used to"
        return measured

    def _beside_its_past(self, rank: int, window: Window, factor: float) -> float | None:
        """None until there is a past to speak of. Windows that are as they should be become past."""
        past = self._records[rank].past
        times = median_low(window.times(before) for before in past) if len(past) >= MIN_PAST_WINDOWS else None
        if (times is None or times < CALM * factor) and (not past or past[-1] is not window):
            past.append(window)
        return times

    @staticmethod
    def _others_are_calm(
        rank: int, beside_past: Mapping[int, float | None], ranks: Collection[int], factor: float
    ) -> bool:
        others = [beside_past.get(other) for other in ranks if other != rank]
        return bool(others) and all(times is not None and times < CALM * factor for times in others)


def replace_rank(ranks: Sequence[RankSpec], rank: int, successor: int) -> tuple[RankSpec, ...]:
    """The membership in which `successor`, a new number, holds what `rank` held."""
    changes = {spec.rank: {"rank": successor} if spec.rank == rank else {} for spec in ranks}
    for spec in ranks:
        if spec.leader == rank:
            changes[spec.rank]["leader"] = successor
    return tuple(sorted((structs.replace(spec, **changes[spec.rank]) for spec in ranks), key=lambda spec: spec.rank))
