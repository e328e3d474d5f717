"""The planner: from a model, its precision and machines to a layout, and what every rank of it holds.

Owns the resolution of `layout: auto`, the placement of experts in slots, and the refusal of what does not fit. Pure:
same arguments, same plan. Knows nothing of Ray, and only through `cluster/floors.py` what a layout costs.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from actors.attention.kv_cache import EXPECTED_CHUNKS, PagePools, fit_page_tokens, plan_pages
from actors.checkpoint.config import ModelConfig
from actors.checkpoint.shard import check_expert_shard, check_shard
from actors.config import PipelineConfig
from actors.dispatch.tensor_parallel import shard_config
from actors.errors import ConfigError, LayoutError
from actors.types import EMPTY_SLOT, RankSpec
from cluster.floors import Split, decode, step_floor_s
from cluster.footprint import Footprint, Precision
from cluster.hardware import Machines
from cluster.replicas import place_experts

CPU_KV_CACHE_BYTES = 256 * 1024 * 1024  # PipelineConfig.kv_cache_bytes = 0 on a CPU
LEAST_CONTEXT_TOKENS = 2048  # less KV room than this per request is no service (unless kv_cache_bytes asks for it)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A split that was considered: what it needs, and why it cannot be had (`problem`, empty if it can)."""

    split: Split
    attention_bytes: int  # weights of the fullest attention rank (of a colocated rank: all it holds)
    expert_bytes: int  # weights of the fullest expert rank
    kv_bytes: int  # room for KV per attention rank; may be negative
    kv_tokens: int  # over all attention ranks, if every layer kept everything
    max_model_len: int  # tokens of the longest request that may be asked for
    pools: PagePools  # of each attention rank
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A layout that fits. `pipeline` is the configuration with nothing left open: layout and its ranks, device,
    max_model_len, page_tokens, and on a CPU threads_per_rank.
    """

    pipeline: PipelineConfig
    footprint: Footprint
    machines: Machines
    ranks: tuple[RankSpec, ...]
    weight_bytes: tuple[int, ...]  # by rank
    chosen: Candidate
    reason: str  # one line for people

    @property
    def split(self) -> Split:
        return self.chosen.split

    def describe(self) -> str:
        """One line for logs."""
        fullest_gb = max(self.weight_bytes) / 1e9
        return (
            f"layout {self.split} on {self.machines}: {len(self.ranks)} ranks of at most {fullest_gb:.3g} GB weights, "
            f"KV room {self.chosen.kv_tokens:,} tokens ({self.reason})"
        )


def resolve(
    pipeline: PipelineConfig, model: ModelConfig, machines: Machines, precision: Precision | None = None
) -> Plan:
    """Decides the layout and every rank's slots. `precision` defaults to the checkpoint's under `pipeline.dtype`.

    Raises LayoutError, with the numbers, if the layout that was asked for (or, for auto, every one) does not fit.
    """
    precision = precision or Precision.of(model, dtype=pipeline.dtype, widens_fp8=machines.is_cpu)
    footprint = Footprint(model=model, precision=precision)
    considered = [assess(split, pipeline, footprint, machines) for split in _splits(pipeline, machines)]
    fitting = [candidate for candidate in considered if not candidate.problem]
    if not fitting:
        raise LayoutError(_refusal(considered, footprint, machines))
    best = min(fitting, key=lambda candidate: _preference(candidate, pipeline.target_batch, footprint, machines))
    ranks = rank_specs(best.split, model, pipeline.expert_replicas, pipeline.expert_slots)
    return Plan(
        pipeline=_settled(pipeline, best, footprint, machines),
        footprint=footprint,
        machines=machines,
        ranks=ranks,
        weight_bytes=tuple(_weight_bytes(spec, footprint) for spec in ranks),
        chosen=best,
        reason=_reason(pipeline, machines, len(fitting)),
    )


def candidates(pipeline: PipelineConfig, footprint: Footprint, machines: Machines) -> list[Candidate]:
    """Every split that `pipeline.layout` admits on `machines`, fitting or not."""
    return [assess(split, pipeline, footprint, machines) for split in _splits(pipeline, machines)]


def _settled(pipeline: PipelineConfig, best: Candidate, footprint: Footprint, machines: Machines) -> PipelineConfig:
    threads = max(1, machines.cores // best.split.num_ranks) if machines.is_cpu else 0
    return replace(
        pipeline,
        layout=best.split.layout,
        attention_ranks=best.split.attention_ranks,
        expert_ranks=best.split.expert_ranks,
        attention_tp=best.split.attention_tp,
        expert_tp=best.split.expert_tp,
        expert_slots=num_expert_slots(pipeline, footprint.model, best.split),
        device=machines.accelerator.device,
        max_model_len=best.max_model_len,
        page_tokens=best.pools.page_tokens,
        threads_per_rank=pipeline.threads_per_rank or threads,
    )


def num_expert_slots(pipeline: PipelineConfig, model: ModelConfig, split: Split) -> int:
    """Slots per layer of each expert rank: as asked for, or what it takes to hold every expert as often as asked."""
    if not model.moe_layers:
        return 0
    num_holders = split.expert_ranks // split.expert_tp
    return pipeline.expert_slots or -(-model.num_experts * pipeline.expert_replicas // num_holders)


def rank_specs(
    split: Split, model: ModelConfig, expert_replicas: int = 1, expert_slots: int = 0
) -> tuple[RankSpec, ...]:
    """The ranks of a split. Attention ranks come first; every expert of every MoE layer gets its slots. What a rank has
    beyond that of its `expert_slots` is empty. Ranks that share an attention follow the first of them; with `expert_tp`
    each of them has its slice of every expert.

    Raises LayoutError if there are fewer expert ranks than replicas.
    """
    num_holders = split.expert_ranks // split.expert_tp
    held = place_experts(model.num_experts, num_holders, expert_replicas) * split.expert_tp if model.moe_layers else ()
    held = tuple((*experts, *[EMPTY_SLOT] * (expert_slots - len(experts))) for experts in held)
    slots = [dict.fromkeys(model.moe_layers, experts) if experts else {} for experts in held]
    if split.layout != "disaggregated":
        slots = slots or [{} for _ in range(split.num_ranks)]
        tp = split.attention_tp
        return tuple(
            RankSpec(
                rank=i,
                roles=("attention", "expert"),
                slots=slots[i],
                shard=(i % tp, tp),
                expert_shard=(i % split.expert_tp, split.expert_tp),
                leader=i - i % tp if i % tp else -1,
            )
            for i in range(split.num_ranks)
        )
    attention = [RankSpec(rank=i, roles=("attention",)) for i in range(split.attention_ranks)]
    first = split.attention_ranks
    experts = [RankSpec(rank=first + i, roles=("expert",), slots=slots[i]) for i in range(split.expert_ranks)]
    return (*attention, *experts)


def assess(split: Split, pipeline: PipelineConfig, footprint: Footprint, machines: Machines) -> Candidate:
    """Weighs one split against the machines."""
    model = footprint.model
    if pipeline.expert_replicas > split.expert_ranks:
        return _impossible(split, f"{pipeline.expert_replicas} replicas of every expert need as many expert ranks")
    if split.layout == "disaggregated" and not model.moe_layers:
        return _impossible(split, "the model has no experts to disaggregate")
    if why := _indivisible(model, split):
        return _impossible(split, why)
    if split.expert_tp > 1 and (pipeline.expert_replicas > 1 or pipeline.expert_slots not in (0, model.num_experts)):
        return _impossible(split, "every rank has its slice of every expert once: there are no replicas or spare slots")
    if split.attention_tp > 1 and not machines.is_cpu and split.num_ranks > machines.per_host:
        return _impossible(split, f"{split.num_ranks} ranks that share an attention need GPUs of one host")
    if split.expert_ranks > max(1, model.num_experts * pipeline.expert_replicas):
        return _impossible(split, f"{split.expert_ranks} expert ranks for {model.num_experts} experts")
    if not machines.is_cpu and split.num_ranks > machines.count:
        return _impossible(split, f"needs {split.num_ranks} GPUs, there are {machines.count}")
    if (
        pipeline.expert_slots
        and pipeline.expert_slots * split.expert_ranks < model.num_experts * pipeline.expert_replicas
    ):
        room = f"{split.expert_ranks} ranks of {pipeline.expert_slots} expert_slots"
        return _impossible(split, f"{room} cannot hold {pipeline.expert_replicas} x {model.num_experts} experts")
    specs = rank_specs(split, model, pipeline.expert_replicas, pipeline.expert_slots)
    weights = [_weight_bytes(spec, footprint) for spec in specs]
    attention_bytes = max(weights[: split.attention_ranks])
    kv_bytes = _kv_room_bytes(pipeline, machines, attention_bytes)
    max_model_len, pools = _contexts(pipeline, footprint, kv_bytes, split.attention_tp)
    tokens_per_unit = max(kv_bytes, 0) // footprint.kv_bytes_per_token(of=split.attention_tp)
    candidate = Candidate(
        split=split,
        attention_bytes=attention_bytes,
        expert_bytes=max(weights[-split.expert_ranks :]),
        kv_bytes=kv_bytes,
        kv_tokens=tokens_per_unit * split.attention_units,
        max_model_len=max_model_len,
        pools=pools,
    )
    return replace(candidate, problem=_misfit(pipeline, machines, footprint, weights, candidate))


def _indivisible(model: ModelConfig, split: Split) -> str:
    """What of the model cannot be divided over so many ranks; empty if all can."""
    try:
        if split.attention_tp > 1:
            check_shard(model, split.attention_tp)
        check_expert_shard(model, split.expert_tp)
    except ConfigError as e:
        return str(e)
    return ""


def _splits(pipeline: PipelineConfig, machines: Machines) -> list[Split]:
    """The splits that the configuration leaves open."""
    attention, experts = pipeline.attention_ranks, pipeline.expert_ranks
    if pipeline.attention_tp > 1:
        return [_shared_attention(pipeline)]
    if pipeline.layout == "single":
        if (attention, experts) != (1, 1):
            raise LayoutError(
                f"layout single has one rank; {attention} attention and {experts} expert ranks were asked"
            )
        return [Split(layout="single")]
    if pipeline.layout == "colocated":
        if experts not in (1, attention):
            raise LayoutError(
                f"every colocated rank has both roles; asked were {attention} attention and {experts} expert ranks"
            )
        return [Split(layout="colocated", attention_ranks=attention, expert_ranks=attention)]
    if pipeline.layout == "disaggregated" or (attention, experts) != (1, 1):
        num = 1 if machines.is_cpu or machines.num_hosts > 1 else pipeline.micro_batches
        return [Split(layout="disaggregated", attention_ranks=attention, expert_ranks=experts, micro_batches=num)]
    return _open_splits(machines)


def _shared_attention(pipeline: PipelineConfig) -> Split:
    """The one split that attention_tp admits: colocated, and all ranks one attention unit."""
    tp = pipeline.attention_tp
    if pipeline.layout not in ("auto", "colocated"):
        raise LayoutError(f"attention_tp {tp} needs the layout colocated, not {pipeline.layout}")
    for name, asked in (("attention_ranks", pipeline.attention_ranks), ("expert_ranks", pipeline.expert_ranks)):
        if asked not in (1, tp):
            raise LayoutError(f"with attention_tp {tp} there are {tp} ranks, each with both roles; {name} is {asked}")
    return Split(layout="colocated", attention_ranks=tp, expert_ranks=tp, attention_tp=tp, expert_tp=pipeline.expert_tp)


def _open_splits(machines: Machines) -> list[Split]:
    """What auto chooses from: on a CPU one rank, on one host anything, on several hosts each side by itself."""
    n = 1 if machines.is_cpu else machines.count
    if n == 1:
        return [Split(layout="single")]
    disaggregated = [Split(layout="disaggregated", attention_ranks=a, expert_ranks=n - a) for a in range(1, n)]
    if machines.num_hosts > 1:
        return disaggregated
    colocated = [
        Split(layout="colocated", attention_ranks=n, expert_ranks=n, attention_tp=attention_tp, expert_tp=expert_tp)
        for attention_tp, expert_tp in ((1, 1), (n, 1), (n, n))
    ]
    return [Split(layout="single"), *colocated, *disaggregated]


def _preference(candidate: Candidate, target_batch: int, footprint: Footprint, machines: Machines) -> float:
    """Seconds per request of a decode step at `target_batch`, or at as many as have room: less is better."""
    work = decode(max(1, min(target_batch, candidate.kv_tokens // decode(1).context_tokens)))
    return step_floor_s(footprint, machines, candidate.split, work) / work.num_tokens


def _weight_bytes(spec: RankSpec, footprint: Footprint) -> int:
    num_slots = sum(len(experts) for experts in spec.slots.values())
    dense = footprint.attention_shard_bytes(spec.shard[1]) if "attention" in spec.roles else 0
    return dense + num_slots * footprint.expert_slice_bytes(spec.expert_shard[1])


def usable_bytes(pipeline: PipelineConfig, machines: Machines) -> int:
    """Of one accelerator's memory, what weights and KV may take; of a CPU's, what all ranks together may."""
    gpu = machines.accelerator
    return (
        gpu.memory_bytes
        if machines.is_cpu
        else int(gpu.memory_bytes * pipeline.gpu_memory_utilization) - gpu.reserved_bytes
    )


def _kv_room_bytes(pipeline: PipelineConfig, machines: Machines, attention_bytes: int) -> int:
    """KV bytes per attention rank: what was asked for, or what is left beside the fullest rank's weights."""
    if pipeline.kv_cache_bytes:
        return pipeline.kv_cache_bytes
    return CPU_KV_CACHE_BYTES if machines.is_cpu else usable_bytes(pipeline, machines) - attention_bytes


