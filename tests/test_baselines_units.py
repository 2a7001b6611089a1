"""The unit-level baselines and BlockPruner against autograd, transformers, and loops written as the papers have them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from flexi_baselines import blockpruner, equal_shares, flap, input_moments, llm_pruner, wanda_sp
from flexi_baselines.blockpruner import BlockPruner
from flexi_baselines.flap import Flap, Fluctuation
from flexi_baselines.llm_pruner import GroupTaylor, LlmPruner
from flexi_baselines.wanda_sp import WandaScores, WandaSp
from tiny import change, close, logits, opened, tiny, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from flexi_plugins.budget import global_units, rounded_down
from flexi_plugins.calibration import Calibrator
from flexi_plugins.data import BlockRecipe, BlockShape, ModelShape, Part, PruningPlan, Scores, Statistics
from flexi_plugins.errors import FlexiError, OutOfReach
from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.hookspecs import BlockTrace, Budget, GradientTrace, LinearTrace, PruningRequest
from flexi_plugins.plugins import Plugins
from flexi_plugins.pruner import Pruner, count_only

MODULES = (blockpruner, flap, llm_pruner, wanda_sp)
KNOWN = {s.name: s for module in (flap, llm_pruner) for s in module.statistics()}
KINDS = ["llama", "llama-biases", "mistral", "qwen3-biases"]
WINDOWS, SAMPLES = tokens(4, 10), tokens(4, 7, seed=5)


@pytest.mark.flexi(*MODULES)
def test_unit_level_baselines_conform(flexi_check):
    flexi_check()


# ------------------------------------------------------------------------------------------------- helpers


def loaded() -> Plugins:
    plugins = Plugins.load()
    for module in MODULES:
        if not plugins.manager.is_registered(module):
            plugins.add(module)
    return plugins


def pruner_of(model: nn.Module) -> Pruner:
    """Return a pruner over a tiny model, calibrated on random tokens."""
    pruner = Pruner(opened(model), dtype="float32", plugins=loaded())
    pruner.__dict__["texts"] = (WINDOWS, SAMPLES, "no text")
    return pruner


def statistics_of(model: nn.Module, rows: int = 2) -> Statistics:
    checkpoint = opened(model)
    plan = PruningPlan.identity(checkpoint.shape)
    return Calibrator(Blocks(checkpoint), WINDOWS, SAMPLES, KNOWN, rows).statistics(Planned(plan), KNOWN)


def request_of(shape: ModelShape, ratio: float = 0.2, **changes: Any) -> PruningRequest:
    return PruningRequest(shape, PruningPlan.identity(shape), Budget(shape.parameters, ratio), **changes)


def shape_of(blocks: int = 2, heads: int = 2, channels: int = 6, **changes: Any) -> ModelShape:
    """Return a shape with a head of 32 parameters (multi-head attention) and a channel of 12."""
    return ModelShape((BlockShape(heads, heads, 2, channels),) * blocks, hidden=4, vocabulary=5, tied=True, **changes)


def alike(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether two tensors agree to a tolerance relative to the largest expected value."""
    worst = float((found.double() - expected.double()).abs().max())
    return found.shape == expected.shape and worst <= tolerance * float(expected.abs().max())


def per_block(values: Sequence[Sequence[float]]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(v, dtype=torch.float32) for v in values)


def gone(plan: PruningPlan) -> set[tuple[int, str, int]]:
    """Return the units that a plan without removed blocks leaves out."""
    found = set()
    for index, (recipe, block) in enumerate(zip(plan.blocks, plan.shape.blocks, strict=True)):
        [part] = recipe.parts
        for kind, kept, width in (
            ("attention", part.kv_heads, block.kv_heads),
            ("mlp", part.channels, block.channels),
        ):
            found |= {(index, kind, u) for u in range(width) if kept is not None and u not in kept}
    return found


def inner_inputs(model: nn.Module, windows: Tensor = WINDOWS) -> list[dict[str, Tensor]]:
    """Return what enters the two output maps of every block, (windows, tokens, columns), from transformers in float64."""
    model = copy.deepcopy(model).double()
    found: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
    for index, block in enumerate(model.model.layers):
        for kind, path in (("attention", block.self_attn.o_proj), ("mlp", block.mlp.down_proj)):

            def note(module, inputs, index=index, kind=kind):
                found[index][kind] = inputs[0]

            path.register_forward_pre_hook(note)
    logits(model, windows)
    return found


