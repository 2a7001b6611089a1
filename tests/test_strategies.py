"""Strategies on hand-made scores and statistics: which blocks and units go, and how many; donors by brute force."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexi_plugins.data import BlockRecipe, BlockShape, ModelShape, Part, PruningPlan, Scores, Statistics
from flexi_plugins.errors import FlexiError, OutOfReach
from flexi_plugins.hookspecs import Budget, PruningRequest, ReplacementStrategy
from flexi_plugins.strategies.concat_merge import ConcatMerge
from flexi_plugins.strategies.remove_blocks import RemoveBlocks
from flexi_plugins.strategies.remove_units import RemoveUnits
from flexi_plugins.strategies.share_lora import ShareLora, block_distance


def shaped(
    blocks: int = 4, heads: int = 4, channels: int = 16, group: int = 2, head_dim: int = 2, hidden: int = 8
) -> ModelShape:
    block = BlockShape(heads * group, heads, head_dim, channels)
    return ModelShape((block,) * blocks, hidden, vocabulary=5, tied=True)


@dataclass
class HandWeights:
    """Random weights of a shape."""

    shape: ModelShape
    seed: int = 0
    made: dict[Any, Any] = field(default_factory=dict)

    def block(self, index: int) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(100 * self.seed + index)
        maps = self.shape.maps(self.shape.blocks[index])
        return {role: torch.randn(size, generator=generator) for role, size in maps.items()}

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


def scored(
    shape: ModelShape,
    block: Sequence[float] | None = None,
    attention: Sequence[Sequence[float]] | None = None,
    mlp: Sequence[Sequence[float]] | None = None,
    comparable: bool = False,
) -> Scores:
    """Return scores; what is not given is flat."""
    return Scores(
        torch.tensor(block) if block is not None else torch.ones(len(shape.blocks)),
        tuple(torch.tensor(a) for a in attention) if attention else tuple(torch.ones(b.kv_heads) for b in shape.blocks),
        tuple(torch.tensor(m) for m in mlp) if mlp else tuple(torch.ones(b.channels) for b in shape.blocks),
        comparable,
    )


def random_scores(shape: ModelShape, seed: int = 0, comparable: bool = False) -> Scores:
    g = torch.Generator().manual_seed(seed)
    return Scores(
        torch.rand(len(shape.blocks), generator=g),
        tuple(torch.rand(b.kv_heads, generator=g) for b in shape.blocks),
        tuple(torch.rand(b.channels, generator=g) for b in shape.blocks),
        comparable,
    )


def asked(
    shape: ModelShape,
    ratio: float,
    scores: Scores | None = None,
    plan: PruningPlan | None = None,
    statistics: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    weights: HandWeights | None = None,
) -> PruningRequest:
    """Return a request on the model of ``plan`` (default: the original of this shape)."""
    plan = plan or PruningPlan.identity(shape)
    values = {
        name: {q: tuple(torch.tensor(x) for x in v) for q, v in quantities.items()}
        for name, quantities in (statistics or {}).items()
    }
    return PruningRequest(
        shape=plan.new_shape,
        plan=plan,
        budget=Budget(plan.shape.parameters, ratio),
        statistics=Statistics(values),
        weights=weights or HandWeights(plan.new_shape),
        scores=scores or scored(plan.new_shape),
    )


def driven(
    strategy: ReplacementStrategy, shape: ModelShape, ratio: float, request: Callable[..., PruningRequest]
) -> list[PruningPlan]:
    """Call a progressive strategy until it is finished; return every plan of the original."""
    plans = [PruningPlan.identity(shape)]
    while True:
        plans.append(plans[-1].compose(strategy.plan(request(plans[-1]))))
        if strategy.finished(plans[-1], Budget(shape.parameters, ratio)):
            return plans[1:]


# ------------------------------------------------------------------------------------------ concat-merge


def turning(
    angles: Sequence[float], influence: Sequence[float] | None = None, last: Sequence[float] | None = None
) -> dict[str, dict[str, Sequence[float]]]:
    """Return CoMe's statistics; ``angles`` are those of the pairs (0, 1), (1, 2), ..."""
    flat = [1.0] * (len(angles) + 1)
    return {
        "pair-angle": {"all": [0.0, *angles], "last": [0.0, *(last or angles)]},
        "block-influence": {"influence": [9.0] * len(flat), "clamped": influence or flat},
    }


def merged_pair(plan: PruningPlan) -> tuple[int, ...]:
    """Return the blocks whose norms are averaged."""
    return next(tuple(s for s, _ in r.norm_weights) for r in plan.blocks if len(r.norm_weights) > 1)


