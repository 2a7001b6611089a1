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
from typing import TYPE_CHECKING, ClassVar, Literal

from flexi_baselines.laco_walk import Walk
from flexi_plugins.budget import check_reach, rounded_down
from flexi_plugins.data import BlockRecipe, ModelShape, PruningPlan
from flexi_plugins.errors import OutOfReach
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

    @property
    def _walk(self) -> Walk:
        return Walk(self.C, self.L, self.H, self.I, telescoped=self.merge == "notebook")

    def reach(self, shape: ModelShape) -> float:
        """Return the ratio of a walk on which every merge stays."""
        return self._walk.plan(shape, None, lambda plan: True).ratio

    def plan(self, request: PruningRequest) -> PruningPlan:
        """Walk with T as given, or with the largest T at which the ratio is met; a note says which it was."""
        shape, budget = request.shape, request.budget if self.T is None else None
        if budget is not None:
            check_reach(self.name, budget, self.reach(shape))
        if request.counting:
            return self._walk.plan(shape, budget, lambda plan: True)
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
                    f"{self.name}: ratio {budget.ratio:g} is out of reach; it reaches up to {rounded_down(plan.ratio)}"
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

        return self._walk.plan(shape, budget, stays), rejected

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
