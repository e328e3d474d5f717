"""Host buffers that reads pass through on their way to a device: few, of one size, used over and over.

Owns their memory and the wait until a copy has left one. Knows nothing of files.
"""

import queue

import torch
from torch import Tensor


class StagingRing:
    """At most `num_buffers` buffers, made when they are first needed; pinned for a GPU. Any thread may use it."""

    def __init__(self, num_buffers: int, buffer_bytes: int, device: torch.device) -> None:
        self._buffer_bytes = buffer_bytes
        self._device = device
        self._free: queue.LifoQueue[_Buffer | None] = queue.LifoQueue()
        for _ in range(num_buffers):
            self._free.put(None)

    def take(self, num_bytes: int) -> "_Buffer":
        """A buffer of at least `num_bytes` that nothing reads any more. Waits for one."""
        buffer = self._free.get()
        if buffer is None or buffer.room.numel() < num_bytes:
            size = max(num_bytes, self._buffer_bytes)
            buffer = _Buffer(torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda"))
        buffer.wait()
        return buffer

    def give_back(self, buffer: "_Buffer") -> None:
        """The copies out of it are queued on this thread's current stream; it is used again when they have ended."""
        if self._device.type == "cuda":
            buffer.left = torch.cuda.Event()
            buffer.left.record(torch.cuda.current_stream(self._device))
        self._free.put(buffer)


class _Buffer:
    def __init__(self, room: Tensor) -> None:
        self.room = room
        self.left: torch.cuda.Event | None = None

    def wait(self) -> None:
        if self.left is not None:
            self.left.synchronize()
