"""Statistics and metrics against direct computations: float64, transformers' own model, forward hooks and autograd."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from tiny import change, opened, tiny, tokens
from torch import Tensor, nn

from flexi_plugins.calibration import Calibrator
from flexi_plugins.data import BlockRecipe, ModelShape, Part, PruningPlan, Scores, Statistics
from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.hookspecs import BlockTrace, Budget, GradientTrace, LinearTrace, PruningRequest
from flexi_plugins.metrics.come import CoMe, PairAngle, Sensitivity
from flexi_plugins.metrics.flexigpt import BlockInfluence, FlexiGPT, LeaveOneOut
from flexi_plugins.metrics.saap import Saap, Taylor, noise
from flexi_plugins.numerics import one_minus_cosine, row_distance, standardise

KINDS = ("llama", "qwen2", "llama-biases")
KNOWN = {s.name: s for s in (BlockInfluence(), LeaveOneOut(), Sensitivity(), PairAngle(), Taylor())}
WINDOWS, SAMPLES = tokens(6, 10), tokens(3, 8, seed=1)  # two batches of different size
HEADS, KV_HEADS, HEAD_DIM, CHANNELS = 8, 4, 4, 24
METRICS = (FlexiGPT(), CoMe(), Saap())


def calibrator(model: nn.Module) -> Calibrator:
    return Calibrator(Blocks(opened(model)), WINDOWS, SAMPLES, KNOWN)


def measured(model: nn.Module, names: Sequence[str] = tuple(KNOWN)) -> Statistics:
    return calibrator(model).statistics(Planned(PruningPlan.identity(opened(model).shape)), names)


def request(shape: ModelShape, statistics: Statistics) -> PruningRequest:
    plan = PruningPlan.identity(shape)
    return PruningRequest(shape, plan, Budget(shape.parameters, 0.5), statistics)


def scores(model: nn.Module, metric: FlexiGPT | CoMe | Saap) -> Scores:
    shape = opened(model).shape
    found = metric.score(request(shape, measured(model, sorted(metric.needs))))
    return found.check(metric.name, shape)


def agree(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance * 1e-3)


# ------------------------------------------------------------------------------- the direct computation


@dataclass
class Seen:
    """What one block of transformers' model did, (tokens, ...) in float64."""

    input: Tensor
    middle: Tensor
    output: Tensor
    attention_inner: Tensor
    mlp_inner: Tensor


