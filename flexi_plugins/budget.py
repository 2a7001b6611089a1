"""From a ratio, scores or losses to what goes: global ranking, protected blocks, floors, rounding to a multiple. Public."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from flexi_plugins.data import BlockRecipe, ModelShape, Part, PruningPlan, Rule, Scores
from flexi_plugins.errors import FlexiError, OutOfReach
from flexi_plugins.hookspecs import Budget

if TYPE_CHECKING:
    from torch import Tensor


def check_reach(who: str, budget: Budget, reach: float) -> None:
    """Raise with the reachable range unless the budget's ratio lies in it."""
    if not 0 < budget.ratio < 1:
        raise OutOfReach(
            f"{who}: ratio {budget.ratio:g} is not between 0 and 1; on this model it reaches up to {rounded_down(reach)}"
        )
    if budget.ratio > reach:
        raise OutOfReach(
            f"{who}: ratio {budget.ratio:g} is out of reach on this model; it reaches ratios up to {rounded_down(reach)}"
        )


def rounded_down(ratio: float) -> str:
    """Return a ratio to four decimals that is in reach where the given one is."""
    return f"{math.floor(ratio * 1e4) / 1e4:.4f}"


def smallest(count: int, make: Callable[[int], PruningPlan], budget: Budget, who: str) -> int:
    """Return the smallest n in 1..count whose plan meets the budget."""
    for n in range(1, count + 1):
        if budget.met(make(n)):
            return n
    reach = make(count).ratio if count else 0.0
    raise OutOfReach(
        f"{who}: ratio {budget.ratio:g} is out of reach on this model; it reaches ratios up to {rounded_down(reach)}"
    )


def removable(shape: ModelShape, first: int, last: int) -> int:
    """Return how many blocks can go where the first and the last ones are protected, and at least one stays."""
    check_protected(first, last)
    return min(len(shape.blocks) - first - last, len(shape.blocks) - 1)


def check_protected(first: int, last: int) -> None:
    """Raise for a negative number of blocks to protect."""
    if first < 0 or last < 0:
        raise FlexiError(f"protect_first = {first}, protect_last = {last}: expected 0 or more blocks to protect")


def removable_share(shape: ModelShape, first: int, last: int, together: bool = False) -> float:
    """Return the ratio of removing as many blocks as can go (see ``removable``), whichever of several sizes stays.

    together: they go as one run.
    """
    sizes = [shape.block_parameters(b) for b in shape.blocks[first : len(shape.blocks) - last]]
    count = max(0, removable(shape, first, last))
    runs = [sizes[start : start + count] for start in range(len(sizes) - count + 1)] if together else []
    return min(map(sum, runs), default=sum(sorted(sizes)[:count])) / shape.parameters


def check_count(who: str, option: str, count: int, most: int) -> None:
    """Raise unless a strategy's own number of what is to go lies in 1..most."""
    if not 0 < count <= most:
        raise FlexiError(f"{who}: {option} = {count}, expected 1..{most} on this model")


def least_loss(losses: Sequence[float], what: str) -> int:
    """Return the index of the lowest loss, the first of equal ones; raise if with all of ``what`` the model breaks down."""
    if not any(math.isfinite(loss) for loss in losses):
        raise FlexiError(
            f"{what} leaves a model that breaks down: none of {len(losses)} losses is finite; compute in float32 (--dtype "
            "float32), calibrate on other text, or choose by another option"
        )
    return min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)


def lowest(scores: Tensor, count: int, allowed: Sequence[int]) -> list[int]:
    """Return the ``count`` allowed indices with the lowest scores, ascending; ties go to the later index."""
    values = scores.tolist()
    ranked = sorted(allowed, key=lambda i: (values[i], -i))
    return sorted(ranked[:count])


@dataclass(frozen=True)
class _Item:
    """The least that can go at once: one KV head, or a group of a block's channels."""

    priority: float
    block: int
    kind: Literal["attention", "mlp"]
    units: tuple[int, ...]
    cost: int


