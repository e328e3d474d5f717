"""Who takes part next, and with which experts: growth, shrinkage, recovery and the balance of experts.

Owns the answers to `actors/router/membership.py`: pure, so that a step which was not carried out is simply proposed
again. Where experts should be is for `cluster/replicas.py` to say, how they get there for `cluster/slot_moves.py`.
Knows nothing of when the number of ranks should change (`cluster/autoscale.py`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, product

import numpy as np
from msgspec import structs

from actors.config import Layout
from actors.errors import LayoutError
from actors.router.membership import ExpertTokens, Goal, Proposal
from actors.types import EMPTY_SLOT, RankSpec, Role
from cluster.replicas import Aim, Held, Room, Tokens, balanced, completed, place_experts, rank_tokens
from cluster.slot_moves import Slots, experts_in, next_round

TOKENS_TO_JUDGE = 1000  # per expert rank and layer; of fewer, chance alone makes one rank seem 5 % busier
HORIZON_ROUNDS = 8  # balance is judged by what this many steps can gain

Rows = list[Slots]
"""One layer's slots, by expert rank."""


@dataclass(slots=True, kw_only=True)
class Balancer:
    """Implements MembershipPlanner.

    Each new expert rank has `num_slots` per layer, spare ones included; ranks keep as many as they came with. Every
    expert is kept on `replicas` ranks where slots allow. `rebalance_gain`, which may be changed at any time, is the
    least fall of the busiest ranks' tokens, as a share, for which experts are moved (tokens are summed over layers:
    ranks pass through them in step).

    Ranks with the highest numbers retire, once the others hold every expert as often as they should; that may take some
    epochs. There are never fewer expert ranks than can hold `replicas` of every expert, whatever the goal (`problem`).

    With `attention_tp` above 1 that many colocated ranks are one attention unit, and the pipeline. Their number never
    changes: what is lost comes back as it was, and experts move between the ranks that are there. With
    `expert_tp`, which is then as many, each of them has its slice of every expert, in the slot of the expert's number:
    nothing moves.
    """

    layout: Layout  # not auto
    moe_layers: tuple[int, ...]  # empty for a dense model
    num_experts: int
    num_slots: int
    replicas: int = 1
    rebalance_gain: float = 0.1
    attention_tp: int = 1
    expert_tp: int = 1

    def __post_init__(self) -> None:
        if self.attention_tp > 1 and self.layout != "colocated":
            raise LayoutError(f"tensor-parallel attention needs the layout colocated, not {self.layout}")
        if self.moe_layers and min(self.num_slots, self.replicas) < 1:
            raise LayoutError(f"{self.num_slots} expert slots for {self.replicas} replicas of every expert")
        if self.expert_tp > 1 and (self.expert_tp, self.replicas) != (self.attention_tp, 1):
            raise LayoutError(
                f"{self.expert_tp} slices of {self.replicas} replicas of every expert over {self.attention_tp} ranks"
            )

    def first(self, goal: Goal, next_rank: int) -> tuple[RankSpec, ...]:
        """A membership from nothing."""
        numbers = count(next_rank)
        attention = self._new_attention_ranks(max(1, goal.attention_ranks), numbers)
        num_ranks = self._num_expert_ranks([], goal)
        experts = self._new_expert_ranks([self.num_slots] * num_ranks, numbers)
        if self.expert_tp > 1:
            return tuple(self._sliced(experts))
        dealt = place_experts(self.num_experts, num_ranks, self.replicas) if self.moe_layers else ()
        rows = [(*row, *[EMPTY_SLOT] * (self.num_slots - len(row))) for row in dealt]
        return (*attention, *self._as_unit(_with_slots(experts, dict.fromkeys(self.moe_layers, rows))))

    def recover(self, survivors: Sequence[RankSpec], lost: Sequence[RankSpec], next_rank: int) -> tuple[RankSpec, ...]:
        """The membership that serves soonest after a loss: nothing is loaded but experts that nobody holds any more.

        They go into empty slots of survivors, and in the place of experts that others hold, too: no step reads slots
        now. Where there is not the room, as few new ranks come as it takes, with as many slots as lost ones had.
        `propose` brings back the rest. A unit gets a new rank for each lost shard.
        """
        numbers = count(next_rank)
        attention, experts = _by_role(survivors)
        if self.layout == "disaggregated" and not attention:
            attention = self._new_attention_ranks(1, numbers)
        new_slots = iter(sorted(filter(None, (self._slots_of(spec) for spec in _by_role(lost)[1])), reverse=True))
        if self.attention_tp > 1:
            experts = self._of_unit(experts)
            sizes = [next(new_slots, self.num_slots) for _ in range(self.attention_tp - len(experts))]
        else:
            experts = self._with_room(experts)
            sizes = [] if experts else [next(new_slots, self.num_slots)]
            while any(self._num_missing(experts, layer) > sum(sizes) for layer in self.moe_layers):
                sizes.append(next(new_slots, self.num_slots))
        experts = [*experts, *self._new_expert_ranks(sizes, numbers)]
        if self.expert_tp > 1:
            return _ascending(self._sliced(experts))
        return _ascending(attention, self._as_unit(self._stepped(experts, _held_at_all, {})))

    def propose(self, current: Sequence[RankSpec], goal: Goal, tokens: ExpertTokens, next_rank: int) -> Proposal | None:
        """The next step: ranks towards the goal's numbers and experts to where holders lack; else towards balance.

        Balance is left alone in layers with fewer than TOKENS_TO_JUDGE per rank: without `tokens`, in all.
        """
        if self.expert_tp > 1:
            return None
        numbers = count(next_rank)
        attention, experts = _by_role(current)
        new_attention = self._sized_attention(attention, goal, numbers)
        new_experts = self._sized_experts(experts, goal, tokens, numbers)
        if new_attention == attention and new_experts == experts:
            return self._rebalanced(attention, experts, tokens)
        why = _sizes_text(len(attention), len(new_attention), "attention rank")
        why += _sizes_text(len(experts), len(new_experts), "expert rank")
        if len(new_experts) == len(experts) and new_experts != experts:
            what = (
                "before a rank retires"
                if self._num_expert_ranks(experts, goal) < len(experts)
                else "replicas that are missing"
            )
            why += [f"{what}: {_moves_text(experts, new_experts)}"]
        return Proposal(
            ranks=_ascending(new_attention, new_experts),
            why=", ".join(why) + (f" ({goal.why})" if goal.why else ""),
        )

    def problem(self, current: Sequence[RankSpec], goal: Goal) -> str:
        """Why there will be more expert ranks than the goal's; empty if there will not."""
        num_ranks = self._num_expert_ranks(_by_role(current)[1], goal)
        if num_ranks <= max(1, goal.expert_ranks):
            return ""
        experts = f"{self.num_experts} experts" + (f" {self.replicas} times each" if self.replicas > 1 else "")
        return f"it takes {num_ranks} expert ranks of {self.num_slots} slots per layer to hold {experts}"

    # --- numbers of ranks ---------------------------------------------------------------------------------------------

    def _sized_attention(self, attention: list[RankSpec], goal: Goal, numbers: Iterator[int]) -> list[RankSpec]:
        if self.layout != "disaggregated":
            return attention
        num_ranks = max(1, goal.attention_ranks)
        return [*attention[:num_ranks], *self._new_attention_ranks(num_ranks - len(attention), numbers)]

    def _sized_experts(
        self, experts: list[RankSpec], goal: Goal, tokens: ExpertTokens, numbers: Iterator[int]
    ) -> list[RankSpec]:
        """One step to the goal's number, and to as many holders of every expert as there should be."""
        num_ranks = self._num_expert_ranks(experts, goal)
        if num_ranks > len(experts):
            new = self._new_expert_ranks([self.num_slots] * (num_ranks - len(experts)), numbers)
            return self._stepped([*experts, *new], _shared_out, tokens)
        staying = self._stepped(experts[:num_ranks], completed, tokens)
        if num_ranks == len(experts):
            return staying
        is_settled = self._stepped(staying, completed, tokens) == staying
        return staying if is_settled else [*staying, *experts[num_ranks:]]

    def _num_expert_ranks(self, experts: Sequence[RankSpec], goal: Goal) -> int:
        """The goal's number, or as many as it takes to hold `replicas` of every expert; the oldest stay."""
        if self.attention_tp > 1:
            return self.attention_tp
        for num in count(max(1, goal.expert_ranks)):
            new_slots = max(0, num - len(experts)) * self.num_slots
            rooms = (sum(len(spec.slots.get(layer, ())) for spec in experts[:num]) for layer in self.moe_layers)
            if not self.moe_layers or (
                num >= self.replicas and min(rooms) + new_slots >= self.num_experts * self.replicas
            ):
                break
        return num

    # --- attention units ----------------------------------------------------------------------------------------------

    def _of_unit(self, ranks: Sequence[RankSpec]) -> list[RankSpec]:
        """Those that have a shard of the unit as it is to be; of two with the same one, the older."""
        by_shard: dict[tuple[int, int], RankSpec] = {}
        for spec in ranks:
            if spec.shard[1] == self.attention_tp:
                by_shard.setdefault(spec.shard, spec)
        return sorted(by_shard.values(), key=lambda spec: spec.rank)

    def _as_unit(self, ranks: Sequence[RankSpec]) -> list[RankSpec]:
        """`ranks` with the shards that nobody has given to those that have none, and with shard 0 as their leader."""
        tp = self.attention_tp
        if tp == 1:
            return list(ranks)
        free = iter(sorted(set(range(tp)) - {spec.shard[0] for spec in ranks if spec.shard[1] == tp}))
        sharded = [s if s.shard[1] == tp else structs.replace(s, shard=(next(free), tp)) for s in ranks]
        leader = next(spec.rank for spec in sharded if spec.shard[0] == 0)
        return [structs.replace(s, leader=-1 if s.rank == leader else leader) for s in sharded]

    def _sliced(self, ranks: Sequence[RankSpec]) -> list[RankSpec]:
        """`ranks` as a unit in which each has the slice of every expert that its shard says."""
        slots = dict.fromkeys(self.moe_layers, tuple(range(self.num_experts)))
        return [structs.replace(spec, slots=slots, expert_shard=spec.shard) for spec in self._as_unit(ranks)]

    # --- ranks and their slots ----------------------------------------------------------------------------------------

    def _new_attention_ranks(self, num_ranks: int, numbers: Iterator[int]) -> list[RankSpec]:
        """Ranks of the attention side, which only a disaggregated layout has."""
        num_ranks = num_ranks if self.layout == "disaggregated" else 0
        return [RankSpec(rank=next(numbers), roles=("attention",)) for _ in range(num_ranks)]

    def _new_expert_ranks(self, sizes: Sequence[int], numbers: Iterator[int]) -> list[RankSpec]:
        """One rank without experts for each number of slots per layer."""
        roles: tuple[Role, ...] = ("expert",) if self.layout == "disaggregated" else ("attention", "expert")
        empty = [dict.fromkeys(self.moe_layers, (EMPTY_SLOT,) * num_slots) for num_slots in sizes]
        return [RankSpec(rank=next(numbers), roles=roles, slots=slots) for slots in empty]

    def _slots_of(self, spec: RankSpec) -> int:
        """Slots per layer that a rank has in every layer."""
        return min((len(spec.slots.get(layer, ())) for layer in self.moe_layers), default=0)

    def _num_missing(self, experts: Sequence[RankSpec], layer: int) -> int:
        """Experts of `layer` that nobody holds and for which there is no empty slot."""
        rows = [spec.slots.get(layer, ()) for spec in experts]
        held = {expert for row in rows for expert in experts_in(row)}
        return self.num_experts - len(held) - sum(row.count(EMPTY_SLOT) for row in rows)

    def _with_room(self, experts: Sequence[RankSpec]) -> list[RankSpec]:
        """`experts` with empty slots for what nobody holds, as far as other holders of what lay there allow."""
        rows = {layer: _rows(experts, layer) for layer in self.moe_layers}
        return _with_slots(experts, {layer: _vacated(rows[layer], self._num_missing(experts, layer)) for layer in rows})

    def _stepped(self, ranks: Sequence[RankSpec], aim: Aim, tokens: ExpertTokens) -> list[RankSpec]:
        """`ranks` after one round towards `aim` in every layer. Layers without good figures count as evenly loaded."""
        judged = self._judged(tokens, len(ranks))
        even_E = np.ones(self.num_experts)
        done: dict[tuple[tuple[Slots, ...], bytes], Rows] = {}  # layers are often alike
        moved: dict[int, Rows] = {}
        for layer in self.moe_layers:
            rows, tokens_E = _rows(ranks, layer), judged.get(layer, even_E)
            key = tuple(rows), tokens_E.tobytes()
            if key not in done:
                done[key] = _moved(rows, aim, tokens_E, self.replicas)
            moved[layer] = done[key]
        return _with_slots(ranks, moved)

    # --- balance ------------------------------------------------------------------------------------------------------

    def _judged(self, tokens: ExpertTokens, num_ranks: int) -> dict[int, Tokens]:
        """Figures of the layers that have enough of them."""
        figures = {layer: np.asarray(tokens[layer], float) for layer in self.moe_layers if layer in tokens}
        return {layer: tokens_E for layer, tokens_E in figures.items() if tokens_E.sum() >= TOKENS_TO_JUDGE * num_ranks}

    def _rebalanced(
        self, attention: Sequence[RankSpec], experts: Sequence[RankSpec], tokens: ExpertTokens
    ) -> Proposal | None:
        """The next step to a better balance, if what the next few gain is worth it.

        A layer's next steps follow from its slots alone, so they cannot lead round in circles: on a circle they would
        have to make it better and better.
        """
        judged = self._judged(tokens, len(experts))
        now = {layer: _busiest(_rows(experts, layer), tokens_E) for layer, tokens_E in judged.items()}
        mean = {layer: float(tokens_E.sum()) / len(experts) for layer, tokens_E in judged.items()}
        enough = (1 - self.rebalance_gain) * sum(now.values())
        if not judged or sum(mean.values()) > enough:
            return None
        moved: dict[int, Rows] = {}
        after = dict(now)
        for layer, tokens_E in judged.items():
            most = (1 - self.rebalance_gain / 2) * now[layer]
            path = _path(_rows(experts, layer), tokens_E, self.replicas) if mean[layer] <= most else []
            at_end = _busiest(path[-1], tokens_E) if path else now[layer]
            if at_end < now[layer] and at_end <= most:
                moved[layer], after[layer] = path[0], at_end
        if not moved or sum(after.values()) > enough:
            return None
        changed = _with_slots(experts, {layer: _rows(experts, layer) for layer in self.moe_layers} | moved)
        ratios = [sum(busiest.values()) / sum(mean.values()) for busiest in (now, after)]
        return Proposal(
            ranks=_ascending(attention, changed),
            why=f"busiest expert rank {ratios[0]:.2f} times the mean, can be {ratios[1]:.2f}: "
            + _moves_text(experts, changed),
        )


