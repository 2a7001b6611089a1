"""LLM-Streamline's choice of blocks (arXiv 2403.19135, and the code's get_cosine.py): one run of consecutive blocks.

Of all runs of n blocks the one goes whose input and output are most alike: argmax over i of the mean over tokens of
cos(x_i, x_i+n), x_i the stream that enters block i; what leaves the last block is taken before the final norm (in the
code behind it). The code tries every run; Prune&Comp's CosSim(CL) (arXiv 2507.18212) protects the first and the last
block, and makes up for the run with one alpha (compensate). The network that the paper trains in its place is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from flexi_plugins.budget import check_count, check_reach, removable, removable_share, smallest
from flexi_plugins.data import ModelShape, PruningPlan
from flexi_plugins.hookspecs import (
    ALL_BLOCKS,
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
class RunDistance:
    """1 - cos between the input of every block up to this one and this one's output, mean over all tokens."""

    name: ClassVar[str] = "run-distance"
    span: ClassVar[int] = ALL_BLOCKS
    backward: ClassVar[bool] = False

    def observe(self, trace: BlockTrace) -> dict[str, Tensor]:
        """Return sums over tokens: distance (index + 1,), entry i for the run that begins at block i."""
        import torch

        from flexi_plugins.numerics import row_distance

        starts = (*trace.before, trace.input)
        return {"distance": torch.stack([row_distance(start, trace.output).sum() for start in starts])}

    def finish(self, totals: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Return means over tokens."""
        return {"distance": totals["distance"] / tokens}


@dataclass(frozen=True)
class LlmStreamline:
    """Remove the run of consecutive blocks that turns the residual stream least."""

    blocks: int | None = None  # how many to remove (layer_intervals), in the place of a ratio
    protect_first: int = 0
    protect_last: int = 0
    compensate: bool = False  # Prune&Comp's magnitude compensation

    name: ClassVar[str] = "llm-streamline"
    paper: ClassVar[str] = "LLM-Streamline, arXiv 2403.19135"
    knobs: ClassVar[tuple[str, ...]] = ("blocks",)
    wants: ClassVar[frozenset[str]] = frozenset()
    progressive: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """Distances of runs; stream magnitudes, to compensate."""
        return frozenset({"run-distance"} | ({"stream-magnitude"} if self.compensate else set()))

    def reach(self, shape: ModelShape) -> float:
        """Return the ratio of removing every block that may go (at least one stays)."""
        return removable_share(shape, self.protect_first, self.protect_last, together=True)

    def plan(self, request: PruningRequest) -> PruningPlan:
        """Remove the run of as many blocks as the ratio, or ``blocks``, asks for."""
        most = removable(request.shape, self.protect_first, self.protect_last)
        if self.blocks is None:
            check_reach(self.name, request.budget, self.reach(request.shape))
        else:
            check_count(self.name, "blocks", self.blocks, most)
        count = self.blocks or smallest(most, lambda n: self._without(request, n), request.budget, self.name)
        return self._without(request, count)

    def _without(self, request: PruningRequest, count: int) -> PruningPlan:
        from flexi_plugins.numerics import enlargement

        blocks, start = range(len(request.shape.blocks)), self.protect_first
        if not request.counting:
            distance = request.statistics["run-distance"]["distance"]
            starts = blocks[start : len(blocks) - self.protect_last - count + 1]
            start = min(starts, key=lambda first: float(distance[first + count - 1][first]))
        recipes = list(PruningPlan.keep(request.shape, (*blocks[:start], *blocks[start + count :])).blocks)
        if self.compensate and not request.counting and start < len(recipes):
            entered, left = (request.statistics["stream-magnitude"][name] for name in ("input", "output"))
            recipes[start] = replace(recipes[start], gain=enlargement(entered[start], left[start + count - 1]))
        return PruningPlan(request.shape, tuple(recipes))

    def finished(self, plan: PruningPlan, budget: Budget) -> bool:
        """Return True: one step does it all."""
        return True

    def tensors(self, request: TensorRequest) -> dict[str, Tensor]:
        """Return nothing: removal makes no new tensors."""
        return {}


@hookimpl
def replacement_strategies() -> list[ReplacementStrategy]:
    """Return the llm-streamline strategy."""
    return [LlmStreamline()]


@hookimpl
def statistics() -> list[Statistic]:
    """Return distances of runs."""
    return [RunDistance()]
