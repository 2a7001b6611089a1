"""A block that goes is absorbed by the one before it, by least squares: what Chain of Merges teaches, for pruning.

Chain of Merges (arXiv 2508.21421) merges fine-tuned models, not blocks: from input to output, each linear map is the
closed-form least-squares solution on activations that are recorded through what is already merged. Here, and this is
our transfer of it and not the paper's method: block b goes, and the output map of the block before it is solved anew so
that the residual stream behind that block is what it was behind b. Every solution sees the model as merged so far.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from flexi_plugins.budget import check_count, check_protected, check_reach
from flexi_plugins.data import BlockRecipe, ModelShape, PruningPlan
from flexi_plugins.errors import FlexiError, OutOfReach
from flexi_plugins.hookspecs import BlockTrace, Budget, PruningRequest, ReplacementStrategy, TensorRequest, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

OUTPUTS = {"down": ("down",), "joint": ("attention_output", "down")}


@dataclass(frozen=True)
class LeastSquaresMerge:
    """Remove the lowest-scored block, one at a time, and have the block before it make up for it."""

    blocks: int | None = None  # how many to remove, in the place of a ratio
    target: Literal["original", "current"] = (
        "original"  # whose stream is aimed at: the dense model's, or as merged so far
    )
    maps: Literal["down", "joint"] = "down"  # joint: the attention output map as well, with all activations held fixed
    ridge: float = 0.01  # weight of the old map's own outputs, relative to the mean squared activation of a channel
    protect_first: int = 1  # the first block has no other before it
    protect_last: int = 0

    name: ClassVar[str] = "least-squares-merge"
    paper: ClassVar[str] = "our transfer of Chain of Merges, arXiv 2508.21421"
    knobs: ClassVar[tuple[str, ...]] = ("blocks",)
    needs: ClassVar[frozenset[str]] = frozenset()
    wants: ClassVar[frozenset[str]] = frozenset({"block"})
    progressive: ClassVar[bool] = True

    def _allowed(self, shape: ModelShape) -> list[int]:
        """Return the blocks that can go: those behind one whose output maps can make up for them."""
        check_protected(self.protect_first, self.protect_last)
        blocks = range(max(1, self.protect_first), len(shape.blocks) - self.protect_last)
        return [i for i in blocks if all(shape.maps(shape.blocks[i - 1]).get(role) for role in OUTPUTS[self.maps])]

    def reach(self, shape: ModelShape) -> float:
        """Return the ratio of removing every block that may go."""
        return sum(shape.block_parameters(shape.blocks[i]) for i in self._allowed(shape)) / shape.parameters

    def plan(self, request: PruningRequest) -> PruningPlan:
        """Remove one block; the one before it gets new output maps."""
        assert request.scores is not None
        assert request.scores.block is not None
        shape, most = request.shape, len(self._allowed(request.plan.shape))
        if self.blocks is None:
            check_reach(self.name, request.budget, self.reach(request.plan.shape))
        else:
            check_count(self.name, "blocks", self.blocks, most)
        allowed = [i for i in self._allowed(shape) if request.plan.blocks[i - 1].shares is None]
        if not allowed:
            raise OutOfReach(f"{self.name}: no block is left that may go at a ratio of {request.plan.ratio:.4f}")
        scores = request.scores.block.tolist()
        gone = min(allowed, key=lambda i: (scores[i], -i))
        blocks = list(PruningPlan.identity(shape).blocks)
        own = tuple(f"{role}.weight" for role in OUTPUTS[self.maps])
        blocks[gone - 1 : gone + 1] = [replace(blocks[gone - 1], own=own)]
        return PruningPlan(shape, tuple(blocks))

    def finished(self, plan: PruningPlan, budget: Budget) -> bool:
        """Whether enough blocks are gone."""
        if self.blocks is not None:
            return len(plan.shape.blocks) - len(plan.blocks) >= self.blocks
        return budget.met(plan)

    def tensors(self, request: TensorRequest) -> dict[str, Tensor]:
        """Return the output maps of the block that a removed one was behind; see ``solved``."""
        made: dict[str, Tensor] = {}
        for position, recipe in enumerate(request.plan.blocks):
            names = [f"blocks.{position}.{name}" for name in recipe.own]
            if recipe.own and any(name not in request.attached for name in names):
                roles = OUTPUTS[self.maps]
                traces = request.traces(position, self._aim(request.before, position))
                maps = solved(traces, roles, self.ridge)
                dtype = request.weights.block(recipe.sources[0])["down"].dtype
                made |= {f"blocks.{position}.{role}.weight": w.to(dtype) for role, w in zip(roles, maps, strict=True)}
        return made

    def _aim(self, before: PruningPlan, position: int) -> tuple[PruningPlan, int]:
        """Return the model, and the block of it, behind which is the stream that the block at a position shall give."""
        if self.target == "current":
            return before, position + 1
        follower: BlockRecipe | None = before.blocks[position + 2] if position + 2 < len(before.blocks) else None
        end = len(before.shape.blocks) if follower is None else min(follower.sources)
        return PruningPlan.identity(before.shape), end - 1


def solved(traces: Iterable[tuple[BlockTrace, Tensor]], roles: tuple[str, ...], ridge: float) -> list[Tensor]:
    """Return the output maps W (hidden, columns) that minimise |X (W - W_0)' - D|^2 + lambda |W - W_0|^2 over all tokens.

    X: (tokens, columns), the inputs of the maps of ``roles`` side by side; W_0: the maps as they are; D: (tokens, hidden),
    the target less the stream behind the block as it is (biases are in both); lambda: ``ridge`` x the mean of the diagonal
    of X'X. Solved as (X'X + lambda I) (W - W_0)' = X'D in float64.
    """
    import torch

    gram = cross = old = None
    widths: list[int] = []
    for trace, target in traces:
        inner = {"attention_output": trace.attention_inner, "down": trace.mlp_inner}
        weights = {"attention_output": trace.attention_weight, "down": trace.mlp_weight}
        inputs = [inner[role] for role in roles]
        x = torch.cat([i.float() for i in inputs if i is not None], 1)
        y = target.float() - trace.output.float()
        if gram is None or cross is None:
            widths = [i.shape[1] for i in inputs if i is not None]
            old = torch.cat([w.double() for role in roles if (w := weights[role]) is not None], 1)
            gram, cross = x.new_zeros(x.shape[1], x.shape[1]).double(), x.new_zeros(x.shape[1], y.shape[1]).double()
        gram += x.T @ x
        cross += x.T @ y
    if gram is None or cross is None or old is None:
        raise FlexiError("least-squares-merge: there are no calibration tokens; expected at least one window")
    weight = ridge * gram.diagonal().mean()
    gram.diagonal().add_(weight)
    new = old + torch.linalg.solve(gram, cross).T
    return [part.contiguous() for part in new.split(widths, 1)]


@hookimpl
def replacement_strategies() -> list[ReplacementStrategy]:
    """Return the least-squares-merge strategy."""
    return [LeastSquaresMerge()]
