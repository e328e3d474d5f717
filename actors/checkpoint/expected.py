"""Which tensors a checkpoint must hold, from its config alone: one table.

Owns names, shapes and dtypes of the text model. Knows nothing of files. Source: the parameters of transformers'
Llama4ForCausalLM; routed experts as their layout module states.
"""

import math
from collections.abc import Iterable
from typing import Literal

from actors.checkpoint.config import ModelConfig
from actors.checkpoint.headers import ITEM_BYTES
from actors.checkpoint.layouts import fused, per_expert
from actors.checkpoint.layouts.rules import PLAIN_DTYPES, TensorRule, experts_prefix, linear_rules
from actors.checkpoint.quantization import ExpertFormat

ExpertLayout = Literal["none", "fused", "fused_fp8", "per_expert", "per_expert_fp8", "per_expert_int4"]

FORM_OF_LAYOUT: dict[ExpertLayout, ExpertFormat] = {
    "none": "plain",
    "fused": "plain",
    "fused_fp8": "fp8",
    "per_expert": "plain",
    "per_expert_fp8": "fp8",
    "per_expert_int4": "int4",
}

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

UNUSED_PREFIXES = ("vision_model.", "multi_modal_projector.")  # known, but text serving does not read them


def expected_tensors(config: ModelConfig, layout: ExpertLayout) -> dict[str, TensorRule]:
    """Every tensor of the text model under its text-only name (`model.…`, `lm_head.weight`)."""
    hidden, vocab = config.hidden_size, config.vocab_size
    rules = {
        "model.embed_tokens.weight": TensorRule(shape=(vocab, hidden)),
        "model.norm.weight": TensorRule(shape=(hidden,)),
        "lm_head.weight": TensorRule(shape=(vocab, hidden), optional=config.tie_word_embeddings),
    }
    for layer in range(config.num_layers):
        for name, shape in _layer_shapes(config, layer).items():
            rules[f"model.layers.{layer}.{name}.weight"] = TensorRule(shape=shape)
        for name, linear_shape in ffn_shapes(config, layer).items():
            rules |= linear_rules(name, linear_shape, ffn_form(config))
    if layout.startswith("fused"):
        rules |= fused.expected(config, FORM_OF_LAYOUT[layout])
    elif layout != "none":
        rules |= per_expert.expected(config, FORM_OF_LAYOUT[layout])
    return rules


def ffn_form(config: ModelConfig) -> ExpertFormat:
    """How shared experts and dense layers are stored."""
    return config.quantized if config.quantizes_ffn else "plain"


def _layer_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, queries, keys = (
        config.hidden_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
    }
    if config.is_moe(layer):
        shapes["feed_forward.router"] = (config.num_experts, hidden)
    return shapes


def ffn_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """The linears of a layer's shared expert or dense FFN, by name without `.weight`: gate, up, down."""
    is_moe, hidden = config.is_moe(layer), config.hidden_size
    width = config.expert_width if is_moe else config.dense_width
    prefix = f"model.layers.{layer}.feed_forward." + ("shared_expert." if is_moe else "")
    return {
        prefix + "gate_proj": (width, hidden),
        prefix + "up_proj": (width, hidden),
        prefix + "down_proj": (hidden, width),
    }


def num_checkpoint_bytes(config: ModelConfig, layout: ExpertLayout) -> int:
    """Bytes of all weights of such a checkpoint, unquantized ones in the config's dtype."""
    num_bytes = 0
    for rule in expected_tensors(config, layout).values():
        item_bytes = DTYPE_BYTES[config.dtype] if rule.dtypes == PLAIN_DTYPES else ITEM_BYTES[rule.dtypes[0]]
        num_bytes += math.prod(rule.shape) * item_bytes
    return num_bytes


def detect_layout(names: Iterable[str], config: ModelConfig) -> ExpertLayout:
    """Which layout the routed experts are stored in, by what the index holds."""
    if not config.moe_layers:
        return "none"
    prefixes = tuple(experts_prefix(layer) for layer in config.moe_layers)
    layout: ExpertLayout = "fused"
    for name in names:
        if not name.startswith(prefixes):
            continue
        if name.endswith(".weight_packed"):
            return "per_expert_int4"
        if name.endswith("_proj_scale"):
            return "fused_fp8"
        if name.endswith(".weight_scale") and layout != "per_expert_fp8":
            layout = "per_expert_fp8"
        elif name.partition(".experts.")[2][:1].isdigit() and layout == "fused":
            layout = "per_expert"
    return layout
