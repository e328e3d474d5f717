"""What a rank is: something in memory (`held.py`), a place in an epoch, and a step to run.

Owns which worker does what on this rank, and its dispatch in the epoch. Knows nothing of sockets or leases
(`rank_loop.py`), and leaves the mathematics to `attention/`, `expert/` and `dispatch/`.

Two threads call it: one runs `join` and `step` in order; the other runs `load`, `prepare` and `interrupt` beside it.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import torch

from actors.attention.sampler import SampledBatch
from actors.attention.upload import mark
from actors.config import PipelineConfig
from actors.dispatch.by_size import DispatchBySize
from actors.dispatch.contract import Dispatch
from actors.dispatch.group import EpochGroup
from actors.dispatch.local import LocalDispatch
from actors.dispatch.replicated import ReplicatedDispatch
from actors.errors import RankError
from actors.expert.worker import ExpertWorker, Report
from actors.held import Held
from actors.laps import Laps
from actors.next_epoch import BetweenRanks, NextEpoch, Part, form, reach_peers
from actors.types import Epoch, Loaded, Pace, RankSpec, SlotSource, StepPlan, StepResult
from actors.wire import ChannelKeys

log = logging.getLogger("corral.rank")

EXPERT_REPORT_S = 1.0
NO_EPOCH = 0


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that runs, or has run: what it is an answer to, and its tokens when they are there."""

    plan: StepPlan
    began_s: float
    sampled: SampledBatch | None
    ended: torch.cuda.Event | None  # None where all has been done

    @property
    def is_done(self) -> bool:
        """Whether `Rank.finish` will not wait. A step that samples nothing takes its time, too: else those of a long
        prompt would queue up on the device without end, and others' steps behind them.
        """
        return self.ended is None or bool(self.ended.query())


