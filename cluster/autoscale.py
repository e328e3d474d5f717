"""How many ranks there should be: from how long requests wait, how full the KV cache is and how long steps take.

Owns the decision and its hysteresis, with time passed in: the same observations give the same goals. Knows nothing of
how ranks come and go (`cluster/balance.py`, the router's epochs), nor of where they would run.

A need must last for a whole delay before it moves the goal, by one rank, and then again for the next; while the rank
that was asked for is still on its way, no other is. Changed bounds apply at once.
"""

from dataclasses import dataclass

from actors.config import Layout, ScalingConfig
from actors.router.membership import Goal, Observation

DOWN_MARGIN = 0.6  # of a target: what the load on the ranks that would be left may reach, for one to be taken away
MAX_GAP_S = 5.0  # between observations; over a longer one nobody knows whether a need lasted


@dataclass(slots=True, kw_only=True)
class _Side:
    """Ranks that are counted together: those of one role, or all of them where each has both."""

    role: str  # "expert" or "attention", as the bounds call it
    own: int  # the layout's number
    count: int
    more_since_s: float | None = None
    less_since_s: float | None = None

    def forget(self) -> None:
        self.more_since_s = self.less_since_s = None


class Autoscaler:
    """Implements the router's Scaler. `attention_ranks` and `expert_ranks` are the layout's own numbers.

    Only in a disaggregated layout do attention ranks count by themselves; elsewhere the bounds of experts hold for all.
    `is_fixed`: the layout's numbers cannot change (tensor-parallel attention), whatever the bounds say.
    """

    def __init__(
        self,
        scaling: ScalingConfig,
        attention_ranks: int,
        expert_ranks: int,
        layout: Layout = "disaggregated",
        is_fixed: bool = False,
    ) -> None:
        self._is_fixed = is_fixed
        self._experts = _Side(role="expert", own=expert_ranks, count=expert_ranks)
        self._attention = (
            _Side(role="attention", own=attention_ranks, count=attention_ranks) if layout == "disaggregated" else None
        )
        self._scaling = scaling
        self._seen_s: float | None = None  # when the last observation came
        self._why = "as configured"

    @property
    def rebalances(self) -> bool:
        return self._scaling.rebalance

    @property
    def rebalance_interval_s(self) -> float:
        return self._scaling.rebalance_interval_s

    @property
    def slow_rank_factor(self) -> float:
        return self._scaling.slow_rank_factor

    @property
    def slow_rank_s(self) -> float:
        return self._scaling.slow_rank_s

    def set_bounds(self, scaling: ScalingConfig) -> None:
        """Applies from the next observation on."""
        self._scaling = scaling

    def bounds(self, role: str) -> tuple[int, int]:
        """Fewest and most ranks of `role`; a bound of 0 is the layout's number, unless the other bound forbids it."""
        side = self._experts if role == "expert" or self._attention is None else self._attention
        scaling = self._scaling
        if self._is_fixed:
            return side.own, side.own
        if side.role == "expert":
            low, high = scaling.min_experts, scaling.max_experts
        else:
            low, high = scaling.min_attention, scaling.max_attention
        if low and not high:
            return low, max(low, side.own)
        if high and not low:
            return min(high, side.own), high
        return (low, high) if low else (side.own, side.own)

    def observe(self, seen: Observation, now_s: float) -> Goal:
        """The goal after what was seen. Call it every second or so.

        The first goal is what there is (a router that was restarted finds ranks), within the bounds.
        """
        if self._seen_s is None:
            self._experts.count = seen.expert_ranks
            if self._attention is not None:
                self._attention.count = seen.attention_ranks
        is_gap = self._seen_s is not None and now_s - self._seen_s > MAX_GAP_S
        self._seen_s = now_s
        for side in (self._experts, self._attention):
            if side is not None:
                if is_gap:
                    side.forget()
                self._keep_bounds(side)
        if self._attention is not None:
            self._decide(self._attention, seen.attention_ranks, self._attention_need(seen), seen, now_s)
        self._decide(self._experts, seen.expert_ranks, self._expert_need(seen), seen, now_s)
        attention = self._experts if self._attention is None else self._attention
        return Goal(attention_ranks=attention.count, expert_ranks=self._experts.count, why=self._why)

    def _keep_bounds(self, side: _Side) -> None:
        low, high = self.bounds(side.role)
        if not low <= side.count <= high:
            bound = "at least" if side.count < low else "at most"
            side.count = min(max(side.count, low), high)
            self._why = f"{bound} {side.count} {_ranks(side.role, side.count)} by the bounds"
            side.forget()

    def _decide(self, side: _Side, num_seen: int, need: str, seen: Observation, now_s: float) -> None:
        """Moves the goal of one side by one rank at most. `need` says why it wants more, or is empty."""
        low, high = self.bounds(side.role)
        spare = self._spare(side, num_seen, seen) if not need else ""
        may_grow, may_shrink = side.count < high and num_seen >= side.count, side.count > low and num_seen <= side.count
        side.more_since_s = _since(side.more_since_s, bool(need) and may_grow, now_s)
        side.less_since_s = _since(side.less_since_s, bool(spare) and may_shrink, now_s)
        if _lasts(side.more_since_s, self._scaling.upscale_delay_s, now_s):
            side.count += 1
            self._why = f"{side.count} {_ranks(side.role, side.count)}: {need}"
            side.forget()
        elif _lasts(side.less_since_s, self._scaling.downscale_delay_s, now_s):
            side.count -= 1
            self._why = f"{side.count} {_ranks(side.role, side.count)}: {spare}"
            side.forget()

    def _attention_need(self, seen: Observation) -> str:
        """Why more attention ranks are wanted: KV room and seats are theirs."""
        target = self._scaling.target_kv_used_fraction
        if seen.kv_used_fraction > target:
            return f"{seen.kv_used_fraction:.0%} of the KV cache is used, the target is {target:.0%}"
        if seen.num_queued and seen.num_running >= seen.num_seats:
            return f"all {seen.num_seats} seats are taken and {seen.num_queued} requests wait"
        return ""

    def _expert_need(self, seen: Observation) -> str:
        """Why more expert ranks are wanted: steps are slow, or requests wait and attention ranks cannot help."""
        scaling = self._scaling
        if 0 < scaling.target_step_ms < seen.step_ms:
            return f"a step takes {seen.step_ms:.1f} ms, the target is {scaling.target_step_ms:g} ms"
        attention_need = self._attention_need(seen)
        if self._attention is None and attention_need:
            return attention_need
        attention_helps = (
            attention_need and self._attention is not None and self._attention.count < self.bounds("attention")[1]
        )
        if seen.queue_s > scaling.target_queue_s and not attention_helps:
            return f"requests wait {seen.queue_s:.1f} s, the target is {scaling.target_queue_s:g} s"
        return ""

    def _spare(self, side: _Side, num_seen: int, seen: Observation) -> str:
        """Why one rank less is enough, or empty: what the others would have to do must leave room below all targets.

        On n - 1 of n expert ranks a step takes up to n / (n - 1) as long, so that by Little's law as many more requests
        run at once.
        """
        scaling, growth = self._scaling, num_seen / max(1, side.count - 1)
        if seen.queue_s > DOWN_MARGIN * scaling.target_queue_s:
            return ""
        seats = seen.num_running / max(1, seen.num_seats)
        room = max(seats, seen.kv_used_fraction / scaling.target_kv_used_fraction) * growth
        is_timed = side.role == "expert" and scaling.target_step_ms > 0
        if is_timed and seen.step_ms * growth > DOWN_MARGIN * scaling.target_step_ms:
            return ""
        counts_room = self._attention is None or not is_timed  # else the time of steps says more about experts
        if room > (DOWN_MARGIN if counts_room else 1.0):
            return ""
        return f"no queue, and {seats:.0%} of seats and {seen.kv_used_fraction:.0%} of the KV cache used"


def _since(since_s: float | None, holds: bool, now_s: float) -> float | None:
    """Since when a condition holds without a break."""
    if not holds:
        return None
    return now_s if since_s is None else since_s


def _lasts(since_s: float | None, delay_s: float, now_s: float) -> bool:
    return since_s is not None and now_s - since_s >= delay_s


def _ranks(role: str, number: int) -> str:
    return f"{role} rank" if number == 1 else f"{role} ranks"
