"""Strategies against brute force: which pairs, shares, units and donors are chosen, floors, budgets and reach."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import built, close, logits, opened, sharing, tiny, tokens
from torch import Tensor
from torch.nn import functional as F

from flexi_plugins.budget import check_reach, lowest, priorities, rounded_down, smallest
from flexi_plugins.data import BlockShape, ModelShape, Part, PruningPlan, Scores, Statistics
from flexi_plugins.errors import FlexiError, OutOfReach
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.families.llama import FAMILIES
from flexi_plugins.hookspecs import Budget, PruningRequest, TensorRequest
from flexi_plugins.modeling import FlexiForCausalLM
from flexi_plugins.models import known_config
from flexi_plugins.pruner import Pruner, count_only
from flexi_plugins.recovery.correspondence import correspondences
from flexi_plugins.rewrite import with_digests
from flexi_plugins.strategies import share_lora
from flexi_plugins.strategies.concat_merge import ConcatMerge
from flexi_plugins.strategies.least_squares_merge import LeastSquaresMerge
from flexi_plugins.strategies.remove_blocks import RemoveBlocks
from flexi_plugins.strategies.remove_units import RemoveUnits
from flexi_plugins.strategies.share_lora import ShareLora

WEIGHTS = SimpleNamespace()  # where no weight is looked at
WINDOWS, SAMPLES = tokens(3, 10), tokens(4, 7, seed=5)


def shape_of(blocks=8, heads=4, channels=24, **changes) -> ModelShape:
    return ModelShape(
        (BlockShape(2 * heads, heads, 4, channels),) * blocks, hidden=32, vocabulary=61, tied=False, **changes
    )


def random_scores(shape: ModelShape, seed: int = 0, comparable: bool = True) -> Scores:
    generator = torch.Generator().manual_seed(seed)

    def made(width):
        values = torch.rand(width, generator=generator).exp() * 10 ** float(torch.rand((), generator=generator))
        return values if comparable else values - 4

    return Scores(
        block=made(len(shape.blocks)),
        attention=tuple(made(b.kv_heads) for b in shape.blocks),
        mlp=tuple(made(b.channels) for b in shape.blocks),
        comparable=comparable,
    )


def request_of(shape, ratio=0.1, *, plan=None, scores=None, angles=None, influence=None, last=None, weights=WEIGHTS):
    """Return a request on the model of ``plan`` (the original by default), with hand-made statistics."""
    plan = plan or PruningPlan.identity(shape)
    count = len(plan.blocks)
    angles = torch.as_tensor(angles if angles is not None else [0.0, *range(1, count)], dtype=torch.float32)
    last = angles if last is None else torch.as_tensor(last, dtype=torch.float32)
    influence = torch.as_tensor(influence if influence is not None else [1.0] * count)
    found = {
        "pair-angle": {"all": tuple(angles), "last": tuple(last)},
        "block-influence": {"clamped": tuple(influence)},
    }
    scores = scores or random_scores(plan.new_shape)
    return PruningRequest(plan.new_shape, plan, Budget(shape.parameters, ratio), Statistics(found), weights, scores)


def merged_pair(plan: PruningPlan) -> tuple[int, ...]:
    """Return the two blocks that a step merged."""
    (recipe,) = [r for r in plan.blocks if len(r.norm_weights) == 2]
    return tuple(s for s, _ in recipe.norm_weights)


def units(plan: PruningPlan) -> list[tuple[int, int]]:
    """Return how many KV heads and channels each source gave to the merged block."""
    (recipe,) = [r for r in plan.blocks if len(r.norm_weights) == 2]
    found = {p.source: (len(p.kv_heads or ()), len(p.channels or ())) for p in recipe.parts}
    return [found.get(s, (0, 0)) for s, _ in recipe.norm_weights]


# ---------------------------------------------------------------------------------------- concat-merge: pairs


def test_the_pair_with_the_smallest_angle_is_merged():
    """Entry i of the angles belongs to the pair (i - 1, i); entry 0 means nothing."""
    angles, last = [0.0, 0.5, 0.4, 0.2, 0.6, 0.3, 0.7, 0.8], [0.0, 0.5, 0.4, 0.2, 0.6, 0.1, 0.7, 0.8]
    request = request_of(shape_of(), angles=angles, last=last)
    assert merged_pair(ConcatMerge().plan(request)) == (2, 3)
    assert merged_pair(ConcatMerge(tokens="last").plan(request)) == (4, 5)


def test_pairs_by_score_are_those_with_the_lowest_sum():
    scores = replace(random_scores(shape_of()), block=torch.tensor([3.0, 1, 2.5, 2, 2, 9, 0, 9]))
    assert merged_pair(ConcatMerge(pairs="score").plan(request_of(shape_of(), scores=scores))) == (1, 2)


@pytest.mark.parametrize("influence", [[1.0] * 8, [1.0, 1, 1, 0, 1, 1, 1, 1]])
def test_each_block_is_merged_once_unless_repeat(influence):
    """Also where one of the two gave nothing, and the merged block has a single part."""
    shape = shape_of()
    first = ConcatMerge().plan(request_of(shape, angles=[0, 5, 5, 1, 5, 5, 5, 5], influence=influence))
    assert merged_pair(first) == (2, 3)
    angles = [0, 5, 1, 2, 4, 3, 6]  # now 2 is the merged block, and (1, 2) and (2, 3) turn the stream least
    request = request_of(shape, plan=first, angles=angles)
    assert merged_pair(ConcatMerge().plan(request)) == (4, 5)
    again = ConcatMerge(repeat=True).plan(request)
    assert merged_pair(again) == (1, 2)
    assert first.compose(again).blocks[1].norm_weights == ((1, 0.5), (2, 0.25), (3, 0.25))


def test_blocks_whose_query_heads_are_tiled_cannot_be_merged_again() -> None:
    """It is refused in front of the first merge; without groups tiling changes nothing, and all is well."""
    strategy = ConcatMerge(heads="tiled", repeat=True)
    with pytest.raises(FlexiError, match=r"concat-merge: heads = 'tiled' .* set repeat = false, or heads = 'grouped'"):
        strategy.plan(request_of(shape_of()))
    alone = ModelShape((BlockShape(4, 4, 8, 24),) * 8, hidden=32, vocabulary=61, tied=False)
    assert len(strategy.plan(request_of(alone)).blocks) == 7


def test_a_block_that_another_was_dropped_for_is_merged_already():
    shape, strategy = shape_of(), ConcatMerge(merge="drop")
    first = strategy.plan(request_of(shape, angles=[0, 5, 5, 1, 5, 5, 5, 5], influence=[1.0, 1, 1, 2, 1, 1, 1, 1]))
    assert [r.sources for r in first.blocks] == [(0,), (1,), (3,), (4,), (5,), (6,), (7,)]
    request = request_of(shape, plan=first, angles=[0, 5, 1, 2, 4, 3, 6])
    assert merged_pair(strategy.plan(request)) == (4, 5)
    assert merged_pair(replace(strategy, repeat=True).plan(request)) == (1, 2)
    assert [(run.first, run.last) for run in correspondences(first)][2] == (2, 3)


@pytest.mark.parametrize("kind", ["qwen3", "llama-biases", "llama"])
def test_norms_of_queries_and_keys_and_output_biases_are_summed_by_the_shares(kind):
    model = tiny(kind)
    shape = opened(model).shape
    for merge in ("concat", "sum"):
        strategy = ConcatMerge(merge=merge)
        plan = strategy.plan(request_of(shape, angles=[0, 9, 1, 9, 9, 9], influence=[1.0, 0.25, 0.75, 1.0, 1.0, 1.0]))
        assert plan.blocks[1].biases == (() if kind == "llama" else ((1, 0.25), (2, 0.75)))
        merged, pair = built(plan, model).model.layers[1], model.model.layers[1:3]
        for name, tensor in merged.named_parameters():
            one, other = (dict(block.named_parameters())[name] for block in pair)
            if name.endswith(("q_norm.weight", "k_norm.weight", "o_proj.bias", "down_proj.bias")):
                assert not close(one, other)
                assert close(tensor, 0.25 * one + 0.75 * other, 1e-6)
            elif "layernorm" in name:
                assert close(tensor, (one + other) / 2, 1e-6)


@pytest.mark.parametrize("heads", [5, 10, 20, 40])
def test_searched_shares_are_whole_steps(heads):
    """1 - 0.8 of 40 heads would be 7, for it is less than 0.2 in floating point."""
    shape, tried = shape_of(3, heads=heads), []
    request = replace(
        request_of(shape, angles=[0, 1, 5]),
        quality=lambda plans: tried.extend(sorted(h for h, _ in units(p)) for p in plans) or [0.0] * len(plans),
    )
    ConcatMerge(ratio="search").plan(request)
    small = [heads * min(step, 20 - step) // 20 for step in range(21)]
    assert tried == [[count, heads - count] for count in small]


def test_blocks_of_another_attention_type_are_not_merged():
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    shape = shape_of(4)
    shape = replace(shape, blocks=tuple(replace(b, attention_type=k) for b, k in zip(shape.blocks, kinds, strict=True)))
    assert merged_pair(ConcatMerge().plan(request_of(shape, angles=[0, 1, 9, 2]))) == (1, 2)
    assert ConcatMerge().reach(shape) == ConcatMerge(repeat=True).reach(shape)
    assert ConcatMerge().reach(shape) == pytest.approx(shape.block_parameters(shape.blocks[0]) / shape.parameters)
    alternating = replace(shape, blocks=(shape.blocks[0], shape.blocks[1]) * 2)
    assert ConcatMerge(repeat=True).reach(alternating) == 0
    with pytest.raises(OutOfReach, match=r"reaches ratios up to 0\.0000"):
        ConcatMerge().plan(request_of(alternating))


def drive(strategy, shape, ratio, angles) -> PruningPlan:
    """Run a progressive strategy to its end; ``angles`` gives those of a plan's model."""
    plan, budget = PruningPlan.identity(shape), Budget(shape.parameters, ratio)
    while True:
        plan = plan.compose(strategy.plan(request_of(shape, ratio, plan=plan, angles=angles(plan))))
        if strategy.finished(plan, budget):
            return plan