def _misfit(
    pipeline: PipelineConfig, machines: Machines, footprint: Footprint, weights: Sequence[int], candidate: Candidate
) -> str:
    """Why a split's bytes do not fit, with the numbers; empty if they do."""
    usable = usable_bytes(pipeline, machines)
    if machines.is_cpu:
        reserved_bytes = candidate.split.num_ranks * machines.accelerator.reserved_bytes
        needed_bytes = sum(weights) + candidate.split.attention_ranks * candidate.kv_bytes + reserved_bytes
        if needed_bytes > usable:
            return f"all ranks need {_gb(needed_bytes)}, the machine has {_gb(usable)}"
    elif max(weights) > usable:
        return f"a rank's weights are {_gb(max(weights))}, usable are {_gb(usable)} of each GPU"
    elif candidate.attention_bytes + pipeline.kv_cache_bytes > usable:
        asked = _gb(candidate.attention_bytes + pipeline.kv_cache_bytes)
        return f"weights and kv_cache_bytes are {asked}, usable are {_gb(usable)} of each GPU"
    if pipeline.max_model_len > footprint.model.max_position_embeddings:
        return (
            f"max_model_len {pipeline.max_model_len:,} is above the model's {footprint.model.max_position_embeddings:,}"
        )
    needed_tokens = pipeline.max_model_len or (1 if pipeline.kv_cache_bytes else LEAST_CONTEXT_TOKENS)
    tp = candidate.split.attention_tp
    room_tokens = longest_request_tokens(footprint, candidate.kv_bytes, candidate.pools.page_tokens, tp)
    if room_tokens < needed_tokens:
        return (
            f"{_gb(max(candidate.kv_bytes, 0))} of KV per attention rank hold a request of {room_tokens:,} tokens, "
            f"needed are {needed_tokens:,}"
        )
    return ""