def output_maps(model: nn.Module, index: int) -> dict[str, nn.Linear]:
    block = model.model.layers[index]
    return {"attention": block.self_attn.o_proj, "mlp": block.mlp.down_proj}


# -------------------------------------------------------------------------------------- llm-pruner: scores


def gradients(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradient of the mean loss of all samples, and the mean of the samples' squared gradients, by autograd."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    mean: dict[str, Tensor] = {}
    square: dict[str, Tensor] = {}
    for row in SAMPLES:
        model.zero_grad()
        F.cross_entropy(model(row[None]).logits[0, :-1], row[1:]).backward()
        for name, parameter in model.named_parameters():
            g = parameter.grad / len(SAMPLES)
            mean[name] = mean.get(name, 0) + g
            square[name] = square.get(name, 0) + g * g * len(SAMPLES)
    return mean, square


FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "vectorize": lambda w, g, f: (w * g).sum(1).abs(),
    "param_first": lambda w, g, f: (w * g).abs().sum(1),
    "param_second": lambda w, g, f: (w * w * f).abs().sum(1),
    "param_mix": lambda w, g, f: (w * g - 0.5 * w * w * f).abs().sum(1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_a_maps_scores_is_its_formula(kind):
    model = tiny(kind)
    found, roles = statistics_of(model), opened(model).family.ROLES
    mean, square = gradients(model)
    for form, formula in FORMULAS.items():
        for index in range(len(model.model.layers)):
            for role, path in roles.items():
                name = f"model.layers.{index}.{path}.weight"
                w, g, f = model.get_parameter(name).double(), mean[name], square[name]
                if role in ("attention_output", "down"):  # there the columns are the unit's
                    w, g, f = w.T, g.T, f.T
                assert alike(found[f"llm-pruner-{form}"][role][index], formula(w, g, f))


def test_a_head_is_the_sum_of_its_channels_over_all_four_maps():
    """Query head h belongs to KV head h // group."""
    model = tiny("llama")
    checkpoint = opened(model)
    [block, *_] = checkpoint.shape.blocks
    scores = pruner_of(model).score(LlmPruner())
    mean, _ = gradients(model)
    for head in range(block.kv_heads):
        queries = slice(head * block.group * block.head_dim, (head + 1) * block.group * block.head_dim)
        keys = slice(head * block.head_dim, (head + 1) * block.head_dim)
        expected = 0.0
        for path, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys), ("o_proj", queries)):
            name = f"model.layers.0.self_attn.{path}.weight"
            effect = (model.get_parameter(name).double() * mean[name]).abs()
            expected += float((effect.T if path == "o_proj" else effect)[rows].sum())
        assert float(scores.attention[0][head]) == pytest.approx(expected, rel=1e-5)
    assert scores.comparable
    assert scores.rule == "undivided"


BLOCK = BlockShape(query_heads=4, kv_heads=2, head_dim=2, channels=3)


def test_released_pairing_gives_query_head_h_to_kv_head_h_modulo_their_number():
    scores = torch.arange(8.0)  # four query heads of two channels
    assert LlmPruner().aligned(scores, BLOCK).tolist() == [0 + 2, 1 + 3, 4 + 6, 5 + 7]
    assert LlmPruner(pairing="released").aligned(scores, BLOCK).tolist() == [0 + 4, 1 + 5, 2 + 6, 3 + 7]
    alone = replace(BLOCK, query_heads=2)  # multi-head attention: nothing to pair
    assert LlmPruner(pairing="released").aligned(scores[:4], alone).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("sum", [6.0, 16.0]),
        ("mean", [2.0, 16 / 3]),
        ("max", [3.0, 8.0]),
        ("prod", [6.0, 56.0]),
        ("first", [1.0, 7.0]),
        ("second", [2.0, 1.0]),
    ],
)
def test_maps_are_joined_channel_by_channel(strategy, expected):
    maps = per_block([[1, 7], [2, 1], [3, 8]])
    assert LlmPruner(grouping_strategy=strategy).joined(maps).tolist() == pytest.approx(expected)