def units(plan: PruningPlan, position: int) -> dict[int, tuple[tuple[int, ...] | None, tuple[int, ...] | None]]:
    return {p.source: (p.kv_heads, p.channels) for p in plan.blocks[position].parts}


def counts(plan: PruningPlan, pair: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Return how many KV heads and channels of each of the pair its merged block has."""
    found = units(plan, pair[0])
    kept = [found.get(b, ((), ())) for b in pair]
    return [len(h) for h, _ in kept], [len(c) for _, c in kept]


@pytest.mark.parametrize(("tokens", "pair"), [("all", (1, 2)), ("last", (2, 3))])
def test_the_pair_that_turns_least_is_merged(tokens: str, pair: tuple[int, int]) -> None:
    statistics = turning([0.3, 0.1, 0.2], last=[0.3, 0.2, 0.1])
    plan = ConcatMerge(tokens=tokens, merges=1).plan(asked(shaped(), 0.1, statistics=statistics))
    assert merged_pair(plan) == pair
    assert [r.whole for r in plan.blocks].count(None) == 1
    assert len(plan.blocks) == 3


def test_the_pair_of_lowest_scores_is_merged() -> None:
    strategy = ConcatMerge(pairs="score", merges=1)
    assert strategy.needs == {"block-influence"}
    assert strategy.wants == {"block", "attention", "mlp"}
    request = asked(shaped(), 0.1, scored(shaped(), [0.0, 5.0, 2.0, 1.0]), statistics=turning([0.1, 0.2, 0.3]))
    assert merged_pair(strategy.plan(request)) == (2, 3)


@pytest.mark.parametrize(
    ("options", "influence", "heads", "channels"),
    [
        ({}, (1.0, 3.0), [1, 3], [4, 12]),
        ({}, (3.0, 1.0), [3, 1], [12, 4]),
        ({}, (1.0, 2.0), [1, 3], [5, 11]),
        ({}, (2.0, 1.0), [3, 1], [11, 5]),
        ({}, (1.0, 1.0), [2, 2], [8, 8]),
        ({}, (0.0, 0.0), [2, 2], [8, 8]),
        ({"exponent": 2.0}, (1.0, 3.0), [0, 4], [1, 15]),
        ({"exponent": 0.0}, (1.0, 3.0), [2, 2], [8, 8]),
        ({"floor": 0.9}, (1.0, 3.0), [0, 4], [1, 15]),
        ({"floor": 0.9}, (3.0, 1.0), [4, 0], [15, 1]),
        ({"floor": 0.6}, (1.0, 3.0), [1, 3], [4, 12]),
    ],
)
def test_width_is_shared_by_influence(
    options: dict[str, float], influence: tuple[float, float], heads: list[int], channels: list[int]
) -> None:
    shape = shaped()
    statistics = turning([0.3, 0.1, 0.2], [7.0, *influence, 7.0])
    plan = ConcatMerge(merges=1, **options).plan(asked(shape, 0.1, statistics=statistics))
    assert counts(plan, (1, 2)) == (heads, channels)
    assert plan.block_shape(plan.blocks[1]) == shape.blocks[1], "the merged block has the width of one"


def test_the_floor_is_a_root_for_more_original_blocks() -> None:
    shape = shaped()
    half = tuple(range(8))
    first = BlockRecipe(parts=(Part(0, (0, 1), half), Part(1, (0, 1), half)), norms=((0, 0.5), (1, 0.5)))
    so_far = PruningPlan(shape, (first, BlockRecipe(parts=(Part(2),)), BlockRecipe(parts=(Part(3),))))
    request = asked(shape, 0.1, plan=so_far, statistics=turning([0.1, 0.2]))
    plan = ConcatMerge(merges=2, repeat=True, floor=0.7225).plan(request)
    assert counts(plan, (0, 1)) == ([4, 0], [14, 2]), "three original blocks: 0.7225 ^ (1 / 2) = 0.85"


def test_width_is_shared_by_scores_above_the_lowest_block() -> None:
    strategy = ConcatMerge(ratio="score", merges=1)
    assert strategy.needs == {"pair-angle"}
    scores = scored(shaped(), [-2.0, -1.0, 1.0, 5.0])  # above the lowest: 0, 1, 3, 7
    plan = strategy.plan(asked(shaped(), 0.1, scores, statistics=turning([0.3, 0.1, 0.2])))
    assert counts(plan, (1, 2)) == ([1, 3], [4, 12])


def test_the_best_units_are_kept_in_their_order_and_norms_are_averaged() -> None:
    shape = shaped(2, channels=4)
    scores = scored(
        shape,
        attention=[[3.0, 1.0, 2.0, 9.0], [1.0, 2.0, 3.0, 0.0]],
        mlp=[[0.0, 5.0, 1.0, 2.0], [4.0, 3.0, 2.0, 1.0]],
    )
    plan = ConcatMerge(merges=1).plan(asked(shape, 0.1, scores, statistics=turning([0.1])))
    assert plan.blocks == (
        BlockRecipe(parts=(Part(0, (0, 3), (1, 3)), Part(1, (1, 2), (0, 1))), norms=((0, 0.5), (1, 0.5))),
    )
    assert "KV heads 2 + 2, channels 2 + 2" in plan.origin["notes"][0]


def test_a_block_without_any_share_still_enters_the_norm_mean() -> None:
    statistics = turning([0.3, 0.1, 0.2], [1.0, 0.0, 2.0, 1.0])
    plan = ConcatMerge(merges=1).plan(asked(shaped(), 0.1, statistics=statistics))
    assert plan.blocks[1].sources == (2,)
    assert plan.blocks[1].norms == ((1, 0.5), (2, 0.5))


@pytest.mark.parametrize("repeat", [False, True])
def test_a_merged_block_is_merged_again_only_if_asked(repeat: bool) -> None:
    shape = shaped(6)

    def step(plan: PruningPlan) -> PruningRequest:
        angles = [0.1 * (1 + i) for i in range(len(plan.blocks) - 1)]  # the first pair always turns least
        return asked(shape, 0.1, plan=plan, statistics=turning(angles))

    plans = driven(ConcatMerge(repeat=repeat, merges=3), shape, 0.1, step)
    groups = [tuple(s for s, _ in r.norm_weights) for r in plans[-1].blocks]
    assert groups == ([(0, 1, 2, 3), (4,), (5,)] if repeat else [(0, 1), (2, 3), (4, 5)])
    assert [len(p.blocks) for p in plans] == [5, 4, 3]


def test_a_pair_that_would_leave_too_few_pairs_waits() -> None:
    statistics = turning([0.3, 0.1, 0.2])
    request = asked(shaped(), 0.1, statistics=statistics)
    assert merged_pair(ConcatMerge(merges=1).plan(request)) == (1, 2)
    assert merged_pair(ConcatMerge(merges=2).plan(request)) == (2, 3)
    by_ratio = asked(shaped(), ConcatMerge().reach(shaped()), statistics=statistics)
    assert merged_pair(ConcatMerge().plan(by_ratio)) == (2, 3)


@pytest.mark.parametrize("merges", [1, 2, 3])
def test_merging_stops_at_the_budget(merges: int) -> None:
    shape = shaped(6)
    one = shape.block_parameters(shape.blocks[0]) / shape.parameters
    ratio = (merges - 0.5) * one

    def step(plan: PruningPlan) -> PruningRequest:
        return asked(shape, ratio, plan=plan, statistics=turning([0.1] * (len(plan.blocks) - 1)))

    plan = driven(ConcatMerge(), shape, ratio, step)[-1]
    assert plan.ratio == pytest.approx(merges * one)
    assert ConcatMerge().reach(shape) == pytest.approx(3 * one)
    assert ConcatMerge(repeat=True).reach(shape) == pytest.approx(5 * one)


def test_no_pair_left_and_out_of_reach_say_what_is_reachable() -> None:
    shape = shaped(3)
    plan = ConcatMerge(merges=1).plan(asked(shape, 0.1, statistics=turning([0.1, 0.2])))
    with pytest.raises(OutOfReach, match=rf"no two neighbouring.*{plan.ratio:.4f}.*repeat = true"):
        ConcatMerge().plan(asked(shape, 0.1, plan=plan, statistics=turning([0.1])))
    with pytest.raises(OutOfReach, match=f"0.9 is out of reach.*up to {ConcatMerge().reach(shape):.4f}"):
        ConcatMerge().plan(asked(shape, 0.9, statistics=turning([0.1, 0.2])))
    with pytest.raises(FlexiError, match=r"merges = 2, expected 1\.\.1"):
        ConcatMerge(merges=2).plan(asked(shape, 0.1, statistics=turning([0.1, 0.2])))


def test_blocks_of_another_kind_are_no_pair() -> None:
    shape = shaped()
    sliding = replace(shape.blocks[0], attention_type="sliding_attention")
    mixed = replace(shape, blocks=(shape.blocks[0], sliding, sliding, shape.blocks[0]))
    plan = ConcatMerge(merges=1).plan(asked(mixed, 0.1, statistics=turning([0.1, 0.3, 0.2])))
    assert merged_pair(plan) == (1, 2)
    with pytest.raises(FlexiError, match=r"expected 1\.\.1"):
        ConcatMerge(merges=2).plan(asked(mixed, 0.1, statistics=turning([0.1, 0.3, 0.2])))


# ----------------------------------------------------------------------------------------- remove-blocks


def left(plan: PruningPlan) -> list[int | None]:
    return [r.whole for r in plan.blocks]


def ratio_of(shape: ModelShape, blocks: float) -> float:
    return blocks * shape.block_parameters(shape.blocks[0]) / shape.parameters


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"blocks": 1}, [0, 1, 2, 3, 5]),
        ({"blocks": 3}, [1, 2, 3]),
        ({"blocks": 2}, [0, 1, 2, 3]),
        ({"blocks": 2, "protect_last": 1}, [1, 2, 3, 5]),
        ({"blocks": 2, "protect_first": 1, "protect_last": 2}, [0, 1, 4, 5]),
    ],
)
def test_the_lowest_blocks_go_and_of_equal_ones_the_later(options: dict[str, int], kept: list[int]) -> None:
    scores = scored(shaped(6), [1.0, 3.0, 2.0, 2.0, 0.0, 0.5])
    assert left(RemoveBlocks(**options).plan(asked(shaped(6), 0.99, scores))) == kept


def test_ties_go_to_the_later_block() -> None:
    assert left(RemoveBlocks(blocks=2).plan(asked(shaped(5), 0.1))) == [0, 1, 2]


@pytest.mark.parametrize(("blocks", "removed"), [(0.5, 1), (1.0, 1), (1.01, 2), (2.5, 3)])
def test_as_few_blocks_go_as_the_ratio_needs(blocks: float, removed: int) -> None:
    shape = shaped(6)
    scores = scored(shape, [5.0, 0.0, 4.0, 1.0, 2.0, 3.0])
    for progressive in (False, True):
        strategy = RemoveBlocks(progressive=progressive)
        ratio = ratio_of(shape, blocks) - 1e-9

        def step(plan: PruningPlan, ratio: float = ratio) -> PruningRequest:
            kept = [scores.block[b] for b in left(plan)]
            return asked(shape, ratio, scored(plan.new_shape, torch.stack(kept).tolist()), plan)

        plan = driven(strategy, shape, ratio, step)[-1]
        assert left(plan) == [b for b in range(6) if b not in [1, 3, 4, 5][:removed]]


def test_progressive_removal_uses_fresh_scores() -> None:
    shape = shaped(5)

    def step(plan: PruningPlan) -> PruningRequest:
        first = [5.0, 1.0, 2.0, 3.0, 4.0]
        fresh = first if len(plan.blocks) == 5 else [9.0, 9.0, 9.0, 0.0]
        return asked(shape, 0.1, scored(plan.new_shape, fresh), plan)

    assert [left(p) for p in driven(RemoveBlocks(blocks=2, progressive=True), shape, 0.1, step)] == [
        [0, 2, 3, 4],
        [0, 2, 3],
    ]
    assert left(RemoveBlocks(blocks=2).plan(step(PruningPlan.identity(shape)))) == [0, 3, 4]
    protected = RemoveBlocks(blocks=2, progressive=True, protect_last=1)
    assert left(driven(protected, shape, 0.1, step)[-1]) == [0, 2, 4], "of three equal ones the later goes"


@pytest.mark.parametrize("protected", [(0, 0), (2, 0), (1, 2), (0, 3)])
def test_remove_blocks_reaches_what_it_says(protected: tuple[int, int]) -> None:
    shape = shaped(6)
    strategy = RemoveBlocks(protect_first=protected[0], protect_last=protected[1])
    reach = strategy.reach(shape)
    assert reach == pytest.approx(ratio_of(shape, min(5, 6 - sum(protected))))
    plan = strategy.plan(asked(shape, reach - 1e-9))
    assert plan.ratio == pytest.approx(reach)
    with pytest.raises(OutOfReach, match=f"remove-blocks.*up to {reach:.4f}"):
        strategy.plan(asked(shape, reach + 0.01))
    with pytest.raises(FlexiError, match=rf"blocks = 6, expected 1\.\.{min(5, 6 - sum(protected))}"):
        replace(strategy, blocks=6).plan(asked(shape, 0.1))


@pytest.mark.parametrize("ratio", [-0.1, 0.0, 1.0, 2.0])
def test_a_ratio_lies_between_0_and_1(ratio: float) -> None:
    for strategy in (ConcatMerge(), RemoveBlocks(), RemoveUnits(), ShareLora(rank=1)):
        with pytest.raises(OutOfReach, match=rf"{strategy.name}: ratio.*up to \d\.\d{{4}}"):
            strategy.plan(asked(shaped(), ratio))


# ------------------------------------------------------------------------------------------ remove-units


def removed(plan: PruningPlan) -> dict[tuple[int, str], set[int]]:
    """Return the units that are gone: (block, kind) -> indices."""
    found = {}
    for i, (recipe, block) in enumerate(zip(plan.blocks, plan.shape.blocks, strict=True)):
        part = recipe.parts[0]
        for kind, kept, width in (("attention", part.kv_heads, block.kv_heads), ("mlp", part.channels, block.channels)):
            if kept is not None:
                found[i, kind] = set(range(width)) - set(kept)
    return found


HEAD_FIRST, CHANNELS_FIRST = {(0, "attention"): {0}}, {(0, "mlp"): set(range(8))}


@pytest.mark.parametrize(
    ("rule", "comparable", "head", "gone"),
    [
        ("auto", True, 9.0, CHANNELS_FIRST),  # 9 / 96 parameters > 1 / 24
        ("auto", True, 3.0, HEAD_FIRST),
        ("auto", False, 9.0, HEAD_FIRST),  # standardised: -1.73 < -1
        ("standardised", True, 9.0, HEAD_FIRST),
        ("standardised-divided", True, 9.0, CHANNELS_FIRST),  # -1.73 / 96 > -1 / 24
        ("divided", False, 9.0, CHANNELS_FIRST),
        ("divided", False, 3.0, HEAD_FIRST),
        ("undivided", True, 3.0, CHANNELS_FIRST),
        ("undivided", True, 0.5, HEAD_FIRST),
    ],
)
def test_the_rule_decides_between_heads_and_channels(
    rule: str, comparable: bool, head: float, gone: dict[tuple[int, str], set[int]]
) -> None:
    shape = shaped(1)
    assert (shape.head_cost(shape.blocks[0]), shape.channel_cost()) == (96, 24)
    scores = scored(shape, None, [[head, 10.0, 10.0, 10.0]], [[1.0] * 8 + [2.0] * 8], comparable)
    strategy = RemoveUnits(rule=rule, protect_first=0, protect_last=0)
    assert removed(strategy.plan(asked(shape, 1 / shape.parameters, scores))) == gone


def test_scores_that_are_not_comparable_are_standardised_in_each_block_and_kind() -> None:
    """Any positive scale and any offset of one block's kind changes nothing."""
    shape = shaped()
    plain = random_scores(shape)
    moved = Scores(
        plain.block,
        tuple(a * 10.0**i - 3 for i, a in enumerate(plain.attention)),
        tuple(m / 10.0**i + 7 for i, m in enumerate(plain.mlp)),
    )
    for ratio in (0.1, 0.3, 0.45):
        found = [RemoveUnits(protect_first=0).plan(asked(shape, ratio, s)) for s in (plain, moved)]
        assert found[0] == found[1]


def greedy(scores: Scores, shape: ModelShape, blocks: Sequence[int], target: int) -> dict[tuple[int, str], set[int]]:
    """Remove the cheapest item per parameter until the target is met: one head, or the block's 8 lowest channels."""
    items = []
    for b in blocks:
        heads = sorted(range(shape.blocks[b].kv_heads), key=lambda u: float(scores.attention[b][u]))
        cost = shape.head_cost(shape.blocks[b])
        items += [(float(scores.attention[b][u]) / cost, b, "attention", [u], cost) for u in heads[:-1]]
        order = sorted(range(shape.blocks[b].channels), key=lambda u: float(scores.mlp[b][u]))
        for start in range(0, len(order) - 8, 8):
            group = order[start : start + 8]
            total = sum(float(scores.mlp[b][u]) for u in group)
            items.append((total / (8 * shape.channel_cost()), b, "mlp", group, 8 * shape.channel_cost()))
    gone: dict[tuple[int, str], set[int]] = {}
    left_over = shape.parameters - target
    for _, b, kind, group, cost in sorted(items):
        if left_over <= 0:
            break
        gone.setdefault((b, kind), set()).update(group)
        left_over -= cost
    return gone


@pytest.mark.parametrize("seed", range(4))
def test_comparable_scores_are_ranked_per_parameter_over_all_blocks(seed: int) -> None:
    shape = shaped(5, channels=32)
    scores = random_scores(shape, seed, comparable=True)
    scores = replace(scores, attention=tuple(4 * a for a in scores.attention))
    for ratio in (0.05, 0.2, 0.35):
        request = asked(shape, ratio, scores)
        assert removed(RemoveUnits().plan(request)) == greedy(scores, shape, [1, 2, 3], request.budget.target)


@pytest.mark.parametrize("comparable", [False, True])
@pytest.mark.parametrize("channels", [16, 20, 30])
def test_the_budget_is_met_within_one_item_with_floors_and_multiples(comparable: bool, channels: int) -> None:
    shape = shaped(5, channels=channels)
    strategy = RemoveUnits(min_heads=2, protect_first=1, protect_last=2)
    rng = random.Random(0)
    for seed in range(10):
        ratio = rng.uniform(0.01, strategy.reach(shape) - 1e-6)
        request = asked(shape, ratio, random_scores(shape, seed, comparable))
        plan = strategy.plan(request)
        assert request.budget.met(plan)
        largest = max(shape.head_cost(shape.blocks[0]), 8 * shape.channel_cost())
        assert plan.stored_parameters > request.budget.target - largest
        assert [left(plan)[i] for i in (0, 3, 4)] == [0, 3, 4], "protected"
        for block in plan.new_shape.blocks[1:3]:
            assert block.kv_heads >= 2
            assert block.channels == channels or (block.channels % 8 == 0 and block.channels >= 8)


def test_global_removal_reaches_its_floors_and_not_more() -> None:
    shape = shaped(5, channels=20)
    strategy = RemoveUnits(min_heads=2, multiple=4)
    reach = strategy.reach(shape)
    plan = strategy.plan(asked(shape, reach - 1e-9, random_scores(shape)))
    assert plan.ratio == pytest.approx(reach)
    assert {(b.kv_heads, b.channels) for b in plan.new_shape.blocks[1:4]} == {(2, 4)}
    with pytest.raises(OutOfReach, match=f"remove-units.*up to {reach:.4f}"):
        strategy.plan(asked(shape, reach + 0.001))
    with pytest.raises(FlexiError, match="belongs to mode uniform"):
        replace(strategy, fraction=0.25).plan(asked(shape, 0.1))
    with pytest.raises(FlexiError, match="protect_first"):
        RemoveUnits(protect_first=3, protect_last=3).plan(asked(shape, 0.1))


@pytest.mark.parametrize("min_heads", [1, 2])
def test_a_block_that_scores_nothing_keeps_its_floors(min_heads: int) -> None:
    shape = shaped(4, channels=20)
    flat = random_scores(shape, comparable=True)
    worthless = replace(
        flat,
        attention=tuple(a * (i != 1) for i, a in enumerate(flat.attention)),
        mlp=tuple(m * (i != 1) for i, m in enumerate(flat.mlp)),
    )
    strategy = RemoveUnits(min_heads=min_heads)
    plan = strategy.plan(asked(shape, strategy.reach(shape) * 0.7, worthless))
    assert (plan.new_shape.blocks[1].kv_heads, plan.new_shape.blocks[1].channels) == (min_heads, 8)


def by_llm_pruner(width: int, rows: int, fraction: float) -> int:
    """How many groups of ``rows`` rows go: torch-pruning keeps int(rows x (1 - fraction)) rows, in whole groups."""
    return (width * rows - int(width * rows * (1 - fraction))) // rows


@pytest.mark.parametrize(("heads", "channels"), [(4, 16), (3, 20), (5, 11)])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.3, 0.5])
def test_uniform_removal_has_llm_pruners_counts(heads: int, channels: int, fraction: float) -> None:
    shape = shaped(5, heads=heads, channels=channels)
    scores = random_scores(shape)
    strategy = RemoveUnits(mode="uniform", fraction=fraction, first=1, last=3)
    plan = strategy.plan(asked(shape, 0.99, scores))
    for b in range(5):
        for kind, values, rows in (("attention", scores.attention[b], 2), ("mlp", scores.mlp[b], 1)):
            count = by_llm_pruner(len(values), rows, fraction) if 1 <= b <= 3 else 0
            assert removed(plan).get((b, kind), set()) == set(values.argsort()[:count].tolist())
    rounded = heads * fraction != int(heads * fraction)
    assert any("KV heads" in n for n in plan.origin.get("notes", ())) == rounded


