"""Which names of tensors a checkpoint directory announces.

Owns the index file. Knows nothing of what the tensors are, and looks at no shard unless the directory has a single one.
"""

from pathlib import Path

import msgspec

from actors.checkpoint.headers import read_header
from actors.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def stored_names(directory: Path) -> frozenset[str]:
    """Names as they are stored; none where there are no weights. Raises CheckpointError if they cannot be read."""
    if (directory / SINGLE_FILE).exists():
        return frozenset(read_header(directory / SINGLE_FILE))
    return frozenset(read_weight_map(directory / INDEX_FILE)) if (directory / INDEX_FILE).exists() else frozenset()


def read_weight_map(file: Path) -> dict[str, str]:
    """Name of every tensor -> the shard that holds it. Raises CheckpointError."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Index).weight_map
    except OSError as e:
        raise CheckpointError(str(file), None, f"cannot be read: {e.strerror}") from e
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise CheckpointError(str(file), None, f"malformed index: {e}") from e
