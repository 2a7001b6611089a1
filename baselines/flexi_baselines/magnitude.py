"""Magnitude and Magnitude+ (Shortened LLaMA, arXiv 2402.02834, and the authors' anal_block_sensitivity_magnitude.py).

Per matrix and output row sum_k |w_ck|^p, reduced over the rows of a matrix and then over the matrices of a block; the
blocks with the lowest go, all at once. The released defaults are p = 1 and sums, so the L1 norm of the block. "+" is the
authors' heuristic to keep the first four and the last two blocks (block_prune.py): here they go last, when no other is left.
The weights of a block's norms count as matrices of one column. The authors' fourth reduction, the product, leaves the range
of any float at such widths and is left out. A compensated model (Prune&Comp, arXiv 2507.18212, and the authors' mag+.py) is
scored with its gains folded into the weights: the maps that write to the stream are as much larger as all gains behind them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from flexi_plugins.data import Scores
from flexi_plugins.hookspecs import ImportanceMetric, PruningRequest, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

Reduction = Literal["sum", "mean", "max"]
FIRST, LAST = 4, 2  # blocks that "+" keeps
WRITING = ("attention_output", "down")  # maps that write to the residual stream


@dataclass(frozen=True)
class Magnitude:
    """The norm of a block's linear maps and norms."""

    norm_power: Literal[1, 2] = 1  # p
    weight_reduction: Reduction = "sum"  # over the rows of a matrix
    block_reduction: Reduction = "sum"  # over the matrices of a block
    plus: bool = False  # Magnitude+: the first four and the last two blocks rank above all others

    name: ClassVar[str] = "magnitude"
    paper: ClassVar[str] = "Shortened LLaMA, arXiv 2402.02834"
    gives: ClassVar[frozenset[str]] = frozenset({"block"})
    needs: ClassVar[frozenset[str]] = frozenset()

    def score(self, request: PruningRequest) -> Scores:
        """Return the reduced norms: (blocks,)."""
        import torch

        weights, shape = request.weights, request.shape
        assert weights is not None

        def norms() -> Tensor:
            blocks = []
            for index, block in enumerate(shape.blocks):
                maps, vectors = weights.block(index), weights.vectors(index)
                folded = math.prod(recipe.gain for recipe in request.plan.blocks[index + 1 :]) ** self.norm_power
                rows = {role: row_sums(maps[role], self.norm_power) for role in shape.maps(block)}
                rows |= {role: folded * rows[role] for role in WRITING if role in rows}
                rows |= {n: row_sums(vectors[n][:, None], self.norm_power) for n in vectors if not n.endswith(".bias")}
                blocks.append(reduced(rows.values(), self.weight_reduction, self.block_reduction))
            return torch.stack(blocks)

        key = ("magnitude", self.norm_power, self.weight_reduction, self.block_reduction)
        scores: Tensor = weights.cached(key, norms)
        return Scores(block=ends_raised(scores) if self.plus else scores)


def row_sums(weight: Tensor, power: int) -> Tensor:
    """Return sum_k |w_ck|^p of every row c of a (rows, columns) matrix: (rows,), float32."""
    import torch

    from flexi_plugins.numerics import pieces

    return torch.cat([weight[part].float().abs().pow(power).sum(1) for part in pieces(*weight.shape)])


def reduced(matrices: Iterable[Tensor], weight_reduction: Reduction, block_reduction: Reduction) -> Tensor:
    """Return a block's score () from a vector for each of its matrices; empty ones are of an absent sub-layer."""
    import torch

    found = [getattr(values, weight_reduction)() for values in matrices if values.numel()]
    return getattr(torch.stack(found), block_reduction)()


def ends_raised(scores: Tensor) -> Tensor:
    """Return block scores with those of the first four and the last two blocks above all others, in their own order."""
    raised = scores.clone()
    gap = 2 * float(scores.max() - scores.min()) or 1.0
    protected = [i for i in range(len(scores)) if i < FIRST or i >= len(scores) - LAST]
    raised[protected] += gap
    return raised


@hookimpl
def importance_metrics() -> list[ImportanceMetric]:
    """Return the magnitude metric."""
    return [Magnitude()]
