"""Named shapes of the Llama 4 family, and the config files that say so.

Owns the sizes, in the words of ModelConfig, and both spellings of config.json. Knows nothing of weights. Sources:
meta-llama/Llama-4-Scout-17B-16E-Instruct and Llama-4-Maverick-17B-128E-Instruct; the tiny shapes keep every
peculiarity of those at a size that a test can afford.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from actors.checkpoint.config import ModelConfig, RopeScaling, parse_model_config
from actors.checkpoint.expected import ExpertLayout
from actors.checkpoint.tokenizer_files import special_tokens
from actors.errors import ConfigError

ConfigStyle = Literal["old", "new"]
StoredExperts = Literal["fused", "fp8", "per_expert", "fp8_ffn", "int4", "fused_fp8"]
"""How a checkpoint stores routed experts; fp8_ffn and int4 have shared experts and dense layers in that form too."""

LAYOUTS: dict[StoredExperts, ExpertLayout] = {
    "fused": "fused",
    "fp8": "per_expert_fp8",
    "per_expert": "per_expert",
    "fp8_ffn": "per_expert_fp8",
    "int4": "per_expert_int4",
    "fused_fp8": "fused_fp8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What `make_model` needs to know. `moe_interval` 2 makes the odd layers MoE, 1 all of them.

    The first `base_vocab` ids are text, the control tokens follow, and rows up to `vocab_size` have no token, as in
    the real models.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    expert_width: int
    dense_width: int
    num_experts: int
    moe_interval: int
    base_vocab: int
    vocab_size: int
    chunk_tokens: int
    max_position_embeddings: int
    floor_scale: int
    use_qk_norm: bool
    rope_scaling: RopeScaling | None = None
    rope_theta: float = 500000.0
    nope_interval: int = 4
    experts_per_token: int = 1
    attn_scale: float = 0.1
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"


_TINY = ModelShape(
    hidden_size=96,
    num_layers=8,
    num_heads=10,
    num_kv_heads=2,
    head_dim=16,
    expert_width=64,
    dense_width=128,
    num_experts=8,
    moe_interval=2,
    base_vocab=512,
    vocab_size=576,
    chunk_tokens=32,
    max_position_embeddings=4096,
    floor_scale=8,
    use_qk_norm=False,
    dtype="float32",
)

_TINY_SCOUT = ModelShape(
    hidden_size=96,
    num_layers=8,
    num_heads=10,
    num_kv_heads=2,
    head_dim=16,
    expert_width=64,
    dense_width=128,
    num_experts=8,
    moe_interval=1,
    base_vocab=512,
    vocab_size=576,
    chunk_tokens=32,
    max_position_embeddings=4096,
    floor_scale=8,
    use_qk_norm=True,
    rope_scaling=RopeScaling(
        factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=64
    ),
    dtype="float32",
)

# Widths of whole INT4 groups, so that every form can be tested, in two shards too.
_TINY_WIDE = replace(_TINY, hidden_size=128, num_layers=4, expert_width=256, dense_width=512, num_experts=4)

# 100,512,256 parameters, 27.4 M of them active per token: embedding and head 8.4 M, attention 9.4 M, dense layers
# 4.7 M, shared experts 2.4 M, routers 0.1 M, routed experts 75.5 M.
_BENCH_MAVERICK = ModelShape(
    hidden_size=512,
    num_layers=12,
    num_heads=10,
    num_kv_heads=2,
    head_dim=64,
    expert_width=256,
    dense_width=512,
    num_experts=32,
    moe_interval=2,
    base_vocab=8128,
    vocab_size=8192,
    chunk_tokens=512,
    max_position_embeddings=8192,
    floor_scale=512,
    use_qk_norm=False,
    dtype="float32",
)

_MAVERICK = ModelShape(
    hidden_size=5120,
    num_layers=48,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    expert_width=8192,
    dense_width=16384,
    num_experts=128,
    moe_interval=2,
    base_vocab=200000,
    vocab_size=202048,
    chunk_tokens=8192,
    max_position_embeddings=1048576,
    floor_scale=8192,
    use_qk_norm=False,
)

_SCOUT = ModelShape(
    hidden_size=5120,
    num_layers=48,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    expert_width=8192,
    dense_width=16384,
    num_experts=16,
    moe_interval=1,
    base_vocab=200000,
    vocab_size=202048,
    chunk_tokens=8192,
    max_position_embeddings=10485760,
    floor_scale=8192,
    use_qk_norm=True,
    rope_scaling=RopeScaling(
        factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=8192
    ),
)

SHAPES: dict[str, ModelShape] = {
    "tiny": _TINY,
    "tiny-scout": _TINY_SCOUT,
    "tiny-wide": _TINY_WIDE,
    "bench-maverick": _BENCH_MAVERICK,
    "maverick": _MAVERICK,
    "scout": _SCOUT,
}


_FORMS: dict[str, StoredExperts] = {"fp8": "fp8", "int4": "int4"}


def named_shape(name: str) -> tuple[ModelShape, StoredExperts]:
    """A shape and its form by name: NAME as it is, NAME-fp8, NAME-int4. Raises ConfigError for what is not known.

    What is published under those words is meant: FP8 Maverick has quantized routed experts only, FP8 Scout shared ones
    too. Sources: meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8, RedHatAI's FP8-dynamic and w4a16 of Scout.
    """
    plain_name, _, form = name.rpartition("-")
    if form not in _FORMS or plain_name not in SHAPES:
        plain_name, form = name, ""
    if plain_name not in SHAPES:
        raise ConfigError("model", f"shape {name!r} is not known; known are {', '.join(sorted(SHAPES))}")
    if (plain_name, form) == ("scout", "fp8"):
        return SHAPES[plain_name], "fp8_ffn"
    return SHAPES[plain_name], _FORMS[form] if form else "fused"


def shape_config(shape: ModelShape, *, experts: StoredExperts = "fused", dtype: str = "auto") -> ModelConfig:
    """The ModelConfig of a checkpoint made from `shape`."""
    return parse_model_config(config_json(shape, experts=experts, dtype=dtype))


def config_json(
    shape: ModelShape,
    *,
    experts: StoredExperts = "fused",
    dtype: str = "auto",
    style: ConfigStyle = "new",
    nested: bool = False,
) -> dict[str, Any]:
    """A config.json that transformers loads. `nested` is the multimodal form that the hub's checkpoints have.

    `style` old is what the hub's files say (`rope_theta`, `interleave_moe_layer_step`), new what transformers 5 writes
    (`rope_parameters`, `layer_types`, `moe_layers`).
    """
    dtype = shape.dtype if dtype == "auto" else dtype
    text = _common(shape) | (_old_keys(shape) if style == "old" else _new_keys(shape))
    dtype_key = "torch_dtype" if style == "old" else "dtype"
    outer = {dtype_key: dtype} | _quantization(experts)
    if not nested:
        return {"architectures": ["Llama4ForCausalLM"], **text, **outer}
    specials = special_tokens(shape.base_vocab, shape.vocab_size)
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "boi_token_index": specials["<|image_start|>"],
        "eoi_token_index": specials["<|image_end|>"],
        "image_token_index": specials["<|patch|>"],
        "tie_word_embeddings": shape.tie_word_embeddings,
        "text_config": text | {dtype_key: dtype},
        **outer,
    }


def generation_config_json(shape: ModelShape) -> dict[str, Any]:
    """generation_config.json, with the sampling that the hub's instruct models recommend."""
    ids = _token_ids(shape)
    return {"do_sample": True, "temperature": 0.6, "top_p": 0.9, **ids}


