"""The training forward: the Llama 4 text model as one differentiable function of its weights.

Weights are a plain dict under the hub's names and in the hub's shapes (fused experts, input-major), so that a
checkpoint is this dict on disk. Owns the arithmetic and the load-balancing loss; a test holds its logits against the
served forward. Knows nothing of data or optimizers. Several conversations share a row: none sees another.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody knows)

from actors.checkpoint.config import ModelConfig
from actors.checkpoint.expected import expected_tensors

Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Output:
    """logits_BLV; balance: the load-balancing loss, 1 where all experts are used alike; tokens_ME routed tokens."""

    logits_BLV: Tensor
    balance: Tensor
    tokens_ME: Tensor


def initial_weights(config: ModelConfig, seed: int) -> Weights:
    """fp32 weights to begin training with: normal, and small where a layer adds to the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, rule in expected_tensors(config, "fused").items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(rule.shape)
            continue
        is_added = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
        deviation = 0.02 if not is_added else 0.02 / (2 * config.num_layers) ** 0.5
        weights[name] = torch.randn(rule.shape, generator=generator) * deviation
    return weights


def forward(weights: Weights, config: ModelConfig, ids_BL: Tensor, positions_BL: Tensor) -> Output:
    """Logits of every position. A conversation begins wherever a position is 0."""
    masks = _masks(config, positions_BL)
    angles_BL1R = _angles(config, positions_BL)
    heats_BL11 = _temperatures(config, positions_BL)
    h_BLD = F.embedding(ids_BL, weights["model.embed_tokens.weight"])
    balances, tokens = [], []
    for layer in range(config.num_layers):
        name = f"model.layers.{layer}."
        x_BLD = _norm(h_BLD, weights[name + "input_layernorm.weight"], config)
        uses_rope = layer in config.rope_layers
        mask = masks[config.is_chunked(layer)]
        h_BLD = h_BLD + _attention(weights, name, config, x_BLD, mask, angles_BL1R if uses_rope else None, heats_BL11)
        x_BLD = _norm(h_BLD, weights[name + "post_attention_layernorm.weight"], config)
        if config.is_moe(layer):
            y_BLD, balance, tokens_E = _mixture(weights, name + "feed_forward.", x_BLD)
            balances.append(balance)
            tokens.append(tokens_E)
        else:
            y_BLD = _swiglu(weights, name + "feed_forward.", x_BLD)
        h_BLD = h_BLD + y_BLD
    h_BLD = _norm(h_BLD, weights["model.norm.weight"], config)
    logits_BLV = F.linear(h_BLD, weights["lm_head.weight"])
    return Output(logits_BLV, torch.stack(balances).mean(), torch.stack(tokens))