def longest_request_tokens(footprint: Footprint, kv_bytes: int, page_tokens: int, attention_tp: int = 1) -> int:
    """Tokens of the longest request that `kv_bytes` of each of `attention_tp` ranks hold, in whole pages; chunked
    layers keep one chunk.
    """
    model = footprint.model
    global_bytes = page_tokens * footprint.kv_bytes_per_token(len(model.global_layers), attention_tp)
    chunked_bytes = page_tokens * footprint.kv_bytes_per_token(len(model.chunked_layers), attention_tp)
    chunk_pages = model.chunk_tokens // page_tokens
    pages = max(kv_bytes, 0) // (global_bytes + chunked_bytes)
    if chunked_bytes and pages >= chunk_pages:
        pages = (kv_bytes - chunk_pages * chunked_bytes) // global_bytes if global_bytes else sys.maxsize // page_tokens
    return int(pages) * page_tokens


def _contexts(
    pipeline: PipelineConfig, footprint: Footprint, kv_bytes: int, attention_tp: int
) -> tuple[int, PagePools]:
    """The longest request that may be asked for, in tokens, and the pages of both groups that KV room is divided in.

    Left open, the longest request is what pools balanced for usual requests hold: promising the model's own limit
    (1 M or 10 M tokens) would take nearly all pages from the chunked layers, and room from everybody else.
    """
    model = footprint.model
    page_tokens = fit_page_tokens(model, pipeline.page_tokens)
    room_tokens = longest_request_tokens(footprint, kv_bytes, page_tokens, attention_tp)
    longest_tokens = min(room_tokens, model.max_position_embeddings)
    if not longest_tokens:
        return pipeline.max_model_len, PagePools(page_tokens=page_tokens, global_pages=0, chunked_pages=0)
    usual_tokens = min(longest_tokens, EXPECTED_CHUNKS * model.chunk_tokens or longest_tokens)
    kv_element_bytes = int(footprint.precision.kv_bytes)
    held = shard_config(model, attention_tp)
    pools = plan_pages(held, page_tokens, kv_bytes, pipeline.max_model_len or usual_tokens, kv_element_bytes)
    if pipeline.max_model_len:
        return pipeline.max_model_len, pools
    return min(longest_tokens, max(usual_tokens, pools.global_pages * page_tokens)), pools


def _impossible(split: Split, problem: str) -> Candidate:
    return Candidate(
        split=split,
        attention_bytes=0,
        expert_bytes=0,
        kv_bytes=0,
        kv_tokens=0,
        max_model_len=0,
        pools=PagePools(page_tokens=1, global_pages=0, chunked_pages=0),
        problem=problem,
    )


def _refusal(considered: Sequence[Candidate], footprint: Footprint, machines: Machines) -> str:
    tried = "".join(f"\n  {candidate.split}: {candidate.problem}" for candidate in considered)
    return f"{_gb(footprint.total_bytes)} of weights: no layout that was asked for fits {machines}{tried}"


def _reason(pipeline: PipelineConfig, machines: Machines, num_fitting: int) -> str:
    if pipeline.layout != "auto" or pipeline.attention_tp > 1:
        return "as asked"
    if (pipeline.attention_ranks, pipeline.expert_ranks) != (1, 1):
        return "ranks were asked for by role"
    if machines.is_cpu or machines.count == 1:
        return "one device"
    floor = f"the lowest decode floor at {pipeline.target_batch} requests"
    if machines.num_hosts > 1:
        return f"several hosts: each side scales alone; {floor}"
    return f"{floor} of {num_fitting} that fit"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"