class Rank:
    """One process of the pipeline, in whichever roles its spec says."""

    def __init__(self, rank: int, device: torch.device, address: str, keys: ChannelKeys | None = None) -> None:
        """`address`: this host's own IP, where its group's peers reach it. `keys`: of the pipeline's channels."""
        self.rank = rank
        self.address = address
        self.keys = keys
        self._device = device
        self._group = EpochGroup(device, address)
        self._held: Held | None = None
        self._prepared: NextEpoch | None = None
        self._preparing = self._abandoned = NO_EPOCH  # the epoch that is prepared now, and the last given up before
        self._stream: torch.cuda.Stream | None = None  # of what runs beside the steps, on a GPU
        self._epoch: Epoch | None = None
        self._position = 0  # in the epoch
        self._last_over = NO_EPOCH  # plans of this epoch and of those before it are dropped
        self._sequence = 0  # of the plan that came last in it
        self._answered_step = 0
        self._taken_step = 0  # the last step whose plan was taken in: it may have to be run again, not taken in again
        self._between_ranks: BetweenRanks | None = None
        self._dispatch: Dispatch | None = None
        self._next_report_s = 0.0
        self._finished_s = 0.0  # when the last step was
        self._joined_s: float | None = None  # when the epoch was, until its first step is done
        self.pace: Pace | None = None  # replaced after each step, so that any thread may read it

    @property
    def spec(self) -> RankSpec | None:
        """What it holds: every expert that lies in a slot, whether an epoch names it or not."""
        return self._held.whole_spec if self._held else None

    @property
    def contents(self) -> str:
        """Of which pipeline it holds something (`PipelineConfig.contents`); empty where it holds nothing."""
        return self._held.pipeline.contents if self._held else ""

    @property
    def experts(self) -> ExpertWorker | None:
        return self._held.experts if self._held else None

    # --- beside the steps ---------------------------------------------------------------------------------------------

    def load(self, spec: RankSpec, pipeline: PipelineConfig, sources: Sequence[SlotSource], report: Report) -> None:
        """Reads (or copies from peers, or makes) what `spec` names and is not there yet, beside serving.

        `report` gets bytes done and bytes in all. Raises CheckpointError, ConfigError; RankError where a slot that
        serves would change.
        """
        held, epoch = self._held, self._epoch
        in_use = epoch.ranks[self._position].slots if epoch and epoch.epoch > self._last_over else None
        if held is not None and held.is_for(spec, pipeline):
            held.pipeline = pipeline
            held.change_slots(spec, in_use or {}, sources, report)
            return
        if in_use is not None:
            raise RankError(self.rank, "cannot become another rank while it serves")
        held = self._held = self._dispatch = None  # before their successors take the memory
        self._held = Held.load(spec, pipeline, self._device, self.keys, sources, report)
        self._dispatch = self._held.local

    def loaded(self, epoch: int) -> Loaded:
        """The answer to a Load for `epoch`."""
        return self._loaded_state().loaded(epoch)

    def prepare(self, epoch: Epoch, hurries: bool = False) -> None:
        """First phase: all that waits for peers or may be slow, beside the steps of the epoch before. `hurries`: none
        are to be disturbed, and what a first step need not wait for is left out. Raises RankError if this rank does not
        hold what the epoch says, or if the group does not form, and UnreachableError if a peer's host does not answer.
        """
        self._preparing = epoch.epoch
        before, self._prepared = self._prepared, None
        if before is not None:
            before.drop()
        group = self._group.beside()
        if epoch.store:
            group.prepare(epoch.store)
        try:
            self._check_held(epoch)
            reach_peers(self.rank, epoch)
        except RankError:
            with suppress(RankError):  # where not even the store answers, nobody waits for this rank alone
                group.refuse(epoch.epoch)
            raise
        if self._stream is None and self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            self._prepared = self._form(epoch, group, hurries)
            if self._stream is not None:
                self._stream.synchronize()

    def _check_held(self, epoch: Epoch) -> None:
        if not self._loaded_state().holds(epoch.ranks[epoch.position(self.rank)]):
            raise RankError(self.rank, f"does not hold the slots that epoch {epoch.epoch} names")

    def _form(self, epoch: Epoch, group: EpochGroup, hurries: bool) -> NextEpoch:
        held, part = self._loaded_state(), None
        if len(epoch.ranks) > 1 and held.tp.size == 1:
            slots = {position: spec.slots for position, spec in enumerate(epoch.ranks)}
            part = Part(
                routing=held.routing(slots),
                experts=held.experts,
                shape=held.token_shape,
                before=None if hurries else self._between_ranks,
            )
        position = epoch.position(self.rank)
        formed, laps = form(
            epoch, position, group, held.pipeline, part, hurries, lambda: epoch.epoch <= self._abandoned
        )
        log.info("rank %d formed epoch %d of %d ranks: %s", self.rank, epoch.epoch, len(epoch.ranks), laps)
        return formed

    def interrupt(self, epoch: int | None = None) -> None:
        """Epoch `epoch`, or whichever this rank is in, is over: a step that waits for peers fails now."""
        current = self._epoch.epoch if self._epoch else NO_EPOCH
        self._last_over = max(self._last_over, current if epoch is None else epoch)
        self._abandoned = self._preparing  # it was to follow
        if self._epoch is not None and current <= self._last_over:
            self._group.interrupt()

    def supersede(self, epoch: int) -> None:
        """Epoch `epoch` is to be next: whatever was being prepared before fails now."""
        self._abandoned = max(self._abandoned, min(self._preparing, epoch - 1))

    # --- in the order of the plans ------------------------------------------------------------------------------------

    def join(self, epoch_number: int, fresh: bool) -> None:
        """Second phase: leaves the epoch before for the one that was prepared; forgets all requests if `fresh`. Raises
        RankError.
        """
        prepared, held = self._prepared, self._loaded_state()
        if prepared is None or prepared.epoch.epoch != epoch_number:
            raise RankError(self.rank, f"epoch {epoch_number} was not prepared")
        laps, epoch = Laps(), prepared.epoch
        has_moved = held.experts is not None and held.experts.has_moved
        takes_over = not has_moved and self._hand_over(prepared.dispatch)
        self.leave()
        laps.lap("left")
        self._position, self._prepared = epoch.position(self.rank), None
        self._group, self._between_ranks = prepared.group, prepared.dispatch
        before = self._dispatch
        is_void = held.tp.join(self._group, epoch.unit_positions(self.rank), fresh)
        self._dispatch = self._make_dispatch(epoch, held, fresh)
        laps.lap("dispatch")
        keeps_graphs = not is_void and not has_moved and (takes_over or self._dispatch is before)
        if held.experts is not None:
            held.experts.free_replaced()
        if held.attention is not None:
            brings_tokens = ["attention" in spec.roles for spec in epoch.ranks]
            held.attention.start_epoch(self._dispatch, fresh, keeps_graphs, brings_tokens)
        if fresh:
            self._taken_step = self._answered_step = 0
        self._epoch, self._sequence = epoch, 0
        self._joined_s = time.monotonic()
        laps.lap("workers")
        log.info("rank %d joined epoch %d of %d ranks, %s graphs: %s",
                 self.rank, epoch_number, len(epoch.ranks), "keeps" if keeps_graphs else "has no", laps)  # fmt: skip

    def _hand_over(self, successor: BetweenRanks | None) -> bool:
        """Has `successor` go on with the graphs of the epoch that is left now, if they fit and it has ended well."""
        before, is_well = self._between_ranks, self._epoch is not None and self._epoch.epoch > self._last_over
        if not (is_well and isinstance(before, DispatchBySize) and isinstance(successor, DispatchBySize)):
            return False
        return successor.take_over(before)

    def _make_dispatch(self, epoch: Epoch, held: Held, fresh: bool) -> Dispatch:
        """The dispatch of the layout. A unit whose members are as before keeps its own, with tables in place."""
        model, slots = held.model, {position: spec.slots for position, spec in enumerate(epoch.ranks)}
        if held.spec.expert_shard[1] > 1:  # every token passes every slice, and the unit's sum joins the terms
            return held.local_dispatch()
        if held.tp.size > 1:
            assert held.experts is not None, "ranks of a unit have both roles"
            if isinstance(self._dispatch, ReplicatedDispatch) and not fresh:
                self._dispatch.update(slots, self._position)
                return self._dispatch
            return ReplicatedDispatch(
                held.experts, slots, model.moe_layers, model.num_experts, self._position, self._device
            )
        if self._between_ranks is not None:
            return self._between_ranks
        return held.local_dispatch()

    def leave(self) -> None:
        """Ends this rank's part in its epoch; peers that wait for it get an error at once."""
        self._epoch = None
        self._group.leave()  # first: what waits for the device must not wait for lost peers
        if isinstance(self._between_ranks, DispatchBySize):
            self._between_ranks.close()
        self._between_ranks = None

    def stop(self) -> None:
        """Ends this rank's part in any epoch, the one that it is in and the one that may follow."""
        self.interrupt()
        self.leave()
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            prepared.drop()

    def step(self, plan: StepPlan) -> StepResult | None:
        """Runs one step to its end."""
        launched = self.launch(plan)
        return None if launched is None else self.finish(launched)

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be launched before the one before it is finished: its device needs no host meanwhile."""
        is_ours = isinstance(self._dispatch, LocalDispatch | ReplicatedDispatch)  # others wait at the end of a step
        return is_ours and self._device.type == "cuda"

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched | None:
        """Starts one step; None for a plan of an epoch that is over, which is dropped.

        Raises RankError when a peer is lost: the epoch is over for this rank then. What it keeps of its requests is as
        the last step that it answered left them, and the plan after that taken in.
        """
        epoch = self._epoch
        if epoch is None or plan.epoch != epoch.epoch or plan.epoch <= self._last_over:
            return None
        began_s, waited_s = time.perf_counter(), self._group.waited_s
        self._check_order(plan)
        try:
            sampled = self._launch(plan)
        except RankError as e:
            self.leave()
            raise RankError(_number(epoch, e.rank, self.rank), e.problem) from e
        ended = sampled.copied if sampled is not None else mark(self._device) if self.runs_ahead else None
        launched = Launched(plan, began_s, sampled, ended)
        self._count(plan, time.perf_counter() - began_s - (self._group.waited_s - waited_s))
        if self._joined_s is not None:
            now_s, joined_s, self._joined_s = time.monotonic(), self._joined_s, None
            log.info("rank %d launched its first step of epoch %d %.2f s after it joined, in %.2f s",
                     self.rank, plan.epoch, now_s - joined_s, time.perf_counter() - began_s)  # fmt: skip
        return launched

    def _check_order(self, plan: StepPlan) -> None:
        """Raises RankError for a plan that does not follow the one before, and RuntimeError where an answer was lost:
        tokens after it exist already, so that its own cannot be computed again.
        """
        self._sequence += 1
        if plan.sequence != self._sequence:
            self.leave()
            raise RankError(self.rank, f"{plan.sequence - self._sequence} plans before step {plan.step} did not arrive")
        if plan.rank_plan is not None and plan.step <= self._answered_step:
            raise RuntimeError(f"the answer to step {plan.step} was lost")

    def _count(self, plan: StepPlan, busy_s: float) -> None:
        """Adds a step to `pace`, if there was anything to do in it."""
        experts, before = self.experts, self.pace or Pace(busy_us=0, num_steps=0, num_rows=0)
        num_rows = plan.tokens_of_rank[self._position] + (experts.take_num_rows() if experts else 0)
        if num_rows:
            self.pace = Pace(
                busy_us=before.busy_us + int(busy_s * 1e6),
                num_steps=before.num_steps + 1,
                num_rows=before.num_rows + num_rows,
            )

    def use_idle_time(self) -> bool:
        """Nobody waits for this rank: captures a step's graph, which a request would have to wait for later, if there
        is one. Not to be called beside `load` or `prepare`: a capture is void where another thread waits for the whole
        device meanwhile. Source: CUDA programming guide, prohibited operations of stream capture.
        """
        attention = self._held.attention if self._held else None
        is_in_epoch = self._epoch is not None and self._epoch.epoch > self._last_over
        return is_in_epoch and attention is not None and attention.capture_next()

    def finish(self, launched: Launched) -> StepResult | None:
        """Waits for a step's tokens; ranks without a plan of their own answer nothing.

        Raises RankError as `launch` does. A step that was ahead of one that failed is lost with it: None.
        """
        plan, epoch = launched.plan, self._epoch
        if epoch is None or plan.rank_plan is None:
            return None
        if len(epoch.ranks) > 1 and launched.ended is not None:
            try:
                self._group.await_event(launched.ended)
            except RankError as e:
                self.leave()
                raise RankError(_number(epoch, e.rank, self.rank), e.problem) from e
        elif launched.ended is not None:
            launched.ended.synchronize()
        if not epoch.ranks[self._position].leads:
            return None
        tokens = launched.sampled.to_tokens() if launched.sampled is not None else []
        began_s, self._finished_s = max(launched.began_s, self._finished_s), time.perf_counter()
        self._answered_step = plan.step
        return StepResult(
            rank=self.rank,
            epoch=plan.epoch,
            step=plan.step,
            tokens=tuple(tokens),
            elapsed_us=int((self._finished_s - began_s) * 1e6),
            expert_tokens=self._expert_tokens(),
        )

    def _launch(self, plan: StepPlan) -> SampledBatch | None:
        """A rank with tokens computes its own part; one without serves the others' tokens, layer after layer."""
        attention = self._loaded_state().attention
        if plan.rank_plan is not None and plan.step > self._taken_step:
            assert attention is not None, "only attention ranks have a part in the plan"
            attention.take_in(plan.rank_plan)
            self._taken_step = plan.step
        if plan.tokens_of_rank[self._position]:
            assert plan.rank_plan and attention and self._dispatch, "only attention ranks bring tokens"
            self._dispatch.begin_step(plan.tokens_of_rank)
            return attention.launch(plan.rank_plan, max(plan.tokens_of_rank))
        if self._between_ranks is not None:
            self._between_ranks.serve_step(plan.tokens_of_rank)
        return None

    def _loaded_state(self) -> Held:
        if self._held is None:
            raise RankError(self.rank, "has loaded nothing")
        return self._held

    def _expert_tokens(self) -> dict[int, tuple[int, ...]]:
        """Tokens by expert since the last report, about once a second, when they have come from the device."""
        attention, now_s = self._loaded_state().attention, time.monotonic()
        if attention is None:
            return {}
        if now_s >= self._next_report_s:
            self._next_report_s = now_s + EXPERT_REPORT_S
            attention.request_expert_tokens()
        return attention.take_expert_tokens()


def _number(epoch: Epoch, position: int, unknown: int) -> int:
    """The number of the rank at a position of the group; `unknown` where the group could not tell which it was."""
    return epoch.ranks[position].rank if 0 <= position < len(epoch.ranks) else unknown
