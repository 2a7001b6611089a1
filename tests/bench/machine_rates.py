"""What this machine can do: the rates of its disk and of one block's matrix products, of which bounds are made."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from flexi_plugins.data import BlockShape, ModelShape

CHUNK = 16 * 2**20
WRITTEN = 2**30
REPEATS = 3
CACHED = 2.0  # a read that is at most so many times slower than one from memory came from memory


# ----------------------------------------------------------------------------------------------- disk


@dataclass(frozen=True)
class Disk:
    """Sequential rates, bytes per second: read after the page cache was dropped, read from the cache, written with fsync."""

    read: float
    cached: float
    write: float

    @property
    def drop_works(self) -> bool:
        """Whether dropped files are read slower than cached ones, so that a pass does read from the disk."""
        return self.read * CACHED < self.cached

    def __str__(self) -> str:
        verdict = "the drop works" if self.drop_works else "THE DROP DOES NOT WORK: passes read from memory"
        return (
            f"disk: reads {self.read / 1e9:.2f} GB/s after its cache was dropped, {self.cached / 1e9:.2f} GB/s from the "
            f"cache ({verdict}), writes {self.write / 1e9:.2f} GB/s"
        )


def disk_rates(files: Sequence[Path]) -> Disk:
    """Measure the disk that holds these files: all of them read, 1 GiB written beside the first."""
    drop_cache(files)
    read = sum(f.stat().st_size for f in files) / sum(_read_seconds(f) for f in files)
    _read_seconds(files[0])
    cached = files[0].stat().st_size / _read_seconds(files[0])
    return Disk(read, cached, WRITTEN / min(_write_seconds(files[0].parent) for _ in range(REPEATS)))


def drop_cache(files: Sequence[Path]) -> None:
    """Write these files out and ask the system to forget its copies of them in memory."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _read_seconds(file: Path) -> float:
    buffer = bytearray(CHUNK)
    start = time.perf_counter()
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
    return time.perf_counter() - start


def _write_seconds(folder: Path) -> float:
    content, file = os.urandom(CHUNK), folder / "rate.tmp"
    start = time.perf_counter()
    try:
        with file.open("wb", buffering=0) as stream:
            for _ in range(WRITTEN // CHUNK):
                stream.write(content)
            os.fsync(stream.fileno())
        return time.perf_counter() - start
    finally:
        file.unlink()


# ------------------------------------------------------------------------------------------- products


@dataclass(frozen=True)
class Products:
    """Rates of matrix products, multiply-adds per second, and seconds of what the Taylor statistic does.

    forward: the seven maps of one block in bfloat16 on a batch of windows, and on the gradient samples. sketch: the down
    map x (channels, a few columns) in float32. weight_gradient, elementwise: seconds of one product of the weight gradient,
    and of one pass over the matrix, in float32, for one sample and all seven maps.
    """

    forward_windows: float
    forward_samples: float
    sketch: float
    weight_gradient: float
    elementwise: float

    def __str__(self) -> str:
        return (
            f"products: one block forward {self.forward_windows / 1e9:.0f} and {self.forward_samples / 1e9:.0f} "
            f"G multiply-adds/s on a batch of windows and on the samples (bfloat16), sketch {self.sketch / 1e9:.0f} "
            f"(float32); per sample and block: weight gradients {self.weight_gradient:.3f} s, one element-wise pass "
            f"{self.elementwise:.3f} s"
        )


def product_rates(shape: ModelShape, batch: int, samples: int, length: int, columns: int) -> Products:
    """Measure with torch's threads: ``batch`` tokens of windows, ``samples`` x ``length`` tokens, sketches of ``columns``."""
    block = shape.blocks[0]
    gradient, elementwise = _taylor_seconds(shape, block, length)
    down, sketch = torch.randn(shape.hidden, block.channels), torch.randn(block.channels, columns)
    result = down @ sketch
    with torch.inference_mode():
        return Products(
            forward_windows=_forward_rate(shape, block, batch),
            forward_samples=_forward_rate(shape, block, samples * length),
            sketch=down.numel() * columns / seconds_of(partial(torch.mm, down, sketch, out=result)),
            weight_gradient=gradient,
            elementwise=elementwise,
        )


def _forward_rate(shape: ModelShape, block: BlockShape, tokens: int) -> float:
    weights = [torch.randn(size, dtype=torch.bfloat16) for size in shape.maps(block).values()]
    inputs = {w.shape[1]: torch.randn(tokens, w.shape[1], dtype=torch.bfloat16) for w in weights}
    seconds = seconds_of(lambda: [F.linear(inputs[w.shape[1]], w) for w in weights])
    return tokens * sum(w.numel() for w in weights) / seconds


def _taylor_seconds(shape: ModelShape, block: BlockShape, tokens: int) -> tuple[float, float]:
    """Return the seconds of weight gradients, and of element-wise passes, of one sample and all maps of a block."""
    gradient = elementwise = 0.0
    for rows, columns in shape.maps(block).values():
        above, below, weight = torch.randn(rows, tokens), torch.randn(tokens, columns), torch.randn(rows, columns)
        product = above @ below
        gradient += seconds_of(partial(torch.mm, above, below, out=product))
        elementwise += seconds_of(partial(product.mul_, weight))
    return gradient, elementwise


def seconds_of(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the shortest time of a call; the first one does not count. A bound is made of what the machine can do."""
    run()
    return min(_timed(run) for _ in range(repeats))


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
