"""How many bytes and floating-point operations each part of a model is.

Owns the arithmetic from a model's shape and the precision of its weights. Knows nothing of layouts or machines.
Parameter counts agree with the published totals of Llama 4 Scout and Maverick (text part).
"""

from dataclasses import dataclass
from typing import Literal

from actors.checkpoint.config import ExpertFormat, ModelConfig

PrecisionName = Literal["checkpoint", "float32", "bfloat16", "fp8", "int4"]

FP8_BYTES = 1.0
INT4_BYTES = 4.125 / 8  # four bits, and a bf16 scale for each group of 128
_BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}
_BYTES_OF_FORM: dict[ExpertFormat, float] = {"fp8": FP8_BYTES, "int4": INT4_BYTES}
_SCALE_BYTES = 4  # one fp32 scale per output channel of an fp8 matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Bytes per parameter of each part, and per element of the KV cache."""

    routed_bytes: float  # routed experts
    ffn_bytes: float  # shared experts and dense layers
    dense_bytes: float  # attention, router, embedding, head
    kv_bytes: float

    @staticmethod
    def of(
        model: ModelConfig,
        name: PrecisionName = "checkpoint",
        dtype: str = "auto",
        widens_fp8: bool = False,
        kv_cache_dtype: str = "auto",
        quantize_ffn: str = "",
    ) -> "Precision":
        """What a rank holds: `checkpoint` is what that has, in each part.

        `fp8` quantizes routed experts only, as the official Maverick FP8 checkpoint does; `int4` shared experts and
        dense layers too, as Scout's w4a16 does. `widens_fp8`: the device has no arithmetic for quantized weights, and a
        rank keeps them in the compute dtype (a CPU). `kv_cache_dtype` and `quantize_ffn`: "fp8" is one byte.
        """
        stored, includes_ffn = model.quantized, model.quantizes_ffn
        if name in _BYTES_OF_DTYPE:
            dtype, stored = name, "plain"
        else:
            if name == "fp8":
                stored, includes_ffn = "fp8", False
            elif name == "int4":
                stored, includes_ffn = "int4", True
            dtype = model.dtype if dtype == "auto" else dtype
        width = _BYTES_OF_DTYPE[dtype]
        routed_bytes = width if widens_fp8 else _BYTES_OF_FORM.get(stored, width)
        requantized_bytes = FP8_BYTES if quantize_ffn == "fp8" and not widens_fp8 else width
        return Precision(
            routed_bytes=routed_bytes,
            ffn_bytes=routed_bytes if includes_ffn and stored != "plain" else requantized_bytes,
            dense_bytes=width,
            kv_bytes=1 if kv_cache_dtype == "fp8" else width,
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
        return self.expert_slice_bytes(1)

    def expert_slice_bytes(self, of: int) -> int:
        """What each of `of` ranks holds of a routed expert that is divided over them: down's scales are whole."""
        width, hidden = self.model.expert_width // of, self.model.hidden_size
        scales = 2 * width + hidden if self.precision.routed_bytes == FP8_BYTES else 0
        return int(self.expert_params * self.precision.routed_bytes / of) + scales * _SCALE_BYTES

    @property
    def attention_rank_bytes(self) -> int:
        """All that an attention rank holds: everything but routed experts."""
        return self.attention_shard_bytes(1)

    def attention_shard_bytes(self, of: int) -> int:
        """What each of `of` tensor-parallel ranks holds of that: the embedding, norms and routers are whole."""
        whole = self.norm_params + self.router_params + self.head_params  # the embedding is as large as the head
        heads = 0 if self.model.tie_word_embeddings else self.head_params
        divided = (self.attention_params + heads) * self.precision.dense_bytes
        divided += self.ffn_params * self.precision.ffn_bytes
        return int(whole * self.precision.dense_bytes + divided / of)

    @property
    def total_bytes(self) -> int:
        num_experts = len(self.model.moe_layers) * self.model.num_experts
        return self.attention_rank_bytes + num_experts * self.expert_bytes

    def kv_bytes_per_token(self, num_layers: int | None = None, of: int = 1) -> int:
        """Bytes of keys and values of one token in `num_layers` layers (all, if not stated), on each of `of` ranks."""
        layers = self.model.num_layers if num_layers is None else num_layers
        return int(layers * 2 * self.model.num_kv_heads // of * self.model.head_dim * self.precision.kv_bytes)
