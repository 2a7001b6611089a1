"""SLEB's block scores (arXiv 2402.09025, and the authors' sleb.py): the loss of the current model without the block.

With remove-blocks and ``progressive`` this is the paper's method (its third metric): of the blocks that are left, the one
without which the negative log-likelihood of the calibration text is lowest goes for good. Without ``progressive`` it is
the paper's second metric, all at once. The loss is the plain next-token loss of the whole model over all positions; there
is no early exit. The first and the last block are never tried: ``early_barrier`` and ``latter_barrier``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flexi_plugins.budget import least_loss
from flexi_plugins.data import PruningPlan, Scores
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import ImportanceMetric, PruningRequest, hookimpl


@dataclass(frozen=True)
class Sleb:
    """A block's score is the loss without it, in nats per token; blocks that are not tried rank above all others."""

    early_barrier: int = 1  # so many blocks at the front are not tried
    latter_barrier: int = 1  # and so many at the end

    name: ClassVar[str] = "sleb"
    paper: ClassVar[str] = "SLEB, arXiv 2402.09025"
    gives: ClassVar[frozenset[str]] = frozenset({"block"})
    needs: ClassVar[frozenset[str]] = frozenset()
    excused: ClassVar[dict[str, str]] = {
        "dead-blocks-score-low": "the blocks outside the barriers score highest, whatever they do"
    }

    def score(self, request: PruningRequest) -> Scores:
        """Return the loss without each block that is tried, one sweep for all: (blocks,)."""
        import torch

        blocks = range(len(request.shape.blocks))
        tried = self._tried(request.plan)
        barriers = f"{self.name}: early_barrier = {self.early_barrier}, latter_barrier = {self.latter_barrier}"
        if min(self.early_barrier, self.latter_barrier) < 0:
            raise FlexiError(f"{barriers}: expected 0 or more")
        if not tried:
            raise FlexiError(
                f"{barriers}: expected a block between them that may go, found none of {len(blocks)}; lower the barriers or "
                "the ratio"
            )
        steps = [PruningPlan.keep(request.shape, (i for i in blocks if i != gone)) for gone in tried]
        found = request.quality([request.plan.compose(step) for step in steps], "loss")
        least_loss(found, f"{self.name}: any block that goes")
        losses = torch.tensor(found)
        most = float(losses[losses.isfinite()].max()) + 1  # without the others the model breaks down
        scores = torch.full((len(blocks),), most)
        scores[tried] = losses.where(losses.isfinite(), most)
        return Scores(block=scores)

    def _tried(self, plan: PruningPlan) -> list[int]:
        """Return the blocks between the barriers, but for those whose weights another block runs with."""
        donors = {recipe.shares for recipe in plan.blocks if recipe.shares is not None}
        between = range(self.early_barrier, len(plan.blocks) - self.latter_barrier)
        return [i for i in between if plan.blocks[i].whole not in donors]


@hookimpl
def importance_metrics() -> list[ImportanceMetric]:
    """Return the sleb metric."""
    return [Sleb()]
