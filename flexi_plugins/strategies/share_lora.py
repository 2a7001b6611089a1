"""FlexiGPT's replacement (arXiv 2501.14713, sections 3.2-3.4): pruned blocks run with another block's weights.

The donor of a pruned block i is the unpruned block j whose rank-r reconstructions a rank-r adapter can best turn into
i's: d(W_i, W_j) = ||W^_i - (W^_j + D_ij)||_F, W^ the rank-r reconstruction, D_ij the best rank-r approximation of
W^_i - W^_j (eq. 2-4), summed over all linear maps (the paper defines d for one matrix, not how it adds up). Its two
ablations (figures 2b and 2c) are options: W in the place of W^, and the plain distance ||W_i - W_j||_F.
Adapters start at the SVD of the full difference W_i - W_j; both sub-layers' outputs are normalised with a small gain,
of which the paper says no more than that it was tuned: it can be chosen by the loss on the calibration text. The other
two of its ablations (table 4, whose words are all that is known of them) are options too: adapters that start at a zero
product, and no normalisation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from flexi_plugins.budget import check_count, check_reach, least_loss, smallest
from flexi_plugins.data import BlockRecipe, ModelShape, Part, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import (
    Budget,
    PruningRequest,
    ReplacementStrategy,
    TensorRequest,
    Weights,
    hookimpl,
    no_progress,
)

if TYPE_CHECKING:
    from torch import Generator, Tensor

SvdMethod = Literal["auto", "exact", "randomised"]
"""How weights are factorised, see ``numerics.truncated_svd``."""
DonorDistance = Literal["reconstruction", "difference", "frobenius"]
"""Which distance chooses the donor: the paper's (eq. 2), or one of its ablations (figures 2b and 2c)."""
GAINS = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1)  # of which a calibrated gain is the best


@dataclass(frozen=True)
class ShareLora:
    """Replace the lowest-scored blocks by an unpruned block's weights plus adapters and normalised outputs."""

    blocks: int | None = None  # how many to replace, in the place of a ratio
    rank: int | None = None  # adapter rank; default hidden / 16, the paper's 256 at 4096
    # Start of gamma; calibrated: of GAINS the one with the lowest loss. The default is the largest at which SmolLM2-135M
    # starts no worse than without the blocks (baselines/recipes/share-lora-start.toml).
    output_gain: float | Literal["calibrated"] = 0.003
    donor: DonorDistance = "reconstruction"
    adapters: Literal["svd", "zero"] = "svd"  # how they start: at the SVD of the difference, or at a zero product
    output_norm: bool = True  # whether both sub-layers' outputs are normalised; without, there is no gain
    svd: SvdMethod = "auto"  # auto: exact on small matrices, randomised on large ones
    protect_first: int = 0
    protect_last: int = 0

    name: ClassVar[str] = "share-lora"
    paper: ClassVar[str] = "FlexiGPT, arXiv 2501.14713"
    knobs: ClassVar[tuple[str, ...]] = ("blocks",)
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
        check_count(self.name, "blocks", count, len(order))
        return self._sharing(shape, order[:count], request)

    def _sharing(self, shape: ModelShape, gone: Sequence[int], request: PruningRequest | None = None) -> PruningPlan:
        blocks = list(PruningPlan.identity(shape).blocks)
        nearest = self._nearest(gone, request) if request and not request.counting else {}
        for block in gone:
            donors = [j for j, s in enumerate(shape.blocks) if j not in gone and s == shape.blocks[block]]
            donor = nearest[block] if nearest else donors[0]
            blocks[block] = BlockRecipe(
                parts=(Part(block),), shares=donor, rank=self._rank(shape), output_norm=self.output_norm
            )
        return PruningPlan(shape, tuple(blocks))

    def _nearest(self, gone: Sequence[int], request: PruningRequest) -> dict[int, int]:
        """Return the nearest of the blocks that stay, of the same widths, for each that goes."""
        assert request.weights is not None
        shape = request.shape
        stay = [j for j in range(len(shape.blocks)) if j not in gone]
        pairs = [(i, j) for i in gone for j in stay if shape.blocks[i] == shape.blocks[j]]
        how = self._rank(shape), self.svd, self.donor
        distances = donor_distances(request.weights, shape, pairs, *how, request.progress)
        return {i: min((j for own, j in pairs if own == i), key=lambda j: distances[frozenset((i, j))]) for i in gone}

    def finished(self, plan: PruningPlan, budget: Budget) -> bool:
        """Return True: one step does it all."""
        return True

    def tensors(self, request: TensorRequest) -> dict[str, Tensor]:
        """Return adapters from the SVD of W_i - W_j (eq. 7-8: singular values on A) and constant output gains."""
        made = self._adapters(request)
        if not self.output_norm:
            return made
        if self.output_gain != "calibrated":
            return made | self._gains(request, made, self.output_gain)
        candidates = [made | self._gains(request, made, gain) for gain in GAINS]
        losses = request.quality([request.plan] * len(GAINS), "loss", candidates)
        return candidates[least_loss(losses, f"{self.name}: any output gain of {GAINS[0]:g}..{GAINS[-1]:g}")]

    def _adapters(self, request: TensorRequest) -> dict[str, Tensor]:
        import torch

        made: dict[str, Tensor] = {}
        plan, weights, generator = request.plan, request.weights, torch.Generator().manual_seed(request.seed)
        for position, recipe in enumerate(plan.blocks):
            if recipe.shares is None or not recipe.rank:
                continue
            source = recipe.parts[0].source
            for role, (rows, columns) in plan.shape.maps(plan.shape.blocks[source]).items():
                own = linear_map(weights, source, role)
                if self.adapters == "zero":
                    a, b = zero_adapter(rows, columns, recipe.rank, generator)
                else:
                    a, b = difference_adapter(own, linear_map(weights, recipe.shares, role), recipe.rank, self.svd)
                made[f"blocks.{position}.{role}.lora_a"] = a.to(own.dtype)
                made[f"blocks.{position}.{role}.lora_b"] = b.to(own.dtype)
        return made

    def _gains(self, request: TensorRequest, adapters: dict[str, Tensor], gain: float) -> dict[str, Tensor]:
        """Return gamma of both sub-layers of every sharing block: (hidden,), in the weights' dtype."""
        import torch

        plan = request.plan
        donors = {p: r.shares for p, r in enumerate(plan.blocks) if r.shares is not None}
        known = next(iter(adapters.values()), None)
        if known is None:
            donor = next(iter(donors.values()))
            known = linear_map(request.weights, donor, next(iter(plan.shape.maps(plan.shape.blocks[donor]))))
        widths = {position: plan.block_shape(plan.blocks[position]) for position in donors}
        return {
            f"blocks.{position}.{part}.output_norm": torch.full((plan.shape.hidden,), gain, dtype=known.dtype)
            for position, width in widths.items()
            for part, there in (("attention", width.kv_heads), ("mlp", width.channels))
            if there
        }