def watch(model: nn.Module, ids: Tensor = WINDOWS) -> list[Seen]:
    """Run transformers' own model in float64 with forward hooks on its modules."""
    model = copy.deepcopy(model).double()
    seen: dict[tuple[int, str], Tensor] = {}
    for i, layer in enumerate(model.model.layers):

        def note(name: str, i: int = i):
            return lambda _, inputs: seen.__setitem__((i, name), inputs[0].flatten(0, 1))

        layer.register_forward_pre_hook(note("input"))
        layer.post_attention_layernorm.register_forward_pre_hook(note("middle"))
        layer.self_attn.o_proj.register_forward_pre_hook(note("attention_inner"))
        layer.mlp.down_proj.register_forward_pre_hook(note("mlp_inner"))
        layer.register_forward_hook(
            lambda _, inputs, output, i=i: seen.__setitem__(
                (i, "output"), (output[0] if isinstance(output, tuple) else output).flatten(0, 1)
            )
        )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    names = ("input", "middle", "output", "attention_inner", "mlp_inner")
    return [Seen(**{n: seen[i, n] for n in names}) for i in range(len(model.model.layers))]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def columns(kv_head: int) -> list[int]:
    """Columns of the attention output map that belong to a KV head: query head h goes with KV head h // group."""
    mine = [h for h in range(HEADS) if h // (HEADS // KV_HEADS) == kv_head]
    return [h * HEAD_DIM + d for h in mine for d in range(HEAD_DIM)]


# --------------------------------------------------------------------------------- forward statistics


@pytest.mark.parametrize("kind", KINDS)
def test_block_influence(kind: str) -> None:
    model = tiny(kind)
    found = measured(model, ["block-influence"])["block-influence"]
    seen = watch(model)
    direct = [1 - cosine(s.input, s.output) for s in seen]
    agree(torch.stack(found["influence"]), torch.stack([d.mean() for d in direct]))
    agree(torch.stack(found["clamped"]), torch.stack([d.clamp(0, 1).mean() for d in direct]))
    normed = copy.deepcopy(model).double().model.norm(seen[-1].output)
    after = (1 - cosine(seen[-1].input, normed)).mean()
    assert abs(float(found["influence"][-1]) - float(after)) > 1e-3, "the last block's output is before the final norm"


@pytest.mark.parametrize("kind", KINDS)
def test_pair_angle(kind: str) -> None:
    model = tiny(kind)
    found = measured(model, ["pair-angle"])["pair-angle"]
    assert float(found["all"][0]) == float(found["last"][0]) == 0
    for i, (before, after) in enumerate(itertools.pairwise(watch(model)), start=1):
        angle = torch.arccos(cosine(before.input, after.output).clamp(0, 1)) / math.pi
        agree(found["all"][i], angle.mean())
        agree(found["last"][i], angle.view(WINDOWS.shape)[:, -1].mean())


@pytest.mark.parametrize("kind", KINDS)
def test_sensitivity(kind: str) -> None:
    model = tiny(kind)
    found = measured(model, ["sensitivity"])["sensitivity"]
    relative = scores(model, CoMe())
    for i, (layer, seen) in enumerate(zip(model.model.layers, watch(model), strict=True)):
        attention = seen.attention_inner.abs().mean(0) * layer.self_attn.o_proj.weight.double().abs().sum(0)
        mlp = seen.mlp_inner.abs().mean(0) * layer.mlp.down_proj.weight.double().abs().sum(0)
        agree(found["attention"][i], attention)
        agree(found["mlp"][i], mlp)
        middle, output = seen.middle.abs().sum(1).mean(), seen.output.abs().sum(1).mean()
        agree(found["attention_residual"][i], middle)
        agree(found["mlp_residual"][i], output)
        heads = torch.stack([attention[columns(k)].sum() for k in range(KV_HEADS)])
        agree(relative.attention[i], heads / middle)
        agree(relative.mlp[i], mlp / output)


@pytest.mark.parametrize("kind", KINDS)
def test_leave_one_out(kind: str) -> None:
    model = tiny(kind)
    found = measured(model, ["leave-one-out"])["leave-one-out"]
    for i, (layer, seen) in enumerate(zip(model.model.layers, watch(model), strict=True)):
        out, down = layer.self_attn.o_proj.weight.double(), layer.mlp.down_proj.weight.double()
        for k in range(KV_HEADS):
            v = seen.attention_inner[:, columns(k)] @ out[:, columns(k)].T
            agree(found["attention"][i][k], (1 - cosine(seen.middle, seen.middle - v)).mean(), 5e-4)
        for c in range(CHANNELS):
            v = seen.mlp_inner[:, c : c + 1] * down[:, c]
            agree(found["mlp"][i][c], (1 - cosine(seen.output, seen.output - v)).mean(), 5e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_a_kv_head_out_is_silencing_its_values(kind: str) -> None:
    """No assumption about which query heads go with a KV head: transformers' model decides."""
    model = tiny(kind)
    found = measured(model, ["leave-one-out"])["leave-one-out"]
    whole = watch(model)[2].middle
    for k in range(KV_HEADS):
        silent = copy.deepcopy(model)
        values = silent.model.layers[2].self_attn.v_proj
        values.weight[k * HEAD_DIM : (k + 1) * HEAD_DIM] = 0
        if values.bias is not None:
            values.bias[k * HEAD_DIM : (k + 1) * HEAD_DIM] = 0
        agree(found["attention"][2][k], (1 - cosine(whole, watch(silent)[2].middle)).mean(), 5e-4)


# ----------------------------------------------------------------------------------------- gradients

MAPS = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}


def unit_of(name: str, row: int) -> int:
    """Return the KV head or channel that a row (of an output map: a column) belongs to."""
    if name.startswith("mlp"):
        return row
    head = row // HEAD_DIM
    return head // (HEADS // KV_HEADS) if name.endswith(("q_proj", "o_proj")) else head


@pytest.mark.parametrize("kind", KINDS)
def test_taylor_scores_are_per_sample_autograd_on_the_whole_model(kind: str) -> None:
    model = tiny(kind)
    found = measured(model, ["taylor"])["taylor"]
    direct = copy.deepcopy(model).double().requires_grad_(True)
    for s, sample in enumerate(SAMPLES):
        direct.zero_grad()
        logits = direct(input_ids=sample[None], use_cache=False).logits[0, :-1]
        nn.functional.cross_entropy(logits, sample[1:]).backward()
        for i, layer in enumerate(direct.model.layers):
            for part, names in MAPS.items():
                vector = torch.zeros(KV_HEADS if part == "attention" else CHANNELS, dtype=torch.float64)
                element = vector.clone()
                for name in names:
                    weight = layer.get_submodule(name).weight
                    product = (weight * weight.grad).detach()
                    product = product.T if name.endswith(("o_proj", "down_proj")) else product
                    for row, line in enumerate(product):
                        vector[unit_of(name, row)] += line.sum().abs()
                        element[unit_of(name, row)] += line.abs().sum()
                agree(found[f"vector_{part}"][i][s], vector, 1e-3)
                agree(found[f"element_{part}"][i][s], element, 1e-3)


def test_taylor_by_hand() -> None:
    x, dy = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, -1.0]]])  # gradient [[3, 6], [-1, -2]]
    weight = torch.tensor([[1.0, -1.0], [2.0, 1.0]])  # product [[3, -6], [-2, -2]]
    rows, cols = LinearTrace(x, dy, weight), LinearTrace(x, dy, weight)
    up = Taylor().observe(GradientTrace(0, 0, 0, 0, {"up": rows}))
    assert up["vector_mlp"].tolist() == [[3, 4]]
    assert up["element_mlp"].tolist() == [[9, 4]]
    assert up["vector_attention"].shape == (1, 0)
    down = Taylor().observe(GradientTrace(0, 0, 0, 0, {"down": cols}))
    assert down["vector_mlp"].tolist() == [[1, 8]]
    assert down["element_mlp"].tolist() == [[5, 8]]


