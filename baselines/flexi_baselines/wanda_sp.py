"""Wanda-sp, structured Wanda (FLAP, arXiv 2312.11983, and the authors' prune_wanda_sp): |weight| x norm of the input.

Metric: channel c of an output map scores the mean over its rows of |w_c| times the root mean square of its input (the
authors' norm is over the tokens of a window: a constant factor more); a head is the sum of its channels. Strategy: the
same share of the heads and channels of every block goes, block by block, each scored behind the blocks that are narrowed
already, as the authors do; with the strategy flap and structure = "UL-UM" all blocks are scored on the dense model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from flexi_baselines.equal_shares import STEPS, going, least_fraction, saved, to_do
from flexi_plugins.budget import check_reach, lowest, without_units
from flexi_plugins.data import ModelShape, PruningPlan, Scores
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import (
    Budget,
    ImportanceMetric,
    PruningRequest,
    ReplacementStrategy,
    TensorRequest,
    hookimpl,
)

if TYPE_CHECKING:
    from torch import Tensor

PAPER = "Wanda-sp, in FLAP, arXiv 2312.11983"


@dataclass(frozen=True)
class WandaScores:
    """Mean |weight| x root mean square of the input; of a KV head with its query heads, the sum over their channels."""

    name: ClassVar[str] = "wanda-sp"
    paper: ClassVar[str] = PAPER
    gives: ClassVar[frozenset[str]] = frozenset({"attention", "mlp"})
    needs: ClassVar[frozenset[str]] = frozenset({"input-moments"})

    def score(self, request: PruningRequest) -> Scores:
        """Return scores that rank the units of one kind in one block."""
        moments = request.statistics["input-moments"]

        def channels(kind: str, index: int) -> Tensor:
            square = moments[f"{kind}_variance"][index] + moments[f"{kind}_mean"][index].square()
            return square.sqrt() * moments[f"{kind}_magnitude"][index]

        attention, mlp = [], []
        for index, block in enumerate(request.shape.blocks):
            columns = channels("attention", index)
            attention.append(columns.view(block.kv_heads, -1).sum(1) if block.kv_heads else columns)
            mlp.append(channels("mlp", index))
        return Scores(attention=tuple(attention), mlp=tuple(mlp), rule="standardised")


@dataclass(frozen=True)
class WandaSp:
    """Remove the lowest int(fraction x n) of the n heads, and of the n channels, of one block after the other."""

    fraction: float | None = None  # share of each block's units (--pruning_ratio), in the place of a ratio

    name: ClassVar[str] = "wanda-sp"
    paper: ClassVar[str] = PAPER
    knobs: ClassVar[tuple[str, ...]] = ("fraction",)
    needs: ClassVar[frozenset[str]] = frozenset()
    wants: ClassVar[frozenset[str]] = frozenset({"attention", "mlp"})
    progressive: ClassVar[bool] = True

    def reach(self, shape: ModelShape) -> float:
        """Return the ratio of the largest fraction."""
        return saved(shape, (STEPS - 1) / STEPS) / shape.parameters

    def plan(self, request: PruningRequest) -> PruningPlan:
        """Narrow the first block that is not narrowed yet."""
        assert request.scores is not None
        assert request.scores.attention is not None
        assert request.scores.mlp is not None
        original, shape = request.plan.shape, request.shape
        if self.fraction is None:
            check_reach(self.name, request.budget, self.reach(original))
        elif not 0 < self.fraction < 1 or not saved(original, self.fraction):
            raise FlexiError(f"{self.name}: fraction {self.fraction:g} removes no unit, or is not between 0 and 1")
        fraction = self._fraction(original, request.budget)
        index = to_do(request.plan, fraction)[0]
        heads, channels = going(original, index, fraction)
        gone = {
            (index, "attention"): lowest(request.scores.attention[index], heads, range(shape.blocks[index].kv_heads)),
            (index, "mlp"): lowest(request.scores.mlp[index], channels, range(shape.blocks[index].channels)),
        }
        return without_units(shape, gone)

    def _fraction(self, shape: ModelShape, budget: Budget) -> float:
        """Return the fraction that is set, or the smallest that meets the budget."""
        if self.fraction is not None:
            return self.fraction
        return least_fraction(shape, shape.parameters - budget.target)

    def finished(self, plan: PruningPlan, budget: Budget) -> bool:
        """Whether every block is narrowed."""
        return not to_do(plan, self._fraction(plan.shape, budget))

    def tensors(self, request: TensorRequest) -> dict[str, Tensor]:
        """Return nothing: removal makes no new tensors."""
        return {}


@hookimpl
def importance_metrics() -> list[ImportanceMetric]:
    """Return the wanda-sp metric."""
    return [WandaScores()]


@hookimpl
def replacement_strategies() -> list[ReplacementStrategy]:
    """Return the wanda-sp strategy."""
    return [WandaSp()]
