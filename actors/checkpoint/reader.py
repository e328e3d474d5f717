"""Byte-range reads from safetensors files straight into final tensors.

Owns the file handles, the pool of reads in flight, the bounded staging buffers, and the count of bytes read. Knows
nothing of layers or experts: it is told which part of which tensor goes where.
"""

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import Tensor

from actors.checkpoint.headers import TensorInfo
from actors.checkpoint.pieces import Piece
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

READS_IN_FLIGHT = 8
BLOCK_BYTES = 8 * 1024 * 1024  # one read; also the staging buffer of each thread


class Reader:
    """Reads pieces. `read_bytes` counts what the operating system handed over, for the proof that no more was read."""

    def __init__(self, reads_in_flight: int = READS_IN_FLIGHT, block_bytes: int = BLOCK_BYTES) -> None:
        self.read_bytes = 0
        self._reads_in_flight = reads_in_flight
        self._block_bytes = block_bytes
        self._local = threading.local()

    def read(self, pieces: Iterable[Piece], progress: Progress | None = None) -> None:
        """Fills every piece's target; several reads are in flight.

        `progress` is called from this thread, once at the start and once per block. On CUDA what must still be turned
        or converted is queued on this thread's current stream. Raises CheckpointError.
        """
        blocks = [block for piece in pieces for block in piece.blocks(self._block_bytes)]
        total_bytes, done_bytes = sum(block.num_bytes for block in blocks), 0
        report = progress if progress is not None else lambda done, total: None
        report(0, total_bytes)
        descriptors: dict[Path, int] = {}
        pool = ThreadPoolExecutor(
            self._reads_in_flight, "checkpoint-reader", initializer=_use_stream, initargs=(_stream_of(blocks),)
        )
        try:
            for block in blocks:
                if block.info.file not in descriptors:
                    descriptors[block.info.file] = _open(block.info.file)
            for future in as_completed(
                [pool.submit(self._read_block, descriptors[block.info.file], block) for block in blocks]
            ):
                done_bytes += future.result()
                self.read_bytes += future.result()
                report(done_bytes, total_bytes)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for descriptor in descriptors.values():
                os.close(descriptor)

    def _read_block(self, descriptor: int, block: Piece) -> int:
        """Reads one block into its target, straight where it can, else through this thread's staging buffer."""
        target, info = block.target, block.info
        stored = TORCH_DTYPES[info.dtype]
        offset = info.begin + block.first_row * block.row_bytes
        if target.device.type == "cpu" and target.dtype == stored and target.is_contiguous():
            return _read_into(descriptor, offset, target, info)
        staged = self._staging(block.num_bytes, target.device).view(stored).view(target.shape)
        count = _read_into(descriptor, offset, staged, info)
        # To the device as stored (fewest bytes), converted there, and only then turned: on a CPU, converting while
        # turning is seven times slower.
        target.copy_(staged.to(target.device).to(target.dtype))
        return count

    def _staging(self, num_bytes: int, device: torch.device) -> Tensor:
        buffer: Tensor | None = getattr(self._local, "buffer", None)
        if buffer is None or buffer.numel() < num_bytes:
            buffer = torch.empty(max(num_bytes, self._block_bytes), dtype=torch.uint8, pin_memory=device.type == "cuda")
            self._local.buffer = buffer
        return buffer[:num_bytes]


def _stream_of(blocks: Sequence[Piece]) -> torch.cuda.Stream | None:
    """This thread's stream on the device that is read to; None on a CPU."""
    device = blocks[0].target.device if blocks else torch.device("cpu")
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


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
