"""A model's shape, read from a hub `config.json` in either spelling.

Owns the translation of config files into one frozen value. Knows nothing of tensors or files beside config.json and
generation_config.json. Source: the files of meta-llama/Llama-4-* and transformers' Llama4TextConfig.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from actors.errors import CheckpointError

ExpertFormat = Literal["plain", "fp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama-3 frequency scaling. With low == high there is no interpolated band."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a Llama-4-family text model. Widths in elements, lengths in tokens."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    expert_width: int  # each routed expert and the shared expert
    dense_width: int  # dense layers
    num_experts: int
    experts_per_token: int
    moe_layers: tuple[int, ...]
    rope_layers: tuple[int, ...]  # layers that rotate; they attend inside chunks; the others see everything
    chunk_tokens: int  # a rope layer's token sees its own chunk only; 0: no chunking
    use_qk_norm: bool
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    temperature_tuning: bool
    floor_scale: int
    attn_scale: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    dtype: str  # "bfloat16", "float32", "float16"
    quantized: ExpertFormat = "plain"  # what quantization_config announces for the routed experts
    has_vision: bool = False

    @property
    def queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads

    def is_moe(self, layer: int) -> bool:
        return layer in self.moe_layers

    def is_chunked(self, layer: int) -> bool:
        """Whether `layer` attends inside chunks (its KV pages die with the chunk)."""
        return self.chunk_tokens > 0 and layer in self.rope_layers

    @property
    def chunked_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_layers) if self.is_chunked(i))

    @property
    def global_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_layers) if not self.is_chunked(i))


def read_model_config(directory: Path) -> ModelConfig:
    """Reads `config.json` (and eos ids from generation_config.json where it is there). Raises CheckpointError."""
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text())
    except OSError as e:
        raise CheckpointError(str(path), None, f"cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise CheckpointError(str(path), None, f"is not JSON: {e}") from e
    try:
        return parse_model_config(values)
    except (KeyError, TypeError, ValueError) as e:
        problem = f"lacks {e}" if isinstance(e, KeyError) else str(e)
        raise CheckpointError(str(path), None, problem) from e


def parse_model_config(values: Mapping[str, Any]) -> ModelConfig:
    """Translates a parsed config.json, nested (`text_config`) or flat, in the old spelling (`rope_theta`,
    `rope_scaling`, `interleave_moe_layer_step`) or the new (`rope_parameters`, `layer_types`, `moe_layers`).
    """
    text: Mapping[str, Any] = values.get("text_config") or values
    layers = int(text["num_hidden_layers"])
    rope = text.get("rope_parameters") or {}
    theta = rope.get("rope_theta", text.get("rope_theta", 500000.0))
    hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    expert_width = int(text["intermediate_size"])
    return ModelConfig(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or hidden // heads),
        vocab_size=int(text["vocab_size"]),
        expert_width=expert_width,
        dense_width=int(text.get("intermediate_size_mlp", expert_width)),
        num_experts=int(text.get("num_local_experts", 0)),
        experts_per_token=int(text.get("num_experts_per_tok", 1)),
        moe_layers=_moe_layers(text, layers),
        rope_layers=_rope_layers(text, layers),
        chunk_tokens=int(text.get("attention_chunk_size") or 0),
        use_qk_norm=bool(text.get("use_qk_norm", True)),
        rms_norm_eps=float(text.get("rms_norm_eps", 1e-5)),
        rope_theta=float(theta),
        rope_scaling=_rope_scaling(text.get("rope_scaling") or rope),
        temperature_tuning=bool(text.get("attn_temperature_tuning", True)),
        floor_scale=int(text.get("floor_scale", 8192)),
        attn_scale=float(text.get("attn_scale", 0.1)),
        max_position_embeddings=int(text.get("max_position_embeddings", 131072)),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        bos_token_id=int(text.get("bos_token_id", 200000)),
        eos_token_ids=_as_ids(text.get("eos_token_id", (200001, 200007, 200008))),
        pad_token_id=int(text.get("pad_token_id", -1)),
        dtype=str(text.get("dtype") or text.get("torch_dtype") or values.get("dtype")
                  or values.get("torch_dtype") or "bfloat16").removeprefix("torch."),  # fmt: skip
        quantized=_expert_format(values.get("quantization_config") or text.get("quantization_config")),
        has_vision="vision_config" in values,
    )


def _moe_layers(text: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    stated = text.get("moe_layers")
    if stated is not None:
        return tuple(int(i) for i in stated)
    step = int(text.get("interleave_moe_layer_step", 1))
    return tuple(range(step - 1, layers, step)) if step > 0 else ()


def _rope_layers(text: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    stated = text.get("no_rope_layers")  # 1 means the layer uses RoPE; an empty list means the default pattern
    if stated:
        if len(stated) != layers:
            raise ValueError(f"no_rope_layers has {len(stated)} entries for {layers} layers")
        return tuple(i for i, uses_rope in enumerate(stated) if uses_rope)
    interval = int(text.get("no_rope_layer_interval", 4))
    return tuple(i for i in range(layers) if (i + 1) % interval != 0)


def _rope_scaling(scaling: Mapping[str, Any]) -> RopeScaling | None:
    kind = scaling.get("rope_type", scaling.get("type", "default")) if scaling else "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope scaling of type {kind!r} is not known; llama3 is")
    return RopeScaling(
        factor=float(scaling["factor"]),
        low_freq_factor=float(scaling["low_freq_factor"]),
        high_freq_factor=float(scaling["high_freq_factor"]),
        original_max_position_embeddings=int(scaling["original_max_position_embeddings"]),
    )


def _as_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list | tuple) else (int(value),)


def _expert_format(quantization: Mapping[str, Any] | None) -> ExpertFormat:
    """Which of the known quantizations the checkpoint announces. Raises ValueError on any other."""
    if not quantization:
        return "plain"
    method, form = quantization.get("quant_method"), quantization.get("format")
    if method == "compressed-tensors" and form == "float-quantized":
        return "fp8"
    raise ValueError(
        f"quantization_config: {method!r} with format {form!r} is not known; known: compressed-tensors float-quantized"
    )
