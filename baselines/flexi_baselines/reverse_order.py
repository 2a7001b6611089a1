"""Reverse order: blocks go from the last to the first, whatever they do; a control.

It is the Reverse-order baseline of CoMe (arXiv 2510.15304, and the authors' reverse.py with its option for blocks that
are to stay, here under its name).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flexi_plugins.data import Scores
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import ImportanceMetric, PruningRequest, hookimpl


@dataclass(frozen=True)
class ReverseOrder:
    """The later a block of the original model, the lower its score."""

    retain_layer: tuple[int, ...] = ()  # blocks of the original that go after all others, the first of these first

    name: ClassVar[str] = "reverse-order"
    paper: ClassVar[str] = "control, as in CoMe, arXiv 2510.15304"
    gives: ClassVar[frozenset[str]] = frozenset({"block"})
    needs: ClassVar[frozenset[str]] = frozenset()
    excused: ClassVar[dict[str, str]] = {
        "dead-blocks-score-low": "a block's place is all that counts, not what it does"
    }

    def score(self, request: PruningRequest) -> Scores:
        """Return the places in the order of removal, counted from 0: (blocks,)."""
        import torch

        count = len(request.plan.shape.blocks)
        unknown = [i for i in self.retain_layer if not 0 <= i < count]
        if unknown:
            raise FlexiError(f"{self.name}: retain_layer names block {unknown[0]}, expected blocks in 0..{count - 1}")
        order = [i for i in reversed(range(count)) if i not in self.retain_layer] + list(self.retain_layer)
        place = {source: float(order.index(source)) for source in range(count)}
        return Scores(block=torch.tensor([place[recipe.sources[0]] for recipe in request.plan.blocks]))


@hookimpl
def importance_metrics() -> list[ImportanceMetric]:
    """Return the reverse-order metric."""
    return [ReverseOrder()]
