"""What the ingress knows of the served model.

Owns the value that the router's description is read into and the model's sampling defaults. Knows nothing of weights.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from actors.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """One served model. `model` is the checkpoint's directory, `max_model_len` in tokens of prompt and output."""

    name: str
    model: str
    max_model_len: int
    vocab_size: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    created_s: int

    @staticmethod
    def parse(values: dict[str, Any]) -> "ModelCard":
        """Reads the plain dict that the router's `describe` returns. Raises msgspec.ValidationError."""
        return msgspec.convert(values, ModelCard)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What a client that is silent about sampling gets."""

    temperature: float = 1.0
    top_p: float = 1.0


def read_sampling_defaults(directory: Path) -> SamplingDefaults:
    """Reads temperature and top_p of generation_config.json, where there is one. Raises CheckpointError."""
    path = directory / "generation_config.json"
    if not path.exists():
        return SamplingDefaults()
    try:
        values = json.loads(path.read_text())
        return SamplingDefaults(
            temperature=_number(values, "temperature"),
            top_p=_number(values, "top_p"),
        )
    except (ValueError, TypeError, AttributeError) as e:
        raise CheckpointError(str(path), None, f"cannot be used: {e}") from e


def _number(values: dict[str, Any], key: str) -> float:
    value = values.get(key)
    return 1.0 if value is None else float(value)