def test_what_is_promised_is_reached_whatever_the_angles_say():
    """Angles that leave every third block alone would end at two thirds of the promised ratio."""
    shape = shape_of(12)

    def greedy(plan):
        wanted = [(1, 2), (4, 5), (7, 8), (10, 11)]
        pairs = [(a.sources[0], b.sources[0]) for a, b in zip(plan.blocks, plan.blocks[1:], strict=False)]
        return [0.0, *(0.1 if p in wanted else 0.9 for p in pairs)]

    reach = ConcatMerge().reach(shape)
    done = drive(ConcatMerge(), shape, reach - 1e-6, greedy)
    assert len(done.blocks) == 6
    assert {frozenset(s for s, _ in r.norm_weights) for r in done.blocks} == {
        frozenset((i, i + 1)) for i in range(0, 12, 2)
    }
    easy = drive(ConcatMerge(), shape, reach / 2, greedy)  # here the angles have their way
    assert {frozenset(s for s, _ in r.norm_weights) for r in easy.blocks if len(r.norm_weights) == 2} <= {
        frozenset(p) for p in ((1, 2), (4, 5), (7, 8), (10, 11))
    }
    assert easy.ratio >= reach / 2


def test_merges_take_the_place_of_a_ratio():
    plan = drive(ConcatMerge(merges=3), shape_of(), 0.9, lambda p: None)
    assert len(plan.blocks) == 5
    for merges in (0, 5):
        with pytest.raises(FlexiError, match=rf"merges = {merges}, expected 1\.\.4 on this model"):
            ConcatMerge(merges=merges).plan(request_of(shape_of()))


