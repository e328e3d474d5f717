"""What a config's `quantization_config` announces, in our words.

Owns which quantizations are served and the refusal of all others. Knows nothing of the tensors that are really there.
Sources: compressed-tensors (float-quantized, pack-quantized), transformers' fbgemm_fp8.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

ExpertFormat = Literal["plain", "fp8", "int4"]

INT4_GROUP = 128  # columns that share a scale

_FP8_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
_FP8_INPUTS = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
_INT4_WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True, "group_size": INT4_GROUP}
_KNOWN = "compressed-tensors float-quantized and pack-quantized, fbgemm_fp8"


@dataclass(frozen=True, slots=True)
class Quantization:
    """`form` of the routed experts; whether shared experts and dense layers have it too, as far as the config says."""

    form: ExpertFormat = "plain"
    includes_ffn: bool = False


def parse_quantization(values: Mapping[str, Any], ffn_modules: Iterable[str]) -> Quantization:
    """Reads a quantization_config (empty: there is none). `ffn_modules`: names of shared and dense linears to look for
    among what it ignores. Raises ValueError for any scheme that is not served, naming what is wrong with it.
    """
    if not values:
        return Quantization()
    method, form = values.get("quant_method"), values.get("format")
    if method == "fbgemm_fp8":
        ignored = values.get("modules_to_not_convert") or ()
        return Quantization("fp8", not _ignores([f"re:.*{re.escape(name)}" for name in ignored], ffn_modules))
    if method != "compressed-tensors" or form not in ("float-quantized", "pack-quantized"):
        raise ValueError(f"quantization_config: {method!r} with format {form!r} is not known; known: {_KNOWN}")
    for group in _groups(values):
        if form == "float-quantized":
            _demand(group, "weights", _FP8_WEIGHTS)
            _demand(group, "input_activations", _FP8_INPUTS)
        else:
            _demand(group, "weights", _INT4_WEIGHTS)
            _refuse_reordering(group)
    includes_ffn = not _ignores(values.get("ignore") or (), ffn_modules)
    return Quantization("fp8" if form == "float-quantized" else "int4", includes_ffn)


def _groups(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = values.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
        raise ValueError("quantization_config: config_groups does not say how weights are quantized")
    return list(groups.values())


def _demand(group: Mapping[str, Any], part: str, wanted: Mapping[str, Any]) -> None:
    stated = group.get(part)
    stated = stated if isinstance(stated, Mapping) else {}
    for key, value in wanted.items():
        if stated.get(key) != value:
            raise ValueError(f"quantization_config: {part} have {key} {stated.get(key)!r}, which must be {value!r}")


def _refuse_reordering(group: Mapping[str, Any]) -> None:
    if group["weights"].get("actorder") == "group":
        raise ValueError("quantization_config: weights with actorder 'group' (weight_g_idx) are not supported")
    if group.get("input_activations"):
        raise ValueError("quantization_config: input_activations beside 4-bit weights are not supported")


def _ignores(ignored: Iterable[str], modules: Iterable[str]) -> bool:
    """Whether any of `modules`, with or without the multimodal prefix, is named or matched (`re:`)."""
    names = [prefix + module for module in modules for prefix in ("", "language_model.")]
    try:
        return any(
            re.match(entry[3:], name) is not None if entry.startswith("re:") else entry == name
            for entry in map(str, ignored)
            for name in names
        )
    except re.error as e:
        raise ValueError(f"quantization_config: what is ignored has a pattern that is none: {e}") from e
