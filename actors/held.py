"""What a rank has in memory: the workers of its roles, made for one pipeline, and how they come there.

Owns the order of loading, and what is run once before anybody waits for a step. Knows nothing of epochs or plans.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from msgspec import structs

from actors.attention.captured import most_step_rows
from actors.attention.kv_cache import PagePools
from actors.attention.worker import AttentionWorker
from actors.checkpoint.config import ModelConfig, read_model_config
from actors.checkpoint.shard import Shard
from actors.config import PipelineConfig
from actors.dispatch.contract import RoutingTable, build_routing_table
from actors.dispatch.local import LocalDispatch
from actors.dispatch.rows import TokenShape
from actors.dispatch.tensor_parallel import TensorParallel, make_tensor_parallel
from actors.errors import RankError
from actors.expert.worker import ExpertWorker, Report
from actors.laps import Laps
from actors.precision import compute_dtype
from actors.types import Loaded, RankSpec, SlotSource
from actors.wire import ChannelKeys

log = logging.getLogger("corral.rank")


@dataclass(slots=True, kw_only=True)
class Held:
    """The weights of `spec`, made for `pipeline`. `pools` are there with `attention`."""

    spec: RankSpec
    pipeline: PipelineConfig
    model: ModelConfig
    device: torch.device
    tp: TensorParallel
    attention: AttentionWorker | None = None
    experts: ExpertWorker | None = None
    pools: PagePools | None = None
    local: LocalDispatch | None = None  # where this process holds (a slice of) every expert: graphs outlive epochs

    @staticmethod
    def load(
        spec: RankSpec, pipeline: PipelineConfig, device: torch.device, keys: ChannelKeys | None,
        sources: Sequence[SlotSource], report: Report,
    ) -> "Held":  # fmt: skip
        """Reads, copies from peers or makes all that `spec` names, and rehearses. Raises CheckpointError, ConfigError.

        `local` is there afterwards if graphs were captured through it.
        """
        model, laps = read_model_config(Path(pipeline.model)), Laps()
        tp = make_tensor_parallel(spec.shard, _token_shape(model, pipeline, device), most_step_rows(pipeline))
        held = Held(spec=spec, pipeline=pipeline, model=model, device=device, tp=tp)
        if "expert" in spec.roles:
            index, of = spec.expert_shard
            held.experts = ExpertWorker.load(
                model, pipeline, spec.slots, device, report, sources, keys, Shard(index=index, of=of)
            )
            held._tell(laps, "experts")
        if "attention" in spec.roles:  # last, for its cache takes what memory is left
            held.attention = AttentionWorker.load(model, pipeline, device, report, tp)
            held.pools = held.attention.allocate_cache()
            held._tell(laps, "attention")
        held._rehearse(laps)
        return held

    def _rehearse(self, laps: Laps) -> None:
        """Whatever is compiled, captured or allocated at its first use has it now, before anybody waits for a step."""
        experts, attention, slots = self.experts, self.attention, self.spec.slots
        if experts is not None:
            experts.rehearse(self.pipeline.max_num_batched_tokens, has_tokens=attention is not None)
            self._tell(laps, "rehearsal of experts")
        if attention is None:
            return
        attention.rehearse(experts, {layer: len(of_layer) for layer, of_layer in slots.items()})
        self._tell(laps, "rehearsal of steps")
        every_expert = set(range(self.model.num_experts))
        if experts is not None and self.tp.size == 1 and all(every_expert <= set(of) for of in slots.values()):
            attention.start_epoch(self.local_dispatch())
            attention.capture()
            self._tell(laps, "graphs")

    def _tell(self, laps: Laps, name: str) -> None:
        """Of each part of loading as it ends: one that does not is told by its absence."""
        laps.lap(name)
        log.info("rank %d loads: %s", self.spec.rank, laps)

    def is_for(self, spec: RankSpec, pipeline: PipelineConfig) -> bool:
        """Whether it differs from these in nothing but slots, which can change while weights stay in memory."""
        own, other = ((s.roles, s.shard, s.expert_shard) for s in (self.spec, spec))
        return own == other and self.pipeline.contents == pipeline.contents

    def change_slots(
        self, spec: RankSpec, in_use: Mapping[int, tuple[int, ...]], sources: Sequence[SlotSource], report: Report
    ) -> None:
        """Until all of it is there, nobody may count on any slot that is not `in_use`. Raises RankError where one that
        is would change.
        """
        if self.experts is not None and not self.experts.holds(spec.slots):
            try:
                self.experts.change(spec.slots, in_use, sources, report)
            except ValueError as e:
                raise RankError(spec.rank, str(e)) from e
        self.spec = spec

    @property
    def whole_spec(self) -> RankSpec:
        """With every expert that lies in a slot, whether an epoch names it or not."""
        return self.spec if self.experts is None else structs.replace(self.spec, slots=self.experts.slots)

    def holds(self, spec: RankSpec) -> bool:
        return spec == self.spec and (self.experts is None or self.experts.holds(spec.slots))

    def loaded(self, epoch: int) -> Loaded:
        """The answer to a Load for `epoch`."""
        pools = self.pools
        return Loaded(
            rank=self.spec.rank,
            epoch=epoch,
            weight_bytes=sum(worker.weight_bytes for worker in (self.attention, self.experts) if worker),
            page_tokens=pools.page_tokens if pools else 0,
            global_pages=pools.global_pages if pools else 0,
            chunked_pages=pools.chunked_pages if pools else 0,
            proofs=self.experts.proofs(self.spec.slots) if self.experts else {},
        )

    @property
    def token_shape(self) -> TokenShape:
        return _token_shape(self.model, self.pipeline, self.device)

    def routing(self, slots: dict[int, dict[int, tuple[int, ...]]]) -> RoutingTable:
        """Of slots by rank (as dispatch numbers them) and layer."""
        return build_routing_table(slots, self.model.moe_layers, self.model.num_experts, self.device)

    def local_dispatch(self) -> LocalDispatch:
        """To this process alone: always the same one, which graphs may have captured."""
        assert self.experts is not None, "who asks nobody else has both roles"
        routing = self.routing({0: self.spec.slots})
        if self.local is None:
            self.local = LocalDispatch(self.experts, routing)
        else:
            self.local.update(routing)
        return self.local


def _token_shape(model: ModelConfig, pipeline: PipelineConfig, device: torch.device) -> TokenShape:
    return TokenShape(
        hidden=model.hidden_size,
        experts_per_token=model.experts_per_token,
        dtype=compute_dtype(model, pipeline),
        device=device,
    )
