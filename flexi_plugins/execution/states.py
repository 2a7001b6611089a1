"""Hidden states between blocks: in memory up to a number of bytes, in one unnamed file beyond it."""

from __future__ import annotations

import mmap
import tempfile
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from flexi_plugins.errors import FlexiError

LARGE = 2**23  # bytes of states that have pages of their own; the system maps no more than some 65,000 at once


class States:
    """Tensors by key. What does not fit in ``limit`` bytes is spilled to a file, which vanishes with the process.

    The newest is spilled: states are read again in the order in which they were made, so the oldest is wanted first.
    """

    def __init__(self, limit: float = float("inf")) -> None:
        self.limit = limit
        self.held = self.spilled = 0  # bytes in memory now; bytes written to the file so far
        self._memory: dict[Hashable, Tensor] = {}
        self._disk: dict[Hashable, tuple[int, Tensor]] = {}  # offset in the file, and dtype and shape as a meta tensor
        self._free: dict[int, list[int]] = {}  # bytes -> offsets of room that is free again
        self._file: Any = None

    def __contains__(self, key: Hashable) -> bool:
        return key in self._memory or key in self._disk

    def put(self, key: Hashable, states: Tensor) -> None:
        """Store a tensor under a key that is not in use."""
        assert key not in self, f"states {key} are there already"
        if self.held + states.nbytes <= self.limit:
            self._memory[key] = _apart(states)
            self.held += states.nbytes
        else:
            self._disk[key] = self._write(states), states.to("meta")

    def get(self, key: Hashable, device: torch.device | str = "cpu") -> Tensor:
        """Return the tensor of a key, on its device if it was held in memory, else on ``device``."""
        if key in self._memory:
            return self._memory[key]
        offset, like = self._disk[key]
        buffer = torch.empty(like.nbytes, dtype=torch.uint8)
        rest = memoryview(buffer.numpy().data)
        self._file.seek(offset)
        while count := self._file.readinto(rest):  # 2 GiB at most at a time
            rest = rest[count:]
        if rest:
            raise FlexiError(
                f"states: the file they were spilled to, in {tempfile.gettempdir()}, is shorter than what was written"
            )
        return buffer.view(like.dtype).view(like.shape).to(device)

    def limit_to(self, limit: float) -> None:
        """Hold at most so many bytes in memory from now on; spill the newest of what is held beyond that."""
        self.limit = limit
        while self.held > limit:
            key, states = next(reversed(self._memory.items()))
            self._disk[key] = self._write(states), states.to("meta")
            self.held -= self._memory.pop(key).nbytes

    def drop(self, unwanted: Callable[[Any], bool]) -> None:
        """Forget the tensors whose key is unwanted."""
        for key in [k for k in (*self._memory, *self._disk) if unwanted(k)]:
            self.pop(key)

    def pop(self, key: Hashable) -> None:
        """Forget the tensor of a key."""
        if key in self._memory:
            self.held -= self._memory.pop(key).nbytes
        else:
            offset, like = self._disk.pop(key)
            self._free.setdefault(like.nbytes, []).append(offset)
            if not self._disk:  # states of other sizes would not fit into the room that is free
                self._file.truncate(0)
                self._free.clear()

    def _write(self, states: Tensor) -> int:
        data = states.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            free = self._free.get(data.nbytes)
            offset = self._file.seek(free.pop()) if free else self._file.seek(0, 2)
            rest = data.data
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise FlexiError(
                f"states: expected room to spill {data.nbytes / 2**20:.0f} MiB to {tempfile.gettempdir()}, found: {error}; free "
                "some there, point TMPDIR to a larger disk, or give more memory (--memory)"
            ) from error
        self.spilled += data.nbytes
        return offset


def _apart(states: Tensor) -> Tensor:
    """Return a copy of large states, unless they are on a GPU, in pages of its own, which go back to the system with it.

    Kept among what a block computes with, they would leave holes in the allocator's memory that nothing fits into.
    """
    if states.device.type != "cpu" or states.nbytes < LARGE:
        return states
    pages = mmap.mmap(-1, states.nbytes, access=mmap.ACCESS_COPY)  # private to the process
    return torch.frombuffer(pages, dtype=states.dtype).view(states.shape).copy_(states)
