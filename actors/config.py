"""Frozen configuration of one pipeline, as `serve deploy` and `corral serve` state it.

Owns the keys, their defaults and their bounds. "auto" values are resolved once, by the planner (`cluster/layout.py`)
or by the rank that knows its device. Unknown keys are errors. The environment is not read here.
"""

import hashlib
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import msgspec

from actors.errors import ConfigError

MIN_SLOW_RANK_FACTOR = 2.0  # what differs by less is noise, or another mixture of work

Layout = Literal["auto", "single", "colocated", "disaggregated"]
Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
QuantizeFfn = Literal["", "fp8"]
KvDType = Literal["auto", "fp8"]
Load = Literal["checkpoint", "dummy"]
Routing = Literal["model", "uniform"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """Everything that a pipeline is told. Names follow vLLM's flags where one exists.

    Raises ConfigError from `parse` on an unknown key or a value out of bounds.
    """

    model: str = "demo"  # checkpoint directory, demo for the one that comes along, shape:NAME for random weights
    served_model_name: str = ""  # what clients call it; "" is the directory's last part
    application: str = "corral"  # names the detached rank actors

    layout: Layout = "auto"
    attention_ranks: int = 1
    expert_ranks: int = 1
    attention_tp: int = 1  # ranks that share one attention, each with a part of its heads, FFN widths and head
    expert_tp: int = 1  # attention_tp: each of these ranks has a slice of every expert instead of some whole ones
    expert_replicas: int = 1  # copies of every expert, on different ranks
    expert_slots: int = 0  # per layer on each expert rank, spare ones included; 0 is what the fewest ranks need
    target_batch: int = 128  # requests at once that auto chooses the layout for, of those that fit
    device: Device = "auto"
    attention_resources: dict[str, float] = field(default_factory=dict)  # Ray resources a rank asks for beside its GPU
    expert_resources: dict[str, float] = field(default_factory=dict)
    threads_per_rank: int = 0  # CPU threads of each rank; 0 divides the machine's cores

    dtype: DType = "auto"  # compute dtype of unquantized weights; auto is the checkpoint's
    quantize_ffn: QuantizeFfn = ""  # fp8: shared experts and dense layers that the checkpoint has in 16 bits
    load: Load = "checkpoint"  # dummy: random weights on the device, for benchmarks at full size
    routing: Routing = "model"  # uniform: benchmarks only, experts at random instead of by score

    max_model_len: int = 0  # tokens of prompt + output; 0 is the model's own limit, or what the KV cache holds
    max_num_batched_tokens: int = 2048  # tokens of one step, all attention ranks' prefill and decode together
    max_num_seqs: int = 256  # requests that run at once, per attention rank
    max_queued_requests: int = 1024  # waiting beyond this: 429 / RESOURCE_EXHAUSTED
    page_tokens: int = 16
    kv_cache_bytes: int = 0  # per attention rank; 0: on GPU what gpu_memory_utilization leaves, on CPU 256 MiB
    gpu_memory_utilization: float = 0.9
    kv_cache_dtype: KvDType = "auto"  # fp8: half the bytes, float8_e4m3fn without scales
    enforce_eager: bool = False  # no CUDA graphs
    micro_batches: Literal[1, 2] = 1  # disaggregated, GPUs of one host: 2 has larger decode steps run as halves in turn
    micro_batch_rows: int = 64  # larger are those of more requests per attention rank; a power of two

    step_timeout_s: float = 10.0  # a step that takes longer has lost a rank
    group_timeout_s: float = 5.0  # one collective operation
    join_timeout_s: float = 15.0  # to form the group of an epoch
    rank_silence_s: float = 2.0  # a rank that answers nothing for this long is lost
    recovery_timeout_s: float = 120.0  # without an epoch for this long, open requests end with UNAVAILABLE
    lease_s: float = 30.0  # a rank that hears no router for this long exits
    ingress_lease_s: float = 5.0  # requests of an ingress that is silent for this long are cancelled

    @staticmethod
    def parse(values: dict[str, Any]) -> "PipelineConfig":
        """Builds a config from plain data (YAML, JSON), naming the key in any error."""
        config: PipelineConfig = _convert(values, PipelineConfig)
        config._check_bounds()
        return config

    def _check_bounds(self) -> None:
        for key in ("attention_ranks", "expert_ranks", "attention_tp", "expert_tp", "expert_replicas", "target_batch",
                    "max_num_batched_tokens", "max_num_seqs", "page_tokens"):  # fmt: skip
            if getattr(self, key) < 1:
                raise ConfigError(key, "must be at least 1")
        for key in ("threads_per_rank", "max_model_len", "max_queued_requests", "kv_cache_bytes", "expert_slots"):
            if getattr(self, key) < 0:
                raise ConfigError(key, "must not be negative")
        for key in ("step_timeout_s", "group_timeout_s", "join_timeout_s", "rank_silence_s", "recovery_timeout_s",
                    "lease_s", "ingress_lease_s"):  # fmt: skip
            if not getattr(self, key) > 0:
                raise ConfigError(key, "must be above 0 seconds")
        if self.micro_batch_rows < 8 or self.micro_batch_rows & (self.micro_batch_rows - 1):
            raise ConfigError("micro_batch_rows", "must be a power of two, at least 8")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError("gpu_memory_utilization", "must be in (0, 1]")
        if self.expert_tp not in (1, self.attention_tp):
            raise ConfigError("expert_tp", f"must be 1, or as many as attention_tp, which is {self.attention_tp}")
        if self.expert_tp > 1 and self.expert_replicas > 1:
            raise ConfigError("expert_replicas", f"must be 1 with expert_tp {self.expert_tp}: slices have no replicas")

    @property
    def most_whole_rows(self) -> int:
        """Of steps with more, attention ranks compute half while the other half is at the experts; 0 if of none."""
        return self.micro_batch_rows if self.micro_batches == 2 and self.layout == "disaggregated" else 0

    def as_dict(self) -> dict[str, Any]:
        """The config as plain data, for the wire and for `parse`."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def contents(self) -> str:
        """A name for what ranks of this pipeline have in memory. Pipelines share it if they differ only in how many
        ranks there are, in names, and in how long somebody waits: ranks of one can be taken over by the other.
        """
        kept = {key: value for key, value in self.as_dict().items() if key not in _OUTSIDE_OF_RANKS}
        return hashlib.sha256(msgspec.json.encode(kept, order="sorted")).hexdigest()[:16]


_OUTSIDE_OF_RANKS = frozenset({
    "served_model_name", "attention_ranks", "expert_ranks", "expert_replicas", "expert_slots", "target_batch",
    "threads_per_rank", "max_queued_requests", "step_timeout_s", "group_timeout_s", "join_timeout_s", "rank_silence_s",
    "recovery_timeout_s", "lease_s", "ingress_lease_s",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig:
    """Between which bounds the pipeline scales itself, and when. All of it may change while it serves.

    Bounds of 0 are the layout's own numbers: no scaling. Colocated ranks scale by the bounds of experts.
    """

    min_experts: int = 0  # expert ranks
    max_experts: int = 0
    min_attention: int = 0  # attention ranks
    max_attention: int = 0
    upscale_delay_s: float = 10.0  # more is wanted for this long before a rank is added
    downscale_delay_s: float = 120.0  # less is enough for this long before one is taken away
    target_queue_s: float = 1.0  # requests should not wait for admission longer than this
    target_kv_used_fraction: float = 0.8  # of the fuller page group: above it another attention rank is wanted
    target_step_ms: float = 0.0  # steps slower than this want another expert rank; 0: only the queue does
    rebalance: bool = True  # give hot experts more replicas
    rebalance_interval_s: float = 10.0  # least time between two changes for the sake of balance
    rebalance_gain: float = 0.1  # least fall of the busiest rank's share that is worth a change
    slow_rank_factor: float = 4.0  # a rank whose part of a step takes so many times its peers' is replaced; 0: never
    slow_rank_s: float = 15.0  # for how long it must do so

    @staticmethod
    def parse(values: dict[str, Any]) -> "ScalingConfig":
        """Builds a config from plain data. Raises ConfigError on an unknown key or a value out of bounds."""
        config: ScalingConfig = _convert(values, ScalingConfig)
        for key in ("min_experts", "max_experts", "min_attention", "max_attention", "upscale_delay_s",
                    "downscale_delay_s", "target_step_ms", "rebalance_interval_s", "rebalance_gain",
                    "slow_rank_s"):  # fmt: skip
            if getattr(config, key) < 0:
                raise ConfigError(key, "must not be negative")
        if config.slow_rank_factor and config.slow_rank_factor < MIN_SLOW_RANK_FACTOR:
            raise ConfigError("slow_rank_factor", f"must be 0 or at least {MIN_SLOW_RANK_FACTOR:g}")
        for low, high in (("min_experts", "max_experts"), ("min_attention", "max_attention")):
            if 0 < getattr(config, high) < getattr(config, low):
                raise ConfigError(high, f"must be at least {low}, which is {getattr(config, low)}")
        if not config.target_queue_s > 0:
            raise ConfigError("target_queue_s", "must be above 0 seconds")
        if not 0 < config.target_kv_used_fraction <= 1:
            raise ConfigError("target_kv_used_fraction", "must be in (0, 1]")
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressConfig:
    """Limits at the edge."""

    max_body_bytes: int = 4 * 1024 * 1024
    max_stop_strings: int = 16
    max_n: int = 16
    max_prompts: int = 64  # prompts of one /v1/completions call; n answers to each
    max_logprobs: int = 20
    default_max_tokens: int = 0  # OpenAI clients that name none get this; 0 is all the room that the context leaves
    stream_interval_ms: int = (
        0  # least time between two messages of a stream; tokens that come meanwhile travel together
    )
    extra_model_names: tuple[str, ...] = field(default=())
    api_keys_file: str = ""  # on every node with an ingress; one key per line, of which clients must show one

    @staticmethod
    def parse(values: dict[str, Any]) -> "IngressConfig":
        """Builds a config from plain data. Raises ConfigError on an unknown key or a value out of bounds."""
        config: IngressConfig = _convert(values, IngressConfig)
        for key in ("max_body_bytes", "max_n", "max_prompts"):
            if getattr(config, key) < 1:
                raise ConfigError(key, "must be at least 1")
        for key in ("max_stop_strings", "max_logprobs", "default_max_tokens", "stream_interval_ms"):
            if getattr(config, key) < 0:
                raise ConfigError(key, "must not be negative")
        return config


def _convert(values: dict[str, Any], kind: type[Any]) -> Any:
    """Plain data as a dataclass of `kind`. Raises ConfigError naming the key."""
    known = {f.name for f in fields(kind)}
    for key in values:
        if key not in known:
            raise ConfigError(key, f"unknown key; known are {', '.join(sorted(known))}")
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as e:
        key = str(e).rpartition("$.")[2].rstrip("`") or "config"
        raise ConfigError(key, str(e).partition(" - at")[0]) from e