def priorities(scores: Scores, shape: ModelShape, rule: Rule) -> tuple[list[Tensor], list[Tensor]]:
    """Return the ranking values of heads and channels per block, by the rule.

    auto: the scores' own rule; without one, comparable scores are divided by the unit's parameters, and others are
    standardised per (block, kind), undivided.
    """
    from flexi_plugins.numerics import standardise

    if scores.attention is None or scores.mlp is None:
        raise FlexiError("unit ranking: the metric gave no attention or no mlp scores")
    if rule == "auto":
        rule = scores.rule
    if rule == "auto":
        rule = "divided" if scores.comparable else "standardised"
    attention, mlp = [], []
    for block, heads, channels in zip(shape.blocks, scores.attention, scores.mlp, strict=True):
        if rule.startswith("standardised"):
            heads, channels = standardise(heads), standardise(channels)
        if rule.endswith("divided") and rule != "undivided":
            heads, channels = heads / max(1, shape.head_cost(block)), channels / shape.channel_cost()
        attention.append(heads)
        mlp.append(channels)
    return attention, mlp


def global_units(
    scores: Scores, shape: ModelShape, budget: Budget, allowed: Sequence[int], rule: Rule, multiple: int, min_heads: int
) -> PruningPlan:
    """Return the plan that removes the lowest-ranked heads and channel groups of the allowed blocks until the budget is met.

    Channels go in groups of ``multiple``, lowest first, so that widths stay multiples; every block keeps ``min_heads``
    KV heads and one group of channels.
    """
    attention, mlp = priorities(scores, shape, rule)
    items = [
        item
        for b in allowed
        for item in (*_heads(shape, b, attention[b], min_heads), *_channels(shape, b, mlp[b], multiple))
    ]
    excess = shape.parameters - budget.target
    gone: dict[tuple[int, str], list[int]] = {}
    for item in sorted(items, key=lambda i: i.priority):
        if excess <= 0:
            break
        gone.setdefault((item.block, item.kind), []).extend(item.units)
        excess -= item.cost
    if excess > 0:
        raise OutOfReach(
            f"unit ranking: ratio {budget.ratio:g} is out of reach with these protected blocks and floors; "
            f"it reaches ratios up to {rounded_down(sum(i.cost for i in items) / shape.parameters)}"
        )
    return without_units(shape, gone)


def _heads(shape: ModelShape, block: int, values: Tensor, floor: int) -> list[_Item]:
    order = values.argsort(stable=True).tolist()
    cost = shape.head_cost(shape.blocks[block])
    return [_Item(float(values[u]), block, "attention", (u,), cost) for u in order[: max(0, len(order) - floor)]]


def _channels(shape: ModelShape, block: int, values: Tensor, multiple: int) -> list[_Item]:
    ordered, indices = values.sort(stable=True)
    order, cost = indices.tolist(), shape.channel_cost()
    first = len(order) % multiple or multiple  # what is over a multiple goes with the first group
    starts = [0, *range(first, len(order), multiple)]
    groups = [tuple(order[a:b]) for a, b in zip(starts, [*starts[1:], len(order)], strict=True)]
    means = [ordered[:first].mean().item(), *ordered[first:].view(-1, multiple).mean(1).tolist()]
    return [_Item(mean, block, "mlp", g, len(g) * cost) for mean, g in zip(means, groups, strict=True)][:-1]


def without_units(shape: ModelShape, gone: dict[tuple[int, str], list[int]]) -> PruningPlan:
    """Return the plan that removes these units: (block, "attention" or "mlp") -> indices."""

    def kept(block: int, kind: str, width: int) -> tuple[int, ...] | None:
        lost = set(gone.get((block, kind), ()))
        return tuple(u for u in range(width) if u not in lost) if lost else None

    recipes = [
        BlockRecipe(parts=(Part(i, kept(i, "attention", b.kv_heads), kept(i, "mlp", b.channels)),))
        for i, b in enumerate(shape.blocks)
    ]
    return PruningPlan(shape, tuple(recipes))