# --------------------------------------------------------------------------------------- closed forms


def test_a_block_that_adds_nothing_scores_nothing() -> None:
    model = tiny(num_hidden_layers=2)
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    model.model.layers[1].mlp.down_proj.weight.zero_()
    found = measured(model)
    assert float(found["block-influence"]["influence"][1]) == 0
    assert float(found["leave-one-out"]["attention"][1].abs().max()) == 0
    assert float(found["leave-one-out"]["mlp"][1].abs().max()) == 0
    assert float(found["sensitivity"]["attention"][1].abs().max()) == 0
    first = watch(model)[0]
    agree(found["pair-angle"]["all"][1], (torch.arccos(cosine(first.input, first.output).clamp(0, 1)) / math.pi).mean())
    for metric in METRICS:
        block = scores(model, metric).block
        assert block is not None
        assert float(block[1]) < float(block[0])
    assert float(scores(model, CoMe()).block[1]) == float(scores(model, FlexiGPT()).block[1]) == 0


def trace(before: Sequence[float], after: Sequence[float], **changes: object) -> BlockTrace:
    row = torch.tensor([list(after)])
    values = {
        "index": 1,
        "kv_heads": 0,
        "group": 0,
        "input": torch.tensor([list(before)]),
        "middle": row,
        "output": row,
        "before": (torch.tensor([list(before)]),),
        "attention_inner": None,
        "mlp_inner": None,
        "attention_weight": None,
        "mlp_weight": None,
        "last": torch.tensor([True]),
    }
    return BlockTrace(**{**values, **changes})


