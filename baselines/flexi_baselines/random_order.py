"""Random order: blocks, KV heads and channels go by lot; a control.

The lots are drawn from the seed of the calibration and from the plan so far, so that every step of a progressive strategy
draws anew: with the same lots again, blocks would go one beside the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flexi_plugins.data import Scores, digest
from flexi_plugins.hookspecs import ImportanceMetric, PruningRequest, hookimpl

LOTS = "the score is a lot: it belongs to a place in the model, and not to what is there"


@dataclass(frozen=True)
class RandomOrder:
    """Independent uniform numbers; units are not comparable by them, so a ranking does not divide them by their cost."""

    name: ClassVar[str] = "random-order"
    paper: ClassVar[str] = "control"
    gives: ClassVar[frozenset[str]] = frozenset({"block", "attention", "mlp"})
    needs: ClassVar[frozenset[str]] = frozenset()
    excused: ClassVar[dict[str, str]] = dict.fromkeys(
        ("permuted-units-permute-scores", "dead-units-score-low", "dead-blocks-score-low"), LOTS
    )

    def score(self, request: PruningRequest) -> Scores:
        """Return numbers in 0..1."""
        import torch

        generator = torch.Generator().manual_seed(int(digest([request.seed, request.plan.hash])[:15], 16))
        blocks = request.shape.blocks
        return Scores(
            block=torch.rand(len(blocks), generator=generator),
            attention=tuple(torch.rand(b.kv_heads, generator=generator) for b in blocks),
            mlp=tuple(torch.rand(b.channels, generator=generator) for b in blocks),
        )


@hookimpl
def importance_metrics() -> list[ImportanceMetric]:
    """Return the random-order metric."""
    return [RandomOrder()]