# ---------------------------------------------------------------------------------------- concat-merge: shares


@pytest.mark.parametrize(
    ("influence", "options", "expected"),
    [
        ((0.3, 0.7), {}, [(3, 7), (7, 17)]),  # floor(10 x 0.3), floor(24 x 0.3)
        ((0.7, 0.3), {}, [(7, 17), (3, 7)]),
        ((9.0, 1.0), {}, [(9, 22), (1, 2)]),
        ((0.5, 0.5), {}, [(5, 12), (5, 12)]),
        ((1.0, 0.0), {}, [(10, 24), (0, 0)]),
        ((0.0, 0.0), {}, [(5, 12), (5, 12)]),
        ((0.2, 0.8), {"exponent": 0.5}, [(3, 8), (7, 16)]),  # sqrt: 1 : 2
        ((0.2, 0.4), {"exponent": 2.0}, [(2, 4), (8, 20)]),  # squares: 1 : 4
        ((0.4, 0.6), {"floor": 0.8}, [(1, 4), (9, 20)]),  # 1 - 0.8 is 0.1999..., as in the formula
        ((0.6, 0.4), {"floor": 0.75}, [(8, 18), (2, 6)]),
        ((0.1, 0.9), {"floor": 0.75}, [(1, 2), (9, 22)]),
    ],
)
def test_shares_are_the_influences(influence, options, expected):
    shape = shape_of(3, heads=10)
    plan = ConcatMerge(**options).plan(request_of(shape, angles=[0, 1, 5], influence=[*influence, 1.0]))
    assert merged_pair(plan) == (0, 1)
    assert units(plan) == expected
    assert plan.new_shape.blocks[0] == shape.blocks[0]  # the width stays


def test_the_floor_loosens_with_the_number_of_original_blocks():
    """min_max ^ (1 / (originals - 1)): for a merged block of two and a third one, the square root."""
    shape = shape_of(3, heads=10)
    strategy = ConcatMerge(repeat=True, floor=0.49)
    first = strategy.plan(request_of(shape, angles=[0, 1, 5]))
    plan = strategy.plan(request_of(shape, plan=first, angles=[0, 1], influence=[0.45, 0.55]))
    assert units(plan) == [(3, 7), (7, 17)]


def test_shares_by_score_are_measured_from_the_lowest_block():
    shape = shape_of(4, heads=10)
    scores = replace(random_scores(shape), block=torch.tensor([-1.0, 5, -0.5, -0.75]))
    plan = ConcatMerge(ratio="score").plan(request_of(shape, angles=[0, 9, 9, 1], scores=scores))
    assert units(plan) == [(7, 16), (3, 8)]  # 0.5 : 0.25
    plan = ConcatMerge(ratio="score").plan(request_of(shape, angles=[0, 1, 9, 9], scores=scores))
    assert units(plan) == [(0, 0), (10, 24)]


def test_the_best_units_are_kept_in_their_order():
    shape, scores = shape_of(4), random_scores(shape_of(4), seed=3)
    plan = ConcatMerge().plan(request_of(shape, angles=[0, 9, 1, 9], influence=[1.0, 0.3, 0.7, 1.0], scores=scores))
    first, second = plan.blocks[1].parts
    assert (first.source, second.source) == (1, 2)
    for part, heads, channels in ((first, 1, 7), (second, 3, 17)):
        for kept, values, count in ((part.kv_heads, scores.attention, heads), (part.channels, scores.mlp, channels)):
            ranked = sorted(range(len(values[part.source])), key=lambda u: -float(values[part.source][u]))
            assert kept == tuple(sorted(ranked[:count]))
    assert plan.blocks[1].norms == ((1, 0.5), (2, 0.5))
    assert plan.origin["notes"] == ["merge 1: blocks 1 and 2 share 0.300 : 0.700, KV heads 1 + 3, channels 7 + 17"]


def test_a_share_of_one_and_none_is_not_a_removal():
    """A block that gives nothing still enters the mean of the norms."""
    model = tiny()
    shape = opened(model).shape
    plan = ConcatMerge().plan(request_of(shape, angles=[0, 9, 1, 9, 9], influence=[1.0, 1.0, 0.0, 1.0, 1.0]))
    assert [p.source for p in plan.blocks[1].parts] == [1]
    assert plan.blocks[1].norms == ((1, 0.5), (2, 0.5))
    norms = [model.model.layers[i].input_layernorm.weight for i in (1, 2)]
    found = built(plan, model)
    assert close(found.model.layers[1].input_layernorm.weight, (norms[0] + norms[1]) / 2, 1e-7)
    removed = built(PruningPlan.keep(shape, [0, 1, 3, 4]), model)
    assert not close(logits(found, tokens()), logits(removed, tokens()), 1e-2)


# ---------------------------------------------------------------------------------------- come, start to end


