"""FlexiGPT's replacement (arXiv 2501.14713, sections 3.2-3.4): pruned blocks run with another block's weights.

The donor of a pruned block i is the unpruned block j whose rank-r reconstructions a rank-r adapter can best turn into
i's: d(W_i, W_j) = ||W^_i - (W^_j + D_ij)||_F, W^ the rank-r reconstruction, D_ij the best rank-r approximation of
W^_i - W^_j, summed over all linear maps (the paper defines d for one matrix and does not say how it adds them up).
Adapters start at the SVD of the full difference W_i - W_j; both sub-layers' outputs are normalised with a small gain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from flexi_plugins.budget import check_reach, smallest
from flexi_plugins.data import BlockRecipe, ModelShape, Part, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Budget, PruningRequest, ReplacementStrategy, Weights, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ShareLora:
    """Replace the lowest-scored blocks by an unpruned block's weights plus adapters and normalised outputs."""

    blocks: int | None = None  # how many to replace, in the place of a ratio
    rank: int | None = None  # adapter rank; default hidden / 16, the paper's 256 at 4096
    output_gain: float = 0.01  # start of gamma; the paper's value is unknown ("small", "carefully tuned")
    protect_first: int = 0
    protect_last: int = 0

    name: ClassVar[str] = "share-lora"
    paper: ClassVar[str] = "FlexiGPT, arXiv 2501.14713"
    needs: ClassVar[frozenset[str]] = frozenset()
    wants: ClassVar[frozenset[str]] = frozenset({"block"})
    progressive: ClassVar[bool] = False

    def _order(self, shape: ModelShape, scores: Sequence[float]) -> list[int]:
        """Return the blocks that may go, lowest score first; of every kind of block the best one stays as a donor."""
        stay = Counter(shape.blocks)
        order = []
        allowed = range(self.protect_first, len(shape.blocks) - self.protect_last)
        for index in sorted(allowed, key=lambda i: (scores[i], -i)):
            if stay[shape.blocks[index]] > 1:
                stay[shape.blocks[index]] -= 1
                order.append(index)
        return order

    def _rank(self, shape: ModelShape) -> int:
        return max(1, shape.hidden // 16) if self.rank is None else self.rank

    def reach(self, shape: ModelShape) -> float:
        """Return the ratio of replacing every block that may go (one donor of each kind stays)."""
        gone = self._order(shape, [0.0] * len(shape.blocks))
        return self._sharing(shape, gone).ratio if gone else 0.0

    def plan(self, request: PruningRequest) -> PruningPlan:
        """Choose the blocks to replace by score, then each one's donor by distance."""
        assert request.scores is not None
        assert request.scores.block is not None
        shape = request.shape
        order = self._order(shape, request.scores.block.tolist())
        count = self.blocks
        if count is None:
            check_reach(self.name, request.budget, self.reach(shape))
            count = smallest(len(order), lambda n: self._sharing(shape, order[:n]), request.budget, self.name)
        if not 0 < count <= len(order):
            raise FlexiError(f"{self.name}: blocks = {count}, expected 1..{len(order)} on this model")
        return self._sharing(shape, order[:count], request.weights)

    def _sharing(self, shape: ModelShape, gone: Sequence[int], weights: Weights | None = None) -> PruningPlan:
        blocks = list(PruningPlan.identity(shape).blocks)
        for block in gone:
            donors = [j for j, s in enumerate(shape.blocks) if j not in gone and s == shape.blocks[block]]
            donor = self._nearest(block, donors, weights, shape) if weights else donors[0]
            blocks[block] = BlockRecipe(parts=(Part(block),), shares=donor, rank=self._rank(shape), output_norm=True)
        return PruningPlan(shape, tuple(blocks))

    def _nearest(self, block: int, donors: list[int], weights: Weights, shape: ModelShape) -> int:
        return min(donors, key=lambda j: block_distance(block, j, self._rank(shape), weights))

    def finished(self, plan: PruningPlan, budget: Budget) -> bool:
        """Return True: one step does it all."""
        return True

    def tensors(self, plan: PruningPlan, weights: Weights) -> dict[str, Tensor]:
        """Return adapters from the SVD of W_i - W_j (eq. 7-8: singular values on A) and constant output gains."""
        import torch

        made: dict[str, Tensor] = {}
        for position, recipe in enumerate(plan.blocks):
            if recipe.shares is None:
                continue
            own, donor = weights.block(recipe.parts[0].source), weights.block(recipe.shares)
            for role, weight in own.items():
                if recipe.rank:
                    a, b = difference_adapter(weight, donor[role], recipe.rank)
                    made[f"blocks.{position}.{role}.lora_a"] = a.to(weight.dtype)
                    made[f"blocks.{position}.{role}.lora_b"] = b.to(weight.dtype)
            dtype = next(iter(own.values())).dtype
            for part in ("attention", "mlp"):
                gain = torch.full((plan.shape.hidden,), self.output_gain, dtype=dtype)
                made[f"blocks.{position}.{part}.output_norm"] = gain
        return made


def difference_adapter(weight: Tensor, donor: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A = (U S)[:, :r] (rows, r) and B = V[:, :r]' (r, columns) of the SVD of weight - donor."""
    import torch

    u, s, vh = torch.linalg.svd(weight.float() - donor.float(), full_matrices=False)
    return (u[:, :rank] * s[:rank]).contiguous(), vh[:rank].contiguous()


def block_distance(block: int, donor: int, rank: int, weights: Weights) -> float:
    """Return d summed over the linear maps of two blocks."""
    pairs = ((factors(weights, block, r, rank), factors(weights, donor, r, rank)) for r in weights.block(block))
    return sum(tail_energy(a, b, rank) for a, b in pairs)


def factors(weights: Weights, block: int, role: str, rank: int) -> tuple[Tensor, Tensor]:
    """Return (U S, V) of the rank-r reconstruction of one weight: (rows, r) and (columns, r); computed once."""
    import torch

    def make() -> tuple[Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(weights.block(block)[role].float(), full_matrices=False)
        return u[:, :rank] * s[:rank], vh[:rank].T

    return weights.cached(("svd", block, role, rank), make)


def tail_energy(own: tuple[Tensor, Tensor], donor: tuple[Tensor, Tensor], rank: int) -> float:
    """Return sqrt(sum of sigma_k^2, k > r) of P Q' - P_j Q_j', from the 2r x 2r core of two QR factorisations."""
    import torch

    left = torch.linalg.qr(torch.cat([own[0], -donor[0]], 1)).R
    right = torch.linalg.qr(torch.cat([own[1], donor[1]], 1)).R
    return float(torch.linalg.svdvals(left @ right.T)[rank:].square().sum().sqrt())


@hookimpl
def replacement_strategies() -> list[ReplacementStrategy]:
    """Return the share-lora strategy."""
    return [ShareLora()]