def test_only_sums_over_all_maps_are_in_one_scale():
    model = tiny("llama")
    pruner = pruner_of(model)
    assert pruner.score(LlmPruner()).comparable
    assert not pruner.score(LlmPruner(grouping_strategy="first")).comparable
    first = pruner.score(LlmPruner(grouping_strategy="first"))
    assert alike(first.mlp[2], statistics_of(model)["llm-pruner-param_first"]["gate"][2])


class Allocations(TorchDispatchMode):
    """Notes the bytes of the largest tensor made while it is on; views of what there was do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)}
        if isinstance(found, Tensor) and found.untyped_storage().data_ptr() not in known:
            self.largest = max(self.largest, found.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KNOWN)
def test_statistics_make_nothing_of_the_size_of_a_matrix(name, dtype):
    tokens, hidden, channels = 2000, 1000, 2000
    generator = torch.Generator().manual_seed(0)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    stream, inner, weight = drawn(tokens, hidden), drawn(tokens, channels), drawn(hidden, channels)
    if KNOWN[name].backward:
        maps = {
            "up": LinearTrace(stream[:8].view(2, 4, hidden), inner[:8].view(2, 4, channels), weight.T.contiguous()),
            "down": LinearTrace(inner[:8].view(2, 4, channels), stream[:8].view(2, 4, hidden), weight),
        }
        trace: Any = GradientTrace(0, 4, 1, 500, maps)
    else:
        weights = {"attention_weight": weight, "mlp_weight": weight}
        states = {"input": stream, "middle": stream, "output": -stream, "before": ()}
        last = torch.arange(tokens) % 10 == 9
        inners = {"attention_inner": inner, "mlp_inner": inner}
        trace = BlockTrace(1, 20, 1, **states, **weights, **inners, last=last, sequences=range(200), total=200)
    with Allocations() as made:
        KNOWN[name].observe(trace)
    assert 0 < made.largest < weight.numel() * 4 / 3


# ------------------------------------------------------------------------------------------- input moments


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_what_transformers_feeds_the_output_maps(kind):
    model = tiny(kind)
    found, inputs = statistics_of(model)["input-moments"], inner_inputs(model)
    for index, seen in enumerate(inputs):
        for part, values in seen.items():
            flat, weight = values.flatten(0, 1), output_maps(model, index)[part].weight.double()
            expected = {
                "mean": flat.mean(0),
                "variance": flat.var(0, correction=0),
                "squares": weight.square().sum(0),
                "magnitude": weight.abs().mean(0),
            }
            for name, value in expected.items():
                assert alike(found[f"{part}_{name}"][index], value)


def test_a_variance_far_from_zero_keeps_its_digits():
    """Two windows around 1000, each with a variance of 1: what is within a window is not lost in its mean."""
    inner = 1000 + torch.tensor([[-1.0], [1.0]]).repeat(20, 1)
    last = torch.arange(40) % 20 == 19
    none = torch.zeros(40, 1)
    trace = BlockTrace(0, 1, 1, none, none, none, (), None, inner, None, torch.ones(1, 1), last, range(2), 2)
    found = input_moments.InputMoments().finish(input_moments.InputMoments().observe(trace), 40)
    assert float(found["mlp_variance"]) == pytest.approx(1.0, rel=1e-5)
    assert found["attention_variance"].numel() == 0


def released_by_hand(windows: Sequence[Tensor]) -> Tensor:
    """The published update, one window after the other, with both means being the new one; float64."""
    mean = torch.zeros(windows[0].shape[1], dtype=torch.float64)
    fluctuation = torch.zeros_like(mean)
    for seen, window in enumerate(windows):
        mean = mean * (seen / (seen + 1)) + window.mean(0) / (seen + 1)
        if seen:
            fluctuation = fluctuation * ((seen - 1) / seen) + ((window - mean) ** 2).sum(0) / (seen + 1)
    return fluctuation


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_the_released_fluctuation_is_the_published_loop(rows):
    model = tiny("llama")
    found = statistics_of(model, rows)["running-fluctuation"]
    for index, seen in enumerate(inner_inputs(model)):
        for part, values in seen.items():
            assert alike(found[part][index], released_by_hand(list(values)))


def test_the_released_fluctuation_is_no_variance():
    """The first window counts for nothing but the mean: with two windows, half the second one's spread around it."""
    windows = [torch.tensor([[5.0], [-5.0]]).double(), torch.tensor([[2.0], [0.0]]).double()]
    means = torch.stack([w.mean(0) for w in windows])
    deviations = torch.stack([((w - w.mean(0)) ** 2).sum(0) for w in windows])
    found = input_moments.running_fluctuation(means, deviations, 4)
    assert float(found) == pytest.approx(0.5 * ((2 - 0.5) ** 2 + (0 - 0.5) ** 2))
    assert float(released_by_hand(windows)) == pytest.approx(float(found))
    assert float(torch.cat(windows).var(correction=0)) == pytest.approx(13.25)