def watch(model, windows: Tensor) -> tuple[dict[int, Tensor], dict[tuple[int, str], Tensor]]:
    """Return the residual stream before every block (and after the last), and the inputs of the outgoing maps."""
    states: dict[int, Tensor] = {}
    inner: dict[tuple[int, str], Tensor] = {}
    handles = []
    for i, layer in enumerate(model.model.layers):
        handles.append(layer.register_forward_pre_hook(lambda m, a, i=i: states.update({i: a[0]})))
        handles.append(layer.register_forward_hook(lambda m, a, o, i=i: states.update({i + 1: o})))
        for name, path in (("attention", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
            handles.append(path.register_forward_pre_hook(lambda m, a, k=(i, name): inner.update({k: a[0]})))
    logits(model, windows)
    for handle in handles:
        handle.remove()
    return states, inner


def come_by_hand(model, windows: Tensor, merges: int):
    """CoMe's loop on a transformers model's weights, float64, from the published description alone."""
    model = copy.deepcopy(model).double()
    origin = [[i] for i in range(len(model.model.layers))]
    for _ in range(merges):
        states, inner = watch(model, windows)

        def cosine(i: int, j: int, states=states) -> Tensor:
            return F.cosine_similarity(states[i], states[j], dim=-1).clamp(0, 1)

        count = len(origin)
        influence = [(1 - cosine(i, i + 1)).sum() for i in range(count)]
        angle = [torch.arccos(cosine(i, i + 2)).sum() for i in range(count - 1)]
        free = [i for i in range(count - 1) if len(origin[i]) == len(origin[i + 1]) == 1]
        i = min(free, key=lambda i, angle=angle: float(angle[i]))
        merge_by_hand(model, i, float(influence[i] / (influence[i] + influence[i + 1])), inner)
        origin[i : i + 2] = [origin[i] + origin[i + 1]]
    return model, origin


def best_by_hand(inner: Tensor, weight: Tensor, units: int, count: int) -> Tensor:
    """Return the columns of the ``count`` units with the highest mean |activation| x column norm, in their order."""
    scores = (inner.abs().flatten(0, 1).mean(0) * weight.abs().sum(0)).view(units, -1)
    best = sorted(scores.mean(1).argsort(descending=True)[:count].tolist())
    return torch.arange(scores.numel()).view(units, -1)[best].flatten()


def merge_by_hand(model, i: int, share: float, inner) -> None:
    config, layers = model.config, model.model.layers
    group, head_dim = config.num_attention_heads // config.num_key_value_heads, config.head_dim

    def counts(width: int) -> tuple[int, int]:
        low = int(width * min(share, 1 - share))
        return (low, width - low) if share < 0.5 else (width - low, low)

    pair = layers[i], layers[i + 1]
    columns: dict[str, list[Tensor]] = {"o_proj": [], "down_proj": []}
    for j in (0, 1):
        heads, channels = (counts(w)[j] for w in (config.num_key_value_heads, config.intermediate_size))
        o, down = pair[j].self_attn.o_proj.weight, pair[j].mlp.down_proj.weight
        columns["o_proj"].append(best_by_hand(inner[i + j, "attention"], o, config.num_key_value_heads, heads))
        columns["down_proj"].append(best_by_hand(inner[i + j, "mlp"], down, config.intermediate_size, channels))
    keys = [c[c % (group * head_dim) < head_dim] for c in columns["o_proj"]]  # the first query head of each KV head
    keys = [c // (group * head_dim) * head_dim + c % head_dim for c in keys]
    rows = {**columns, "q_proj": columns["o_proj"], "k_proj": keys, "v_proj": keys}
    rows |= {"gate_proj": columns["down_proj"], "up_proj": columns["down_proj"]}
    for name, index in rows.items():
        maps = [getattr(b.self_attn if name[0] in "qkvo" else b.mlp, name) for b in pair]
        axis = 1 if name in ("o_proj", "down_proj") else 0
        maps[0].weight.data = torch.cat(
            [m.weight.index_select(axis, r) for m, r in zip(maps, index, strict=True)], axis
        )
    for name in ("input_layernorm", "post_attention_layernorm"):
        norms = [getattr(b, name).weight for b in pair]
        norms[0].data = (norms[0] + norms[1]) / 2
    del layers[i + 1]
    config.num_hidden_layers -= 1


@pytest.fixture(scope="module")
def pruner_of():
    """Return what makes a pruner over a tiny model, calibrated on random tokens."""

    def make(model) -> Pruner:
        pruner = Pruner(opened(model), dtype="float32")
        pruner.__dict__["texts"] = (WINDOWS, SAMPLES, "no text")
        return pruner

    return make


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_come_is_what_its_authors_describe(kind, pruner_of):
    model = tiny(kind, num_hidden_layers=8)
    pruner = pruner_of(model)
    plan = pruner.plan("come", ConcatMerge(merges=3), 0.5)
    expected, origin = come_by_hand(model, WINDOWS, 3)
    assert [[s for s, _ in r.norm_weights] for r in plan.blocks] == origin
    assert close(logits(pruner.model(plan), WINDOWS), logits(expected, WINDOWS).float(), 1e-4)


# ---------------------------------------------------------------------------------------- remove-blocks


def test_the_lowest_blocks_go_at_once():
    scores = replace(random_scores(shape_of()), block=torch.tensor([5.0, 1, 4, 1, 9, 8, 0, 7]))

    def left(**options):
        plan = RemoveBlocks(**options).plan(request_of(shape_of(), scores=scores))
        return [r.whole for r in plan.blocks]

    assert left(blocks=1) == [0, 1, 2, 3, 4, 5, 7]
    assert left(blocks=2) == [0, 1, 2, 4, 5, 7]  # of equal ones the later goes
    assert left(blocks=3) == [0, 2, 4, 5, 7]
    assert left(blocks=2, protect_first=2, protect_last=2) == [0, 1, 4, 5, 6, 7]
    assert left(blocks=4, progressive=True) == [0, 1, 2, 3, 4, 5, 7]  # a step at a time


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5, 0.7])
def test_as_few_blocks_go_as_the_ratio_allows(ratio):
    shape = shape_of()
    plan = RemoveBlocks().plan(request_of(shape, ratio))
    one = shape.block_parameters(shape.blocks[0])
    assert plan.ratio >= ratio > plan.ratio - one / shape.parameters


@pytest.mark.parametrize("blocks", [0, 8])
def test_a_number_of_blocks_that_cannot_go(blocks):
    with pytest.raises(FlexiError, match=rf"remove-blocks: blocks = {blocks}, expected 1\.\.7 on this model"):
        RemoveBlocks(blocks=blocks).plan(request_of(shape_of()))


def test_progressive_removal_scores_the_model_of_every_step(pruner_of):
    model = tiny("qwen2", num_hidden_layers=7)
    pruner = pruner_of(model)
    plan = pruner.plan("flexigpt", RemoveBlocks(progressive=True, blocks=3), 0.5)
    left = list(range(7))
    for _ in range(3):
        current = copy.deepcopy(model)
        current.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in left)
        current.config.num_hidden_layers = len(left)
        states, _ = watch(current, WINDOWS)
        turned = [(1 - F.cosine_similarity(states[i], states[i + 1], dim=-1)).mean() for i in range(len(left))]
        del left[int(torch.stack(turned).argmin())]
    assert [r.whole for r in plan.blocks] == left
    one_shot = pruner.plan("flexigpt", RemoveBlocks(blocks=3), 0.5)
    assert len(one_shot.blocks) == 4


