"""Byte-range reads from safetensors files straight into final tensors.

Owns the file handles, the pool of reads in flight, the bounded staging buffers, and the count of bytes read. Knows
nothing of layers or experts: it is told which part of which tensor goes where.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import Tensor

from actors.checkpoint.headers import TensorInfo
from actors.checkpoint.pieces import Piece
from actors.checkpoint.staging import StagingRing
from actors.errors import CheckpointError

Progress = Callable[[int, int], None]  # (done_bytes, total_bytes)

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

READS_IN_FLIGHT = {"cpu": 8, "cuda": 12}
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 16 << 20}  # one read, and one staging buffer
BUFFERS_PER_READ = 2  # one is filled while the other is copied: 384 MiB of pinned memory on CUDA, whatever is read


class Reader:
    """Reads pieces. `read_bytes` counts what the operating system handed over, for the proof that no more was read."""

    def __init__(self, reads_in_flight: int | None = None, block_bytes: int | None = None) -> None:
        """None is what suits the device that is read to."""
        self.read_bytes = 0
        self._reads_in_flight = reads_in_flight
        self._block_bytes = block_bytes

    def read(self, pieces: Iterable[Piece], progress: Progress | None = None) -> None:
        """Fills every piece's target, all on one device; several reads are in flight, in the order of the files.

        `progress` is called from this thread, once at the start and once per block. On CUDA the copies are queued on
        this thread's current stream and may not have ended. Raises CheckpointError.
        """
        pieces = list(pieces)
        device = pieces[0].target.device if pieces else torch.device("cpu")
        block_bytes = self._block_bytes or BLOCK_BYTES[device.type]
        threads = self._reads_in_flight or READS_IN_FLIGHT[device.type]
        blocks = [block for piece in pieces for block in piece.blocks(block_bytes)]
        blocks.sort(key=lambda block: (block.info.file, block.info.begin, block.first_row))
        total_bytes, done_bytes = sum(block.num_bytes for block in blocks), 0
        report = progress if progress is not None else lambda done, total: None
        report(0, total_bytes)
        ring = StagingRing(BUFFERS_PER_READ * threads, block_bytes, device)
        descriptors: dict[Path, int] = {}
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        pool = ThreadPoolExecutor(threads, "checkpoint-reader", initializer=_use_stream, initargs=(stream,))
        try:
            for block in blocks:
                if block.info.file not in descriptors:
                    descriptors[block.info.file] = _open(block.info.file)
            for future in as_completed(
                [pool.submit(_read_block, descriptors[block.info.file], block, ring) for block in blocks]
            ):
                done_bytes += future.result()
                self.read_bytes += future.result()
                report(done_bytes, total_bytes)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for descriptor in descriptors.values():
                os.close(descriptor)


def _read_block(descriptor: int, block: Piece, ring: StagingRing) -> int:
    """Reads one block into its target, straight where it can, else through a staging buffer. Returns bytes read."""
    target, stored = block.target, TORCH_DTYPES[block.info.dtype]
    is_plain = target.dtype == stored and block.is_contiguous
    if is_plain and target.device.type == "cpu" and target.is_contiguous():
        return _read_rows(descriptor, block, target)
    buffer = ring.take(block.num_bytes)
    try:
        rows = buffer.room[: block.num_bytes].view(stored).view(block.num_rows, -1)
        count = _read_rows(descriptor, block, rows)
        _copy(rows, 0 if block.reads_slices else block.first_column, target)
    finally:
        ring.give_back(buffer)
    return count


def _copy(rows: Tensor, first_column: int, target: Tensor) -> None:
    """To the device as stored (fewest bytes), cut and converted there, and only then turned: on a CPU, converting while
    turning is seven times slower.
    """
    if rows.dtype == target.dtype and rows.shape == target.shape and target.is_contiguous():
        target.copy_(rows, non_blocking=True)
        return
    moved = rows.to(target.device, non_blocking=True)
    target.copy_(moved[:, first_column : first_column + target.shape[1]].to(target.dtype))


def _read_rows(descriptor: int, block: Piece, target: Tensor) -> int:
    """The block's rows, or where that is less than them the wanted part of each, into a contiguous CPU tensor."""
    info = block.info
    begin = info.begin + block.first_row * block.stored_row_bytes
    if not block.reads_slices:
        return _read_into(descriptor, begin, target, info)
    begin += block.first_column * info.item_bytes
    return sum(_read_into(descriptor, begin + i * block.stored_row_bytes, row, info) for i, row in enumerate(target))


def _use_stream(stream: torch.cuda.Stream | None) -> None:
    if stream is not None:
        torch.cuda.set_stream(stream)


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise CheckpointError(str(file), None, f"cannot be read: {e.strerror}") from e


def _read_into(descriptor: int, offset: int, target: Tensor, info: TensorInfo) -> int:
    """Fills a contiguous CPU tensor from `offset`. Returns the bytes read. Raises CheckpointError on a short read."""
    room = target.reshape(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(room):
        try:
            count = os.preadv(descriptor, [room[done:]], offset + done)
        except OSError as e:
            raise CheckpointError(str(info.file), info.name, f"cannot be read: {e.strerror}") from e
        if count == 0:
            problem = f"ended at byte {offset + done} while the tensor goes on to {info.end}"
            raise CheckpointError(str(info.file), info.name, problem)
        done += count
    return done