# ------------------------------------------------------------------------------------------ wanda-sp, flap: scores


def moments(**quantities: Any) -> Statistics:
    """Return input moments of one block by hand: two heads of two channels, four MLP channels."""
    given = {
        f"{kind}_{name}": quantities.get(f"{kind}_{name}", [1.0] * 4)
        for kind in ("attention", "mlp")
        for name in ("mean", "variance", "squares", "magnitude")
    }
    return Statistics({"input-moments": {name: (torch.tensor(v),) for name, v in given.items()}})


HAND = shape_of(blocks=1, heads=2, channels=4)


def test_wanda_sp_by_hand():
    """Root mean square sqrt(3^2 + 4^2) = 5 times the mean weight; a head is the sum of its channels."""
    found = moments(mlp_mean=[3.0] * 4, mlp_variance=[16.0] * 4, mlp_magnitude=[1.0, 2.0, 3.0, 0.0])
    scores = WandaScores().score(request_of(HAND, statistics=found))
    assert scores.mlp[0].tolist() == pytest.approx([5, 10, 15, 0])
    assert scores.attention[0].tolist() == pytest.approx([2 * math.sqrt(2)] * 2)
    assert not scores.comparable


def test_flap_by_hand():
    """z-scores with the unbiased deviation, of squares in attention; a head is the mean over its channels."""
    found = moments(
        mlp_variance=[1.0, 2.0, 3.0, 4.0],
        attention_variance=[1.0, 1.0, 1.0, 1.0],
        attention_squares=[1.0, 1.0, 3.0, 3.0],
    )
    scores = Fluctuation().score(request_of(HAND, statistics=found))
    deviation = math.sqrt(5 / 3)
    assert scores.mlp[0].tolist() == pytest.approx(
        [-1.5 / deviation, -0.5 / deviation, 0.5 / deviation, 1.5 / deviation]
    )
    assert scores.attention[0].tolist() == pytest.approx([-math.sqrt(3) / 2, math.sqrt(3) / 2])
    assert scores.rule == "undivided"


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [("WIFV", [8.0, 3.0, 2.0, 12.0]), ("IFV", [4.0, 3.0, 1.0, 6.0]), ("WIFN", [4.0, 4.0, 1.0, 5.0])],
)
def test_the_metrics_of_flap(metrics, expected):
    found = moments(
        mlp_mean=[0.0, 1.0, 0.0, math.sqrt(19)],
        mlp_variance=[4.0, 3.0, 1.0, 6.0],
        mlp_squares=[2.0, 1.0, 2.0, 2.0],
        mlp_magnitude=[2.0, 2.0, 1.0, 1.0],
    )
    values = Fluctuation(metrics=metrics).channels(request_of(HAND, statistics=found), "mlp", 0)
    assert values.tolist() == pytest.approx(expected)


def test_flap_as_released_ranks_by_the_released_fluctuation():
    model = tiny("llama-mha")
    pruner, found = pruner_of(model), statistics_of(model)
    scores = pruner.score(Fluctuation(variance="released"))
    raw = found["running-fluctuation"]["mlp"][1] * found["input-moments"]["mlp_squares"][1]
    assert alike(scores.mlp[1], (raw - raw.mean()) / raw.std())
    assert not alike(scores.mlp[1], pruner.score(Fluctuation()).mlp[1], 1e-2)
    assert Fluctuation(metrics="WIFN", variance="released").needs == {"input-moments"}


# ---------------------------------------------------------------------------------------------- flap: structures