# ---------------------------------------------------------------------------------------- remove-units


def groups_of(values: Tensor, multiple: int) -> list[list[int]]:
    """Return channels in the groups in which they go, lowest first; the first takes what is over a multiple."""
    order = sorted(range(len(values)), key=lambda u: float(values[u]))
    first = len(order) % multiple or multiple
    return [order[:first], *(order[i : i + multiple] for i in range(first, len(order), multiple))]


def ranked(scores: Scores, shape: ModelShape, rule: str) -> tuple[list[Tensor], list[Tensor]]:
    """The ranking values by the rule, written out."""
    attention, mlp = list(scores.attention or ()), list(scores.mlp or ())
    if "standardised" in rule:
        attention, mlp = ([(v - v.mean()) / v.std(correction=0) for v in values] for values in (attention, mlp))
    if rule in ("divided", "standardised-divided"):
        attention = [v / shape.head_cost(b) for v, b in zip(attention, shape.blocks, strict=True)]
        mlp = [v / shape.channel_cost() for v in mlp]
    return attention, mlp


@pytest.mark.parametrize("comparable", [True, False])
@pytest.mark.parametrize("rule", ["auto", "divided", "undivided", "standardised", "standardised-divided"])
def test_units_are_ranked_globally_by_the_rule(rule, comparable):
    """Nothing that went ranks above anything that could have gone and stayed, and the last one was needed."""
    shape = shape_of(6, heads=5, channels=44)
    scores = random_scores(shape, seed=7, comparable=comparable)
    meant = ("divided" if comparable else "standardised") if rule == "auto" else rule
    attention, mlp = ranked(scores, shape, meant)
    for found, expected in zip(priorities(scores, shape, rule), (attention, mlp), strict=True):
        assert all(close(a, b, 1e-6) for a, b in zip(found, expected, strict=True))
    plan = RemoveUnits(rule=rule).plan(request_of(shape, 0.15, scores=scores))
    gone, stayed = [], []
    for index in range(1, 5):
        (part,) = plan.blocks[index].parts
        heads = set(range(5)) if part.kv_heads is None else set(part.kv_heads)
        channels = set(range(44)) if part.channels is None else set(part.channels)
        order = sorted(range(5), key=lambda u: float(attention[index][u]))
        for unit in order[:-1]:  # the best head always stays
            (stayed if unit in heads else gone).append(
                (float(attention[index][unit]), shape.head_cost(shape.blocks[0]))
            )
        for group in groups_of(mlp[index], 8)[:-1]:
            assert len(channels & set(group)) in (0, len(group))
            value = float(mlp[index][group].mean())
            (stayed if channels & set(group) else gone).append((value, len(group) * shape.channel_cost()))
        assert heads
        assert len(channels) % 8 == 0 or len(channels) == 44
    assert max(v for v, _ in gone) <= min(v for v, _ in stayed)
    target = int((1 - 0.15) * shape.parameters)
    assert plan.stored_parameters == shape.parameters - sum(c for _, c in gone) <= target
    assert plan.stored_parameters + max(gone)[1] > target
    assert plan.blocks[0].whole == 0
    assert plan.blocks[5].whole == 5


def test_floors_hold_at_the_very_reach():
    shape = shape_of(6, heads=5, channels=44)
    strategy = RemoveUnits(multiple=16, min_heads=2, protect_first=2)
    plan = strategy.plan(request_of(shape, strategy.reach(shape) - 1e-9))
    assert {(b.kv_heads, b.channels) for b in plan.new_shape.blocks[2:5]} == {(2, 16)}
    assert [r.whole for r in plan.blocks] == [0, 1, None, None, None, 5]
    assert plan.ratio == pytest.approx(strategy.reach(shape))


