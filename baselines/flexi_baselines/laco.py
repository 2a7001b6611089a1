"""LaCo, layer collapse (arXiv 2402.11187, and the authors' notebooks): later blocks collapse into an earlier one.

From block l = H - C down to L: blocks l .. l + C - 1 become one; where what leaves the last block is still like the
original model's, s > T, the merge stays and l goes down by I, else by 1. Published, a merge is theta_l + sum over k of
(theta_l+k - theta_l). The notebooks update in place the copy that they subtract, so that the sum telescopes and the last
block's maps take the place of all: ``merge`` names the two apart. Both keep the norms of block l, as the notebooks do.
The walk is the notebooks' (their correction of l after a merge never applies); s is their cosine with two differences: it
is the mean over tokens, theirs is of a sentence's tokens in one vector, and it is taken before the final norm.
A ratio is met by the largest T at which the walk meets it (T is what the authors set per model): T starts at 1 and falls
to the most similar merge that was rejected. The walk ends where the ratio is met, and its last merge takes no more blocks
than that. The defaults are the paper's C and I for Llama-2-7B, for which it has T = 0.65, as a reimplementation reports
them; the notebooks have C = 7, I = 1, T = 0.45 for a 13B Llama.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, ClassVar, Literal

from flexi_plugins.budget import check_reach
from flexi_plugins.data import BlockRecipe, ModelShape, Part, PruningPlan
from flexi_plugins.errors import FlexiError, OutOfReach
from flexi_plugins.hookspecs import Budget, PruningRequest, ReplacementStrategy, TensorRequest, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LaCo:
    """Collapse blocks into an earlier one as long as the model's output stays similar."""

    C: int = 4  # blocks of a merge, with the one that they collapse into
    L: int = 0  # lowest block of the walk, counted from 0
    H: int | None = None  # highest block of the walk; None: the last
    I: int = 2  # noqa: E741  # how far down after a merge
    T: float | None = None  # similarity above which a merge stays, in the place of a ratio
    merge: Literal["published", "notebook"] = "published"

    name: ClassVar[str] = "laco"
    paper: ClassVar[str] = "LaCo, arXiv 2402.11187"
    needs: ClassVar[frozenset[str]] = frozenset()
    wants: ClassVar[frozenset[str]] = frozenset()
    progressive: ClassVar[bool] = False
    knobs: ClassVar[tuple[str, ...]] = ("T",)

    def reach(self, shape: ModelShape) -> float:
        """Return the ratio of a walk on which every merge stays."""
        return self._walk(shape, None, lambda plan: True).ratio

    def plan(self, request: PruningRequest) -> PruningPlan:
        """Walk with T as given, or with the largest T at which the ratio is met; a note says which it was."""
        shape, budget = request.shape, request.budget if self.T is None else None
        if budget is not None:
            check_reach(self.name, budget, self.reach(shape))
        if request.counting:
            return self._walk(shape, budget, lambda plan: True)
        known: dict[tuple[BlockRecipe, ...], float] = {}

        def similarity(plan: PruningPlan) -> float:
            if plan.blocks not in known:
                [turn] = request.quality([request.plan.compose(plan)], "turn")
                known[plan.blocks] = max(-1.0, 1 - turn)  # infinite where the model breaks down: as unlike as can be
            return known[plan.blocks]

        threshold = 1.0 if self.T is None else self.T
        while True:
            plan, rejected = self._above(shape, budget, similarity, threshold)
            if budget is None or budget.met(plan):
                return replace(plan, origin={"notes": [f"T = {threshold:.6f}"]})
            if not rejected or max(rejected) <= -1.0:  # of none, or of a model that breaks down
                raise OutOfReach(
                    f"{self.name}: ratio {budget.ratio:g} is out of reach; it reaches up to {plan.ratio:.4f}"
                )
            threshold = math.nextafter(max(rejected), -math.inf)

    def _above(
        self, shape: ModelShape, budget: Budget | None, similarity: Callable[[PruningPlan], float], threshold: float
    ) -> tuple[PruningPlan, list[float]]:
        """Return the plan of the walk on which merges above a threshold stay, and the similarities of the others."""
        rejected: list[float] = []

        def stays(plan: PruningPlan) -> bool:
            found = similarity(plan)
            if found <= threshold:
                rejected.append(found)
            return found > threshold

        return self._walk(shape, budget, stays), rejected

    def _walk(self, shape: ModelShape, budget: Budget | None, stays: Callable[[PruningPlan], bool]) -> PruningPlan:
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
                f"{self.name}: C = {self.C}, L = {self.L}, H = {highest}, I = {self.I} on a model of {last + 1} blocks; "
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
        if self.merge == "notebook":
            mix = mix[-1:]
        elif count > 1:
            mix = ((block, 1.0 - count), *mix)
        recipes = [BlockRecipe(parts=(Part(i),)) for i in range(len(shape.blocks))]
        recipes[block : block + count + 1] = [BlockRecipe(mix=mix, norms=((block, 1.0),))]
        return PruningPlan(shape, tuple(recipes))

    def finished(self, plan: PruningPlan, budget: Budget) -> bool:
        """Return True: one step does it all."""
        return True

    def tensors(self, request: TensorRequest) -> dict[str, Tensor]:
        """Return nothing: a mix makes no new tensors."""
        return {}


@hookimpl
def replacement_strategies() -> list[ReplacementStrategy]:
    """Return the laco strategy."""
    return [LaCo()]
