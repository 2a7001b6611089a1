"""MKA's merges (arXiv 2406.16330, and its released pipeline.py): the last two blocks become one, again and again."""

from __future__ import annotations

from collections.abc import Sequence

from flexi_plugins.data import BlockRecipe, ModelShape, Part, PruningPlan


def mergeable(shape: ModelShape) -> int:
    """Return how many blocks in front of the last are of its own widths, up to the first that is not."""
    alike = [block == shape.blocks[-1] for block in reversed(shape.blocks)]
    return (alike.index(False) if False in alike else len(alike)) - 1


def merged(shape: ModelShape, shares: Sequence[float]) -> PruningPlan:
    """Return the plan that merges the last two blocks once for each share, the weight of the earlier one."""
    first = last = len(shape.blocks) - 1
    mix: tuple[tuple[int, float], ...] = ((last, 1.0),)
    for share in shares:
        first -= 1
        mix = ((first, share), *((source, (1 - share) * weight) for source, weight in mix))
    blocks = [BlockRecipe(parts=(Part(i),)) for i in range(first)]
    return PruningPlan(shape, (*blocks, BlockRecipe(mix=mix, norms=((first, 1.0),))))