def test_a_metric_without_unit_scores_is_refused():
    shape = shape_of()
    with pytest.raises(FlexiError, match="the metric gave no attention or no mlp scores"):
        RemoveUnits().plan(request_of(shape, scores=Scores(block=torch.ones(8))))


def test_protection_that_leaves_nothing_is_an_error():
    with pytest.raises(FlexiError, match=r"blocks 5\.\.3 are not a range of the model's blocks 0\.\.7"):
        RemoveUnits(protect_first=5, protect_last=4).plan(request_of(shape_of()))


def test_uniform_mode_takes_llm_pruners_share_of_every_block():
    shape = shape_of(8, heads=8, channels=100)
    scores = random_scores(shape, comparable=False)
    plan = RemoveUnits(mode="uniform", fraction=0.25, first=2, last=5).plan(request_of(shape, scores=scores))
    for index, recipe in enumerate(plan.blocks):
        if not 2 <= index <= 5:
            assert recipe.whole == index
            continue
        assert recipe.parts[0].kv_heads == tuple(sorted(scores.attention[index].topk(6).indices.tolist()))
        assert recipe.parts[0].channels == tuple(sorted(scores.mlp[index].topk(75).indices.tolist()))
    assert plan.not_plain() is not None
    assert not plan.origin


@pytest.mark.parametrize(
    ("heads", "fraction", "gone"),
    [(3, 0.25, 0), (3, 0.34, 1), (3, 0.5, 1), (4, 0.3, 1), (32, 0.25, 8), (1, 0.9, 0), (4, 0.99, 3)],
)
def test_llm_pruners_count_of_heads_and_what_rounding_did(heads, fraction, gone):
    """It counts rows and removes whole heads: a quarter of three heads is none."""
    shape = shape_of(4, heads=heads, channels=100)
    plan = RemoveUnits(mode="uniform", fraction=fraction, first=1, last=2).plan(request_of(shape))
    block = plan.new_shape.blocks[1]
    assert block.kv_heads == heads - gone
    assert block.channels == int(100 * (1 - fraction))
    notes = " ".join(plan.origin.get("notes", ()))
    assert (f"of {heads} KV heads became {gone} a block" in notes) == (gone != heads * fraction)


def test_uniform_mode_meets_a_ratio_with_the_smallest_fraction():
    shape = shape_of(8, heads=8, channels=96)
    plan = RemoveUnits(mode="uniform").plan(request_of(shape, 0.2))
    assert plan.ratio >= 0.2
    assert len(set(plan.new_shape.blocks[1:7])) == 1
    kept = plan.new_shape.blocks[1]
    richer = [
        replace(kept, channels=kept.channels + 1),
        replace(kept, kv_heads=kept.kv_heads + 1, query_heads=kept.query_heads + 2),
    ]
    for block in richer:
        lighter = replace(shape, blocks=(shape.blocks[0], *[block] * 6, shape.blocks[7]))
        assert lighter.parameters > Budget(shape.parameters, 0.2).target


def test_fractions_belong_to_uniform_mode():
    with pytest.raises(FlexiError, match="option fraction belongs to mode uniform"):
        RemoveUnits(fraction=0.25).plan(request_of(shape_of()))
    with pytest.raises(FlexiError, match="expected a fraction between 0 and 1, found 1"):
        RemoveUnits(mode="uniform", fraction=1.0).plan(request_of(shape_of()))


# ---------------------------------------------------------------------------------------- share-lora


