"""Removal of whole blocks (ShortGPT, arXiv 2403.03853; SLEB's loop when progressive): the lowest scores go.

compensate: Prune&Comp (arXiv 2507.18212, and the authors' magcomp.py). Every block enlarges the residual stream, so what
follows a cut gets one that is too small: alpha = mean over channels of the mean over windows of mean_t |x_j| / mean_t
|x_i|, x_i and x_j the streams that enter the first removed block and the one behind the last, becomes the ``gain`` of
the latter. The authors take alpha on the model in front of each removal, which is ``progressive``; nothing follows a cut
at the end, where there is none. A plain checkpoint has the gain folded into weights (see ``rewrite.state_dict``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from flexi_plugins.budget import check_count, check_reach, lowest, removable, removable_share, smallest
from flexi_plugins.data import ModelShape, PruningPlan
from flexi_plugins.hookspecs import (
    BlockTrace,
    Budget,
    PruningRequest,
    ReplacementStrategy,
    Statistic,
    TensorRequest,
    hookimpl,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StreamMagnitude:
    """Mean over tokens of |x| for every calibration window and channel: before and after each block."""

    name: ClassVar[str] = "stream-magnitude"
    span: ClassVar[int] = 1
    backward: ClassVar[bool] = False

    def observe(self, trace: BlockTrace) -> dict[str, Tensor]:
        """Return ``input`` and ``output``: (windows, hidden), zero for windows of other batches."""
        import torch

        def means(stream: Tensor) -> Tensor:
            windows = stream.chunk(len(trace.sequences))
            return torch.stack([window.float().abs().mean(0) for window in windows])

        return {"input": trace.among_all(means(trace.input)), "output": trace.among_all(means(trace.output))}

    def finish(self, totals: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Return the means as they are."""
        return dict(totals)


@dataclass(frozen=True)
class RemoveBlocks:
    """Remove the blocks with the lowest scores: all at once, or one at a time with fresh scores."""

    blocks: int | None = None  # how many to remove, in the place of a ratio
    progressive: bool = False
    protect_first: int = 0
    protect_last: int = 0
    compensate: bool = False  # Prune&Comp's magnitude compensation

    name: ClassVar[str] = "remove-blocks"
    paper: ClassVar[str] = "ShortGPT, arXiv 2403.03853"
    knobs: ClassVar[tuple[str, ...]] = ("blocks",)
    wants: ClassVar[frozenset[str]] = frozenset({"block"})

    @property
    def needs(self) -> frozenset[str]:
        """Stream magnitudes, to compensate."""
        return frozenset({"stream-magnitude"} if self.compensate else ())

    def reach(self, shape: ModelShape) -> float:
        """Return the ratio of removing every block that may go (at least one stays)."""
        return removable_share(shape, self.protect_first, self.protect_last)

    def _most(self, shape: ModelShape) -> int:
        return removable(shape, self.protect_first, self.protect_last)

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
        else:
            check_count(self.name, "blocks", self.blocks, self._most(request.plan.shape))
        count = 1
        if not self.progressive:
            count = self.blocks or smallest(self._most(shape), without, request.budget, self.name)
        if self.compensate and not request.counting:
            return self._compensated(request, lowest(scores, count, allowed))
        return without(count)

    def _compensated(self, request: PruningRequest, gone: Collection[int]) -> PruningPlan:
        """Return the plan without these blocks, with a gain behind each run of them."""
        from flexi_plugins.numerics import enlargement

        magnitude = request.statistics["stream-magnitude"]
        recipes, first = [], None
        for index, recipe in enumerate(PruningPlan.identity(request.shape).blocks):
            if index in gone:
                first = index if first is None else first
            elif first is None:
                recipes.append(recipe)
            else:  # what enters a block is enlarged by its gain, where it has one
                entered = magnitude["input"][first] * request.plan.blocks[first].gain
                recipes.append(replace(recipe, gain=enlargement(entered, magnitude["output"][index - 1])))
                first = None
        return PruningPlan(request.shape, tuple(recipes))

    def finished(self, plan: PruningPlan, budget: Budget) -> bool:
        """Whether enough blocks are gone."""
        if self.blocks is not None:
            return len(plan.shape.blocks) - len(plan.blocks) >= self.blocks
        return budget.met(plan)

    def tensors(self, request: TensorRequest) -> dict[str, Tensor]:
        """Return nothing: removal makes no new tensors."""
        return {}


@hookimpl
def statistics() -> list[Statistic]:
    """Return the magnitudes of the residual stream."""
    return [StreamMagnitude()]


@hookimpl
def replacement_strategies() -> list[ReplacementStrategy]:
    """Return the remove-blocks strategy."""
    return [RemoveBlocks()]
