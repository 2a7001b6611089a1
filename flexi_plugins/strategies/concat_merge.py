"""CoMe's progressive concatenation merge (arXiv 2510.15304, Algorithm 1, and the authors' code concat_merge.py).

While too many parameters are left: score the current model, choose the pair of neighbouring blocks that together turn
the residual stream least, share the width between them by their influence, keep each one's best KV heads and channels,
and concatenate: queries, keys, values, gate and up by rows, output and down by columns. Norms are averaged; norms of
queries and keys, and output biases, are summed by the shares. Whole KV heads move with their query heads; the released
code repeats the selection of KV heads as a tile, so that on grouped-query models query heads end up with other KV heads
than theirs (``heads = "tiled"``, to explain deviations from its numbers). The stream behind the last block is taken in
front of the final norm, where the released code, through transformers' hidden_states, has it behind.

CoMe-P (Algorithm 2, concat_merge_P.py) is ``ratio = "search"``: of ``granularity`` + 1 shares the one whose merged model
has the lowest loss on the calibration text, all of them run in one sweep.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from flexi_plugins.budget import check_count, check_reach, least_loss
from flexi_plugins.data import BlockRecipe, BlockShape, ModelShape, Part, PruningPlan, Weighted
from flexi_plugins.errors import FlexiError, OutOfReach
from flexi_plugins.hookspecs import Budget, PruningRequest, ReplacementStrategy, TensorRequest, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ConcatMerge:
    """Merge two neighbouring blocks into one of their width, step by step, with fresh statistics."""

    # Pair choice: CoMe's angle; the lowest sum of the metric's block scores; the loss without both blocks (as SLEB
    # would); always the last pair (as MKA does; the released option of this name ends up at the first, by the argmin of
    # weights that are all zero but the last).
    pairs: Literal["own", "score", "sleb", "mka"] = "own"
    # Width shares: CoMe's block influence; the metric's block scores; CoMe-P's search.
    ratio: Literal["own", "score", "search"] = "own"
    granularity: int = 20  # steps of the search
    heads: Literal["grouped", "tiled"] = "grouped"  # which query heads go with a KV head: its own, or as released
    tokens: Literal["last", "all"] = "all"  # which tokens the angle is taken over ("last" as released for CoMe)
    exponent: float = 1.0  # p of the shares (--psu)
    floor: float = 0.0  # the larger share is at least floor ^ (1 / (original blocks - 1)) (--min-max); 0: none
    # How a pair becomes one block; the two that CoMe is compared with: all weights summed by the shares (as MKA does), or
    # the block of the smaller share dropped.
    merge: Literal["concat", "sum", "drop"] = "concat"
    repeat: bool = False  # may a merged block be merged again
    merges: int | None = None  # how many merges, in the place of a ratio

    name: ClassVar[str] = "concat-merge"
    paper: ClassVar[str] = "CoMe, arXiv 2510.15304"
    knobs: ClassVar[tuple[str, ...]] = ("merges",)
    progressive: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """Pair angles and block influence, where CoMe's own choices are asked for."""
        own = {"pair-angle"} if self.pairs == "own" else set()
        return frozenset(own | ({"block-influence"} if self.ratio == "own" else set()))

    @property
    def wants(self) -> frozenset[str]:
        """Unit scores always; block scores where they choose pairs or shares."""
        return frozenset({"attention", "mlp"} | ({"block"} if "score" in (self.pairs, self.ratio) else set()))

    @property
    def remerges(self) -> bool:
        """Whether a merged block may be merged again."""
        return self.repeat

    def reach(self, shape: ModelShape) -> float:
        """Return the ratio of merging every block once (or down to one block with ``repeat``)."""
        return self._most(shape) * min(shape.block_parameters(b) for b in shape.blocks) / shape.parameters

    def _most(self, shape: ModelShape) -> int:
        pairs = _neighbours(shape)
        return len(pairs) if self.repeat else _disjoint(pairs)

    def finished(self, plan: PruningPlan, budget: Budget) -> bool:
        """Whether enough blocks are merged."""
        if self.merges is not None:
            return _done(plan) >= self.merges
        return budget.met(plan)

    def plan(self, request: PruningRequest) -> PruningPlan:
        """Merge one pair of the current model."""
        if self.repeat and self.heads == "tiled" and any(b.group > 1 for b in request.shape.blocks):
            raise FlexiError(
                f"{self.name}: heads = 'tiled' gives query heads other KV heads than theirs, and such a block cannot be merged "
                "again (repeat = true); set repeat = false, or heads = 'grouped'"
            )
        if self.merges is None:
            check_reach(self.name, request.budget, self.reach(request.plan.shape))
        else:
            check_count(self.name, "merges", self.merges, self._most(request.plan.shape))
        first = self._pair(request)
        if self.ratio == "search" and not request.counting:
            return self._searched(request, first)
        return self._merge(request, first, self._shares(request, first))

    def _searched(self, request: PruningRequest, first: int) -> PruningPlan:
        """CoMe-P: return the merge of a pair with the lowest loss, ties to the smaller share of the first block."""
        if self.granularity < 1:
            raise FlexiError(f"{self.name}: granularity = {self.granularity}, expected at least 1")
        steps = self.granularity
        shares = [(step / steps, (steps - step) / steps) for step in range(steps + 1)]
        plans = [self._merge(request, first, share) for share in shares]
        losses = request.quality([request.plan.compose(plan) for plan in plans])
        return plans[least_loss(losses, f"{self.name}: any share of blocks {first} and {first + 1}")]

    def tensors(self, request: TensorRequest) -> dict[str, Tensor]:
        """Return nothing: a concatenation makes no new tensors."""
        return {}

    def _pair(self, request: PruningRequest) -> int:
        """Return the first block of the pair to merge.

        Blocks between merged ones can be left alone; a pair after which too few pairs were left for the ratio waits.
        """
        blocks = request.plan.blocks
        candidates = _neighbours(request.shape)
        if not self.repeat:
            once = [len(b.norm_weights) < 2 for b in blocks]
            candidates = [i for i in candidates if once[i] and once[i + 1]]
        if not candidates:
            raise OutOfReach(
                f"{self.name}: no two neighbouring blocks are left to merge at a ratio of {request.plan.ratio:.4f}; "
                "set repeat = true to merge merged blocks again"
            )
        if not self.repeat:
            later = {i: _disjoint([c for c in candidates if abs(c - i) > 1]) for i in candidates}
            needed = min(self._needed(request) - 1, max(later.values()))
            candidates = [i for i in candidates if later[i] >= needed]
        if request.counting:
            return candidates[0]
        if self.pairs == "own":
            angles = request.statistics["pair-angle"][self.tokens]
            return min(candidates, key=lambda i: float(angles[i + 1]))
        if self.pairs == "mka":
            return candidates[-1]
        if self.pairs == "sleb":
            rest = [[b for b in range(len(blocks)) if b not in (i, i + 1)] for i in candidates]
            without = [request.plan.compose(PruningPlan.keep(request.shape, kept)) for kept in rest if kept]
            losses = request.quality(without) if without else [0.0]
            return candidates[least_loss(losses, f"{self.name}: any pair that goes (pairs = 'sleb')")]
        scores = _block_scores(request)
        return min(candidates, key=lambda i: float(scores[i] + scores[i + 1]))

    def _needed(self, request: PruningRequest) -> int:
        """Return how many more merges the ratio, or ``merges``, asks for."""
        plan = request.plan
        if self.merges is not None:
            return self.merges - _done(plan)
        smallest = min(plan.shape.block_parameters(b) for b in plan.shape.blocks)
        return -((request.budget.target - plan.stored_parameters) // smallest)

    def _shares(self, request: PruningRequest, first: int) -> tuple[float, float]:
        """F_merge: r_j = influence_j ^ p / sum, with a floor for the larger one."""
        if request.counting:
            return 0.5, 0.5
        if self.ratio == "own":
            influence = request.statistics["block-influence"]["clamped"]
            values = [float(influence[first]), float(influence[first + 1])]
        else:  # scores of any sign: measured from the lowest block's
            scores = _block_scores(request)
            values = [float(scores[i] - scores.min()) for i in (first, first + 1)]
        powers = [v**self.exponent for v in values]
        total = sum(powers)
        shares = (powers[0] / total, powers[1] / total) if total > 0 else (0.5, 0.5)
        if not 0 <= self.floor <= 1:
            raise FlexiError(f"{self.name}: floor = {self.floor}, expected 0..1, the larger share that two blocks have")
        originals = sum(len(request.plan.blocks[i].norm_weights) for i in (first, first + 1))
        floor = self.floor ** (1 / (originals - 1))
        if max(shares) < floor:
            return (floor, 1 - floor) if shares[0] >= shares[1] else (1 - floor, floor)
        return shares

    def _merge(self, request: PruningRequest, first: int, shares: tuple[float, float]) -> PruningPlan:
        if self.merge == "concat":
            merged, widths = self._concatenated(request, first, shares)
        elif self.merge == "sum":
            mix = ((first, shares[0]), (first + 1, shares[1]))
            norms, biases = _vectors(request.shape, first, shares)
            merged, widths = BlockRecipe(mix=mix, norms=norms, biases=biases), "weights summed"
        else:  # with norms of both blocks, one of them times 0, so that the plan says for which it stands
            kept = first + (shares[1] > shares[0])
            norms = tuple((i, float(i == kept)) for i in (first, first + 1))
            merged, widths = BlockRecipe(parts=(Part(kept),), norms=norms), f"block {kept} stays"
        blocks = list(PruningPlan.identity(request.shape).blocks)
        blocks[first : first + 2] = [merged]
        note = (
            f"merge {_done(request.plan) + 1}: blocks {first} and {first + 1} share {shares[0]:.3f} : {shares[1]:.3f}"
        )
        return replace(PruningPlan(request.shape, tuple(blocks)), origin={"notes": [f"{note}, {widths}"]})

    def _concatenated(
        self, request: PruningRequest, first: int, shares: tuple[float, float]
    ) -> tuple[BlockRecipe, str]:
        """Return the block of each one's best units, and how many of whose they are."""
        shapes = request.shape.blocks[first : first + 2]
        heads = _split(max(b.kv_heads for b in shapes), shares, [b.kv_heads for b in shapes])
        channels = _split(max(b.channels for b in shapes), shares, [b.channels for b in shapes])
        parts = []
        for offset in (0, 1):
            index = first + offset
            kept_heads = self._best(request, "attention", index, heads[offset])
            kept_channels = self._best(request, "mlp", index, channels[offset])
            parts.append(Part(index, kept_heads, kept_channels, self._query_heads(shapes[offset], kept_heads)))
        kept = tuple(p for p in parts if p.kv_heads or p.channels)
        norms, biases = _vectors(request.shape, first, shares)
        merged = BlockRecipe(parts=kept, norms=norms, biases=biases)
        return merged, f"KV heads {heads[0]} + {heads[1]}, channels {channels[0]} + {channels[1]}"

    def _query_heads(self, shape: BlockShape, kept: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the query heads that the released code takes with these KV heads: h with h mod KV heads among them."""
        if self.heads == "grouped" or shape.group <= 1:
            return None
        return tuple(h for h in range(shape.query_heads) if h % shape.kv_heads in kept)

    def _best(self, request: PruningRequest, kind: str, block: int, count: int) -> tuple[int, ...]:
        if request.counting:
            return tuple(range(count))
        scores = getattr(request.scores, kind)
        if scores is None:
            raise FlexiError(f"{self.name}: the metric gives no {kind} scores")
        return tuple(sorted(scores[block].topk(count).indices.tolist()))


def _vectors(shape: ModelShape, first: int, shares: tuple[float, float]) -> tuple[Weighted, Weighted]:
    """Return the mean of a pair's norms, and the sum of its q/k norms and output biases by the shares, where it has any."""
    summed = shape.head_norms or shape.output_bias or shape.mlp_bias
    norms, biases = ((first, 0.5), (first + 1, 0.5)), ((first, shares[0]), (first + 1, shares[1]))
    return norms, biases if summed else ()


def _done(plan: PruningPlan) -> int:
    return len(plan.shape.blocks) - len(plan.blocks)


def _neighbours(shape: ModelShape) -> list[int]:
    """Return every i whose block can be concatenated with block i + 1."""
    kinds = [(b.head_dim, b.group, b.attention_type, b.kv_heads > 0, b.channels > 0) for b in shape.blocks]
    return [i for i in range(len(kinds) - 1) if kinds[i] == kinds[i + 1]]


def _disjoint(pairs: list[int]) -> int:
    """Return how many of the pairs (i, i + 1), i ascending, can be taken so that no block is in two."""
    count, last = 0, -2
    for i in pairs:
        if i > last + 1:
            count, last = count + 1, i
    return count


def _split(total: int, shares: tuple[float, float], available: list[int]) -> tuple[int, int]:
    """Give the smaller share floor(total x share) units and the larger the rest, as far as each has that many."""
    small = 0 if shares[0] < shares[1] else 1
    count = min(int(total * shares[small]), available[small])
    rest = min(total - count, available[1 - small])
    return (count, rest) if small == 0 else (rest, count)


def _block_scores(request: PruningRequest) -> Tensor:
    assert request.scores is not None
    if request.scores.block is None:
        raise FlexiError("concat-merge: pairs or ratio by score need a metric that gives block scores")
    return request.scores.block


@hookimpl
def replacement_strategies() -> list[ReplacementStrategy]:
    """Return the concat-merge strategy."""
    return [ConcatMerge()]
