"""One safetensors file's header: which tensors it holds and at which bytes.

Owns the file format (eight bytes of little-endian length, JSON, data) and what can be wrong with it. Knows nothing of
models, of more than one file, or of torch (a process without tensors reads headers too). Source: the format's
description in the safetensors repository.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct

from actors.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit; more is not a header

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies. `dtype` as safetensors spells it; [begin, end) are bytes of `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]


class _Entry(Struct, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Reads a file's header, once, and nothing else of it.

    Returns the tensors by their name in the file. Raises CheckpointError: missing, truncated or malformed.
    """
    try:
        with file.open("rb") as stream:
            size_bytes = os.fstat(stream.fileno()).st_size
            header = _read_json(file, stream, size_bytes)
    except OSError as e:
        raise CheckpointError(str(file), None, f"cannot be read: {e.strerror}") from e
    data_begin = 8 + len(header)
    tensors = _decode(file, header, data_begin)
    _check_extent(file, tensors, data_begin, size_bytes)
    return tensors


def _read_json(file: Path, stream: BinaryIO, size_bytes: int) -> bytes:
    prefix = stream.read(8)
    if len(prefix) < 8:
        raise CheckpointError(str(file), None, f"is truncated: {size_bytes} bytes cannot hold a safetensors header")
    length: int = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(str(file), None, f"malformed header: it claims {length} bytes of JSON")
    header = stream.read(length)
    if len(header) < length:
        raise CheckpointError(str(file), None, f"is truncated inside its header: {size_bytes} of {8 + length} bytes")
    return header


def _decode(file: Path, header: bytes, data_begin: int) -> dict[str, TensorInfo]:
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise CheckpointError(str(file), None, f"malformed header: {e}") from e
    raw.pop("__metadata__", None)
    decoder = msgspec.json.Decoder(_Entry)
    tensors = {}
    for name, value in raw.items():
        try:
            entry = decoder.decode(value)
        except msgspec.DecodeError as e:
            raise CheckpointError(str(file), name, f"malformed header: {e}") from e
        tensors[name] = _info(file, name, entry, data_begin)
    return tensors


def _info(file: Path, name: str, entry: _Entry, data_begin: int) -> TensorInfo:
    if entry.dtype not in ITEM_BYTES:
        raise CheckpointError(str(file), name, f"malformed header: dtype {entry.dtype!r} is not known")
    begin, end = entry.data_offsets
    expected_bytes = math.prod(entry.shape) * ITEM_BYTES[entry.dtype]
    if begin < 0 or min(entry.shape, default=0) < 0 or end - begin != expected_bytes:
        raise CheckpointError(
            str(file),
            name,
            f"malformed header: {entry.dtype} of shape {list(entry.shape)} takes {expected_bytes} bytes, "
            f"data_offsets are [{begin}, {end}]",
        )
    return TensorInfo(
        name=name, file=file, dtype=entry.dtype, shape=entry.shape, begin=data_begin + begin, end=data_begin + end
    )


def _check_extent(file: Path, tensors: dict[str, TensorInfo], data_begin: int, size_bytes: int) -> None:
    """The tensors must cover the data without gap or overlap, and the file must end where they do."""
    position = data_begin
    for info in sorted(tensors.values(), key=lambda info: (info.begin, info.end)):
        if info.begin != position:
            raise CheckpointError(
                str(file), info.name, f"malformed header: its data begins at byte {info.begin}, not at {position}"
            )
        position = info.end
        if position > size_bytes:
            raise CheckpointError(
                str(file), info.name, f"is truncated: the tensor ends at byte {position}, the file has {size_bytes}"
            )
    if size_bytes > position:
        raise CheckpointError(str(file), None, f"has {size_bytes - position} bytes more than its header says")