@pytest.mark.parametrize(
    ("after", "influence", "clamped", "angle"),
    [
        ((2.0, 0.0), 0.0, 0.0, 0.0),
        ((0.0, 3.0), 1.0, 1.0, 0.5),
        ((1.0, 1.0), 1 - math.sqrt(0.5), 1 - math.sqrt(0.5), 0.25),
        ((-1.0, 0.0), 2.0, 1.0, 0.5),
        ((0.0, 0.0), 1.0, 1.0, 0.5),
    ],
)
def test_influence_and_angle_by_hand(after: tuple[float, ...], influence: float, clamped: float, angle: float) -> None:
    found = BlockInfluence().observe(trace((1.0, 0.0), after))
    assert float(found["influence"]) == pytest.approx(influence, abs=1e-6)
    assert float(found["clamped"]) == pytest.approx(clamped, abs=1e-6)
    turned = PairAngle().observe(trace((1.0, 0.0), after))
    assert float(turned["all"]) == pytest.approx(angle, abs=1e-6)


def test_units_by_hand() -> None:
    """Residual (3, 4); unit 0 adds (3, 0), unit 1 adds (0, 1)."""
    inner, weight = torch.tensor([[1.5, -1.0]]), torch.tensor([[2.0, 0.0], [0.0, -1.0]])
    whole = trace(
        (0.0, 3.0),
        (3.0, 4.0),
        kv_heads=2,
        group=1,
        attention_inner=inner,
        attention_weight=weight,
        mlp_inner=inner,
        mlp_weight=weight,
    )
    expected = [1 - 4 / 5, 1 - 21 / (5 * math.sqrt(18))]
    for kind in ("attention", "mlp"):
        assert LeaveOneOut().observe(whole)[kind].tolist() == pytest.approx(expected, rel=1e-5)
        assert Sensitivity().observe(whole)[kind].tolist() == [3, 1]
        assert float(Sensitivity().observe(whole)[f"{kind}_residual"]) == 7
    assert LeaveOneOut().observe(trace((1.0, 0.0), (3.0, 4.0)))["attention"].shape == (0,)


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_distances_of_nearly_parallel_vectors_do_not_cancel(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(50, 64, generator=generator)
    after = h - size * torch.randn(50, 64, generator=generator)
    v = h - after  # exact in float32 or nearly so: what the oracle sees too
    a, b = h.double(), h.double() - v.double()
    across = b - (a * b).sum(1, keepdim=True) / (a * a).sum(1, keepdim=True) * a
    sine = (across * across).sum(1) / (b * b).sum(1)
    expected = sine / (1 + (1 - sine).sqrt())
    found = one_minus_cosine((h * h).sum(1), (h * v).sum(1), (v * v).sum(1))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(row_distance(h, h - v).double(), expected, rtol=max(1e-4, 2e-7 / size), atol=0)
    torch.testing.assert_close(expected, 1 - cosine(a, b), rtol=1e-3, atol=1e-15)


def test_distances_at_the_ends() -> None:
    one = torch.tensor(1.0)
    assert float(one_minus_cosine(one, 0 * one, 0 * one)) == 0, "nothing left out"
    assert float(one_minus_cosine(one, one, one)) == 1, "nothing left: no direction"
    assert float(one_minus_cosine(one, 2 * one, 4 * one)) == 2, "turned around"
    assert float(one_minus_cosine(0 * one, 0 * one, one)) == 1
    assert math.isnan(float(one_minus_cosine(one, one * math.nan, one)))
    rows = torch.tensor([[1.0, 0.0], [1e-6, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-5.0, 0.0]])
    assert row_distance(*rows).tolist() == pytest.approx([0, 1, 2], abs=1e-6)


# --------------------------------------------------------------------------------------------- metrics


def test_comparable_scores_are_not_negative_and_a_come_block_is_the_sum_of_its_units() -> None:
    model = tiny()
    for metric in (FlexiGPT(), CoMe()):
        found = scores(model, metric)
        assert found.comparable
        assert min(float(t.min()) for t in (*found.attention, *found.mlp, found.block)) >= 0
    found = scores(model, CoMe())
    for total, heads, channels in zip(found.block, found.attention, found.mlp, strict=True):
        agree(total, heads.sum() + channels.sum(), 1e-6)
    assert not scores(model, Saap()).comparable


def test_flexigpt_scores_are_the_statistics_as_they_are() -> None:
    model = tiny()
    found, statistics = scores(model, FlexiGPT()), measured(model)
    assert torch.equal(found.block, torch.stack(statistics["block-influence"]["influence"]))
    for kind in ("attention", "mlp"):
        for a, b in zip(getattr(found, kind), statistics["leave-one-out"][kind], strict=True):
            assert torch.equal(a, b)


def test_a_block_without_a_sub_layer_is_scored() -> None:
    model = tiny()
    shape = opened(model).shape
    bare = {1: BlockRecipe(parts=(Part(1, kv_heads=()),)), 3: BlockRecipe(parts=(Part(3, channels=()),))}
    plan = change(PruningPlan.identity(shape), bare)
    statistics = calibrator(model).statistics(Planned(plan), KNOWN)
    for metric in METRICS:
        found = metric.score(request(plan.new_shape, statistics)).check(metric.name, plan.new_shape)
        assert found.attention[1].shape == found.mlp[3].shape == (0,)


# ------------------------------------------------------------------------------------------------ saap


def objective(vector: Tensor, element: Tensor, s_v: Tensor, s_e: Tensor) -> Tensor:
    return (vector / (2 * s_v) + element / (2 * s_e)).mean() + torch.log(s_v * s_e) / 2


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e4])
def test_the_closed_form_is_the_minimum_and_learning_reaches_it(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    vector, element = (scale * torch.rand(40, generator=generator).double() * f for f in (1, 30))
    closed = noise(vector, element)
    variances = [torch.tensor(c, dtype=torch.float64, requires_grad=True) for c in closed]
    lowest = objective(vector, element, *variances)
    slopes = torch.autograd.grad(lowest, variances)
    for slope, variance in zip(slopes, variances, strict=True):
        assert abs(float(slope * variance.detach())) < 1e-12
    for factors in itertools.product((0.5, 0.99, 1.01, 2.0), repeat=2):
        moved = [v.detach() * f for v, f in zip(variances, factors, strict=True)]
        assert float(objective(vector, element, *moved)) > float(lowest.detach())
    assert noise(vector, element, "learned") == pytest.approx(closed, rel=1e-4)


def direct_keep(vector: list[Tensor], element: list[Tensor], block: int, metric: Saap) -> Tensor:
    """The keep score of one block's units, from the text of the metric."""
    pool = range(len(vector)) if metric.scope == "module" else [block]
    s_v = torch.cat([vector[b].flatten() for b in pool]).double().mean()
    s_e = torch.cat([element[b].flatten() for b in pool]).double().mean()
    weighted = vector[block].double() / (2 * s_v) + element[block].double() / (2 * s_e)
    mean = weighted.mean(0)
    deviation = ((weighted - mean) ** 2).mean(0).sqrt() / mean
    return standardise(mean + torch.log(s_v * s_e) / 2) - metric.stability * standardise(deviation)


@pytest.mark.parametrize("scope", ["module", "block"])
@pytest.mark.parametrize("stability", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("sigma", ["closed", "learned"])
def test_saap_keep_scores(scope: str, stability: float, sigma: str) -> None:
    model = tiny()
    metric = Saap(stability=stability, scope=scope, sigma=sigma)
    found, taylor = scores(model, metric), measured(model, ["taylor"])["taylor"]
    for kind in ("attention", "mlp"):
        vector, element = list(taylor[f"vector_{kind}"]), list(taylor[f"element_{kind}"])
        for b, units in enumerate(getattr(found, kind)):
            torch.testing.assert_close(
                units.double(), direct_keep(vector, element, b, metric), rtol=1e-3, atol=2e-4 * (1 + stability)
            )


def test_saap_without_stability_ranks_by_fusion_alone() -> None:
    model = tiny()
    taylor = measured(model, ["taylor"])["taylor"]
    vector, element = taylor["vector_mlp"], taylor["element_mlp"]
    s_v, s_e = noise(torch.cat([v.flatten() for v in vector]), torch.cat([e.flatten() for e in element]))
    plain, steady = scores(model, Saap(stability=0)), scores(model, Saap(stability=5))
    for b in range(5):
        fused = (vector[b] / (2 * s_v) + element[b] / (2 * s_e)).mean(0)
        assert torch.equal(plain.mlp[b].argsort(), fused.argsort())
    assert any(not torch.equal(p.argsort(), s.argsort()) for p, s in zip(plain.mlp, steady.mlp, strict=True))


def test_scope_decides_which_units_share_their_noise() -> None:
    vector = [torch.tensor([[1.0, 3.0]]), torch.tensor([[10.0, 30.0]])]
    element = [10 * v for v in vector]
    module, block = Saap(scope="module").fused(vector, element), Saap(scope="block").fused(vector, element)
    assert module[0][1] == module[1][1] == pytest.approx(0.5 * math.log(11 * 110))
    assert [o for _, o in block] == pytest.approx([0.5 * math.log(2 * 20), 0.5 * math.log(20 * 200)])
    assert module[0][0].tolist()[0] == pytest.approx([1 / 11, 3 / 11])
    assert block[0][0].tolist()[0] == block[1][0].tolist()[0] == pytest.approx([0.5, 1.5])


def test_the_less_stable_of_two_equal_units_scores_lower_and_a_dead_one_lowest() -> None:
    steady_and_not = torch.tensor([[1.0, 0.2, 0.0], [1.0, 1.8, 0.0]])
    keep = Saap().keep(steady_and_not, torch.tensor(0.0))
    assert float(keep[0]) > float(keep[1]) > float(keep[2])
    assert bool(keep.isfinite().all())


# ------------------------------------------------------------------------------------ progressive steps


def merge(plan: PruningPlan, first: int) -> PruningPlan:
    """Concatenate block ``first`` of the plan's model and the next one."""
    step = PruningPlan.identity(plan.new_shape)
    parts = (Part(first, (0, 3), tuple(range(0, 24, 3))), Part(first + 1, (1, 2), tuple(range(16))))
    merged = BlockRecipe(parts=parts, norms=((first, 0.5), (first + 1, 0.5)))
    blocks = (*step.blocks[:first], merged, *step.blocks[first + 2 :])
    return plan.compose(PruningPlan(plan.new_shape, blocks))


@pytest.mark.parametrize("chain", [(3, 1, 0), (0, 1, 1), (2, 2), (1, 2, 0)])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_resumed_step_measures_what_a_fresh_pass_does(kind: str, chain: tuple[int, ...]) -> None:
    model = tiny(kind)
    resumed = calibrator(model)
    dense = plan = PruningPlan.identity(opened(model).shape)
    resumed.statistics(Planned(plan), KNOWN)
    for first in chain:
        plan = merge(plan, first)
        found = resumed.statistics(Planned(plan), KNOWN)
        resumed.forget([dense, plan])
        expected = calibrator(model).statistics(Planned(plan), KNOWN)
        for name in KNOWN:
            for quantity, blocks in expected[name].items():
                for a, b in zip(found[name][quantity], blocks, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