def rank_r(weight: Tensor, rank: int) -> Tensor:
    """The best approximation of this rank."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def distance_by_hand(own: Tensor, donor: Tensor, rank: int) -> float:
    """d = || W^_i - (W^_j + D) ||, D the best rank-r approximation of W^_i - W^_j."""
    a, b = rank_r(own, rank), rank_r(donor, rank)
    return float((a - (b + rank_r(a - b, rank))).norm())


@pytest.mark.parametrize("rank", [1, 3, 8, 20, 40])
def test_the_distance_is_the_papers(rank):
    checkpoint = opened(tiny())
    found = share_lora.donor_distances(checkpoint, checkpoint.shape, [(0, 1), (3, 2)], rank)
    assert len(found) == 10  # pairs of five blocks
    for block, donor in ((0, 1), (3, 2)):
        expected = 0.0
        for role, weight in checkpoint.block(block).items():
            one = distance_by_hand(weight, checkpoint.block(donor)[role], rank)
            pair = [share_lora.reconstruction(checkpoint.block(b)[role], rank) for b in (block, donor)]
            assert share_lora.tail_energy(*pair, rank) == pytest.approx(one, rel=1e-4, abs=1e-4)
            expected += one
        assert found[frozenset((block, donor))] == pytest.approx(expected, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("kind", ["llama", "qwen2-mixed"])
def test_donors_are_the_nearest_unpruned_blocks_of_their_kind(kind):
    checkpoint = opened(tiny(kind, num_hidden_layers=5))
    shape = checkpoint.shape
    scores = replace(random_scores(shape), block=torch.tensor([5.0, 0.1, 0.3, 4.0, 0.2]))
    plan = ShareLora(blocks=3).plan(request_of(shape, scores=scores, weights=checkpoint))
    gone = [i for i, r in enumerate(plan.blocks) if r.shares is not None]
    assert gone == [1, 2, 4]
    rank = 2  # hidden / 16, the paper's 256 at 4096
    for block in gone:
        distances = {
            j: sum(distance_by_hand(w, checkpoint.block(j)[r], rank) for r, w in checkpoint.block(block).items())
            for j in (0, 3)
            if shape.blocks[j] == shape.blocks[block]
        }
        assert plan.blocks[block].shares == min(distances, key=distances.__getitem__)
        assert plan.blocks[block].parts == (Part(block),)
        assert (plan.blocks[block].rank, plan.blocks[block].output_norm) == (rank, True)


def test_of_every_kind_of_block_a_donor_stays():
    checkpoint = opened(tiny("qwen2-mixed"))  # full, sliding, full, sliding, full
    shape = checkpoint.shape
    scores = replace(random_scores(shape), block=torch.tensor([9.0, 0.1, 8.0, 0.2, 7.0]))
    plan = ShareLora(blocks=2).plan(request_of(shape, scores=scores, weights=checkpoint))
    assert [r.shares for r in plan.blocks] == [None, 3, None, None, plan.blocks[4].shares]
    assert plan.blocks[4].shares in (0, 2)
    with pytest.raises(FlexiError, match=r"share-lora: blocks = 4, expected 1\.\.3 on this model"):
        ShareLora(blocks=4).plan(request_of(shape, scores=scores, weights=checkpoint))
    assert ShareLora(rank=1).reach(shape) > 0
    assert count_only(shape, ShareLora(blocks=3), 0.5).stored_parameters < shape.parameters


def test_protected_blocks_are_not_replaced():
    scores = replace(random_scores(shape_of()), block=torch.arange(8.0))
    plan = count_only(shape_of(), ShareLora(blocks=2, protect_first=2, protect_last=3), 0.5)
    assert [i for i, r in enumerate(plan.blocks) if r.shares is not None] == [3, 4]
    with pytest.raises(FlexiError, match=r"blocks = 4, expected 1\.\.3"):
        ShareLora(blocks=4, protect_first=2, protect_last=3).plan(request_of(shape_of(), scores=scores, weights=None))


def test_adapters_are_the_truncated_svd_of_the_whole_difference():
    checkpoint = opened(tiny())
    plan = sharing(checkpoint.shape, {3: 1}, rank=5)
    made = ShareLora(output_gain=0.25).tensors(TensorRequest(plan, plan, checkpoint))
    for role, weight in checkpoint.block(3).items():
        difference = weight - checkpoint.block(1)[role]
        a, b = made[f"blocks.3.{role}.lora_a"], made[f"blocks.3.{role}.lora_b"]
        assert close((a @ b).double(), rank_r(difference, 5), 1e-5)
        assert close(b @ b.T, torch.eye(5), 1e-5)  # the singular values are all on A
        singular = torch.linalg.svdvals(difference)[:5]
        assert close(a.norm(dim=0), singular, 1e-5)
    for part in ("attention", "mlp"):
        assert made[f"blocks.3.{part}.output_norm"].tolist() == [0.25] * 32
    assert len(made) == 16


def test_with_full_rank_the_replaced_block_is_itself():
    model, ids = tiny("qwen3-biases"), tokens()
    checkpoint = opened(model)
    plan = sharing(checkpoint.shape, {3: 1, 0: 4}, rank=64)
    plan = replace(plan, blocks=tuple(replace(r, output_norm=False) for r in plan.blocks))
    made = ShareLora().tensors(TensorRequest(plan, plan, checkpoint))
    made = {n: t for n, t in made.items() if "output_norm" not in n}
    found = built(with_digests(plan, made), model, made)
    assert isinstance(found, FlexiForCausalLM)
    for block in (0, 3):
        for role, weight in checkpoint.block(block).items():
            assert close(found.model.layers[block].get_submodule(checkpoint.family.ROLES[role]).weight, weight, 1e-5)
    assert close(logits(found, ids), logits(model, ids), 1e-4)


def test_rank_zero_shares_without_adapters():
    model = tiny()
    plan = sharing(opened(model).shape, {3: 1}, rank=0)
    made = ShareLora().tensors(TensorRequest(plan, plan, opened(model)))
    assert sorted(made) == ["blocks.3.attention.output_norm", "blocks.3.mlp.output_norm"]
    assert logits(built(with_digests(plan, made), model, made), tokens()).isfinite().all()


def test_factorisations_are_made_once(monkeypatch):
    checkpoint, made = opened(tiny()), []
    original = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: made.append(1) or original(*a, **k))
    for seed in range(3):
        ShareLora(blocks=2).plan(
            request_of(checkpoint.shape, scores=random_scores(checkpoint.shape, seed), weights=checkpoint)
        )
    assert len(made) <= 5 * 7


# ---------------------------------------------------------------------------------------- reach


STRATEGIES = [
    ShareLora(),
    ConcatMerge(),
    ConcatMerge(repeat=True),
    RemoveBlocks(),
    RemoveBlocks(progressive=True, protect_first=1, protect_last=2),
    RemoveUnits(),
    RemoveUnits(min_heads=2, multiple=4),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_the_declared_reach_is_reached_and_no_more(strategy):
    shape = shape_of(9)
    reach = strategy.reach(shape)
    assert 0 < reach < 1
    said = rounded_down(reach)
    assert reach - 1e-4 < float(said) <= reach
    for ratio in (reach, reach - 1e-9, float(said)):
        assert count_only(shape, strategy, ratio).ratio >= ratio - 1e-12
    for ratio in (reach + 1e-4, 0.0, 1.0, -0.5, 1.5):
        with pytest.raises(OutOfReach, match=f"up to {said}"):
            count_only(shape, strategy, ratio)
        with pytest.raises(OutOfReach, match=f"up to {said}"):
            strategy.plan(request_of(shape, ratio))


@pytest.mark.parametrize("model", ["huggyllama/llama-7b", "meta-llama/Llama-3.1-8B"])
@pytest.mark.parametrize("strategy", [ConcatMerge(), RemoveBlocks(), RemoveUnits(), ShareLora()], ids=repr)
def test_the_very_reach_is_reached_whatever_floats_make_of_it(model, strategy):
    config = known_config(model)
    shape = FAMILIES[config.model_type].shape(config)
    assert count_only(shape, strategy, strategy.reach(shape)).stored_parameters < shape.parameters


def test_a_floor_of_more_heads_than_there_are_keeps_them_all():
    shape = shape_of(heads=3)
    scores = random_scores(shape)
    lowest_heads = replace(scores, attention=tuple(h - 100 for h in scores.attention))
    for floor in (3, 4, 5, 9):
        plan = RemoveUnits(min_heads=floor).plan(request_of(shape, 0.1, scores=lowest_heads))
        assert all(block.kv_heads == 3 for block in plan.new_shape.blocks)


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (RemoveUnits(multiple=0), "multiple = 0, min_heads = 1: expected a multiple of at least 1"),
        (RemoveUnits(min_heads=-1), "min_heads = -1"),
        (RemoveBlocks(protect_first=-1), "protect_first = -1, protect_last = 0: expected 0 or more"),
        (LeastSquaresMerge(protect_last=-1), "protect_last = -1: expected 0 or more"),
        (ConcatMerge(floor=1.5), r"floor = 1\.5, expected 0\.\.1"),
    ],
    ids=repr,
)
def test_numbers_that_no_option_can_have_are_refused(strategy, said):
    with pytest.raises(FlexiError, match=said):
        strategy.plan(request_of(shape_of(), 0.1, scores=random_scores(shape_of())))


def test_budget_helpers():
    budget = Budget(1000, 0.25)
    assert budget.target == 750
    check_reach("me", budget, 0.25)
    with pytest.raises(
        OutOfReach, match=r"me: ratio 0\.25 is out of reach on this model; it reaches ratios up to 0\.2000"
    ):
        check_reach("me", budget, 0.2)
    with pytest.raises(OutOfReach, match="me: ratio 1 is not between 0 and 1"):
        check_reach("me", Budget(1000, 1.0), 0.2)
    assert lowest(torch.tensor([2.0, 1.0, 1.0, 0.0]), 2, [0, 1, 2]) == [1, 2]
    assert lowest(torch.tensor([2.0, 1.0, 1.0, 0.0]), 1, [0, 1, 2]) == [2]
    shape = shape_of()
    assert smallest(7, lambda n: PruningPlan.keep(shape, range(n, 8)), Budget(shape.parameters, 0.2), "me") == 2
    with pytest.raises(OutOfReach, match="it reaches ratios up to"):
        smallest(1, lambda n: PruningPlan.keep(shape, range(n, 8)), Budget(shape.parameters, 0.9), "me")


# ---------------------------------------------------------------------------------------- all together


@pytest.fixture(scope="module")
def shared_pruner(pruner_of):
    return pruner_of(tiny("llama", num_hidden_layers=6))


@pytest.mark.parametrize("strategy", ["share-lora", "concat-merge", "remove-blocks", "remove-units"])
@pytest.mark.parametrize("metric", ["flexigpt", "saap", "come"])
def test_every_metric_with_every_strategy(metric, strategy, shared_pruner):
    plan = shared_pruner.plan(metric, strategy, 0.2)
    assert plan.ratio >= 0.2
    assert plan == shared_pruner.plan(metric, strategy, 0.2)
    planned = shared_pruner.attach(plan)
    model = shared_pruner.model(planned)
    assert sum(p.numel() for p in model.parameters()) == planned.plan.stored_parameters == plan.stored_parameters
    assert logits(model, WINDOWS).isfinite().all()
    assert (plan.origin["metric"], plan.origin["strategy"], plan.origin["ratio"]) == (metric, strategy, 0.2)
    loss = shared_pruner.calibrator.losses([planned])[0]
    every = logits(model, WINDOWS)
    assert loss == pytest.approx(
        float(F.cross_entropy(every[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten())), rel=1e-4
    )


def test_gains_start_constant_and_small_ones_nearly_skip_the_block(shared_pruner):
    """The paper's reason for the gain: close to zero, a replaced block starts as if it had been removed."""
    plan = shared_pruner.plan("flexigpt", ShareLora(blocks=2, output_gain=1e-6), 0.5)
    kept = [i for i, r in enumerate(plan.blocks) if r.shares is None]
    removed = shared_pruner.model(PruningPlan.keep(plan.shape, kept))
    assert close(logits(shared_pruner.model(plan), WINDOWS), logits(removed, WINDOWS), 1e-3)


def test_quality_runs_plans_of_the_original_model(shared_pruner):
    shape = shared_pruner.checkpoint.shape
    plans = [PruningPlan.identity(shape), PruningPlan.keep(shape, [0, 1, 5])]
    found = shared_pruner._quality(Planned(PruningPlan.identity(shape)), plans)
    assert found == shared_pruner.calibrator.losses([shared_pruner.attach(p) for p in plans])
    with pytest.raises(FlexiError, match="unknown quality measure 'nothing'"):
        shared_pruner._quality(Planned(PruningPlan.identity(shape)), plans, "nothing")


def test_a_plan_that_needs_adapters_says_who_makes_them(shared_pruner):
    with pytest.raises(FlexiError, match="neither has them attached nor says which strategy makes them"):
        shared_pruner.attach(sharing(shared_pruner.checkpoint.shape, {3: 1}))
