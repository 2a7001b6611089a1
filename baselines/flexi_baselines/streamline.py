"""LLM-Streamline's choice of blocks (arXiv 2403.19135, and the code's get_cosine.py): one run of consecutive blocks.

Of all runs of n blocks the one goes whose input and output are most alike: argmax over i of the mean over tokens of
cos(x_i, x_i+n), x_i the stream that enters block i. What leaves the last block is taken before the final norm, where the
code, through transformers' hidden_states, has it behind. The code (read in public copies of the authors' repository)
tries every run; Prune&Comp's CosSim(CL) leaves out the first and the last block, which the two protections do.
The paper then trains a lightweight network in the run's place; that is not part of the choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from flexi_plugins.budget import check_reach, smallest
from flexi_plugins.data import ModelShape, PruningPlan
from flexi_plugins.errors import FlexiError
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

    name: ClassVar[str] = "llm-streamline"
    paper: ClassVar[str] = "LLM-Streamline, arXiv 2403.19135"
    knobs: ClassVar[tuple[str, ...]] = ("blocks",)
    needs: ClassVar[frozenset[str]] = frozenset({"run-distance"})
    wants: ClassVar[frozenset[str]] = frozenset()
    progressive: ClassVar[bool] = False

    def _most(self, shape: ModelShape) -> int:
        return min(len(shape.blocks) - self.protect_first - self.protect_last, len(shape.blocks) - 1)

    def reach(self, shape: ModelShape) -> float:
        """Return the ratio of removing every block that may go (at least one stays)."""
        gone = range(self.protect_first, self.protect_first + max(0, self._most(shape)))
        return sum(shape.block_parameters(shape.blocks[i]) for i in gone) / shape.parameters

    def plan(self, request: PruningRequest) -> PruningPlan:
        """Remove the run of as many blocks as the ratio, or ``blocks``, asks for."""
        most = self._most(request.shape)
        if self.blocks is None:
            check_reach(self.name, request.budget, self.reach(request.shape))
        elif not 0 < self.blocks <= most:
            raise FlexiError(f"{self.name}: blocks = {self.blocks}, expected 1..{most} on this model")
        count = self.blocks or smallest(most, lambda n: self._without(request, n), request.budget, self.name)
        return self._without(request, count)

    def _without(self, request: PruningRequest, count: int) -> PruningPlan:
        blocks = range(len(request.shape.blocks))
        starts = blocks[self.protect_first : len(blocks) - self.protect_last - count + 1]
        start = starts[0]
        if not request.counting:
            distance = request.statistics["run-distance"]["distance"]
            start = min(starts, key=lambda first: float(distance[first + count - 1][first]))
        return PruningPlan.keep(request.shape, (*blocks[:start], *blocks[start + count :]))

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
