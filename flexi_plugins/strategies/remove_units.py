"""Removal of KV heads and MLP channels: one global ranking, or LLM-Pruner's uniform fraction of groups (arXiv 2305.11627)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from flexi_plugins.budget import Rule, check_reach, global_units, lowest, rounded_down, without_units
from flexi_plugins.data import ModelShape, PruningPlan
from flexi_plugins.errors import FlexiError, OutOfReach
from flexi_plugins.hookspecs import Budget, PruningRequest, ReplacementStrategy, TensorRequest, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 999  # uniform: thousandths of the largest fraction that a ratio may lead to


@dataclass(frozen=True)
class RemoveUnits:
    """Remove the lowest-ranked heads and channels.

    global: one ranking over all unprotected blocks (``rule``, see ``budget.priorities``), widths in multiples. uniform:
    the same fraction of the KV heads and channels of each of the blocks first..last (inclusive), as LLM-Pruner does.
    """

    mode: Literal["global", "uniform"] = "global"
    rule: Rule = "auto"
    protect_first: int = 1
    protect_last: int = 1
    multiple: int = 8
    min_heads: int = 1
    fraction: float | None = None  # uniform: share of each block's groups, in the place of a ratio
    first: int | None = None  # first block to prune; default protect_first
    last: int | None = None

    name: ClassVar[str] = "remove-units"
    paper: ClassVar[str] = "LLM-Pruner, arXiv 2305.11627"
    knobs: ClassVar[tuple[str, ...]] = ("fraction",)
    needs: ClassVar[frozenset[str]] = frozenset()
    wants: ClassVar[frozenset[str]] = frozenset({"attention", "mlp"})
    progressive: ClassVar[bool] = False

    def _blocks(self, shape: ModelShape) -> range:
        if self.multiple < 1 or self.min_heads < 0:
            raise FlexiError(
                f"{self.name}: multiple = {self.multiple}, min_heads = {self.min_heads}: expected a multiple of at least 1 "
                "and no negative number of heads"
            )
        first = self.protect_first if self.first is None else self.first
        last = len(shape.blocks) - 1 - self.protect_last if self.last is None else self.last
        if not 0 <= first <= last < len(shape.blocks):
            raise FlexiError(
                f"{self.name}: blocks {first}..{last} are not a range of the model's blocks 0..{len(shape.blocks) - 1}; "
                "change protect_first and protect_last, or first and last"
            )
        return range(first, last + 1)

    def reach(self, shape: ModelShape) -> float:
        """Return the ratio with only the floors left in every unprotected block; uniform: of the largest fraction."""
        if self.mode == "uniform":
            return self._saved(shape, LARGEST / 1000) / shape.parameters
        gone = 0
        for index in self._blocks(shape):
            block = shape.blocks[index]
            gone += max(0, block.kv_heads - self.min_heads) * shape.head_cost(block)
            gone += max(0, block.channels - self.multiple) * shape.channel_cost()
        return gone / shape.parameters

    def _saved(self, shape: ModelShape, fraction: float) -> int:
        """Return how many parameters go with a uniform fraction."""
        blocks = [shape.blocks[i] for i in self._blocks(shape)]
        heads = sum(_count(b.kv_heads, b.head_dim, fraction) * shape.head_cost(b) for b in blocks)
        return heads + sum(_count(b.channels, 1, fraction) for b in blocks) * shape.channel_cost()

    def plan(self, request: PruningRequest) -> PruningPlan:
        """Return the plan that keeps the highest-ranked units."""
        if self.fraction is None:
            check_reach(self.name, request.budget, self.reach(request.shape))
        if self.mode == "uniform":
            return self._uniform(request)
        assert request.scores is not None
        if self.fraction is not None:
            raise FlexiError(f"{self.name}: option fraction belongs to mode uniform; mode global takes a ratio")
        shape = request.shape
        blocks = list(self._blocks(shape))
        return global_units(request.scores, shape, request.budget, blocks, self.rule, self.multiple, self.min_heads)

    def _uniform(self, request: PruningRequest) -> PruningPlan:
        if self.fraction is not None:
            return self._with_fraction(request, self.fraction)
        shape = request.shape
        for thousandth in range(1, LARGEST + 1):
            if shape.parameters - self._saved(shape, thousandth / 1000) <= request.budget.target:
                return self._with_fraction(request, thousandth / 1000)
        raise OutOfReach(
            f"{self.name}: ratio {request.budget.ratio:g} is out of reach for a uniform fraction in these blocks; "
            f"it reaches ratios up to {rounded_down(self.reach(shape))}"
        )

    def _with_fraction(self, request: PruningRequest, fraction: float) -> PruningPlan:
        """Remove the lowest of each unprotected block; the plan notes any rounding."""
        assert request.scores is not None
        assert request.scores.attention is not None
        assert request.scores.mlp is not None
        if not 0 < fraction < 1:
            raise FlexiError(f"{self.name}: expected a fraction between 0 and 1, found {fraction:g}")
        gone: dict[tuple[int, str], list[int]] = {}
        notes = set()
        for index in self._blocks(request.shape):
            block = request.shape.blocks[index]
            for kind, width, rows, scores in (
                ("attention", block.kv_heads, block.head_dim, request.scores.attention[index]),
                ("mlp", block.channels, 1, request.scores.mlp[index]),
            ):
                count = _count(width, rows, fraction)
                gone[index, kind] = lowest(scores, count, range(width))
                if count != width * fraction:
                    unit = "KV heads" if kind == "attention" else "channels"
                    notes.add(f"a fraction of {fraction:g} of {width} {unit} became {count} a block")
        plan = without_units(request.shape, gone)
        return replace(plan, origin={"notes": sorted(notes)}) if notes else plan

    def finished(self, plan: PruningPlan, budget: Budget) -> bool:
        """Return True: one step does it all."""
        return True

    def tensors(self, request: TensorRequest) -> dict[str, Tensor]:
        """Return nothing: removal makes no new tensors."""
        return {}


def _count(width: int, rows: int, fraction: float) -> int:
    """LLM-Pruner's count: rows - int(rows x (1 - fraction)) rows go, in whole units of ``rows``; one unit stays."""
    count = (width * rows - int(width * rows * (1 - fraction))) // rows
    return max(0, min(count, width - 1))


@hookimpl
def replacement_strategies() -> list[ReplacementStrategy]:
    """Return the remove-units strategy."""
    return [RemoveUnits()]
