"""The block-level baselines against transformers, autograd, and loops written as the papers and their code have them."""

from __future__ import annotations

import ast
import copy
import importlib.metadata
import itertools
import math
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flexi_baselines import (
    blockpruner,
    laco,
    magnitude,
    mka,
    npib,
    random_order,
    reverse_order,
    shortgpt,
    sleb,
    streamline,
    taylor,
)
from flexi_baselines.last_blocks import merged
from flexi_baselines.sequence_states import SequenceStates
from test_architecture import PUBLIC
from test_baselines_units import MODULES as OF_UNITS
from tiny import close, logits, sharing
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from flexi_plugins.budget import lowest
from flexi_plugins.data import BlockShape, ModelShape, PruningPlan, Statistics
from flexi_plugins.errors import FlexiError, OutOfReach
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.hookspecs import BlockTrace, Budget, PruningRequest
from flexi_plugins.metrics.none import NoMetric
from flexi_plugins.plugins import Plugins
from flexi_plugins.rewrite import build_model
from flexi_plugins.strategies.remove_blocks import RemoveBlocks
from flexi_plugins.testing.bench import TinyPruner
from flexi_plugins.testing.models import tiny_checkpoint

MODULES = (laco, magnitude, mka, random_order, reverse_order, shortgpt, sleb, streamline, taylor)
FOLDER = Path(__file__).parents[1] / "baselines"
SOURCES = sorted((FOLDER / "flexi_baselines").glob("*.py"))
BLOCKS = 6  # of a tiny model
SHAPE = ModelShape((BlockShape(1, 1, 2, 1),) * 2, hidden=2, vocabulary=5, tied=True)


@pytest.mark.flexi(*MODULES)
def test_block_level_baselines_conform(flexi_check):
    flexi_check()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_baselines_import_only_what_is_public(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for package, _, rest in (name.partition(".") for name in names):
            assert package != "flexi_plugins" or rest.split(".")[0] in PUBLIC


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_a_method_can_be_read_in_one_go(path):
    assert path.read_text(encoding="utf-8").count("\n") <= 120


def test_every_module_with_hooks_has_an_entry_point():
    listed = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]["entry-points"]["flexi_plugins"]
    hooked = sorted(f"flexi_baselines.{p.stem}" for p in SOURCES if "@hookimpl" in p.read_text())
    assert sorted(listed.values()) == hooked


def test_every_installed_entry_point_is_checked_here_or_with_the_units():
    installed = importlib.metadata.distribution("flexi-baselines").entry_points.select(group="flexi_plugins")
    checked = [module.__name__ for module in (*MODULES, *OF_UNITS)]
    assert sorted(point.value for point in installed) == sorted(checked)


# ------------------------------------------------------------------------------------------------- helpers


def pruner(kind: str = "llama-gqa-tied") -> TinyPruner:
    plugins = Plugins.load()
    for module in MODULES:
        if not plugins.manager.is_registered(module):
            plugins.add(module)
    return TinyPruner(tiny_checkpoint(kind), plugins)


@pytest.fixture(scope="module")
def own() -> TinyPruner:
    return pruner()


def dense(own: TinyPruner) -> nn.Module:
    """Return the model as transformers has it; whoever gets it may change it."""
    return copy.deepcopy(build_model(PruningPlan.identity(own.checkpoint.shape), own.checkpoint))


