"""The least time that a step can take in a layout: every byte moves once, every operation runs at its peak rate.

Owns the arithmetic of floors; parts that share one accelerator's memory add up. Floors compare layouts and bound what
kernels may reach; they are no predictions. Knows nothing of whether a layout fits (`cluster/layout.py`).
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from actors.config import Layout
from cluster.footprint import FP8_BYTES, Footprint
from cluster.hardware import NETWORK_BYTES_S, NETWORK_EXCHANGE_S, Accelerator, Machines

_SAMPLES = 400
_ALLREDUCE_S = 7e-6  # one all-reduce of up to 64 KB over 4 GPUs of a host, assumed
_ALLREDUCE_SLOPE = 1.3  # large all-reduces reach 1 / 1.3 of the link, plus 3 us


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How many ranks have which role. Colocated: every rank has both, and the two counts are equal. Single: 1 and 1.

    `attention_tp` ranks share one attention, of `attention_ranks` in all (colocated only). With `expert_tp`, which is
    then as many, each of them has a slice of every expert.
    """

    layout: Layout  # not auto
    attention_ranks: int = 1
    expert_ranks: int = 1
    attention_tp: int = 1
    expert_tp: int = 1
    micro_batches: int = 1  # disaggregated: 2 where the halves of a step are at the two sides in turn

    @property
    def attention_units(self) -> int:
        """Attentions, each with its own requests."""
        return self.attention_ranks // self.attention_tp

    @property
    def num_ranks(self) -> int:
        return self.attention_ranks + (self.expert_ranks if self.layout == "disaggregated" else 0)

    def __str__(self) -> str:
        if self.layout == "single":
            return "single"
        if self.layout == "colocated":
            shared = f" TP{self.attention_tp}" if self.attention_tp > 1 else ""
            return f"colocated {self.attention_ranks}{shared}" + (" sliced" if self.expert_tp > 1 else "")
        return f"{self.attention_ranks}A+{self.expert_ranks}E"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one step computes: `num_tokens` over all attention ranks, each attending to `context_tokens`."""

    num_tokens: int
    context_tokens: int
    reads_cache: bool  # decode reads each request's KV; a prefill chunk has just written it
    samples: int  # positions whose logits are computed


def decode(batch: int, context_tokens: int = 2048) -> Work:
    """One token for each of `batch` requests."""
    return Work(num_tokens=batch, context_tokens=context_tokens, reads_cache=True, samples=batch)


def prefill(chunk_tokens: int, mean_context_tokens: int = 1024) -> Work:
    """One chunk of prompt tokens; its logits are not counted (one position each)."""
    return Work(num_tokens=chunk_tokens, context_tokens=mean_context_tokens, reads_cache=False, samples=0)


def step_floor_s(footprint: Footprint, machines: Machines, split: Split, work: Work) -> float:
    """Seconds that one step takes at least, in a layout of the runtime (expert parallelism, attention data-parallel or
    shared by the ranks of a unit).

    Disaggregated: the two sides take turns. A step of one micro-batch is serial; of two, each half keeps one side busy.
    """
    if split.micro_batches == 2 and work.num_tokens > 1:
        return _in_turn_floor_s(footprint, machines, split, work)
    gpu = machines.accelerator
    if machines.is_cpu:  # ranks share one machine: its rates are divided, so the work is counted once
        return attention_floor_s(footprint, gpu, work) + experts_floor_s(footprint, gpu, work.num_tokens, 1)
    per_unit = _share(work, split.attention_units)
    seconds = attention_floor_s(footprint, gpu, per_unit) / split.attention_tp
    seconds += experts_floor_s(footprint, gpu, work.num_tokens, split.expert_ranks, split.expert_tp)
    seconds += _sums_floor_s(footprint, gpu, split.attention_tp, per_unit.num_tokens)
    if split.attention_tp == split.num_ranks:  # every rank has every token: nothing is dispatched
        return seconds
    return seconds + _exchange_floor_s(footprint, machines, split, work.num_tokens)


def _in_turn_floor_s(footprint: Footprint, machines: Machines, split: Split, work: Work) -> float:
    """Of two halves: the busier side has both, one after the other, and no half is quicker than by itself. The head has
    all rows at once.
    """
    gpu, units = machines.accelerator, split.attention_units
    body, half = replace(work, samples=0), _share(replace(work, samples=0), 2)
    head_s = attention_floor_s(footprint, gpu, _share(work, units))
    head_s -= attention_floor_s(footprint, gpu, _share(body, units))
    alone_s = step_floor_s(footprint, machines, replace(split, micro_batches=1), half)
    attention_s = attention_floor_s(footprint, gpu, _share(half, units))
    experts_s = experts_floor_s(footprint, gpu, half.num_tokens, split.expert_ranks)
    return max(2 * attention_s, 2 * experts_s, alone_s) + head_s


def tensor_parallel_floor_s(footprint: Footprint, gpu: Accelerator, ranks: int, work: Work) -> float:
    """The floor with attention split over all `ranks` GPUs of one host, which then hold every token, so that experts
    need no dispatch: only the two all-reduces of each layer.
    """
    seconds = attention_floor_s(footprint, gpu, work) / ranks
    seconds += experts_floor_s(footprint, gpu, work.num_tokens, ranks)
    return seconds + _sums_floor_s(footprint, gpu, ranks, work.num_tokens)


def _sums_floor_s(footprint: Footprint, gpu: Accelerator, ranks: int, num_tokens: int) -> float:
    """The two all-reduces of every layer over the ranks that share an attention."""
    if ranks == 1:
        return 0.0
    message_bytes = num_tokens * footprint.model.hidden_size * 2
    ring_bytes = 2 * (ranks - 1) / ranks * message_bytes * _ALLREDUCE_SLOPE + 3e-6 * gpu.link_bytes_s
    allreduce_s = _ALLREDUCE_S + min((ranks - 1) * message_bytes, ring_bytes) / gpu.link_bytes_s
    return 2 * footprint.model.num_layers * allreduce_s


def attention_floor_s(footprint: Footprint, gpu: Accelerator, work: Work) -> float:
    """Everything but routed experts, on one accelerator that holds all dense weights."""
    precision, model = footprint.precision, footprint.model
    seconds = _matmul_s(gpu, footprint.attention_params, precision.dense_bytes, work.num_tokens)
    seconds += _matmul_s(gpu, footprint.ffn_params, precision.ffn_bytes, work.num_tokens)
    seconds += _matmul_s(gpu, footprint.head_params, precision.dense_bytes, work.samples) if work.samples else 0.0
    seen_tokens = _tokens_seen(footprint, work.context_tokens)  # over all layers
    flops = 4 * work.num_tokens * seen_tokens * model.num_heads * model.head_dim
    kv_bytes = work.num_tokens * seen_tokens * footprint.kv_bytes_per_token(num_layers=1) if work.reads_cache else 0
    return seconds + max(kv_bytes / gpu.memory_bytes_s, flops / gpu.flops_16bit_s)


def experts_floor_s(footprint: Footprint, gpu: Accelerator, num_tokens: int, ranks: int, expert_tp: int = 1) -> float:
    """Routed experts of all MoE layers, spread over `ranks`: a layer waits for its busiest rank. Uniform routing.

    With `expert_tp` every rank has a slice of each expert instead, and all are as busy.
    """
    model, params = footprint.model, footprint.expert_params
    if not model.moe_layers:
        return 0.0
    busiest = busiest_rank(model.num_experts, num_tokens * model.experts_per_token, ranks // expert_tp)
    read_s = busiest.experts * footprint.expert_slice_bytes(expert_tp) / gpu.memory_bytes_s
    compute_s = 2 * busiest.tokens * params / expert_tp / _flops_s(gpu, footprint.precision.routed_bytes)
    return len(model.moe_layers) * max(read_s, compute_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class BusiestRank:
    """Means, over draws of uniform routing, of the rank that has most: distinct experts touched, and tokens."""

    experts: float
    tokens: float


@cache
def busiest_rank(num_experts: int, num_choices: int, ranks: int) -> BusiestRank:
    """Samples `num_choices` independent choices of an expert, experts spread evenly over `ranks`. Deterministic."""
    generator = np.random.default_rng(0)
    counts_SE = generator.multinomial(num_choices, np.full(num_experts, 1 / num_experts), size=_SAMPLES)
    shares = np.array_split(counts_SE, ranks, axis=1)
    touched_RS = np.stack([(share_SE > 0).sum(axis=1) for share_SE in shares])
    tokens_RS = np.stack([share_SE.sum(axis=1) for share_SE in shares])
    return BusiestRank(experts=float(touched_RS.max(axis=0).mean()), tokens=float(tokens_RS.max(axis=0).mean()))


def _share(work: Work, ranks: int) -> Work:
    """The busiest attention rank's part."""
    return Work(
        num_tokens=-(-work.num_tokens // ranks),
        context_tokens=work.context_tokens,
        reads_cache=work.reads_cache,
        samples=-(-work.samples // ranks),
    )


def _tokens_seen(footprint: Footprint, context_tokens: int) -> int:
    """Positions that one token attends to, summed over layers: chunked layers see at most their chunk."""
    model = footprint.model
    in_chunk = min(context_tokens, model.chunk_tokens) if model.chunk_tokens else context_tokens
    return len(model.global_layers) * context_tokens + len(model.chunked_layers) * in_chunk


def _exchange_floor_s(footprint: Footprint, machines: Machines, split: Split, num_tokens: int) -> float:
    """Dispatch and combine of all MoE layers: one byte per value and a scale out, two bytes per value back."""
    if split.layout == "single":
        return 0.0
    gpu, ranks, hidden = machines.accelerator, split.attention_ranks, footprint.model.hidden_size
    if split.layout == "colocated":
        rows = num_tokens / ranks * (ranks - 1) / ranks  # the rest stays on its own rank
    else:
        rows = num_tokens / min(split.attention_ranks, split.expert_ranks)
    one_host = split.num_ranks <= machines.per_host
    link_bytes_s = gpu.link_bytes_s if one_host else NETWORK_BYTES_S
    exchange_s = gpu.exchange_s if one_host else NETWORK_EXCHANGE_S
    moved_bytes = rows * footprint.model.experts_per_token * (hidden + 4 + 2 * hidden)
    return len(footprint.model.moe_layers) * (2 * exchange_s + moved_bytes / link_bytes_s)


def _matmul_s(gpu: Accelerator, params: int, bytes_per_param: float, num_tokens: int) -> float:
    return max(params * bytes_per_param / gpu.memory_bytes_s, 2 * num_tokens * params / _flops_s(gpu, bytes_per_param))


def _flops_s(gpu: Accelerator, bytes_per_param: float) -> float:
    return gpu.flops_8bit_s if bytes_per_param == FP8_BYTES else gpu.flops_16bit_s  # INT4 is multiplied as bf16
