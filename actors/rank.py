"""What a rank is: weights by role, a place in an epoch, and a step to run.

Owns which worker does what on this rank, and its dispatch in the epoch. Knows nothing of sockets or leases
(`rank_loop.py`), and leaves the mathematics to `attention/`, `expert/` and `dispatch/`.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from actors.attention.worker import AttentionWorker
from actors.checkpoint.config import ModelConfig, read_model_config
from actors.config import PipelineConfig
from actors.dispatch.collective import CollectiveDispatch
from actors.dispatch.contract import Dispatch, build_routing_table
from actors.dispatch.group import EpochGroup
from actors.dispatch.local import LocalDispatch
from actors.dispatch.rows import TokenShape
from actors.errors import RankError
from actors.expert.worker import ExpertWorker
from actors.precision import compute_dtype
from actors.types import Epoch, Loaded, RankSpec, SampledToken, StepPlan, StepResult

EXPERT_REPORT_S = 1.0


class Rank:
    """One process of the pipeline, in whichever roles its spec says. Called by one thread at a time."""

    def __init__(self, rank: int, device: torch.device, address: str) -> None:
        """`address`: this host's own IP, where its group's peers reach it."""
        self.rank = rank
        self._device = device
        self._group = EpochGroup(device, address)
        self._spec: RankSpec | None = None
        self._pipeline: PipelineConfig | None = None
        self._model: ModelConfig | None = None
        self._attention: AttentionWorker | None = None
        self._experts: ExpertWorker | None = None
        self._loaded: Loaded | None = None
        self._prepared: Epoch | None = None
        self._epoch_number = 0
        self._collective: CollectiveDispatch | None = None
        self._dispatch: Dispatch | None = None
        self._next_report_s = 0.0

    def load(self, spec: RankSpec, pipeline: PipelineConfig, report: Callable[[int, int], None]) -> Loaded:
        """Reads (or makes) the weights of `spec`; returns at once where they are held already.

        `report` gets bytes done and bytes in all. Raises CheckpointError, ConfigError.
        """
        if self._loaded is not None and (spec, pipeline) == (self._spec, self._pipeline):
            return self._loaded
        self._attention = self._experts = self._loaded = None
        model = read_model_config(Path(pipeline.model))
        if "expert" in spec.roles:
            self._experts = ExpertWorker.load(model, pipeline, spec.slots, self._device, report)
        if "attention" in spec.roles:  # last, for its cache takes what memory is left
            self._attention = AttentionWorker.load(model, pipeline, self._device, report)
        pools = self._attention.allocate_cache() if self._attention else None
        self._spec, self._pipeline, self._model = spec, pipeline, model
        self._loaded = Loaded(
            rank=self.rank,
            weight_bytes=sum(worker.weight_bytes for worker in (self._attention, self._experts) if worker),
            page_tokens=pools.page_tokens if pools else 0,
            global_pages=pools.global_pages if pools else 0,
            chunked_pages=pools.chunked_pages if pools else 0,
        )
        return self._loaded

    def prepare(self, epoch: Epoch) -> None:
        """First phase: all that may be slow. Raises RankError if this rank does not hold what the epoch says."""
        if self._loaded is None or epoch.ranks[self.rank] != self._spec:
            raise RankError(self.rank, f"does not hold the slots that epoch {epoch.epoch} names")
        if epoch.store:
            self._group.prepare(epoch.store)
        self._prepared = epoch

    def join(self, epoch_number: int) -> None:
        """Second phase: forms the group and forgets all requests. Raises RankError."""
        epoch, model, pipeline = self._prepared, self._model, self._pipeline
        if epoch is None or epoch.epoch != epoch_number or model is None or pipeline is None:
            raise RankError(self.rank, f"epoch {epoch_number} was not prepared")
        slots_of_rank = {spec.rank: spec.slots for spec in epoch.ranks}
        routing = build_routing_table(slots_of_rank, model.moe_layers, model.num_experts, self._device)
        self._collective = self._dispatch = None
        if len(epoch.ranks) == 1:
            assert self._experts is not None, "a single rank has both roles"
            self._dispatch = LocalDispatch(self._experts, routing)
        else:
            self._group.join(
                epoch.epoch, self.rank, len(epoch.ranks), pipeline.join_timeout_s, pipeline.group_timeout_s
            )
            shape = TokenShape(
                hidden=model.hidden_size,
                experts_per_token=model.experts_per_token,
                dtype=compute_dtype(model, pipeline),
                device=self._device,
            )
            attention_ranks = epoch.of_role("attention")
            self._collective = CollectiveDispatch(self._group, routing, self._experts, attention_ranks, shape)
            self._dispatch = self._collective
        if self._attention is not None:
            self._attention.start_epoch(self._dispatch)
        self._epoch_number = epoch_number

    def leave(self) -> None:
        """Ends this rank's part in its epoch; peers that wait for it get an error at once."""
        self._group.leave()
        self._epoch_number = 0

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult | None:
        """Runs one step; expert ranks answer nothing. A plan of an epoch that is over is dropped.

        Raises RankError when a peer is lost: the epoch is over for this rank then.
        """
        if plan.epoch != self._epoch_number:
            return None
        began_s = time.perf_counter()
        try:
            tokens = self._run(plan)
        except RankError:
            self.leave()
            raise
        if plan.rank_plan is None:
            return None
        return StepResult(
            rank=self.rank,
            epoch=plan.epoch,
            step=plan.step,
            tokens=tuple(tokens),
            elapsed_us=int((time.perf_counter() - began_s) * 1e6),
            expert_tokens=self._expert_tokens(),
        )

    def _run(self, plan: StepPlan) -> list[SampledToken]:
        """A rank with tokens computes its own part; one without serves the others' tokens, layer after layer."""
        if plan.tokens_of_rank[self.rank]:
            assert plan.rank_plan and self._attention and self._dispatch, "only attention ranks bring tokens"
            self._dispatch.begin_step(plan.tokens_of_rank)
            return self._attention.step(plan.rank_plan)
        if self._collective is not None:
            self._collective.serve_step(plan.tokens_of_rank)
        if plan.rank_plan and self._attention:
            self._attention.take_in(plan.rank_plan)
        return []

    def _expert_tokens(self) -> dict[int, tuple[int, ...]]:
        """Tokens by expert since the last report, about once a second."""
        now_s = time.monotonic()
        if self._attention is None or now_s < self._next_report_s:
            return {}
        self._next_report_s = now_s + EXPERT_REPORT_S
        return self._attention.take_expert_tokens()
