"""Which original blocks each block of a pruned model stands for (CoMe, arXiv 2510.15304), read off its plan.

CoMe's released code notes while it merges which blocks went into which (``merge_info``: [0, 1, [2, 3], 4]), and the paper
distils along these notes; any plan says as much. Our reading where CoMe has no case: what a strategy removed falls to the
block in front of the gap, and to the first one where nothing is in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from flexi_plugins.data import BlockRecipe, PruningPlan
from flexi_plugins.errors import FlexiError


@dataclass(frozen=True)
class Run:
    """The block at a position of a pruned model, and the original blocks, first to last, that it stands for."""

    position: int
    first: int
    last: int

    @property
    def before(self) -> int:
        """The original block behind which is what enters the run; -1: the embedding."""
        return self.first - 1

    @property
    def merged(self) -> bool:
        """Whether the block stands for more than one original block."""
        return self.last > self.first


def correspondences(plan: PruningPlan) -> tuple[Run, ...]:
    """Return what each block of a plan stands for, in order: together all original blocks, each once.

    A run begins at the first source of the block's units, mix or norms, and ends in front of the next block's. Raise a
    FlexiError where the first sources do not ascend: repeated and reordered blocks stand for no run.
    """
    firsts = [_first(recipe) for recipe in plan.blocks]
    for position, (one, following) in enumerate(pairwise(firsts), 1):
        if following <= one:
            raise FlexiError(
                f"distill: expected blocks in the original's order, found that block {position} begins with original block "
                f"{following} behind one that begins with {one}; recover repeated or reordered blocks by another method, such "
                "as lora"
            )
    starts = [0, *firsts[1:]]
    ends = [*starts[1:], len(plan.shape.blocks)]
    return tuple(Run(p, start, end - 1) for p, (start, end) in enumerate(zip(starts, ends, strict=True)))


def _first(recipe: BlockRecipe) -> int:
    return min((*recipe.sources, *(source for source, _ in (*recipe.norm_weights, *recipe.bias_weights))))
