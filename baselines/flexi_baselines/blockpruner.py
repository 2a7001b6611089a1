"""BlockPruner (arXiv 2406.10594, and the authors' block_search.py): attention and MLP sub-layers go one by one.

Of all sub-layers that are left ("blocks" in the paper's words), the one without which the perplexity of the calibration
text is lowest goes for good, with its norm; the perplexity is of the whole model that is left, all candidates in one
sweep. A block of which both are gone is gone. At least one sub-layer stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from flexi_plugins.budget import check_reach, least_loss
from flexi_plugins.data import BlockRecipe, BlockShape, ModelShape, Part, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Budget, PruningRequest, ReplacementStrategy, TensorRequest, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BlockPruner:
    """Remove the attention or the MLP whose absence the perplexity minds least, one at a time."""

    block_type: Literal["mix", "mha", "mlp"] = "mix"  # what may go: both kinds, attention only, MLPs only
    blocks: int | None = None  # how many sub-layers go (--del-block-num), in the place of a ratio

    name: ClassVar[str] = "blockpruner"
    paper: ClassVar[str] = "BlockPruner, arXiv 2406.10594"
    knobs: ClassVar[tuple[str, ...]] = ("blocks",)
    needs: ClassVar[frozenset[str]] = frozenset()
    wants: ClassVar[frozenset[str]] = frozenset()
    progressive: ClassVar[bool] = True

    def reach(self, shape: ModelShape) -> float:
        """Return the ratio that is reached whichever sub-layers go: if all may, the largest one is the last."""
        sizes = [size for block in shape.blocks for size in self._sizes(shape, block)]
        return (sum(sizes) - (max(sizes) if self.block_type == "mix" else 0)) / shape.parameters

    def _sizes(self, shape: ModelShape, block: BlockShape) -> list[int]:
        """Return the parameters of the sub-layers of a block that may go."""
        return [
            shape.block_parameters(block) - shape.block_parameters(without(block, kind)) for kind in self._kinds(block)
        ]

    def _kinds(self, block: BlockShape) -> list[str]:
        present = {"mha": block.kv_heads, "mlp": block.channels}
        return [kind for kind, width in present.items() if width and self.block_type in ("mix", kind)]

    def plan(self, request: PruningRequest) -> PruningPlan:
        """Remove one sub-layer of the current model."""
        steps = list(self._steps(request.shape))
        if self.blocks is None:
            check_reach(self.name, request.budget, self.reach(request.plan.shape))
        elif not 0 < self.blocks <= self._most(request.plan.shape):
            most = self._most(request.plan.shape)
            raise FlexiError(f"{self.name}: blocks = {self.blocks}, expected 1..{most} sub-layers on this model")
        if request.counting:
            return steps[0]
        losses = request.quality([request.plan.compose(step) for step in steps], "loss")
        return steps[least_loss(losses, f"{self.name}: any sub-layer that goes")]

    def _most(self, shape: ModelShape) -> int:
        return sum(len(self._kinds(b)) for b in shape.blocks) - (self.block_type == "mix")

    def _steps(self, shape: ModelShape) -> Iterator[PruningPlan]:
        """Yield the plan without each sub-layer that may go: attention first, as the authors list them."""
        whole = PruningPlan.identity(shape).blocks
        for kind in ("mha", "mlp"):
            for index, block in enumerate(shape.blocks):
                if kind in self._kinds(block):
                    rest = without(block, kind)
                    part = Part(index, kv_heads=()) if kind == "mha" else Part(index, channels=())
                    kept = (BlockRecipe(parts=(part,)),) if rest.kv_heads or rest.channels else ()
                    yield PruningPlan(shape, (*whole[:index], *kept, *whole[index + 1 :]))

    def finished(self, plan: PruningPlan, budget: Budget) -> bool:
        """Whether enough sub-layers are gone."""
        if self.blocks is not None:
            return sub_layers(plan.shape) - sub_layers(plan.new_shape) >= self.blocks
        return budget.met(plan)

    def tensors(self, request: TensorRequest) -> dict[str, Tensor]:
        """Return nothing: removal makes no new tensors."""
        return {}


def without(block: BlockShape, kind: str) -> BlockShape:
    """Return a block without its attention ("mha") or its MLP ("mlp")."""
    return replace(block, query_heads=0, kv_heads=0) if kind == "mha" else replace(block, channels=0)


def sub_layers(shape: ModelShape) -> int:
    """Return how many sub-layers a model has."""
    return sum(bool(b.kv_heads) + bool(b.channels) for b in shape.blocks)


@hookimpl
def replacement_strategies() -> list[ReplacementStrategy]:
    """Return the blockpruner strategy."""
    return [BlockPruner()]