def _masks(config: ModelConfig, positions_BL: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, 1, L, L] of the full and of the chunked layers: what each position sees."""
    conversations_BL = (positions_BL == 0).cumsum(dim=1)
    same_BLL = conversations_BL[:, :, None] == conversations_BL[:, None, :]
    places = torch.arange(positions_BL.shape[1], device=positions_BL.device)
    full_BLL = same_BLL & (places[:, None] >= places[None, :])
    chunks_BL = positions_BL // max(config.chunk_tokens, 1)
    chunked_BLL = full_BLL & (chunks_BL[:, :, None] == chunks_BL[:, None, :])
    return full_BLL[:, None], chunked_BLL[:, None]


def _angles(config: ModelConfig, positions_BL: Tensor) -> Tensor:
    exponents_R = torch.arange(0, config.head_dim, 2, device=positions_BL.device).float() / config.head_dim
    return (positions_BL.float()[:, :, None] / config.rope_theta**exponents_R)[:, :, None]


def _temperatures(config: ModelConfig, positions_BL: Tensor) -> Tensor:
    steps_BL = torch.log1p(((positions_BL + 1) // config.floor_scale).float())
    strength = config.attn_scale if config.temperature_tuning else 0.0
    return (1 + strength * steps_BL)[:, :, None, None]


def _norm(x_BLD: Tensor, weight_D: Tensor, config: ModelConfig) -> Tensor:
    return F.rms_norm(x_BLD.float(), weight_D.shape, weight_D, config.rms_norm_eps)


def _attention(
    weights: Weights, name: str, config: ModelConfig, x_BLD: Tensor, mask: Tensor, angles: Tensor | None, heats: Tensor
) -> Tensor:
    q_BLHd, k_BLHd, v_BLHd = (
        F.linear(x_BLD, weights[f"{name}self_attn.{part}_proj.weight"]).unflatten(-1, (-1, config.head_dim))
        for part in "qkv"
    )
    if angles is None:
        q_BLHd = (q_BLHd * heats).to(v_BLHd.dtype)
    else:
        q_BLHd, k_BLHd = _rotate(q_BLHd, angles), _rotate(k_BLHd, angles)
    k_BLHd, v_BLHd = (t.repeat_interleave(config.queries_per_kv, dim=2) for t in (k_BLHd, v_BLHd))
    out_BHLd = F.scaled_dot_product_attention(
        q_BLHd.transpose(1, 2), k_BLHd.transpose(1, 2), v_BLHd.transpose(1, 2), attn_mask=mask
    )
    return F.linear(out_BHLd.transpose(1, 2).flatten(2), weights[f"{name}self_attn.o_proj.weight"])


def _rotate(x_BLHd: Tensor, angles_BL1R: Tensor) -> Tensor:
    """Turns the pairs (2j, 2j + 1) of every head."""
    even, odd = x_BLHd.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles_BL1R.cos(), angles_BL1R.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x_BLHd.dtype)


def _swiglu(weights: Weights, name: str, x_BLD: Tensor) -> Tensor:
    gate_BLF, up_BLF = (F.linear(x_BLD, weights[f"{name}{part}_proj.weight"]) for part in ("gate", "up"))
    return F.linear(F.silu(gate_BLF) * up_BLF, weights[f"{name}down_proj.weight"])


def _mixture(weights: Weights, name: str, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shared expert plus the best routed one, whose input the sigmoid of its logit scales.

    All experts are computed and all but one masked: at this size that is quicker than sorting tokens, and it compiles.
    """
    with torch.autocast(x_BLD.device.type, enabled=False):  # near ties should not depend on rounding
        logits_BLE = F.linear(x_BLD.float(), weights[name + "router.weight"])
    num_experts = logits_BLE.shape[-1]
    best_BL1, chosen_BL1 = logits_BLE.max(dim=-1, keepdim=True)
    is_chosen_BLE = F.one_hot(chosen_BL1[..., 0], num_experts)
    gate_up_EDN, down_EFD = weights[name + "experts.gate_up_proj"], weights[name + "experts.down_proj"]
    gate_up_DM = gate_up_EDN.transpose(0, 1).flatten(1)
    scaled_BLD = (x_BLD * best_BL1.sigmoid()).to(x_BLD.dtype)
    gate_up_BLEN = (scaled_BLD @ gate_up_DM).unflatten(-1, (num_experts, -1))
    gate_BLEF, up_BLEF = gate_up_BLEN.chunk(2, dim=-1)
    inner_BLEF = F.silu(gate_BLEF) * up_BLEF * is_chosen_BLE[..., None].to(gate_BLEF.dtype)
    routed_BLD = inner_BLEF.flatten(2) @ down_EFD.flatten(0, 1)
    tokens_E = is_chosen_BLE.sum(dim=(0, 1))
    return _swiglu(weights, name + "shared_expert.", x_BLD) + routed_BLD, _balance(logits_BLE, tokens_E), tokens_E


def _balance(logits_BLE: Tensor, tokens_E: Tensor) -> Tensor:
    """E * sum over experts of (share of tokens) * (mean probability). Source: Switch Transformer, equation 4."""
    probabilities_E = logits_BLE.softmax(dim=-1).mean(dim=(0, 1))
    shares_E = tokens_E / tokens_E.sum()
    return len(tokens_E) * (probabilities_E * shares_E).sum()
