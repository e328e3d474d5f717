"""Which part of the weights one of several tensor-parallel ranks holds.

Owns the division. Knows nothing of groups or collectives: the sum over ranks is the caller's.
"""

from dataclasses import dataclass

from actors.checkpoint.config import ModelConfig
from actors.checkpoint.quantization import INT4_GROUP
from actors.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Part `index` of `of` equal ones. Heads, widths of FFNs and of experts, and the head's vocabulary are divided."""

    index: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise ValueError(f"there is no shard {self.index} of {self.of}")

    def part(self, size: int) -> range:
        """Its share of `size` things, which `check_shard` has found to divide."""
        share = size // self.of
        return range(self.index * share, (self.index + 1) * share)


WHOLE = Shard()


def check_shard(config: ModelConfig, of: int) -> None:
    """Raises ConfigError if the model cannot be divided over `of` ranks."""
    int4_ffn = config.quantizes_ffn and config.quantized == "int4"
    has_dense = len(config.moe_layers) < config.num_layers
    sizes = {
        "attention heads": (config.num_heads, 1),
        "key-value heads": (config.num_kv_heads, 1),
        "rows of the vocabulary": (config.vocab_size, 1),
        "columns of a shared expert": (config.expert_width if config.moe_layers else 0, INT4_GROUP if int4_ffn else 1),
        "columns of a dense layer": (config.dense_width if has_dense else 0, INT4_GROUP if int4_ffn else 1),
    }
    for what, (size, unit) in sizes.items():
        _check_divides("attention_tp", what, size, of, unit)


def check_expert_shard(config: ModelConfig, of: int) -> None:
    """Raises ConfigError if each routed expert cannot be divided over `of` ranks."""
    width = config.expert_width if config.moe_layers else 0
    unit = INT4_GROUP if config.quantized == "int4" else 1
    _check_divides("expert_tp", "columns of a routed expert", width, of, unit)


def _check_divides(key: str, what: str, size: int, of: int, unit: int) -> None:
    if size % (of * unit):
        whole = f" in whole groups of {unit}" if unit > 1 else ""
        raise ConfigError(key, f"{size} {what} cannot be divided by {of}{whole}")
