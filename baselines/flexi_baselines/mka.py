"""MKA (arXiv 2406.16330, and its released pipeline.py): the last two blocks are merged, again and again.

Blocks are compared by the states of all calibration sequences that enter them (see ``npib``). Released, of blocks i and
i + 1, the last two, i gets the share a = sigmoid(beta S_i / (S_i + S_i+1)), S_i the mean of NPIB(i, .) over all blocks, and
a theta_i + (1 - a) theta_i+1 takes the place of both, with the norms of i; similarities are the dense model's throughout.
In the paper a = NPIB(i, i + 1). The pipeline, which was read in public copies, writes the merged maps where they are lost,
so that what it saves is the model without its last blocks (reverse-order): not done here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from flexi_baselines.last_blocks import mergeable, merged
from flexi_baselines.npib import AXES, embedded, npib, ranked
from flexi_baselines.sequence_states import SequenceStates
from flexi_plugins.budget import check_count, check_reach, smallest
from flexi_plugins.data import ModelShape, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import (
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
class Mka:
    """Merge the last two blocks by a weighted sum, as often as the ratio asks for."""

    merges: int | None = None  # how many merges (num_layer), in the place of a ratio
    share: Literal["released", "paper"] = "released"  # what the weight of the earlier block is made of
    states: Literal["last", "released"] = "last"  # which tokens the rows are
    progressive: bool = False  # compare the blocks of the merged model before each merge
    sigma_k: float = 8.0
    alpha: float = 0.5
    beta: float = 1.0
    n_neighbors: int = 5  # of the mutual information; at most one less than there are sequences
    k_entropy: int = 50  # which neighbour the entropy measures; likewise

    name: ClassVar[str] = "mka"
    paper: ClassVar[str] = "MKA, arXiv 2406.16330"
    knobs: ClassVar[tuple[str, ...]] = ("merges",)
    needs: ClassVar[frozenset[str]] = frozenset({"sequence-states"})
    wants: ClassVar[frozenset[str]] = frozenset()
    remerges: ClassVar[bool] = True

    def reach(self, shape: ModelShape) -> float:
        """Return the ratio of merging all blocks behind the last one of other widths; all blocks if there is none."""
        return mergeable(shape) * shape.block_parameters(shape.blocks[-1]) / shape.parameters

    def plan(self, request: PruningRequest) -> PruningPlan:
        """Merge the last two blocks: once if progressive, else as often as needed."""
        shape, most = request.shape, mergeable(request.plan.shape)
        if self.merges is None:
            check_reach(self.name, request.budget, self.reach(request.plan.shape))
        else:
            check_count(self.name, "merges", self.merges, most)
        count = 1
        if not self.progressive:
            count = self.merges or smallest(most, lambda n: merged(shape, [0.5] * n), request.budget, self.name)
        if request.counting:
            return merged(shape, [0.5] * count)
        shares = self._shares(request, count)
        notes = [f"shares of the earlier block: {', '.join(f'{share:.4f}' for share in shares)}"]
        n, k = self._neighbours(rows := len(request.statistics["sequence-states"][self.states][0]))
        if (n, k) != (self.n_neighbors, self.k_entropy):
            notes.append(f"n_neighbors = {n} and k_entropy = {k}, for there are {rows} calibration sequences")
        return replace(merged(shape, shares), origin={"notes": notes})

    def _shares(self, request: PruningRequest, count: int) -> list[float]:
        """Return the weight of the earlier block of each pair, the last pair first."""
        states = request.statistics["sequence-states"][self.states]
        rows = len(states[0])
        if rows < AXES + 2:
            raise FlexiError(
                f"{self.name}: {rows} calibration sequences, expected {AXES + 2} or more; set calibration windows"
            )
        points = [ranked(embedded(s, self.sigma_k, self.alpha)) for s in states]
        similarity = npib(points, *self._neighbours(rows), request.seed)
        return [self._weight(similarity, len(points) - 2 - step) for step in range(count)]

    def _neighbours(self, rows: int) -> tuple[int, int]:
        """Return ``n_neighbors`` and ``k_entropy``, as far as so many sequences have that many others."""
        return min(self.n_neighbors, rows - 1), min(self.k_entropy, rows - 1)

    def _weight(self, similarity: Tensor, first: int) -> float:
        if self.share == "paper":
            return float(similarity[first, first + 1])
        own, other = similarity.mean(1)[first : first + 2]
        return float((self.beta * own / (own + other)).sigmoid())

    def finished(self, plan: PruningPlan, budget: Budget) -> bool:
        """Whether enough blocks are merged."""
        if self.merges is not None:
            return len(plan.shape.blocks) - len(plan.blocks) >= self.merges
        return budget.met(plan)

    def tensors(self, request: TensorRequest) -> dict[str, Tensor]:
        """Return nothing: a mix makes no new tensors."""
        return {}


@hookimpl
def replacement_strategies() -> list[ReplacementStrategy]:
    """Return the mka strategy."""
    return [Mka()]


@hookimpl
def statistics() -> list[Statistic]:
    """Return the states of sequences."""
    return [SequenceStates()]