def _token_ids(shape: ModelShape) -> dict[str, Any]:
    ids = special_tokens(shape.base_vocab, shape.vocab_size)
    return {
        "bos_token_id": ids["<|begin_of_text|>"],
        "eos_token_id": [ids["<|end_of_text|>"], ids["<|eom|>"], ids["<|eot|>"]],
        "pad_token_id": ids["<|finetune_right_pad|>"],
    }


def _common(shape: ModelShape) -> dict[str, Any]:
    return {
        "model_type": "llama4_text",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.expert_width,
        "intermediate_size_mlp": shape.dense_width,
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "attention_chunk_size": shape.chunk_tokens,
        "use_qk_norm": shape.use_qk_norm,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_temperature_tuning": True,
        "floor_scale": shape.floor_scale,
        "attn_scale": shape.attn_scale,
        "tie_word_embeddings": shape.tie_word_embeddings,
        **_token_ids(shape),
    }


def _old_keys(shape: ModelShape) -> dict[str, Any]:
    scaling = None if shape.rope_scaling is None else {"rope_type": "llama3", **asdict(shape.rope_scaling)}
    is_default = shape.nope_interval == 4
    return {
        "rope_theta": shape.rope_theta,
        "rope_scaling": scaling,
        "interleave_moe_layer_step": shape.moe_interval,
        "no_rope_layers": [] if is_default else _rotates(shape),  # empty stands for the default pattern
    }


def _new_keys(shape: ModelShape) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "default"}
    if shape.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **asdict(shape.rope_scaling)}
    return {
        "rope_parameters": {"rope_theta": shape.rope_theta, **scaling},
        "moe_layers": list(range(shape.moe_interval - 1, shape.num_layers, shape.moe_interval)),
        "interleave_moe_layer_step": shape.moe_interval,
        "no_rope_layers": _rotates(shape),
        "layer_types": ["chunked_attention" if rotates else "full_attention" for rotates in _rotates(shape)],
    }


def _rotates(shape: ModelShape) -> list[int]:
    return [int((layer + 1) % shape.nope_interval != 0) for layer in range(shape.num_layers)]


_NEVER_QUANTIZED = ["re:.*self_attn.*", "re:.*router.*", "re:.*vision_model.*", "re:.*multi_modal_projector.*",
                    "re:.*lm_head"]  # fmt: skip
_FFN = ["re:.*shared_expert.*", "re:.*feed_forward\\.(gate|up|down)_proj.*"]

_FP8_GROUP: dict[str, Any] = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False,
                "observer": "minmax"},
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True},
}  # fmt: skip

_INT4_GROUP: dict[str, Any] = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True,
                "dynamic": False, "observer": "minmax", "actorder": None},
    "input_activations": None,
}  # fmt: skip


def _quantization(experts: StoredExperts) -> dict[str, Any]:
    """The quantization_config of a checkpoint, as llm-compressor states it; the fused form's as transformers does."""
    if experts in ("fused", "per_expert"):
        return {}
    if experts == "fused_fp8":
        kept = ["self_attn", "router", "shared_expert", "feed_forward.gate_proj", "feed_forward.up_proj",
                "feed_forward.down_proj", "lm_head"]  # fmt: skip
        return {"quantization_config": {"quant_method": "fbgemm_fp8", "modules_to_not_convert": kept}}
    is_int4 = experts == "int4"
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if is_int4 else "float-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": _NEVER_QUANTIZED + (_FFN if experts == "fp8" else []),
        "config_groups": {"group_0": _INT4_GROUP if is_int4 else _FP8_GROUP},
    }
    return {"quantization_config": config}
