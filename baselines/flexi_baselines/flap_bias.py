"""FLAP's compensation (arXiv 2312.11983, and the authors' lib/prune.py): a bias for what a sub-layer's lost units added."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from flexi_baselines.input_moments import InputMoments
from flexi_plugins.data import ModelShape, Part, PruningPlan
from flexi_plugins.hookspecs import BlockTrace, TensorRequest

if TYPE_CHECKING:
    from torch import Tensor

OUTPUT_MAPS = {"attention": "attention_output", "mlp": "down"}


@dataclass(frozen=True)
class AddedMean:
    """Mean over tokens of what each sub-layer adds to the residual stream: attention, mlp, (hidden,)."""

    name: ClassVar[str] = "added-mean"
    span: ClassVar[int] = 1
    backward: ClassVar[bool] = False

    def observe(self, trace: BlockTrace) -> dict[str, Tensor]:
        """Return sums over tokens."""
        import torch

        steps = {"attention": (trace.input, trace.middle), "mlp": (trace.middle, trace.output)}
        return {
            kind: after.sum(0, dtype=torch.float32) - before.sum(0, dtype=torch.float32)
            for kind, (before, after) in steps.items()
        }

    def finish(self, totals: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Return means over tokens."""
        return {kind: total / tokens for kind, total in totals.items()}


def bias_cost(shape: ModelShape, kind: str) -> int:
    """Return how many parameters a bias adds to an output map that may have one already."""
    return 0 if shape.has_bias(OUTPUT_MAPS[kind]) else shape.hidden


def with_biases(plan: PruningPlan, gone: Collection[tuple[int, str]]) -> PruningPlan:
    """Return the plan with a bias of its own for every sub-layer, (block, kind), that loses units."""
    names = [
        tuple(f"{role}.bias" for k, role in OUTPUT_MAPS.items() if (b, k) in gone) for b in range(len(plan.blocks))
    ]
    blocks = tuple(replace(recipe, own=own) for recipe, own in zip(plan.blocks, names, strict=True))
    return replace(plan, blocks=blocks)


def biases(request: TensorRequest) -> dict[str, Tensor]:
    """Return the biases of a plan, (hidden,), in the dtype of the weights."""
    own = ((p, r, name) for p, r in enumerate(request.plan.blocks) for name in r.own)
    return {f"blocks.{p}.{name}": compensation(request, r.parts[0], name.removesuffix(".bias")) for p, r, name in own}


def compensation(request: TensorRequest, part: Part, role: str) -> Tensor:
    """Return what the units of a block that are not in ``part`` add through an output map on average: (hidden,).

    That is W[:, gone] mean(x[gone]), and where the map has a bias already, that bias (the mean of what the sub-layer adds
    less W mean(x)) goes on top.
    """
    import torch

    shape = request.plan.shape
    block = shape.blocks[part.source]
    kind, units, kept = ("mlp", block.channels, part.channels)
    if role == "attention_output":
        kind, units, kept = ("attention", block.kv_heads, part.kv_heads)
    mean = request.statistics([InputMoments.name])[InputMoments.name][f"{kind}_mean"][part.source]
    weight = request.weights.block(part.source)[role]
    gone = torch.ones(units, dtype=torch.bool)
    gone[list(kept or ())] = False
    columns = gone.repeat_interleave(len(mean) // units)
    bias = weight[:, columns].float() @ mean[columns]
    if shape.has_bias(role):
        added = request.statistics([AddedMean.name])[AddedMean.name][kind][part.source]
        bias += added - weight.float() @ mean
    return bias.to(weight.dtype)