def test_three_heads_and_a_quarter_is_none_and_is_said() -> None:
    shape = shaped(3, heads=3, head_dim=4)
    plan = RemoveUnits(mode="uniform", fraction=0.25).plan(asked(shape, 0.1))
    assert removed(plan) == {(1, "mlp"): {12, 13, 14, 15}}, "of equal units the later go"
    assert plan.origin["notes"] == ["a fraction of 0.25 of 3 KV heads became 0 a block"]


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.4])
def test_a_uniform_ratio_is_the_smallest_fraction_that_meets_it(ratio: float) -> None:
    shape = shaped(5, channels=40)
    strategy, scores = RemoveUnits(mode="uniform"), random_scores(shape)
    found = strategy.plan(asked(shape, ratio, scores))
    plans = (replace(strategy, fraction=f / 1000).plan(asked(shape, ratio, scores)) for f in range(1, 1000))
    assert found == next(p for p in plans if Budget(shape.parameters, ratio).met(p))


@pytest.mark.parametrize("min_heads", [0, 1, 3])
def test_uniform_removal_reaches_what_it_says(min_heads: int) -> None:
    shape = shaped(5, channels=40)
    strategy = RemoveUnits(mode="uniform", min_heads=min_heads)
    reach = strategy.reach(shape)
    plan = strategy.plan(asked(shape, reach - 1e-9))
    assert plan.ratio == pytest.approx(reach)
    assert {(b.kv_heads, b.channels) for b in plan.new_shape.blocks[1:4]} == {(1, 1)}
    with pytest.raises(OutOfReach, match=f"up to {reach:.4f}"):
        strategy.plan(asked(shape, reach + 0.001))
    with pytest.raises(FlexiError, match="fraction between 0 and 1"):
        replace(strategy, fraction=1.0).plan(asked(shape, 0.1))


