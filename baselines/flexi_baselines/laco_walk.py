"""LaCo's walk through the blocks (arXiv 2402.11187, and the authors' notebooks): from block H - C down to L."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

from flexi_plugins.data import BlockRecipe, ModelShape, Part, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Budget


@dataclass(frozen=True)
class Walk:
    """Collapses C - 1 blocks into the one in front of them, and goes I blocks down where that stays, else one."""

    C: int
    L: int
    H: int | None  # None: the last block
    I: int  # noqa: E741
    telescoped: bool  # the last block's maps take the place of all, as in the notebooks

    def plan(self, shape: ModelShape, budget: Budget | None, stays: Callable[[PruningPlan], bool]) -> PruningPlan:
        """Return the plan of one walk, until the budget is met if there is one; ``stays`` judges each merge."""
        plan, block = PruningPlan.identity(shape), self._start(shape)
        while block >= self.L and not (budget and budget.met(plan)):
            count = self._followers(plan, block, budget)
            trial = plan.compose(self._merged(plan.new_shape, block, count)) if count else plan
            if count and stays(trial):
                plan, block = trial, block - self.I
            else:
                block -= 1
        return plan

    def _start(self, shape: ModelShape) -> int:
        """Return the first block to merge into; raise for a walk that this model has not."""
        last = len(shape.blocks) - 1
        highest = last if self.H is None else self.H
        if self.C < 2 or self.I < 1 or self.L < 0 or highest > last or highest - self.C < self.L:
            raise FlexiError(
                f"laco: C = {self.C}, L = {self.L}, H = {highest}, I = {self.I} on a model of {last + 1} blocks; "
                f"expected C of 2 or more, I of 1 or more, and 0 <= L <= H - C with H of at most {last}"
            )
        return highest - self.C

    def _followers(self, plan: PruningPlan, block: int, budget: Budget | None) -> int:
        """Return how many of the blocks behind one collapse into it: of its own widths, and no more than must go."""
        blocks = plan.new_shape.blocks
        own = blocks[block]
        count = sum(1 for _ in takewhile(lambda other: other == own, blocks[block + 1 : block + self.C]))
        if budget is None:
            return count
        return min(count, -((budget.target - plan.stored_parameters) // plan.shape.block_parameters(own)))

    def _merged(self, shape: ModelShape, block: int, count: int) -> PruningPlan:
        """Return the step that collapses ``count`` blocks into the one in front of them."""
        mix = tuple((block + k, 1.0) for k in range(1, count + 1))
        if self.telescoped:
            mix = mix[-1:]
        elif count > 1:
            mix = ((block, 1.0 - count), *mix)
        recipes = [BlockRecipe(parts=(Part(i),)) for i in range(len(shape.blocks))]
        recipes[block : block + count + 1] = [BlockRecipe(mix=mix, norms=((block, 1.0),))]
        return PruningPlan(shape, tuple(recipes))