def streams(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Return the residual stream in front of each block and behind the last, (windows, tokens, hidden), in float64."""
    model, seen = copy.deepcopy(model).double(), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    model.model.layers[-1].register_forward_hook(lambda _, args, output: seen.append(output))
    logits(model, ids)
    return seen


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a, b, dim=-1, eps=0)


def kept(plan: PruningPlan) -> list[int | None]:
    return [recipe.whole for recipe in plan.blocks]


def outside(first: int, count: int) -> list[int]:
    return [i for i in range(BLOCKS) if not first <= i < first + count]


def ratio_of(own: TinyPruner, blocks: float) -> float:
    """Return the share of the parameters that so many blocks have."""
    shape = own.checkpoint.shape
    return blocks * shape.block_parameters(shape.blocks[0]) / shape.parameters


def request_on(plan: PruningPlan, **changes) -> PruningRequest:
    return PruningRequest(plan.new_shape, plan, Budget(plan.shape.parameters, 0.2), **changes)


# ------------------------------------------------------------------------------------------------ ShortGPT


def test_shortgpt_removes_the_blocks_of_lowest_influence(own):
    found = streams(dense(own), own.texts[0])
    influence = [float(1 - cosine(a, b).mean()) for a, b in itertools.pairwise(found)]
    assert own.score(shortgpt.ShortGPT()).block.tolist() == pytest.approx(influence, rel=1e-4)
    plan = own.plan(shortgpt.ShortGPT(), RemoveBlocks(blocks=2), 0.0)
    assert kept(plan) == sorted(sorted(range(BLOCKS), key=influence.__getitem__)[2:])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shortgpt_angular_removes_the_run_that_turns_last_tokens_least(own, count):
    last = [s[:, -1] for s in streams(dense(own), own.texts[0])]
    angles = [float(torch.arccos(cosine(last[i], last[i + count])).mean()) for i in range(BLOCKS - count + 1)]
    best = outside(angles.index(min(angles)), count)
    metric = shortgpt.ShortGPT(measure="angular", n_prune_layers=count)
    assert float(own.score(metric).block.min()) == pytest.approx(min(angles) / math.pi, rel=1e-4)
    assert kept(own.plan(metric, RemoveBlocks(blocks=count), 0.0)) == best
    by_ratio = own.plan(shortgpt.ShortGPT(measure="angular"), RemoveBlocks(), ratio_of(own, count - 0.5))
    assert kept(by_ratio) == best


def test_a_block_scores_as_the_closest_run_that_it_is_in():
    angles = [torch.tensor(a) for a in ([9.0], [0.3, 9.0], [9.0, 0.1, 9.0], [9.0, 9.0, 0.2, 9.0])]
    assert shortgpt.closest(angles, 2).tolist() == pytest.approx([0.3, 0.1, 0.1, 0.2])
    assert shortgpt.closest(angles, 1).tolist() == pytest.approx([9, 9, 9, 9])


def test_shortgpt_angular_asks_for_the_length_of_the_run_where_no_ratio_says_it(own):
    with pytest.raises(FlexiError, match="set n_prune_layers"):
        own.plan(shortgpt.ShortGPT(measure="angular"), RemoveBlocks(blocks=2), 0.0)


# ------------------------------------------------------------------------------------------------ controls


@pytest.mark.parametrize("progressive", [False, True])
def test_reverse_order_removes_from_the_end(own, progressive):
    def left(count, *retain_layer):
        metric = reverse_order.ReverseOrder(retain_layer=retain_layer)
        return kept(own.plan(metric, RemoveBlocks(blocks=count, progressive=progressive), 0.0))

    assert left(2) == [0, 1, 2, 3]
    assert left(2, 5) == [0, 1, 2, 5]
    assert left(5, 5, 1) == [1]  # nothing else was left, and 5 was named first
    with pytest.raises(FlexiError, match=r"retain_layer names block 6, expected blocks in 0\.\.5"):
        left(2, 6)


def test_random_order_depends_on_the_seed_and_on_the_model_so_far():
    shape = ModelShape((BlockShape(4, 2, 4, 8),) * BLOCKS, hidden=16, vocabulary=5, tied=True)
    plan = PruningPlan.identity(shape)
    drawn = [random_order.RandomOrder().score(request_on(plan, seed=s)).block for s in range(100)]
    assert {int(scores.argmin()) for scores in drawn} == set(range(BLOCKS))
    again = random_order.RandomOrder().score(request_on(plan, seed=7)).block
    assert torch.equal(again, drawn[7])
    step = random_order.RandomOrder().score(request_on(PruningPlan.keep(shape, range(5)), seed=7)).block
    assert not torch.equal(step, drawn[7][:5])


# ------------------------------------------------------------------------------------------------ magnitude


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, 26),  # four maps of 2 x 2, gate and up of 1 x 2, down of 2 x 1, two norms of 2, all entries alike
        ({"weight_reduction": "mean"}, 15),  # rows have two entries, those of down and of the norms one
        ({"weight_reduction": "max"}, 15),
        ({"block_reduction": "mean"}, 26 / 9),
        ({"block_reduction": "max"}, 4),
        ({"weight_reduction": "max", "block_reduction": "max"}, 2),
    ],
)
def test_magnitude_by_hand(options, factor):
    values = (-2.0, 3.0)
    weights = SimpleNamespace(
        block=lambda i: {role: torch.full(size, values[i]) for role, size in SHAPE.maps(SHAPE.blocks[i]).items()},
        vectors=lambda i: {n: torch.full((size,), values[i]) for n, size in SHAPE.vectors(SHAPE.blocks[i]).items()},
        cached=lambda key, make: make(),
    )
    request = request_on(PruningPlan.identity(SHAPE), weights=weights)
    for power in (1, 2):
        scores = magnitude.Magnitude(norm_power=power, **options).score(request).block
        assert scores.tolist() == pytest.approx([factor * abs(v) ** power for v in values])


def test_magnitude_is_the_norm_of_a_blocks_maps_and_norms(own):
    norms = [sum(float(p.abs().sum()) for p in block.parameters()) for block in dense(own).model.layers]
    assert own.score(magnitude.Magnitude()).block.tolist() == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama-gqa-tied", "qwen3"])
def test_a_compensated_model_is_scored_as_if_its_gains_were_folded_into_its_weights(kind, tmp_path):
    pruner = TinyPruner(tiny_checkpoint(kind), Plugins.load())
    plan = PruningPlan.keep(pruner.checkpoint.shape, (0, 2, 3, 5))
    recipes = [replace(r, gain=g) for r, g in zip(plan.blocks, (1.0, 1.5, 1.0, 0.7), strict=True)]
    plan = PruningPlan(plan.shape, tuple(recipes))
    pruner.write(plan, tmp_path / "folded")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.float32).requires_grad_(False)
    for power in (1, 2):
        found = pruner.score(magnitude.Magnitude(norm_power=power), Planned(plan)).block.tolist()
        norms = [
            sum(float(p.abs().pow(power).sum()) for n, p in block.named_parameters() if not n.endswith("bias"))
            for block in folded.model.layers
        ]
        assert found == pytest.approx(norms, rel=1e-5)


def test_plus_keeps_the_first_four_and_the_last_two_blocks():
    scores = torch.tensor([1.0, 0, 2, 3, 500, 300, 400, 5, 4])
    raised = magnitude.ends_raised(scores)
    assert lowest(raised, 3, range(9)) == [4, 5, 6]
    assert lowest(raised, 5, range(9)) == [0, 1, 4, 5, 6]  # then their own order
    assert lowest(magnitude.ends_raised(torch.ones(9)), 3, range(9)) == [4, 5, 6]


# ------------------------------------------------------------------------------------------------ Taylor


def released_taylor(model: nn.Module, samples: Tensor, power: int, weights: str, blocks: str) -> list[float]:
    """Score blocks as the released code does: one backward pass of the batch's mean loss, all tensors named weight."""
    model.requires_grad_(True)
    with torch.enable_grad():
        model(input_ids=samples, labels=samples, use_cache=False).loss.backward()
    scores = []
    for layer in model.model.layers:
        terms = [(p * p.grad).detach().abs() ** power for n, p in layer.named_parameters() if "weight" in n]
        found = [getattr(t.sum(1) if t.dim() == 2 else t, weights)() for t in terms]
        scores.append(float(getattr(torch.stack(found), blocks)()))
    return scores


@pytest.mark.parametrize("kind", ["llama-gqa-tied", "llama-bias", "mistral"])
def test_taylor_is_the_released_codes_score(kind):
    """The norms' gradients as well, which are had from the maps behind them."""
    own = pruner(kind)
    for power in (1, 2):
        for weights, blocks in (("sum", "sum"), ("mean", "sum"), ("max", "mean"), ("sum", "max")):
            expected = released_taylor(dense(own), own.texts[1], power, weights, blocks)
            metric = taylor.Taylor(norm_power=power, weight_reduction=weights, block_reduction=blocks)
            assert own.score(metric).block.tolist() == pytest.approx(expected, rel=1e-3)


def test_taylor_by_hand_takes_the_mean_gradient():
    """Gradients that cancel between samples leave nothing; their sizes would have added up."""
    x, dy = torch.tensor([[[1.0, 2.0]], [[1.0, 2.0]]]), torch.tensor([[[3.0]], [[-1.0]]])  # two samples of one token
    trace = SimpleNamespace(input=x, output_gradient=dy, weight=torch.tensor([[5.0, -7.0]]))
    absolute, squared, columns = taylor.term_sums(trace)  # g = (1, 2), w g = (5, -14)
    assert (absolute.tolist(), squared.tolist(), columns.tolist()) == ([19.0], [221.0], [5.0, -14.0])


# ------------------------------------------------------------------------------------------------ SLEB


def without(model: nn.Module, gone: list[int]) -> nn.Module:
    model = copy.deepcopy(model)
    model.model.layers = nn.ModuleList(layer for i, layer in enumerate(model.model.layers) if i not in gone)
    return model


def loss(model: nn.Module, ids: Tensor) -> float:
    return float(F.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def test_sleb_scores_the_loss_without_each_block_between_the_barriers(own):
    scores = own.score(sleb.Sleb()).block
    expected = [loss(without(dense(own), [i]), own.texts[0]) for i in range(1, BLOCKS - 1)]
    assert scores[1:-1].tolist() == pytest.approx(expected, rel=1e-5)
    assert min(scores[0], scores[-1]) > scores[1:-1].max()
    wide = own.score(sleb.Sleb(early_barrier=0, latter_barrier=3)).block
    assert wide[:3].tolist() == pytest.approx([loss(without(dense(own), [0]), own.texts[0]), *expected[:2]], rel=1e-5)
    assert wide[3:].min() > wide[:3].max()


def test_sleb_with_progressive_removal_is_the_papers_greedy_loop(own):
    model, gone = dense(own), []
    for _ in range(3):
        alive = [i for i in range(BLOCKS) if i not in gone]
        gone.append(min(alive[1:-1], key=lambda i: loss(without(model, [*gone, i]), own.texts[0])))
    plan = own.plan(sleb.Sleb(), RemoveBlocks(blocks=3, progressive=True), 0.0)
    assert kept(plan) == [i for i in range(BLOCKS) if i not in gone]


def test_sleb_does_not_try_a_block_whose_weights_another_runs_with(own):
    plan = sharing(own.checkpoint.shape, {4: 2})
    scores = sleb.Sleb().score(request_on(plan, quality=lambda plans, measure: [1.0] * len(plans))).block
    assert scores.tolist() == [2, 1, 2, 1, 1, 2]


@pytest.mark.parametrize(
    ("barriers", "wrong"), [((3, 3), "found none of 6; lower the barriers"), ((-1, 1), "0 or more")]
)
def test_sleb_says_where_no_block_may_be_tried(own, barriers, wrong):
    request = request_on(PruningPlan.identity(own.checkpoint.shape), quality=lambda plans, *_: [1.0] * len(plans))
    with pytest.raises(FlexiError, match=rf"sleb: early_barrier = -?\d, .*{wrong}"):
        sleb.Sleb(*barriers).score(request)


def test_methods_that_choose_by_loss_end_where_every_choice_breaks_the_model(own):
    request = request_on(PruningPlan.identity(own.checkpoint.shape), quality=lambda plans, *_: [math.inf] * len(plans))
    with pytest.raises(FlexiError, match="sleb: any block that goes leaves a model that breaks down"):
        sleb.Sleb().score(request)
    request = replace(request, budget=Budget(own.checkpoint.shape.parameters, 0.05), weights=own.checkpoint)
    with pytest.raises(FlexiError, match="blockpruner: any sub-layer that goes leaves a model that breaks down"):
        blockpruner.BlockPruner().plan(request)
    with pytest.raises(OutOfReach, match=r"laco: ratio 0\.05 is out of reach; it reaches up to 0\.0000"):
        laco.LaCo().plan(request)


# ------------------------------------------------------------------------------------------- LLM-Streamline


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("protect", [0, 1])
def test_llm_streamline_removes_the_run_whose_ends_are_most_alike(own, count, protect):
    found = streams(dense(own), own.texts[0])
    starts = range(protect, BLOCKS - count + 1 - protect)
    best = max(starts, key=lambda i: float(cosine(found[i], found[i + count]).mean()))
    strategy = streamline.LlmStreamline(blocks=count, protect_first=protect, protect_last=protect)
    assert kept(own.plan(NoMetric(), strategy, 0.0)) == outside(best, count)
    by_ratio = streamline.LlmStreamline(protect_first=protect, protect_last=protect)
    assert kept(own.plan(NoMetric(), by_ratio, ratio_of(own, count - 0.5))) == outside(best, count)


@pytest.mark.parametrize("protect_last", [0, 1])
def test_llm_streamline_makes_up_for_the_run_with_one_alpha(own, protect_last):
    strategy = streamline.LlmStreamline(blocks=2, protect_first=1, protect_last=protect_last)
    plain = own.plan(NoMetric(), strategy, 0.0)
    plan = own.plan(NoMetric(), replace(strategy, compensate=True), 0.0)
    assert [r.sources for r in plan.blocks] == [r.sources for r in plain.blocks]
    first = next((i for i, source in enumerate(kept(plain)) if i != source), BLOCKS - 2)
    found = [s.view(*own.texts[0].shape, -1).abs().mean(1) for s in streams(dense(own), own.texts[0])]
    alpha = float((found[first + 2] / found[first]).mean(0).mean())
    expected = [alpha if i == first else 1.0 for i in range(BLOCKS - 2)]
    assert [r.gain for r in plan.blocks] == pytest.approx(expected, rel=1e-4)


def test_a_run_at_the_end_of_the_model_needs_no_alpha(own):
    shape = own.checkpoint.shape
    distance = [torch.arange(i + 1.0).flip(0) if i == BLOCKS - 1 else torch.ones(i + 1) * 9 for i in range(BLOCKS)]
    statistics = {"run-distance": {"distance": distance}}
    request = request_on(PruningPlan.identity(shape), statistics=statistics, weights=own.checkpoint)
    plan = streamline.LlmStreamline(blocks=2, compensate=True).plan(request)
    assert kept(plan) == [0, 1, 2, 3]
    assert all(r.gain == 1 for r in plan.blocks)


def test_llm_streamline_names_the_runs_that_there_are(own):
    with pytest.raises(FlexiError, match=r"blocks = 5, expected 1\.\.4 on this model"):
        own.plan(NoMetric(), streamline.LlmStreamline(blocks=5, protect_first=2), 0.0)


# ------------------------------------------------------------------------------------------------ LaCo


def collapsed(own: TinyPruner, options: dict, threshold: float, needed: int = BLOCKS) -> nn.Module:
    """Return what the authors' loop makes of transformers' model, until so many blocks are gone."""
    current, ids = dense(own), own.texts[0]
    target = streams(current, ids)[-1]
    block = BLOCKS - 1 - options["C"]
    while block >= 0 and (gone := BLOCKS - len(current.model.layers)) < needed:
        layers = current.model.layers
        count = min(options["C"] - 1, len(layers) - block - 1, needed - gone)
        trial = copy.deepcopy(current)
        for name, parameter in trial.model.layers[block].named_parameters():
            if "proj" in name:
                first = layers[block].get_parameter(name)
                for later in layers[block + 1 : block + 1 + count]:
                    subtracted = parameter.data.clone() if options["merge"] == "notebook" else first
                    parameter.data = parameter.data + (later.get_parameter(name) - subtracted)
        del trial.model.layers[block + 1 : block + 1 + count]
        if float(cosine(streams(trial, ids)[-1], target).mean()) > threshold:
            current, block = trial, block - options["I"]
        else:
            block -= 1
    return current


def expect_same(own: TinyPruner, plan: PruningPlan, expected: nn.Module) -> None:
    assert len(plan.blocks) == len(expected.model.layers)
    ids = own.texts[0]
    assert close(logits(build_model(plan, own.checkpoint), ids), logits(expected, ids), 1e-3)


@pytest.mark.parametrize("merge", ["published", "notebook"])
@pytest.mark.parametrize(("size", "interval"), [(2, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("threshold", [-1.0, 0.4, 0.7, 0.9])
def test_laco_is_the_authors_loop(own, merge, size, interval, threshold):
    options = {"C": size, "I": interval, "merge": merge}
    plan = own.plan(NoMetric(), laco.LaCo(T=threshold, **options), 0.05)
    expect_same(own, plan, collapsed(own, options, threshold))


def test_laco_merges_by_its_formula_and_keeps_the_first_blocks_norms(own):
    """theta_l + (theta_l+1 - theta_l) + (theta_l+2 - theta_l); in place, only the last block's maps are left."""
    blocks = dense(own).model.layers
    for merge in ("published", "notebook"):
        plan = own.plan(NoMetric(), laco.LaCo(C=3, I=9, T=-1.0, merge=merge), 0.05)
        model = build_model(plan, own.checkpoint)
        assert kept(plan) == [0, 1, None, 5]
        first, second, third = (b.mlp.up_proj.weight for b in blocks[2:5])
        expected = second + third - first if merge == "published" else third
        assert close(model.model.layers[2].mlp.up_proj.weight, expected)
        assert torch.equal(model.model.layers[2].input_layernorm.weight, blocks[2].input_layernorm.weight)


@pytest.mark.parametrize("method", ["laco", "mka"])
def test_biases_of_merged_maps_are_merged_with_them(method):
    own = pruner("llama-bias")
    if method == "laco":
        plan = own.plan(NoMetric(), laco.LaCo(C=3, I=9, T=-1.0), 0.05)
    else:
        plan = merged(own.checkpoint.shape, [0.7, 0.4])
    model, blocks = build_model(plan, own.checkpoint), dense(own).model.layers
    [(position, mix)] = [(i, recipe.mix) for i, recipe in enumerate(plan.blocks) if recipe.mix]
    layer = model.model.layers[position]
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        for kind in ("weight", "bias"):
            expected = sum(share * blocks[i].get_parameter(f"{name}.{kind}") for i, share in mix)
            assert close(layer.get_parameter(f"{name}.{kind}"), expected), f"{name}.{kind}"


@pytest.mark.parametrize("merge", ["published", "notebook"])
def test_laco_meets_a_ratio_by_the_largest_threshold(own, merge):
    options = {"C": 3, "I": 1, "merge": merge}
    plan = own.plan(NoMetric(), laco.LaCo(**options), ratio_of(own, 2.5))
    note = plan.origin["notes"][0]
    threshold = float(note.removeprefix("T = "))
    expect_same(own, plan, collapsed(own, options, threshold - 1e-4, needed=3))
    assert len(plan.blocks) == BLOCKS - 3
    assert len(collapsed(own, options, threshold + 1e-4, needed=3).model.layers) > BLOCKS - 3


def test_laco_merges_the_pair_that_changes_the_output_least_where_one_is_enough(own):
    model, ids = dense(own), own.texts[0]
    target = streams(model, ids)[-1]
    swapped = []
    for i in range(4):  # two blocks become the second one's maps with the first one's norms
        trial = copy.deepcopy(model)
        for name, parameter in trial.model.layers[i].named_parameters():
            parameter.data = model.model.layers[i + ("proj" in name)].get_parameter(name).data
        del trial.model.layers[i + 1]
        swapped.append(float(cosine(streams(trial, ids)[-1], target).mean()))
    plan = own.plan(NoMetric(), laco.LaCo(C=2, I=1), ratio_of(own, 0.5))
    assert kept(plan).index(None) == swapped.index(max(swapped))


@pytest.mark.parametrize("wrong", [{"C": 1}, {"I": 0}, {"L": -1}, {"H": BLOCKS}, {"H": 3}])
def test_laco_refuses_a_walk_that_the_model_has_not(own, wrong):
    with pytest.raises(FlexiError, match="on a model of 6 blocks; expected C of 2 or more"):
        own.plan(NoMetric(), laco.LaCo(**wrong), 0.1)


# ------------------------------------------------------------------------------------------------ MKA


def points_of(seed: int, rows: int = 12, columns: int = 5) -> Tensor:
    return 3 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_diffusion_embedding_is_the_released_codes():
    x = points_of(0).numpy()
    kernel = np.exp(-((np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1)) / 8) ** 0.5))
    p = kernel.sum(0)
    normed = kernel / (p * p.reshape(-1, 1)) ** 0.5
    v = np.sqrt(normed.sum(0))
    vectors = np.linalg.svd(normed / np.outer(v, v))[0]
    expected = vectors[:, 1:3] / vectors[:, :1]
    found = npib.embedded(torch.tensor(x), 8.0, 0.5).numpy()
    assert np.allclose(found, expected * np.sign((found * expected).sum(0)), rtol=1e-6)


def test_ranks_and_entropies_by_hand():
    assert npib.ranked(torch.tensor([[0.3, -1.0], [0.1, 5.0], [0.2, 0.0]])).tolist() == [
        [2 / 3, 0],
        [0, 2 / 3],
        [1 / 3] * 2,
    ]
    points = torch.tensor(
        [[0.0, 0.0], [0.0, 1.0], [0.0, 3.0]], dtype=torch.float64
    )  # nearest: 1, 1, 2; second: 3, 2, 3
    assert npib.entropy(points, 1) == pytest.approx(math.log(3) + 2 / 3 * math.log(2))
    assert npib.entropy(points, 2) == pytest.approx(-math.log(2 / 3) + 2 / 3 * math.log(3 * 2 * 3))


def test_npib_is_mutual_information_over_the_root_of_entropies():
    from sklearn.feature_selection import mutual_info_regression

    first, second = npib.ranked(points_of(1, 20, 2)), npib.ranked(points_of(2, 20, 2))
    shared = [
        mutual_info_regression(first.numpy(), second[:, a].numpy(), n_neighbors=3, random_state=5) for a in (0, 1)
    ]
    expected = np.mean(shared) / math.sqrt(abs(npib.entropy(first, 4) * npib.entropy(second, 4)))
    found = npib.npib([first, second], 3, 4, seed=5)
    assert [float(found[0, 1]), float(found[1, 0])] == pytest.approx([expected] * 2)
    assert found[0, 0] > found[0, 1]


def test_sequence_states_are_those_of_each_sequences_last_token(own):
    identity = Planned(PruningPlan.identity(own.checkpoint.shape))
    found = own.calibrator.statistics(identity, ["sequence-states"])["sequence-states"]
    for block, stream in enumerate(streams(dense(own), own.texts[0])[:-1]):
        assert close(found["last"][block].double(), stream[:, -1])
        assert close(found["released"][block].double(), stream[0, : len(stream)])  # 8 sequences, worked on at once


def test_released_states_are_first_tokens_of_the_first_of_each_group_of_sequences():
    """202 sequences go two by two: of every second one the first two tokens."""
    stream = torch.arange(202.0 * 3)[:, None]  # three tokens a sequence
    last = torch.tensor([False, False, True]).repeat(202)
    nothing = {"attention_inner": None, "mlp_inner": None, "attention_weight": None, "mlp_weight": None}
    states = {"input": stream, "middle": stream, "output": stream, "before": (), "last": last}
    found = SequenceStates().observe(BlockTrace(0, 1, 1, **states, **nothing, sequences=range(202), total=202))
    assert found["released"][:6, 0].tolist() == [0, 1, 6, 7, 12, 13]
    assert found["last"][:3, 0].tolist() == [2, 5, 8]


def test_mka_merges_the_last_two_blocks_again_and_again(own, monkeypatch):
    similarity = torch.rand(BLOCKS, BLOCKS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(mka, "npib", lambda *_: similarity)
    mean = similarity.mean(1).tolist()

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    last, before = (sigmoid(mean[i] / (mean[i] + mean[i + 1])) for i in (4, 3))
    plan = own.plan(NoMetric(), mka.Mka(merges=2), 0.0)
    assert kept(plan) == [0, 1, 2, None]
    mix, norms = plan.blocks[-1].mix, plan.blocks[-1].norms
    assert ([s for s, _ in mix], norms) == ([3, 4, 5], ((3, 1.0),))
    assert [c for _, c in mix] == pytest.approx([before, (1 - before) * last, (1 - before) * (1 - last)])
    rows = len(own.texts[0])
    lowered = f"n_neighbors = {min(5, rows - 1)} and k_entropy = {rows - 1}, for there are {rows} calibration sequences"
    assert lowered in plan.origin["notes"]
    paper = own.plan(NoMetric(), mka.Mka(merges=1, share="paper"), 0.0)
    assert [c for _, c in paper.blocks[-1].mix] == pytest.approx([float(similarity[4, 5]), 1 - float(similarity[4, 5])])


def test_mka_makes_the_model_that_merging_weights_step_by_step_makes(own):
    plan = own.plan(NoMetric(), mka.Mka(), ratio_of(own, 2.5))
    note = plan.origin["notes"][0]
    shares = [float(s) for s in note.removeprefix("shares of the earlier block: ").split(", ")]
    assert len(shares) == 3
    assert all(0.5 < s < 0.732 for s in shares)  # sigmoids of what lies between 0 and 1
    model = dense(own)
    for share in shares:
        *_, earlier, later = model.model.layers
        for name, parameter in earlier.named_parameters():
            if "proj" in name:
                parameter.data = share * parameter.data + (1 - share) * later.get_parameter(name).data
        del model.model.layers[-1]
    expect_same(own, plan, model)


def test_mka_can_compare_the_merged_models_blocks_before_each_merge(own):
    once, twice = (own.plan(NoMetric(), mka.Mka(merges=n, progressive=True), 0.0) for n in (1, 2))
    assert twice.origin["notes"][0] == once.origin["notes"][0]
    assert sum(note.startswith("shares") for note in twice.origin["notes"]) == 2
    assert twice.blocks[-1].sources == (3, 4, 5)
    assert sum(c for _, c in twice.blocks[-1].mix) == pytest.approx(1)


def test_mka_stops_at_blocks_of_another_kind():
    mixed = pruner("qwen2-mixed")
    assert mka.Mka().reach(mixed.checkpoint.shape) == pytest.approx(ratio_of(mixed, 1))
    with pytest.raises(FlexiError, match=r"merges = 2, expected 1\.\.1 on this model"):
        mixed.plan(NoMetric(), mka.Mka(merges=2), 0.0)


def test_mka_asks_for_enough_sequences():
    states = {"last": (torch.zeros(3, 2),) * 2}
    request = request_on(
        PruningPlan.identity(SHAPE), statistics=Statistics({"sequence-states": states}), weights=SimpleNamespace()
    )
    with pytest.raises(FlexiError, match="3 calibration sequences, expected 4 or more; set calibration windows"):
        mka.Mka(merges=1).plan(request)
