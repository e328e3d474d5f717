"""How many bytes and floating-point operations each part of a model is.

Owns the arithmetic from a model's shape and the precision of its weights. Knows nothing of layouts or machines.
Parameter counts agree with the published totals of Llama 4 Scout and Maverick (text part).
"""

from dataclasses import dataclass
from typing import Literal

from actors.checkpoint.config import ModelConfig

PrecisionName = Literal["checkpoint", "float32", "bfloat16", "fp8"]

_BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}
_SCALE_BYTES = 2  # one bf16 scale per output channel of an fp8 matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Bytes per parameter of each part, and per element of the KV cache."""

    routed_bytes: float  # routed experts
    ffn_bytes: float  # shared experts and dense layers
    dense_bytes: float  # attention, router, embedding, head
    kv_bytes: float

    @staticmethod
    def of(
        model: ModelConfig, name: PrecisionName = "checkpoint", dtype: str = "auto", widens_fp8: bool = False
    ) -> "Precision":
        """`fp8` quantizes routed experts only, as the official Maverick FP8 checkpoint does; the rest is 16-bit.

        `widens_fp8`: the device has no fp8 arithmetic, and a rank keeps such weights in the compute dtype (a CPU).
        """
        if name in _BYTES_OF_DTYPE:
            dtype, quantized = name, False
        else:
            quantized = name == "fp8" or model.quantized == "fp8"
            dtype = model.dtype if dtype == "auto" else dtype
        width = _BYTES_OF_DTYPE[dtype]
        return Precision(
            routed_bytes=1 if quantized and not widens_fp8 else width,
            ffn_bytes=width,
            dense_bytes=width,
            kv_bytes=width,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """A model's parts, in parameters; bytes come by `precision`."""

    model: ModelConfig
    precision: Precision

    @property
    def attention_params_per_layer(self) -> int:
        m = self.model
        return 2 * m.hidden_size * m.head_dim * (m.num_heads + m.num_kv_heads)

    @property
    def expert_params(self) -> int:
        """One routed expert; a shared expert is as large."""
        return 3 * self.model.hidden_size * self.model.expert_width

    @property
    def attention_params(self) -> int:
        return self.model.num_layers * self.attention_params_per_layer

    @property
    def ffn_params(self) -> int:
        """Shared experts of MoE layers, and dense layers."""
        m = self.model
        num_dense = m.num_layers - len(m.moe_layers)
        return len(m.moe_layers) * self.expert_params + num_dense * 3 * m.hidden_size * m.dense_width

    @property
    def router_params(self) -> int:
        return len(self.model.moe_layers) * self.model.num_experts * self.model.hidden_size

    @property
    def head_params(self) -> int:
        """The output head; the embedding is as large, and the same tensor where they are tied."""
        return self.model.vocab_size * self.model.hidden_size

    @property
    def norm_params(self) -> int:
        return (2 * self.model.num_layers + 1) * self.model.hidden_size

    @property
    def total_params(self) -> int:
        routed = len(self.model.moe_layers) * self.model.num_experts * self.expert_params
        return routed + self._always_dense_params + self.ffn_params

    @property
    def _always_dense_params(self) -> int:
        tables = self.head_params * (1 if self.model.tie_word_embeddings else 2)
        return self.attention_params + self.router_params + self.norm_params + tables

    @property
    def expert_bytes(self) -> int:
        """One routed expert of one layer, with its scales where it is quantized."""
        scales = 2 * self.model.expert_width + self.model.hidden_size if self.precision.routed_bytes <= 1 else 0
        return int(self.expert_params * self.precision.routed_bytes) + scales * _SCALE_BYTES

    @property
    def attention_rank_bytes(self) -> int:
        """All that an attention rank holds: everything but routed experts."""
        return int(self._always_dense_params * self.precision.dense_bytes + self.ffn_params * self.precision.ffn_bytes)

    @property
    def total_bytes(self) -> int:
        num_experts = len(self.model.moe_layers) * self.model.num_experts
        return self.attention_rank_bytes + num_experts * self.expert_bytes

    def kv_bytes_per_token(self, num_layers: int | None = None) -> int:
        """Bytes of keys and values of one token in `num_layers` layers (all, if not stated)."""
        layers = self.model.num_layers if num_layers is None else num_layers
        return int(layers * 2 * self.model.num_kv_heads * self.model.head_dim * self.precision.kv_bytes)
