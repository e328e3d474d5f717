"""A model's shape, read from a hub `config.json` in either spelling.

Owns the translation of config files into one frozen value. Knows nothing of tensors but which names a directory has:
configs of quantized models say too little of which parts are. Source: the files of meta-llama/Llama-4-* and
transformers' Llama4TextConfig.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.checkpoint.quantization import INT4_GROUP, ExpertFormat, Quantization, parse_quantization
from actors.checkpoint.stored_names import stored_names
from actors.errors import CheckpointError

__all__ = ["INT4_GROUP", "ExpertFormat", "ModelConfig", "RopeScaling", "parse_model_config", "read_model_config"]

_DTYPES = ("bfloat16", "float32", "float16")


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
    quantizes_ffn: bool = False  # shared experts and dense layers have that form too
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
    """Reads `config.json` (and eos ids from generation_config.json where it is there). Raises CheckpointError.

    Where a quantized checkpoint has weights, their names say which parts are quantized; else the config's word counts.
    """
    path = directory / "config.json"
    try:
        config = parse_model_config(_read_json(path))
    except (KeyError, ValueError) as e:
        problem = f"lacks {e}" if isinstance(e, KeyError) else str(e)
        raise CheckpointError(str(path), None, problem) from e
    if config.quantized != "plain" and (names := stored_names(directory)):
        config = dataclasses.replace(config, quantizes_ffn=_has_quantized_ffn(names))
    generation = directory / "generation_config.json"
    if not generation.exists():
        return config
    try:
        eos_token_ids = _ids(_read_json(generation), "eos_token_id", config.eos_token_ids)
    except ValueError as e:
        raise CheckpointError(str(generation), None, str(e)) from e
    return dataclasses.replace(config, eos_token_ids=eos_token_ids)


def _has_quantized_ffn(names: frozenset[str]) -> bool:
    """Whether any linear of a shared expert or a dense layer has a scale."""
    linear = re.compile(r"\.feed_forward\.(shared_expert\.)?(gate|up|down)_proj\.weight_scale$")
    return any(linear.search(name) for name in names)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except OSError as e:
        raise CheckpointError(str(path), None, f"cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise CheckpointError(str(path), None, f"is not JSON: {e}") from e
    if not isinstance(values, dict):
        raise CheckpointError(str(path), None, "is not a JSON object")
    return values


def parse_model_config(values: Mapping[str, Any]) -> ModelConfig:
    """Translates a parsed config.json, nested (`text_config`) or flat, in the old spelling (`rope_theta`,
    `rope_scaling`, `interleave_moe_layer_step`) or the new (`rope_parameters`, `layer_types`, `moe_layers`).

    A key that is absent has the default of transformers' Llama4TextConfig. Raises KeyError for a size that is not
    there, ValueError (naming the key) for what makes no model or is not supported.
    """
    text = _mapping(values, "text_config") or values
    layers, heads, hidden = (_size(text, key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    rope_parameters = _mapping(text, "rope_parameters")
    rope_layers, moe_layers = _rope_layers(text, layers), _moe_layers(text, layers)
    quantization = _quantization(values, text, layers, moe_layers)
    config = ModelConfig(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_size(text, "num_key_value_heads", heads),
        head_dim=_size(text, "head_dim", hidden // heads),
        vocab_size=_size(text, "vocab_size"),
        expert_width=_size(text, "intermediate_size"),
        dense_width=_size(text, "intermediate_size_mlp", 16384),
        num_experts=_size(text, "num_local_experts", 16),
        experts_per_token=_size(text, "num_experts_per_tok", 1),
        moe_layers=moe_layers,
        rope_layers=rope_layers,
        chunk_tokens=_chunk_tokens(text, rope_layers),
        use_qk_norm=bool(text.get("use_qk_norm", True)),
        rms_norm_eps=_number(text, "rms_norm_eps", 1e-5),
        rope_theta=_number(rope_parameters, "rope_theta", _number(text, "rope_theta", 500000.0)),
        rope_scaling=_rope_scaling(_mapping(text, "rope_scaling") or rope_parameters),
        temperature_tuning=bool(text.get("attn_temperature_tuning", True)),  # transformers 4.51 wrote 4 for true
        floor_scale=_whole(text, "floor_scale", 8192),
        attn_scale=_number(text, "attn_scale", 0.1),
        max_position_embeddings=_size(text, "max_position_embeddings", 131072),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        bos_token_id=_whole(text, "bos_token_id", 200000),
        eos_token_ids=_ids(text, "eos_token_id", (200001, 200007, 200008)),
        pad_token_id=_whole(text, "pad_token_id", -1),
        dtype=_dtype(text, values),
        quantized=quantization.form,
        quantizes_ffn=quantization.includes_ffn,
        has_vision=values.get("vision_config") is not None,
    )
    _check(config, text)
    return config


def _check(config: ModelConfig, text: Mapping[str, Any]) -> None:
    """Raises ValueError for sizes that contradict each other and for what this model family does not have."""
    if config.num_heads % config.num_kv_heads:
        raise ValueError(f"num_attention_heads {config.num_heads} is no multiple of {config.num_kv_heads} kv heads")
    if config.head_dim % 2:
        raise ValueError(f"head_dim {config.head_dim} is odd, but positions rotate pairs")
    if config.moe_layers and config.experts_per_token > config.num_experts:
        raise ValueError(f"num_experts_per_tok is above num_local_experts {config.num_experts}")
    if any(not 0 <= layer < config.num_layers for layer in config.moe_layers):
        raise ValueError(f"moe_layers names layers outside of 0..{config.num_layers - 1}")
    if config.floor_scale < 1:
        raise ValueError("floor_scale must be above 0")
    if config.quantized == "int4":
        _check_int4_widths(config)
    if text.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {text['hidden_act']!r} is not known; silu is")
    if text.get("attention_bias"):
        raise ValueError("attention_bias is not supported")


def _check_int4_widths(config: ModelConfig) -> None:
    widths = [config.hidden_size, config.expert_width] + [config.dense_width] * config.quantizes_ffn
    if any(width % INT4_GROUP for width in widths):
        raise ValueError(f"int4 weights need widths of whole groups of {INT4_GROUP}; there are {widths}")


def _moe_layers(text: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    if text.get("moe_layers") is not None:
        return tuple(sorted(set(_ids(text, "moe_layers", ()))))
    step = _whole(text, "interleave_moe_layer_step", 1)
    return tuple(range(step - 1, layers, step)) if step > 0 else ()


def _rope_layers(text: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    stated = _ids(text, "no_rope_layers", ())  # 1 means the layer uses RoPE; an empty list means the default pattern
    if stated:
        if len(stated) != layers:
            raise ValueError(f"no_rope_layers has {len(stated)} entries for {layers} layers")
        return tuple(i for i, uses_rope in enumerate(stated) if uses_rope)
    interval = _size(text, "no_rope_layer_interval", 4)
    return tuple(i for i in range(layers) if (i + 1) % interval != 0)


def _chunk_tokens(text: Mapping[str, Any], rope_layers: tuple[int, ...]) -> int:
    """The chunk of the layers that rotate; 0 where `layer_types` says that no layer is chunked."""
    stated = text.get("attention_chunk_size", 8192)  # null or 0 is no chunking, absent is the default
    chunk = _size(text, "attention_chunk_size", 8192) if stated else 0
    types = text.get("layer_types")
    if types is None:
        return chunk
    chunked = tuple(i for i, kind in enumerate(types) if kind == "chunked_attention")
    if not chunked:
        return 0
    if chunked != rope_layers:
        raise ValueError("layer_types and no_rope_layers disagree: the layers that rotate are the chunked ones")
    return chunk


def _rope_scaling(scaling: Mapping[str, Any]) -> RopeScaling | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope scaling of type {kind!r} is not known; llama3 is")
    return RopeScaling(
        factor=_number(scaling, "factor"),
        low_freq_factor=_number(scaling, "low_freq_factor"),
        high_freq_factor=_number(scaling, "high_freq_factor"),
        original_max_position_embeddings=_size(scaling, "original_max_position_embeddings"),
    )


def _quantization(
    values: Mapping[str, Any], text: Mapping[str, Any], layers: int, moe_layers: tuple[int, ...]
) -> Quantization:
    ffn_modules = [f"model.layers.{layer}.feed_forward.shared_expert.gate_proj" for layer in moe_layers]
    ffn_modules += [f"model.layers.{i}.feed_forward.gate_proj" for i in range(layers) if i not in moe_layers]
    stated = _mapping(values, "quantization_config") or _mapping(text, "quantization_config")
    return parse_quantization(stated, ffn_modules)


def _dtype(text: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    stated = [level.get(key) for level in (text, values) for key in ("dtype", "torch_dtype")]
    name = str(next((value for value in stated if value is not None), "bfloat16")).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is not known; known are {', '.join(_DTYPES)}")
    return name


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} must be an object, not {value!r}")
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The number under `key`, or `default` where it is absent or null. Raises KeyError without one."""
    value = values.get(key)
    if value is None:
        if default is None:
            raise KeyError(key)
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} must be a number, not {value!r}")
    return float(value)


def _whole(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    number = _number(values, key, default)
    if number != int(number):
        raise ValueError(f"{key} must be a whole number, not {number}")
    return int(number)


def _size(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    size = _whole(values, key, default)
    if size < 1:
        raise ValueError(f"{key} must be at least 1, not {size}")
    return size


def _ids(values: Mapping[str, Any], key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """One whole number or a list of them; `default` where the key is absent or null."""
    value = values.get(key)
    if value is None:
        return default
    return tuple(_whole({key: item}, key) for item in (value if isinstance(value, list | tuple) else (value,)))