def random_scores(shape: ModelShape, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return Scores(
        attention=tuple(torch.randn(b.kv_heads, generator=generator) for b in shape.blocks),
        mlp=tuple(torch.randn(b.channels, generator=generator) for b in shape.blocks),
        rule="undivided",
    )


def plan_of(strategy: Flap, shape: ModelShape, scores: Scores, ratio: float = 0.2) -> PruningPlan:
    return strategy.plan(request_of(shape, ratio, scores=scores))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.3])
def test_one_ranking_cuts_where_the_authors_threshold_does(fraction, seed):
    """Of all units, best first: the threshold is the one where the cumulated cost is nearest to what may stay."""
    shape = shape_of(blocks=3, heads=6, channels=20)
    scores = random_scores(shape, seed)
    values = torch.cat([*scores.attention, *scores.mlp])
    costs = torch.tensor([32.0] * 18 + [12.0] * 60)
    order = values.argsort(descending=True)
    nearest = (costs[order].cumsum(0) - costs.sum() * (1 - fraction)).abs().argmin()
    threshold = values[order][nearest]
    units = [(b, "attention", u) for b in range(3) for u in range(6)]
    units += [(b, "mlp", u) for b in range(3) for u in range(20)]
    expected = {unit for unit, value in zip(units, values, strict=True) if value <= threshold}
    assert gone(plan_of(Flap(fraction=fraction), shape, scores)) == expected


def lowest_of(scores: Sequence[Tensor], kind: str, counts: Sequence[int]) -> set[tuple[int, str, int]]:
    """Return the lowest so many units of each block."""
    return {
        (block, kind, u)
        for block, (values, count) in enumerate(zip(scores, counts, strict=True))
        for u in values.argsort()[:count].tolist()
    }


def lowest_of_all(scores: Sequence[Tensor], kind: str, count: int) -> set[tuple[int, str, int]]:
    units = [(float(v), (block, kind, u)) for block, values in enumerate(scores) for u, v in enumerate(values)]
    return {unit for _, unit in sorted(units)[:count]}


def test_the_same_share_of_every_block():
    """UL-UM: int(0.3 x 6) = 1 head and int(0.3 x 20) = 6 channels."""
    shape = shape_of(blocks=3, heads=6, channels=20)
    scores = random_scores(shape)
    expected = lowest_of(scores.attention, "attention", [1] * 3) | lowest_of(scores.mlp, "mlp", [6] * 3)
    assert gone(plan_of(Flap(structure="UL-UM", fraction=0.3), shape, scores)) == expected


def test_the_same_numbers_in_every_block():
    """UL-MM: 7 // 3 = 2 heads a block, and int((0.3 x (6 x 32 + 20 x 12) - 2 x 32) / 12) = 5 channels."""
    shape = shape_of(blocks=3, heads=6, channels=20)
    scores = random_scores(shape)
    expected = lowest_of(scores.attention, "attention", [2] * 3) | lowest_of(scores.mlp, "mlp", [5] * 3)
    assert gone(plan_of(Flap(structure="UL-MM", fraction=0.3, remove_heads=7), shape, scores)) == expected


def test_a_number_of_heads_and_of_channels_of_all_blocks():
    """AL-MM: 7 heads, and int((0.3 x 3 x (6 x 32 + 20 x 12) - 7 x 32) / 12) = 13 channels."""
    shape = shape_of(blocks=3, heads=6, channels=20)
    scores = random_scores(shape)
    expected = lowest_of_all(scores.attention, "attention", 7) | lowest_of_all(scores.mlp, "mlp", 13)
    assert gone(plan_of(Flap(structure="AL-MM", fraction=0.3, remove_heads=7), shape, scores)) == expected


def test_a_block_keeps_its_best_head_and_its_best_channel():
    shape = shape_of(blocks=2, heads=2, channels=3)
    low = Scores(attention=per_block([[-9, -8], [5, 6]]), mlp=per_block([[-7, -6, -5], [7, 8, 9]]), rule="undivided")
    assert gone(plan_of(Flap(bias=False), shape, low, ratio=0.3)) == {
        (0, "attention", 0),
        (0, "mlp", 0),
        (0, "mlp", 1),
        (1, "attention", 0),
    }


