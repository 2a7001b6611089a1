"""FLAP (arXiv 2312.11983, and the authors' lib/prune.py): units whose input fluctuates little go, and a bias makes up.

The metric is in ``flap_scores``; it goes with any strategy, and the strategy with any unit scores. Which units go is the
``structure``; each sub-layer that loses some gets the bias W[:, gone] mean(x[gone]) (``flap_bias``). A KV head goes with its
query heads and costs as many channels as it has parameters: 4 x 128 d / 3 d = 512 / 3 on LLaMA-7B (the released code keeps
costs in an integer tensor, where they become 170). Unlike there, every block keeps one KV head and one channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from flexi_baselines.flap_bias import AddedMean, bias_cost, biases, with_biases
from flexi_baselines.flap_scores import PAPER, Fluctuation
from flexi_baselines.flap_structures import Step, most_heads, one_ranking, ranked, same_numbers, same_share, unit_cost
from flexi_baselines.input_moments import InputMoments, RunningFluctuation
from flexi_plugins.budget import check_reach, priorities, without_units
from flexi_plugins.data import ModelShape, PruningPlan, Rule, Scores
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import (
    Budget,
    ImportanceMetric,
    PruningRequest,
    ReplacementStrategy,
    Statistic,
    TensorRequest,
    hookimpl,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Flap:
    """Remove the lowest units, and compensate what they added on average by a bias.

    AL-AM: one ranking of all units of all blocks. AL-MM: ``remove_heads`` heads of all blocks, and channels of all blocks.
    UL-MM: the same numbers in every block. UL-UM: the same share of the heads and channels of every block.
    """

    structure: Literal["AL-AM", "AL-MM", "UL-MM", "UL-UM"] = "AL-AM"
    fraction: float | None = None  # share of the blocks' linear weights (--pruning_ratio), in the place of a ratio
    remove_heads: int = 8  # AL-MM, UL-MM: how many KV heads go in all blocks together
    bias: bool = True
    rule: Rule = "auto"  # how units of different kinds and blocks are compared; auto: as the metric says

    name: ClassVar[str] = "flap"
    paper: ClassVar[str] = PAPER
    knobs: ClassVar[tuple[str, ...]] = ("fraction",)
    needs: ClassVar[frozenset[str]] = frozenset()
    wants: ClassVar[frozenset[str]] = frozenset({"attention", "mlp"})
    progressive: ClassVar[bool] = False

    def reach(self, shape: ModelShape) -> float:
        """Return the ratio with all that may go gone, as many biases added as that can take."""
        heads, touched = most_heads(shape, self.structure, self.remove_heads)
        channels = sum(max(0, b.channels - 1) for b in shape.blocks) * shape.channel_cost()
        added = touched * bias_cost(shape, "attention")
        added += sum(b.channels > 1 for b in shape.blocks) * bias_cost(shape, "mlp")
        return (heads + channels - self.bias * added) / shape.parameters

    def plan(self, request: PruningRequest) -> PruningPlan:
        """Remove units in the order of the structure until the budget is met, or the fraction."""
        assert request.scores is not None
        shape = request.shape
        if self.fraction is None:
            check_reach(self.name, request.budget, self.reach(shape))
        elif not 0 < self.fraction < 1:
            raise FlexiError(f"{self.name}: expected a fraction between 0 and 1, found {self.fraction:g}")
        excess = shape.parameters - request.budget.target
        gone: dict[tuple[int, str], list[int]] = {}
        for position, units in self._steps(request.scores, shape):
            if excess <= 0 if self.fraction is None else position > self.fraction:
                break
            for block, kind, index in units:
                added = 0 if (block, kind) in gone else self.bias * bias_cost(shape, kind)
                excess -= unit_cost(shape, block, kind) - added
                gone.setdefault((block, kind), []).append(index)
        plan = without_units(shape, gone)
        return with_biases(plan, gone) if self.bias else plan

    def _steps(self, scores: Scores, shape: ModelShape) -> Iterator[Step]:
        attention, mlp = priorities(scores, shape, self.rule)
        heads, channels = ranked(attention, "attention"), ranked(mlp, "mlp")
        if self.structure == "AL-AM":
            return one_ranking(shape, heads, channels)
        if self.structure == "UL-UM":
            return same_share(shape, heads, channels)
        return same_numbers(shape, heads, channels, self.remove_heads, self.structure == "UL-MM")

    def finished(self, plan: PruningPlan, budget: Budget) -> bool:
        """Return True: one step does it all."""
        return True

    def tensors(self, request: TensorRequest) -> dict[str, Tensor]:
        """Return the biases of the plan, (hidden,), in the dtype of the weights."""
        return biases(request)


@hookimpl
def importance_metrics() -> list[ImportanceMetric]:
    """Return the flap metric."""
    return [Fluctuation()]


@hookimpl
def replacement_strategies() -> list[ReplacementStrategy]:
    """Return the flap strategy."""
    return [Flap()]


@hookimpl
def statistics() -> list[Statistic]:
    """Return the moments of what enters output maps, and what the sub-layers add."""
    return [InputMoments(), RunningFluctuation(), AddedMean()]
