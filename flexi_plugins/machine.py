"""Where models run: the device, the compute dtype it has, and how much memory weights and hidden states may take."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flexi_plugins.errors import FlexiError, unknown

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
FREE_SHARE = 0.7  # of what is free, taken where no limit is given
GROUP = Path("/sys/fs/cgroup")  # of the container, where there is one
LIMIT_SHARE = 0.92  # of a limit, the rest is left to what allocators waste


def float_dtype(name: str, known: Sequence[str] = DTYPES) -> torch.dtype:
    """Return torch's dtype of a name, or raise: ``known`` are the names that the error lists."""
    import torch

    if name not in DTYPES:
        raise FlexiError(unknown("dtype", name, known))
    return getattr(torch, name)


@dataclass(frozen=True)
class Machine:
    """device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1". memory: bytes that the process may take.

    On a GPU memory is that of the GPU. None: most of what is free.
    """

    device: str = "auto"
    memory: int | None = None

    @property
    def torch_device(self) -> torch.device:
        """The device; raise where torch does not know it or has none."""
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).split("\n")[0]
            raise FlexiError(f"device {self.device!r}: expected cpu or a GPU that torch can use: {reason}") from None
        return device

    @property
    def gpu(self) -> str:
        """The name of the GPU that it runs on; empty on a CPU."""
        import torch

        device = self.torch_device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else ""

    def dtype(self, name: str = "auto") -> torch.dtype:
        """Return the compute dtype of a name; auto: bfloat16 where the device multiplies it natively, else float32."""
        import torch

        from flexi_plugins.precision import native_bfloat16

        if name != "auto":
            return float_dtype(name, ["auto", *DTYPES])
        return torch.bfloat16 if native_bfloat16(self.torch_device.type) else torch.float32

    def budget(self) -> tuple[int, int, float]:
        """Return the bytes that weights, hidden states and working space may take from now on; what is taken before.

        Third, the share of a limit that can be used: (used + left) / share is the limit that leaves so much.
        """
        import psutil
        import torch

        if self.torch_device.type == "cuda":
            free = torch.cuda.mem_get_info(self.torch_device)[0]
            used = torch.cuda.memory_allocated(self.torch_device)
        else:
            free, used = free_memory(), psutil.Process().memory_info().rss
        left = int(free * FREE_SHARE) if self.memory is None else int(self.memory * LIMIT_SHARE) - used
        return left, used, LIMIT_SHARE


def free_memory() -> int:
    """Return the bytes of the computer's memory that are free, for one process of a torchrun; in a container those of it."""
    import psutil

    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError, KeyError):  # no control groups, or no limit ("max")
        cached = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())["inactive_file"]
        taken = int((GROUP / "memory.current").read_text()) - int(cached)
        free = min(free, int((GROUP / "memory.max").read_text()) - taken)
    return max(0, free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def parse_memory(text: str) -> int:
    """Return the bytes of a size such as 4GiB, 512MiB or 16GB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text.lower())
    if not found or not float(found[1]):
        raise FlexiError(f"memory {text!r}: expected a size such as 4GiB or 512MiB")
    return int(float(found[1]) * UNITS[found[2] or ""])


def peak_memory() -> int:
    """Return the most bytes that were resident in this process, Python and its libraries included."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def first_process() -> bool:
    """Whether this is the first, or only, process of a call of torchrun: the one that speaks and writes."""
    return os.environ.get("RANK", "0") == "0"


def take_own_gpu(device: str = "auto") -> None:
    """Make ``cuda`` mean the GPU that torchrun gives this process, where it is to run on one; raise where it has none."""
    import torch

    if "LOCAL_RANK" not in os.environ or device == "cpu" or not torch.cuda.is_available():
        return
    rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if rank >= gpus:
        raise FlexiError(
            f"torchrun: process {rank} of this machine has no GPU of its own, there are {gpus}; start as many processes as "
            "GPUs (--nproc-per-node), or train with --device cpu"
        )
    torch.cuda.set_device(rank)
