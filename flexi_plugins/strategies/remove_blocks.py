"""Removal of whole blocks (ShortGPT, arXiv 2403.03853; SLEB's loop when progressive): the lowest scores go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from flexi_plugins.budget import check_reach, lowest, smallest
from flexi_plugins.data import ModelShape, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Budget, PruningRequest, ReplacementStrategy, Weights, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RemoveBlocks:
    """Remove the blocks with the lowest scores: all at once, or one at a time with fresh scores."""

    blocks: int | None = None  # how many to remove, in the place of a ratio
    progressive: bool = False
    protect_first: int = 0
    protect_last: int = 0

    name: ClassVar[str] = "remove-blocks"
    paper: ClassVar[str] = "ShortGPT, arXiv 2403.03853"
    needs: ClassVar[frozenset[str]] = frozenset()
    wants: ClassVar[frozenset[str]] = frozenset({"block"})

    def _most(self, shape: ModelShape) -> int:
        return min(len(shape.blocks) - self.protect_first - self.protect_last, len(shape.blocks) - 1)

    def reach(self, shape: ModelShape) -> float:
        """Return the ratio of removing every block that may go (at least one stays)."""
        gone = range(self.protect_first, self.protect_first + max(0, self._most(shape)))
        return sum(shape.block_parameters(shape.blocks[i]) for i in gone) / shape.parameters

    def plan(self, request: PruningRequest) -> PruningPlan:
        """Remove the lowest-scored blocks; when progressive, the lowest one."""
        assert request.scores is not None
        assert request.scores.block is not None
        scores, shape = request.scores.block, request.shape
        allowed = range(self.protect_first, len(shape.blocks) - self.protect_last)

        def without(count: int) -> PruningPlan:
            gone = lowest(scores, count, allowed)
            return PruningPlan.keep(shape, (i for i in range(len(shape.blocks)) if i not in gone))

        if self.blocks is None:
            check_reach(self.name, request.budget, self.reach(request.plan.shape))
        elif not 0 < self.blocks <= self._most(request.plan.shape):
            raise FlexiError(
                f"{self.name}: blocks = {self.blocks}, expected 1..{self._most(request.plan.shape)} on this model"
            )
        if self.progressive:
            return without(1)
        return without(self.blocks or smallest(self._most(shape), without, request.budget, self.name))

    def finished(self, plan: PruningPlan, budget: Budget) -> bool:
        """Whether enough blocks are gone."""
        if self.blocks is not None:
            return len(plan.shape.blocks) - len(plan.blocks) >= self.blocks
        return budget.met(plan)

    def tensors(self, plan: PruningPlan, weights: Weights) -> dict[str, Tensor]:
        """Return nothing: removal makes no new tensors."""
        return {}


@hookimpl
def replacement_strategies() -> list[ReplacementStrategy]:
    """Return the remove-blocks strategy."""
    return [RemoveBlocks()]
