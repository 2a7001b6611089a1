"""Wanda-sp's budget (arXiv 2312.11983, and the authors' prune_wanda_sp): the same share of every block's units goes."""

from __future__ import annotations

from bisect import bisect_left

from flexi_plugins.data import ModelShape, PruningPlan
from flexi_plugins.errors import OutOfReach

STEPS = 1000  # a ratio is met by the smallest fraction of so many that meets it


def going(shape: ModelShape, index: int, fraction: float) -> tuple[int, int]:
    """Return how many KV heads and channels of a block of the original go."""
    block = shape.blocks[index]
    return int(fraction * block.kv_heads), int(fraction * block.channels)


def saved(shape: ModelShape, fraction: float) -> int:
    """Return how many parameters go with a fraction."""
    counts = [going(shape, index, fraction) for index in range(len(shape.blocks))]
    heads = sum(h * shape.head_cost(b) for (h, _), b in zip(counts, shape.blocks, strict=True))
    return heads + sum(c for _, c in counts) * shape.channel_cost()


def least_fraction(shape: ModelShape, excess: int) -> float:
    """Return the smallest fraction by which so many parameters go; raise where there is none."""
    steps = [step / STEPS for step in range(1, STEPS)]
    place = bisect_left(steps, excess, key=lambda fraction: saved(shape, fraction))
    if place == len(steps):
        reach = saved(shape, steps[-1]) / shape.parameters
        raise OutOfReach(f"equal shares: ratio {excess / shape.parameters:g} is out of reach; it goes up to {reach:g}")
    return steps[place]


def to_do(plan: PruningPlan, fraction: float) -> list[int]:
    """Return the blocks that a plan leaves as they are, and the fraction does not."""
    narrowed = zip(plan.shape.blocks, plan.new_shape.blocks, strict=True)
    return [i for i, (old, new) in enumerate(narrowed) if old == new and any(going(plan.shape, i, fraction))]