def linear_map(weights: Weights, block: int, role: str) -> Tensor:
    """Return one linear map of a block; raise a FlexiError where it holds anything but finite numbers."""
    weight = weights.block(block)[role]
    low, high = weight.aminmax()  # NaN if there is one; forty times as fast as isfinite of bfloat16
    if not (low.isfinite() and high.isfinite()):
        raise FlexiError(f"share-lora: the {role} map of block {block} holds NaN or infinity; expected finite weights")
    return weight


def difference_adapter(weight: Tensor, donor: Tensor, rank: int, svd: SvdMethod = "auto") -> tuple[Tensor, Tensor]:
    """Return A = (U S)[:, :r] (rows, r) and B = V[:, :r]' (r, columns) of the SVD of weight - donor (eq. 7-8)."""
    from flexi_plugins.numerics import difference, truncated_svd

    u, s, v = truncated_svd(difference(weight, donor), rank, svd)
    return u * s, v.T.contiguous()


def zero_adapter(rows: int, columns: int, rank: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return A = 0 (rows, r) and B (r, columns) with orthonormal rows, drawn; r is at most the rank of a map.

    The product is zero, and the gradient of A is not.
    """
    import torch

    rank = min(rank, rows, columns)
    basis, _ = torch.linalg.qr(torch.randn(columns, rank, generator=generator))  # (columns, rank)
    return torch.zeros(rows, rank), basis.T.contiguous()


def donor_distances(
    weights: Weights,
    shape: ModelShape,
    pairs: Iterable[tuple[int, int]],
    rank: int,
    svd: SvdMethod = "auto",
    distance: DonorDistance = "reconstruction",
    progress: Callable[..., Any] = no_progress,
) -> Mapping[frozenset[int], float]:
    """Return d of pairs of blocks of equal widths, summed over their linear maps; each is computed once per model.

    Of a small model all pairs are computed at once: factorisations are most of the work, and other scores or ratios ask
    for other pairs. One role at a time, so that only its factors are held: at rank 256 half a gigabyte for an MLP map of
    LLaMA-7B. progress(title, total): a context manager that yields ``advance(n)``. Raise a FlexiError that names a map
    that is not finite.
    """
    from flexi_plugins.numerics import SMALL

    known: dict[frozenset[int], float] = weights.cached(("share-lora distances", rank, svd, distance), dict)
    missing = [pair for pair in pairs if frozenset(pair) not in known]
    for kind in {shape.blocks[i] for i, _ in missing}:
        wanted = [pair for pair in missing if shape.blocks[pair[0]] == kind]
        if distance != "reconstruction":
            known |= _plain_distances(weights, shape, wanted, rank if distance == "difference" else 0, progress)
            continue
        if shape.hidden <= SMALL:
            wanted = list(combinations([i for i, block in enumerate(shape.blocks) if block == kind], 2))
        known |= _distances(weights, shape, wanted, rank, svd, progress)
    return known


def _distances(
    weights: Weights,
    shape: ModelShape,
    pairs: Sequence[tuple[int, int]],
    rank: int,
    svd: SvdMethod,
    progress: Callable[..., Any],
) -> dict[frozenset[int], float]:
    distances = dict.fromkeys(map(frozenset, pairs), 0.0)
    roles, blocks = shape.maps(shape.blocks[pairs[0][0]]), sorted({i for pair in pairs for i in pair})
    with progress("distances of donors", len(roles) * (len(blocks) + len(pairs))) as advance:
        for role in roles:
            found = {}
            for i in blocks:
                found[i] = reconstruction(linear_map(weights, i, role), rank, svd)
                advance(1)
            for i in sorted({i for i, _ in pairs}):
                own = found[i].double()
                for j in (j for first, j in pairs if first == i):
                    distances[frozenset((i, j))] += tail_energy(own, found[j], rank)
                    advance(1)
    return distances


def _plain_distances(
    weights: Weights,
    shape: ModelShape,
    pairs: Sequence[tuple[int, int]],
    rank: int,
    progress: Callable[..., Any],
) -> dict[frozenset[int], float]:
    """Return the Frobenius norm of W_i - W_j without its ``rank`` largest singular values, summed over the maps."""
    import torch

    from flexi_plugins.numerics import difference

    distances = dict.fromkeys(map(frozenset, pairs), 0.0)
    roles = shape.maps(shape.blocks[pairs[0][0]])
    with progress("distances of donors", len(roles) * len(pairs)) as advance:
        for role, (i, j) in product(roles, pairs):
            left = difference(linear_map(weights, i, role), linear_map(weights, j, role))
            tail = torch.linalg.svdvals(left)[rank:] if rank else left
            distances[frozenset((i, j))] += float(torch.linalg.vector_norm(tail.double()))
            advance(1)
    return distances


class Reconstruction(NamedTuple):
    """W^ = P Q' of one weight, P = (U S)[:, :r] (rows, r), Q = V[:, :r] (columns, r), with P'P and Q'Q in float64."""

    left: Tensor
    right: Tensor
    left_gram: Tensor
    right_gram: Tensor

    def double(self) -> Reconstruction:
        """Return the same in float64, for many distances from one weight."""
        return self._replace(left=self.left.double(), right=self.right.double())


def reconstruction(weight: Tensor, rank: int, svd: SvdMethod = "auto") -> Reconstruction:
    """Return the rank-r reconstruction of a weight as factors, float32."""
    from flexi_plugins.numerics import truncated_svd

    u, s, right = truncated_svd(weight, rank, svd)
    left = u * s
    return Reconstruction(left, right, left.double().T @ left.double(), right.double().T @ right.double())


def tail_energy(own: Reconstruction, donor: Reconstruction, rank: int) -> float:
    """Return d = sqrt(sum of sigma_k^2, k > r) of P_i Q_i' - P_j Q_j' (Eckart and Young: what D_ij cannot hold).

    That is L R' with L = [P_i, -P_j] and R = [Q_i, Q_j], of rank 2r at most: its squared singular values are the
    eigenvalues of K' L'L K with K K' = R'R, all three (2r, 2r). In float64, so that identical blocks are at distance 0.
    """
    import numpy as np
    import torch

    def joined(mine: Tensor, others: Tensor, cross: Tensor) -> Tensor:
        return torch.cat([torch.cat([mine, cross], 1), torch.cat([cross.T, others], 1)])

    left = joined(own.left_gram, donor.left_gram, -own.left.double().T @ donor.left.double())
    right = joined(own.right_gram, donor.right_gram, own.right.double().T @ donor.right.double())
    root = torch.linalg.cholesky(right + 1e-12 * torch.eye(len(right), dtype=right.dtype))  # R may be of lower rank
    squares = np.linalg.eigvalsh((root.T @ left @ root).numpy())  # ascending; several times as fast as torch's at 512
    return float(max(0.0, squares[: max(0, len(squares) - rank)].sum())) ** 0.5


@hookimpl
def replacement_strategies() -> list[ReplacementStrategy]:
    """Return the share-lora strategy."""
    return [ShareLora()]