# -------------------------------------------------------------------------------------------- share-lora


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """Return the best rank-r approximation."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def distance(own: Mapping[str, Tensor], donor: Mapping[str, Tensor], rank: int) -> float:
    """Return d of the paper, summed over the maps, with every reconstruction made explicitly."""
    total = 0.0
    for role, weight in own.items():
        mine, theirs = truncated(weight, rank), truncated(donor[role], rank)
        total += float(torch.linalg.norm(mine - (theirs + truncated(mine - theirs, rank))))
    return total


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_the_donor_is_the_nearest_unpruned_block(rank: int, seed: int) -> None:
    shape = shaped(6, hidden=12)
    weights = HandWeights(shape, seed)
    scores = scored(shape, [3.0, 0.0, 5.0, 1.0, 4.0, 2.0])
    plan = ShareLora(blocks=3, rank=rank).plan(asked(shape, 0.1, scores, weights=weights))
    assert [i for i, r in enumerate(plan.blocks) if r.shares is not None] == [1, 3, 5]
    for i, j in itertools.product((1, 3, 5), range(6)):
        direct = distance(weights.block(i), weights.block(j), rank)
        assert block_distance(i, j, rank, weights) == pytest.approx(direct, rel=1e-4, abs=1e-4)
    for i in (1, 3, 5):
        donor = min((0, 2, 4), key=lambda j: distance(weights.block(i), weights.block(j), rank))
        recipe = BlockRecipe(parts=(Part(i),), shares=donor, rank=rank, output_norm=True)
        assert plan.blocks[i] == recipe, "a pruned block is never a donor, however near"


def test_a_block_that_differs_by_little_is_the_donor() -> None:
    shape = shaped(4)
    weights = HandWeights(shape)
    copied = {0: weights.block(2), 1: weights.block(1), 2: weights.block(2), 3: weights.block(0)}
    weights.block = lambda index: copied[index]  # type: ignore[method-assign]
    plan = ShareLora(blocks=1, rank=2).plan(asked(shape, 0.1, scored(shape, [0.0, 1.0, 1.0, 1.0]), weights=weights))
    assert plan.blocks[0].shares == 2
    pair = ShareLora(blocks=2, rank=2).plan(asked(shape, 0.1, scored(shape, [0.0, 1.0, 0.5, 1.0]), weights=weights))
    assert pair.blocks[0].shares in (1, 3)


def test_adapters_are_the_truncated_difference_and_gains_are_constant() -> None:
    shape = shaped(4)
    weights = HandWeights(shape)
    strategy = ShareLora(blocks=2, rank=2, output_gain=0.03)
    plan = strategy.plan(asked(shape, 0.1, random_scores(shape), weights=weights))
    made = strategy.tensors(plan, weights)
    assert {n.split(".")[1] for n in made} == {str(i) for i, r in enumerate(plan.blocks) if r.shares is not None}
    for i, recipe in enumerate(plan.blocks):
        if recipe.shares is None:
            continue
        donor = weights.block(recipe.shares)
        for role, weight in weights.block(i).items():
            a, b = made[f"blocks.{i}.{role}.lora_a"], made[f"blocks.{i}.{role}.lora_b"]
            assert a.shape == (len(weight), 2)
            torch.testing.assert_close((a @ b).double(), truncated(weight - donor[role], 2), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(b @ b.T, torch.eye(2), msg="the singular values are all in A")
        for part in ("attention", "mlp"):
            assert made[f"blocks.{i}.{part}.output_norm"].tolist() == pytest.approx([0.03] * shape.hidden)


def test_full_rank_adapters_give_the_own_weights_back() -> None:
    shape = shaped(3)
    weights = HandWeights(shape)
    plan = PruningPlan.identity(shape)
    shared = BlockRecipe(parts=(Part(1),), shares=2, rank=100, output_norm=True)
    plan = PruningPlan(shape, (plan.blocks[0], shared, plan.blocks[2]))
    made = ShareLora().tensors(plan, weights)
    for role, own in weights.block(1).items():
        sum_ = weights.block(2)[role] + made[f"blocks.1.{role}.lora_a"] @ made[f"blocks.1.{role}.lora_b"]
        torch.testing.assert_close(sum_, own, rtol=1e-4, atol=1e-5)
    assert ShareLora().tensors(PruningPlan.identity(shape), weights) == {}


def test_as_few_blocks_are_shared_as_the_ratio_needs() -> None:
    shape = shaped(6, channels=64, hidden=16)
    strategy = ShareLora(rank=1)
    block = shape.blocks[0]
    adapters = sum(r + c for r, c in shape.maps(block).values()) + 2 * shape.hidden
    saved = (sum(r * c for r, c in shape.maps(block).values()) - adapters) / shape.parameters
    assert strategy.reach(shape) == pytest.approx(5 * saved)
    scores = scored(shape, [0.0, 3.0, 1.0, 5.0, 2.0, 4.0])
    for count, order in ((1, [0]), (2, [0, 2]), (3, [0, 2, 4]), (5, [0, 1, 2, 4, 5])):
        for asked_for in (count - 0.5, count - 1e-6):
            plan = strategy.plan(asked(shape, asked_for * saved, scores))
            assert [i for i, r in enumerate(plan.blocks) if r.shares is not None] == order
            assert plan.ratio == pytest.approx(count * saved)
    protected = replace(strategy, protect_first=1, protect_last=2)
    assert protected.reach(shape) == pytest.approx(3 * saved)
    plan = protected.plan(asked(shape, 1.9 * saved, scores))
    assert [i for i, r in enumerate(plan.blocks) if r.shares is not None] == [1, 2], "of blocks 1, 2, 3"
    with pytest.raises(OutOfReach, match=f"share-lora.*up to {5 * saved:.4f}"):
        strategy.plan(asked(shape, 5 * saved + 0.01, scores))
    with pytest.raises(FlexiError, match=r"blocks = 6, expected 1\.\.5"):
        replace(strategy, blocks=6).plan(asked(shape, 0.1, scores))


def test_the_number_of_blocks_takes_the_place_of_the_ratio() -> None:
    shape = shaped(5)
    scores = scored(shape, [2.0, 0.0, 1.0, 3.0, 4.0])
    for ratio in (0.0001, 0.9999):
        shared = ShareLora(blocks=2).plan(asked(shape, ratio, scores))
        assert [r.shares is None for r in shared.blocks] == [True, False, False, True, True]
        assert left(RemoveBlocks(blocks=2).plan(asked(shape, ratio, scores))) == [0, 3, 4]


def test_of_every_kind_of_block_one_stays_as_a_donor() -> None:
    shape = shaped(5)
    sliding = replace(shape.blocks[0], attention_type="sliding_attention")
    mixed = replace(shape, blocks=(shape.blocks[0], sliding, shape.blocks[0], sliding, shape.blocks[0]))
    scores = scored(mixed, [0.0, 1.0, 2.0, 3.0, 4.0])
    plan = ShareLora(blocks=3, rank=1).plan(asked(mixed, 0.1, scores))
    assert [r.shares for r in plan.blocks] == [4, 3, 4, None, None]
    with pytest.raises(FlexiError, match=r"expected 1\.\.3"):
        ShareLora(blocks=4, rank=1).plan(asked(mixed, 0.1, scores))


def test_a_rank_that_saves_nothing_reaches_nothing() -> None:
    strategy = ShareLora(rank=8)
    assert strategy.reach(shaped()) < 0
    with pytest.raises(OutOfReach):
        strategy.plan(asked(shaped(), 0.1))
