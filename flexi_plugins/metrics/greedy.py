"""Greedy importance: what the model is worth without a block (iterative layer pruning, arXiv 2510.22763; SLEB's loop).

With remove-blocks and ``progressive`` this is the paper's loop: of the blocks that are left, the one without which the
model does best goes for good. The quality measure can be exchanged: the paper's is chrF++ of generated text, SLEB's the
loss. The paper scores translations against references; here a window's own second half is the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from flexi_plugins.budget import least_loss
from flexi_plugins.data import PruningPlan, Scores
from flexi_plugins.hookspecs import ImportanceMetric, PruningRequest, hookimpl


@dataclass(frozen=True)
class Greedy:
    """A block's score is the quality of the current model without it: "loss" (nats per token) or "chrf" (minus chrF++)."""

    measure: Literal["loss", "chrf"] = "loss"

    name: ClassVar[str] = "greedy"
    paper: ClassVar[str] = "Iterative Layer Pruning, arXiv 2510.22763"
    gives: ClassVar[frozenset[str]] = frozenset({"block"})
    needs: ClassVar[frozenset[str]] = frozenset()

    def score(self, request: PruningRequest) -> Scores:
        """Return the quality without each block, lower is better: (blocks,); one sweep for all.

        A block that cannot go, the last one or one with whose weights another runs, or without which the model breaks
        down, scores more than all others.
        """
        import math

        import torch

        donors = {recipe.shares for recipe in request.plan.blocks}
        blocks = range(len(request.shape.blocks))
        able = [i for i in blocks if request.plan.blocks[i].whole not in donors - {None} and len(blocks) > 1]
        steps = (PruningPlan.keep(request.shape, (i for i in blocks if i != gone)) for gone in able)
        found = request.quality([request.plan.compose(step) for step in steps], self.measure) if able else []
        if able:
            least_loss(found, f"{self.name}: any block that goes")
        known = {i: value for i, value in zip(able, found, strict=True) if math.isfinite(value)}
        most = max(known.values(), default=0.0) + 1.0
        return Scores(block=torch.tensor([known.get(i, most) for i in blocks]))


@hookimpl
def importance_metrics() -> list[ImportanceMetric]:
    """Return the greedy metric."""
    return [Greedy()]
