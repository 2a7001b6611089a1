"""What a pass over a LLaMA-7B cannot do without: bytes at the disk's rate and multiply-adds at the rate of its products.

Bytes to read count as far as the pass had them read from the storage (``from_disk``): what it reads a second time, the
system may have kept in memory.
"""

from __future__ import annotations

from machine_rates import Disk, Products
from seven_b_pass import WINDOWS

from flexi_plugins.data import ModelShape, PruningPlan
from flexi_plugins.numerics import STEPS

BYTES = 2  # bfloat16
GRADIENT_PASSES = 3  # forward, the same again block by block, and back to the block's input; weights have no gradients


def scoring(shape: ModelShape, from_disk: int, disk: Disk, rates: Products) -> dict[str, float]:
    """Return the seconds, by what takes them, of one forward pass over the windows: every block and the embedding read."""
    read = BYTES * (_block_parameters(shape) + shape.vocabulary * shape.hidden)
    work = WINDOWS.windows * _forward(shape, WINDOWS.length)
    return {"read": min(read, from_disk) / disk.read, "forward": work / rates.forward_windows}


def leave_one_out(shape: ModelShape, rates: Products) -> float:
    """Return the seconds of flexigpt's own products: the stream x the two outgoing maps of every block, on all windows."""
    columns = sum(b.query_heads * b.head_dim + b.channels for b in shape.blocks)
    return WINDOWS.windows * WINDOWS.length * shape.hidden * columns / rates.forward_windows


def gradients(shape: ModelShape, from_disk: int, disk: Disk, rates: Products) -> dict[str, float]:
    """Return the seconds of saap: blocks read twice, the rest once; three passes; a product and a pass per sample and map."""
    samples, length = WINDOWS.gradient_samples, WINDOWS.gradient_length
    outer, blocks = shape.outer_parameters, _block_parameters(shape)
    head = samples * length * shape.vocabulary * shape.hidden  # the loss, and back from it
    work = GRADIENT_PASSES * samples * _forward(shape, length) + 2 * head
    each = samples * len(shape.blocks)
    return {
        "read": min(BYTES * (2 * blocks + outer), from_disk) / disk.read,
        "forward and backward": work / rates.forward_samples,
        "weight gradients": each * rates.weight_gradient,
        "element-wise": each * rates.elementwise,
    }


def writing(plan: PruningPlan, written: int, from_disk: int, disk: Disk, rates: Products) -> dict[str, float]:
    """Return the seconds of making a plan's adapters and writing ``written`` bytes; every source is read once for each."""
    shape = plan.shape
    own = {s for r in plan.blocks if r.shares is None for s in r.sources}
    shared = [r for r in plan.blocks if r.shares is not None]
    compared = {r.sources[0] for r in shared} | {r.shares for r in shared}
    blocks = sum(shape.block_parameters(shape.blocks[s]) for s in [*own, *(s for s in compared if s is not None)])
    read = min(BYTES * (shape.outer_parameters + blocks), from_disk)
    bound = {"read": read / disk.read, "write": written / disk.write}
    work = sum(_factors(shape, r.sources[0], r.rank) for r in shared)
    return bound | ({"adapters": work / rates.sketch} if shared else {})


def donor_search(plan: PruningPlan, from_disk: int, disk: Disk, rates: Products) -> dict[str, float]:
    """Return the seconds of rank-r factors of every map of every block, read once; distances come free."""
    rank = max(r.rank for r in plan.blocks)
    work = sum(_factors(plan.shape, i, rank) for i in range(len(plan.shape.blocks)))
    read = min(BYTES * _block_parameters(plan.shape), from_disk)
    return {"read": read / disk.read, "factors": work / rates.sketch}


def _factors(shape: ModelShape, block: int, rank: int) -> int:
    """Return the multiply-adds of rank-r factors of a block's maps: products with the map, orthogonalisation left out.

    ``numerics.truncated_svd`` multiplies a map, there and back, with r / 4 columns at each of its steps.
    """
    return 2 * STEPS * sketch_columns(rank) * _maps(shape, block)


def sketch_columns(rank: int) -> int:
    """Return the columns that ``numerics.truncated_svd`` multiplies a matrix with at once."""
    return max(8, -(-rank // 4))


def _maps(shape: ModelShape, block: int) -> int:
    return sum(rows * columns for rows, columns in shape.maps(shape.blocks[block]).values())


def _block_parameters(shape: ModelShape) -> int:
    return sum(shape.block_parameters(b) for b in shape.blocks)


def _forward(shape: ModelShape, length: int) -> int:
    """Return the multiply-adds of all blocks on one window: linear maps, and causal attention (scores and values)."""
    maps = length * sum(_maps(shape, i) for i in range(len(shape.blocks)))
    attention = sum(length * (length + 1) * b.query_heads * b.head_dim for b in shape.blocks)
    return maps + attention