def _shared_out(held_RE: Held, room_R: Room, tokens_E: Tokens, replicas: int) -> Held:
    """The aim of growth: what is missing, and work for the new ranks."""
    return balanced(completed(held_RE, room_R, tokens_E, replicas), room_R, tokens_E, replicas)


def _held_at_all(held_RE: Held, room_R: Room, tokens_E: Tokens, replicas: int) -> Held:
    """The aim of recovery: a holder for every expert, `replicas` or not."""
    return completed(held_RE, room_R, tokens_E, 1)


def _vacated(rows: Rows, num_wanted: int) -> Rows:
    """One layer's slots with up to `num_wanted` more empty ones, in turn of each rank; every expert keeps a holder."""
    holders = Counter(expert for row in rows for expert in experts_in(row))
    emptied = [list(row) for row in rows]
    for slot, rank in product(range(max(map(len, rows), default=0)), range(len(rows))):
        expert = rows[rank][slot] if slot < len(rows[rank]) else EMPTY_SLOT
        if num_wanted > 0 and expert != EMPTY_SLOT and holders[expert] > 1:
            emptied[rank][slot] = EMPTY_SLOT
            holders[expert] -= 1
            num_wanted -= 1
    return [tuple(row) for row in emptied]


def _path(rows: Rows, tokens_E: Tokens, replicas: int) -> list[Rows]:
    """One layer after each of the next rounds towards balance; empty if there is nothing to do."""
    path = [rows]
    while len(path) <= HORIZON_ROUNDS:
        path.append(_moved(path[-1], balanced, tokens_E, replicas))
        if path[-1] == path[-2]:
            return path[1:-1]
    return path[1:]


