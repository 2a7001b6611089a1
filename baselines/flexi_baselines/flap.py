"""FLAP (arXiv 2312.11983, and the authors' lib/prune.py): units whose input fluctuates little go, and a bias makes up.

Metric: the variance of each input channel of an output map, times the squared norm of its weights (WIFV; for attention
squared once more); z-scores within each block and kind; a head is the mean over its channels. The paper has the variance;
the released code, which its numbers are from, has something else (``RunningFluctuation``): both by name.

Strategy: which units go (``structure``), and for each sub-layer that loses some the bias W[:, gone] mean(x[gone]). It
takes any unit scores, as the metric goes with any strategy. A KV head goes with its query heads and costs as many
channels as it has parameters: 4 x 128 d / 3 d = 512 / 3 on LLaMA-7B (the released code keeps costs in an integer tensor,
where they become 170). Unlike there, every block keeps one KV head and one channel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from flexi_baselines.flap_structures import Step, one_ranking, ranked, same_numbers, same_share, unit_cost
from flexi_baselines.input_moments import AddedMean, InputMoments, RunningFluctuation
from flexi_plugins.budget import check_reach, priorities, without_units
from flexi_plugins.data import ModelShape, Part, PruningPlan, Rule, Scores
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

PAPER = "FLAP, arXiv 2312.11983"
OUTPUT_MAPS = {"attention": "attention_output", "mlp": "down"}


@dataclass(frozen=True)
class Fluctuation:
    """Standardised fluctuation of KV heads and channels."""

    # WIFV: weighted input feature variance. IFV: without the weights. WIFN: the norm of the input x the mean |weight|.
    metrics: Literal["WIFV", "IFV", "WIFN"] = "WIFV"
    variance: Literal["paper", "released"] = "paper"

    name: ClassVar[str] = "flap"
    paper: ClassVar[str] = PAPER
    gives: ClassVar[frozenset[str]] = frozenset({"attention", "mlp"})

    @property
    def needs(self) -> frozenset[str]:
        """Input moments, and the released code's fluctuation where it is asked for."""
        released = self.variance == "released" and self.metrics != "WIFN"
        return frozenset({"input-moments"} | ({"running-fluctuation"} if released else set()))

    def score(self, request: PruningRequest) -> Scores:
        """Return z-scores: ranked as they are, and not comparable otherwise."""
        attention, mlp = [], []
        for index, block in enumerate(request.shape.blocks):
            channels = standardised(self.channels(request, "attention", index).square())
            attention.append(channels.view(block.kv_heads, -1).mean(1) if block.kv_heads else channels)
            mlp.append(standardised(self.channels(request, "mlp", index)))
        return Scores(attention=tuple(attention), mlp=tuple(mlp), rule="undivided")

    def channels(self, request: PruningRequest, kind: str, index: int) -> Tensor:
        """Return the raw metric of a block's input channels: (columns,)."""
        moments = {name: values[index] for name, values in request.statistics["input-moments"].items()}
        variance = moments[f"{kind}_variance"]
        if self.metrics == "WIFN":
            return (variance + moments[f"{kind}_mean"].square()).sqrt() * moments[f"{kind}_magnitude"]
        if self.variance == "released":
            variance = request.statistics["running-fluctuation"][kind][index]
        return variance if self.metrics == "IFV" else variance * moments[f"{kind}_squares"]


def standardised(values: Tensor) -> Tensor:
    """Return (x - mean) / std with the unbiased std, as the authors do; zeros where the values do not differ."""
    if values.numel() < 2 or not bool(values.std() > 0):
        return values.new_zeros(values.shape)
    return (values - values.mean()) / values.std()


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
        blocks, spare = shape.blocks, [max(0, b.kv_heads - 1) for b in shape.blocks]
        if self.structure == "UL-MM":
            spare = [min(s, self.remove_heads // len(blocks)) for s in spare]
        gone = sum(s * shape.head_cost(b) for s, b in zip(spare, blocks, strict=True))
        touched = {"attention": sum(s > 0 for s in spare), "mlp": sum(b.channels > 1 for b in blocks)}
        if self.structure == "AL-MM":
            cheapest = min((shape.head_cost(b) for b in blocks if b.kv_heads), default=0)
            gone = min(self.remove_heads, sum(spare)) * cheapest
            touched["attention"] = min(self.remove_heads, touched["attention"])
        gone += sum(max(0, b.channels - 1) for b in blocks) * shape.channel_cost()
        return (gone - sum(self._bias_cost(shape, kind) * count for kind, count in touched.items())) / shape.parameters

    def _bias_cost(self, shape: ModelShape, kind: str) -> int:
        return shape.hidden if self.bias and not shape.has_bias(OUTPUT_MAPS[kind]) else 0

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
                added = 0 if (block, kind) in gone else self._bias_cost(shape, kind)
                excess -= unit_cost(shape, block, kind) - added
                gone.setdefault((block, kind), []).append(index)
        plan = without_units(shape, gone)
        return self._with_biases(plan, gone) if self.bias else plan

    def _with_biases(self, plan: PruningPlan, gone: Collection[tuple[int, str]]) -> PruningPlan:
        """Return the plan with a bias of its own for every sub-layer that loses units."""
        names = [
            tuple(f"{role}.bias" for k, role in OUTPUT_MAPS.items() if (b, k) in gone) for b in range(len(plan.blocks))
        ]
        blocks = tuple(replace(recipe, own=own) for recipe, own in zip(plan.blocks, names, strict=True))
        return replace(plan, blocks=blocks)

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
        biases = ((p, r, name) for p, r in enumerate(request.plan.blocks) for name in r.own)
        return {
            f"blocks.{p}.{name}": compensation(request, r.parts[0], name.removesuffix(".bias")) for p, r, name in biases
        }


def compensation(request: TensorRequest, part: Part, role: str) -> Tensor:
    """Return what the units of a block that are not in ``part`` add through an output map on average: (hidden,).

    That is W[:, gone] mean(x[gone]), and where the map has a bias already, that bias (the mean of what the sub-layer adds
    less W mean(x)) goes on top.
    """
    import torch

    shape = request.plan.shape
    block = shape.blocks[part.source]
    kind, units, kept = ("mlp", block.channels, part.channels)
    if role == "attention_output":
        kind, units, kept = ("attention", block.kv_heads, part.kv_heads)
    mean = request.statistics([InputMoments.name])[InputMoments.name][f"{kind}_mean"][part.source]
    weight = request.weights.block(part.source)[role]
    gone = torch.ones(units, dtype=torch.bool)
    gone[list(kept or ())] = False
    columns = gone.repeat_interleave(len(mean) // units)
    bias = weight[:, columns].float() @ mean[columns]
    if shape.has_bias(role):
        added = request.statistics([AddedMean.name])[AddedMean.name][kind][part.source]
        bias += added - weight.float() @ mean
    return bias.to(weight.dtype)


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