def test_scores_of_other_metrics_are_ranked_by_their_own_rule():
    """Comparable scores by parameter, as remove-units ranks them; and by any other rule that is asked for."""
    shape = shape_of(blocks=3, heads=6, channels=20)
    scores = random_scores(shape)
    comparable = Scores(
        attention=tuple(v.exp() for v in scores.attention), mlp=tuple(v.exp() for v in scores.mlp), comparable=True
    )
    for rule in ("auto", "standardised", "undivided"):
        found = plan_of(Flap(bias=False, rule=rule), shape, comparable)
        expected = global_units(comparable, shape, Budget(shape.parameters, 0.2), range(3), rule, 1, 1)
        assert found == expected


@pytest.mark.parametrize("structure", ["AL-AM", "AL-MM", "UL-MM", "UL-UM"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_ratio_counts_the_biases(structure, bias):
    shape = shape_of(blocks=3, heads=6, channels=20)
    strategy = Flap(structure=structure, bias=bias, remove_heads=6)
    for ratio in (0.2, 0.5, strategy.reach(shape) - 1e-3):
        plan = plan_of(strategy, shape, random_scores(shape), ratio)
        assert plan.ratio >= ratio
        biases = {name for recipe in plan.blocks for name in recipe.own}
        assert biases == ({"attention_output.bias", "down.bias"} if bias else set())
    with pytest.raises(OutOfReach, match=rf"reaches ratios up to {rounded_down(strategy.reach(shape))}"):
        plan_of(strategy, shape, random_scores(shape), strategy.reach(shape) + 1e-3)


def test_settings_that_no_plan_has_are_refused():
    shape, scores = shape_of(), random_scores(shape_of())
    with pytest.raises(FlexiError, match=r"expected a fraction between 0 and 1, found 1\.2"):
        plan_of(Flap(fraction=1.2), shape, scores)
    with pytest.raises(FlexiError, match=r"remove_heads = 3, expected 0\.\.2"):
        plan_of(Flap(structure="AL-MM", fraction=0.5, remove_heads=3), shape, scores)
    with pytest.raises(FlexiError, match=r"remove_heads = 4, expected 0\.\.2"):
        plan_of(Flap(structure="UL-MM", fraction=0.5, remove_heads=4), shape, scores)


# ---------------------------------------------------------------------------------------------------- flap: the bias


def output_mean(model: nn.Module, kind: str, index: int) -> Tensor:
    """Return the mean over the calibration tokens of what a sub-layer of transformers' model adds."""
    seen: list[Tensor] = []
    output_maps(model, index)[kind].register_forward_hook(lambda m, i, o: seen.append(o.flatten(0, 1)))
    logits(model, WINDOWS)
    return seen[0].mean(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_the_bias_keeps_the_mean_of_what_a_sub_layer_adds(kind, part):
    """Whether the map had a bias or not; without compensation the mean is another one."""
    model = tiny(kind)
    pruner = pruner_of(model)
    shape = pruner.checkpoint.shape
    name = {"attention": "attention_output.bias", "mlp": "down.bias"}[part]
    kept = Part(0, (1, 2), None) if part == "attention" else Part(0, None, tuple(range(5, 24)))
    narrowed = BlockRecipe(parts=(kept,), own=(name,))
    plan = change(PruningPlan.identity(shape), {0: narrowed}, origin={"strategy": "flap"})
    planned = pruner.attach(plan)
    assert [n for n, _ in planned.plan.tensors] == [f"blocks.0.{name}"]
    expected = output_mean(copy.deepcopy(model), part, 0)
    assert alike(output_mean(pruner.model(planned), part, 0), expected)
    bare = change(PruningPlan.identity(shape), {0: replace(narrowed, own=())})
    assert not alike(output_mean(pruner.model(bare), part, 0), expected, 1e-2)


def test_the_bias_is_the_weight_times_the_mean_of_what_is_gone():
    model = tiny("llama")
    pruner = pruner_of(model)
    plan = pruner.plan(Fluctuation(), Flap(), 0.2)
    planned = pruner.make(Fluctuation(), Flap(), 0.2)
    assert planned.plan.blocks == plan.blocks
    lost, inputs = gone(plan), inner_inputs(model)
    width = {"attention": 2 * 4, "mlp": 1}  # channels of a KV head with its query heads
    for index, seen in enumerate(inputs):
        for kind, role in (("attention", "attention_output"), ("mlp", "down")):
            units = [u for b, k, u in lost if (b, k) == (index, kind)]
            columns = [u * width[kind] + c for u in sorted(units) for c in range(width[kind])]
            weight = output_maps(model, index)[kind].weight.double()
            expected = weight[:, columns] @ seen[kind].flatten(0, 1).mean(0)[columns]
            found = planned.attached.get(f"blocks.{index}.{role}.bias")
            assert (found is None) == (not units)
            assert found is None or alike(found, expected)
    assert lost


def test_compensation_brings_the_model_closer():
    """With nearly constant inputs of what goes, the compensated model is nearly the original."""
    model = tiny("llama-biases")
    for block in model.model.layers:
        block.mlp.gate_proj.weight.data[:12] = 0  # what enters half the columns of the down map is constant then
        block.mlp.up_proj.weight.data[:12] = 0
    pruner = pruner_of(model)
    kept = tuple(range(12, 24))
    recipes = [BlockRecipe(parts=(Part(i, None, kept),), own=("down.bias",)) for i in range(5)]
    plan = PruningPlan(pruner.checkpoint.shape, tuple(recipes), origin={"strategy": "flap"})
    assert close(logits(pruner.model(plan), WINDOWS), logits(model, WINDOWS), 1e-4)


# ------------------------------------------------------------------------------------------- wanda-sp: in order


def wanda_by_hand(model: nn.Module, fraction: float) -> set[tuple[int, str, int]]:
    """Score a block, silence its lowest units, and only then look at the next one; on transformers' model, float64."""
    model, lost = copy.deepcopy(model).double(), set()
    for index in range(len(model.model.layers)):
        seen = inner_inputs(model)[index]
        for kind, linear in output_maps(model, index).items():
            norm = seen[kind].flatten(0, 1).square().sum(0).sqrt()
            channels = (linear.weight.abs() * norm).mean(0)
            units = model.config.num_key_value_heads if kind == "attention" else len(channels)
            scores = channels.view(units, -1).sum(1)
            for unit in scores.argsort()[: int(fraction * units)].tolist():
                lost.add((index, kind, unit))
                linear.weight.data.view(len(linear.weight), units, -1)[:, unit] = 0
    return lost


@pytest.mark.parametrize("kind", ["llama", "llama-mha", "mistral"])
def test_wanda_sp_scores_each_block_behind_the_narrowed_ones(kind):
    model = tiny(kind)
    pruner = pruner_of(model)
    plan = pruner.plan(WandaScores(), WandaSp(fraction=0.5), 0.5)
    assert gone(plan) == wanda_by_hand(model, 0.5)


def test_a_share_that_no_fraction_takes_is_out_of_reach():
    shape = shape_of()
    reach = WandaSp().reach(shape)
    for excess in (1, round(reach * shape.parameters / 2), round(reach * shape.parameters)):
        fraction = equal_shares.least_fraction(shape, excess)
        assert equal_shares.saved(shape, fraction) >= excess > equal_shares.saved(shape, fraction - 0.001)
    with pytest.raises(OutOfReach, match="equal shares: ratio 1 is out of reach; it goes up to 0"):
        equal_shares.least_fraction(shape, shape.parameters)


def test_one_step_of_wanda_sp_narrows_one_block():
    shape = shape_of(blocks=3, heads=4, channels=8)
    strategy, request = WandaSp(fraction=0.5), request_of(shape, scores=random_scores(shape))
    step = strategy.plan(request)
    assert {block for block, _, _ in gone(step)} == {0}
    assert not strategy.finished(step, request.budget)
    following = replace(request, plan=step, shape=step.new_shape)
    assert {block for block, _, _ in gone(step.compose(strategy.plan(following)))} == {0, 1}
    assert strategy.finished(count_only(shape, strategy, 0.5), request.budget)


def test_a_fraction_of_wanda_sp_is_rounded_down_in_every_block():
    shape = shape_of(blocks=3, heads=4, channels=10)
    plan = count_only(shape, WandaSp(fraction=0.3), 0.5)
    assert [(b.kv_heads, b.channels) for b in plan.new_shape.blocks] == [(3, 7)] * 3
    with pytest.raises(FlexiError, match="removes no unit"):
        count_only(shape, WandaSp(fraction=0.05), 0.5)


# ------------------------------------------------------------------------------------------------ blockpruner


def silence(model: nn.Module, sub_layer: tuple[str, int]) -> nn.Module:
    """Return the model without what one sub-layer adds."""
    kind, index = sub_layer
    model = copy.deepcopy(model)
    for parameter in output_maps(model, index)[{"mha": "attention", "mlp": "mlp"}[kind]].parameters():
        parameter.data.zero_()
    return model


def perplexity(model: nn.Module) -> float:
    """As the authors have it: exp of the mean over sequences of their mean negative log-likelihood."""
    found = logits(model, WINDOWS).double()
    losses = [F.cross_entropy(row[:-1], ids[1:]) for row, ids in zip(found, WINDOWS, strict=True)]
    return math.exp(torch.stack(losses).mean())


def search_by_hand(model: nn.Module, count: int, kinds: Sequence[str] = ("mha", "mlp")) -> list[tuple[str, int]]:
    removed: list[tuple[str, int]] = []
    candidates = [(kind, index) for kind in kinds for index in range(len(model.model.layers))]
    for _ in range(count):
        left = [c for c in candidates if c not in removed]
        best = min(left, key=lambda c: perplexity(silence(model, c)))
        model = silence(model, best)
        removed.append(best)
    return removed


def absent(plan: PruningPlan) -> set[tuple[str, int]]:
    """Return the sub-layers of the original that a plan has not."""
    kept = {r.parts[0].source: plan.block_shape(r) for r in plan.blocks}
    every = range(len(plan.shape.blocks))
    missing = {("mha", i) for i in every if i not in kept or not kept[i].kv_heads}
    return missing | {("mlp", i) for i in every if i not in kept or not kept[i].channels}


@pytest.mark.parametrize("block_type", ["mix", "mha", "mlp"])
def test_blockpruner_is_the_authors_search(block_type):
    model = tiny("llama-biases", num_hidden_layers=4)
    plan = pruner_of(model).plan("none", BlockPruner(block_type, blocks=3), 0.5)
    kinds = ("mha", "mlp") if block_type == "mix" else (block_type,)
    assert absent(plan) == set(search_by_hand(model, 3, kinds))


def preferring(sign: int) -> Callable[..., list[float]]:
    """Return a quality that prefers the plan with the fewest parameters (1), or with the most (-1)."""
    return lambda plans, measure: [float(sign * p.stored_parameters) for p in plans]


def test_a_block_without_both_sub_layers_is_gone_and_one_sub_layer_stays():
    shape = shape_of(blocks=2, heads=2, channels=20)  # an MLP is larger than an attention
    strategy, plan = BlockPruner(blocks=3), PruningPlan.identity(shape)
    sizes = []
    while not strategy.finished(plan, Budget(shape.parameters, 0.5)):
        request = request_of(shape, quality=preferring(1), weights=object())
        plan = plan.compose(strategy.plan(replace(request, plan=plan, shape=plan.new_shape)))
        sizes.append(
            [(r.parts[0].source, plan.block_shape(r).kv_heads, plan.block_shape(r).channels) for r in plan.blocks]
        )
    assert sizes == [[(0, 2, 0), (1, 2, 20)], [(0, 2, 0), (1, 2, 0)], [(1, 2, 0)]]
    with pytest.raises(FlexiError, match=r"blocks = 4, expected 1\.\.3 sub-layers on this model"):
        count_only(shape, BlockPruner(blocks=4), 0.5)


def test_what_blockpruner_reaches_is_met_whatever_goes_first():
    shape = shape_of(blocks=3, heads=2, channels=20)
    for sign in (1, -1):
        strategy, plan = BlockPruner(), PruningPlan.identity(shape)
        budget = Budget(shape.parameters, strategy.reach(shape) - 1e-6)
        while not strategy.finished(plan, budget):
            request = request_of(shape, budget.ratio, quality=preferring(sign), weights=object())
            plan = plan.compose(strategy.plan(replace(request, plan=plan, shape=plan.new_shape)))
        assert budget.met(plan)


def test_statistics_are_named_by_what_they_are():
    assert {GroupTaylor(form).name for form in FORMULAS} == {f"llm-pruner-{form}" for form in FORMULAS}
    assert LlmPruner("param_mix").needs == {"llm-pruner-param_mix"}