def _moved(rows: Rows, aim: Aim, tokens_E: Tokens, replicas: int) -> Rows:
    """One layer's slots after one round towards `aim`."""
    held_RE = _held(rows, len(tokens_E))
    wanted_RE = aim(held_RE, np.array([len(row) for row in rows]), tokens_E, replicas)
    wanted = [set(np.flatnonzero(wanted_E).tolist()) for wanted_E in wanted_RE]
    return next_round(rows, wanted, tokens_E.tolist())


def _busiest(rows: Rows, tokens_E: Tokens) -> float:
    """Tokens of the busiest rank."""
    return float(rank_tokens(_held(rows, len(tokens_E)), tokens_E).max())


def _held(rows: Rows, num_experts: int) -> Held:
    held_RE = np.zeros((len(rows), num_experts), bool)
    for rank, row in enumerate(rows):
        held_RE[rank, list(experts_in(row))] = True
    return held_RE


def _rows(ranks: Sequence[RankSpec], layer: int) -> Rows:
    return [spec.slots.get(layer, ()) for spec in ranks]


def _with_slots(ranks: Sequence[RankSpec], rows: Mapping[int, Rows]) -> list[RankSpec]:
    """`ranks` with `rows[layer][i]` as the slots of rank i."""
    slots = [{layer: of_ranks[i] for layer, of_ranks in rows.items() if of_ranks[i]} for i in range(len(ranks))]
    return [structs.replace(spec, slots=held) for spec, held in zip(ranks, slots, strict=True)]


def _by_role(ranks: Sequence[RankSpec]) -> tuple[list[RankSpec], list[RankSpec]]:
    """Ranks that only attend, and those that have experts, ascending."""
    ordered = sorted(ranks, key=lambda spec: spec.rank)
    return [s for s in ordered if "expert" not in s.roles], [s for s in ordered if "expert" in s.roles]


def _ascending(*sides: Sequence[RankSpec]) -> tuple[RankSpec, ...]:
    return tuple(sorted((spec for side in sides for spec in side), key=lambda spec: spec.rank))


def _sizes_text(before: int, after: int, noun: str) -> list[str]:
    return [f"{after} {noun}{'s' if after != 1 else ''} instead of {before}"] if before != after else []


def _moves_text(before: Sequence[RankSpec], after: Sequence[RankSpec]) -> str:
    """How many slots of the same ranks change."""
    pairs = [
        (experts_in(old.slots.get(layer, ())), experts_in(slots))
        for old, new in zip(before, after, strict=True)
        for layer, slots in new.slots.items()
    ]
    num_loaded, num_dropped = (sum(len(p[1 - i] - p[i]) for p in pairs) for i in (0, 1))
    return f"{num_loaded} expert slots loaded, {num_dropped} emptied"
