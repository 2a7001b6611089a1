"""Statistics and metrics against direct float64 computations on transformers' own hidden states."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tiny import attached_for, built, change, close, logits, narrowed, noting, opened, sharing, tiny, tokens
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from flexi_plugins.calibration import Calibrator
from flexi_plugins.data import BlockRecipe, Part, PruningPlan, Scores, Statistics
from flexi_plugins.errors import FlexiError
from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.hookspecs import BlockTrace, Budget, GradientTrace, LinearTrace, PruningRequest
from flexi_plugins.metrics import come, flexigpt, saap
from flexi_plugins.numerics import absolute_sum, one_minus_cosine, pieces, product, row_distance, standardise

METRICS = (come.CoMe(), flexigpt.FlexiGPT(), saap.Saap())
KNOWN = {s.name: s for m in (come, flexigpt, saap) for s in m.statistics()}
FORWARD = [name for name, s in KNOWN.items() if not s.backward]
KINDS = ["llama", "llama-biases", "mistral", "qwen3-biases"]
WINDOWS, SAMPLES = tokens(3, 10), tokens(4, 7, seed=5)


def calibrator(checkpoint, windows=WINDOWS, samples=SAMPLES, rows=2) -> Calibrator:
    return Calibrator(Blocks(checkpoint), windows, samples, KNOWN, rows)


def scores_of(metric, statistics: Statistics, plan: PruningPlan) -> Scores:
    request = PruningRequest(plan.new_shape, plan, Budget(plan.shape.parameters, 0.2), statistics)
    return metric.score(request).check(metric.name, plan.new_shape)


@dataclass
class Seen:
    """What one block of transformers' model did, in float64, tokens flattened."""

    input: Tensor
    middle: Tensor
    output: Tensor
    heads: Tensor  # input of the attention output map
    channels: Tensor  # input of the down map
    heads_weight: Tensor
    channels_weight: Tensor


def reference(model, windows=WINDOWS) -> list[Seen]:
    """Run transformers' model in float64 and take what its blocks see by hooks."""
    model = copy.deepcopy(model).double()
    found: list[dict[str, Tensor]] = [{} for _ in model.model.layers]

    def note(index, name, position=0):
        def hook(module, inputs, *output):
            value = inputs[0] if position == 0 else output[0]
            found[index][name] = value.flatten(0, 1)

        return hook

    for i, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(note(i, "input"))
        block.register_forward_hook(note(i, "output", 1))
        block.post_attention_layernorm.register_forward_pre_hook(note(i, "middle"))
        block.self_attn.o_proj.register_forward_pre_hook(note(i, "heads"))
        block.mlp.down_proj.register_forward_pre_hook(note(i, "channels"))
    logits(model, windows)
    blocks = model.model.layers
    return [
        Seen(**f, heads_weight=b.self_attn.o_proj.weight, channels_weight=b.mlp.down_proj.weight)
        for f, b in zip(found, blocks, strict=True)
    ]


def distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of matching rows, float64."""
    return 1 - F.cosine_similarity(a, b, dim=-1, eps=0)


@pytest.fixture(scope="module", params=KINDS)
def measured(request):
    """Return a model, its statistics, and the reference."""
    model = tiny(request.param)
    checkpoint = opened(model)
    plan = PruningPlan.identity(checkpoint.shape)
    return model, checkpoint, calibrator(checkpoint).statistics(Planned(plan), KNOWN), reference(model)


# ---------------------------------------------------------------------------------------- block influence, pair angle


def test_block_influence(measured):
    _, _, statistics, blocks = measured
    for index, seen in enumerate(blocks):
        found = statistics["block-influence"]
        assert float(found["influence"][index]) == pytest.approx(
            float(distance(seen.input, seen.output).mean()), rel=1e-5
        )
        clamped = (1 - (1 - distance(seen.input, seen.output)).clamp(0, 1)).mean()
        assert float(found["clamped"][index]) == pytest.approx(float(clamped), rel=1e-5)


def test_the_last_blocks_influence_is_taken_before_the_final_norm(measured):
    model, _, statistics, blocks = measured
    normed = copy.deepcopy(model.model.norm).double()(blocks[-1].output)
    found = float(statistics["block-influence"]["influence"][-1])
    assert found == pytest.approx(float(distance(blocks[-1].input, blocks[-1].output).mean()), rel=1e-5)
    assert abs(found - float(distance(blocks[-1].input, normed).mean())) > 1e-3


def test_pair_angle(measured):
    _, _, statistics, blocks = measured
    ends = [9, 19, 29]
    for index in range(1, len(blocks)):
        cosine = (1 - distance(blocks[index - 1].input, blocks[index].output)).clamp(0, 1)
        angle = torch.arccos(cosine) / math.pi
        found = statistics["pair-angle"]
        assert float(found["all"][index]) == pytest.approx(float(angle.mean()), rel=1e-5)
        assert float(found["last"][index]) == pytest.approx(float(angle[ends].mean()), rel=1e-5)


# ---------------------------------------------------------------------------------------- units


def added(inner: Tensor, weight: Tensor) -> Tensor:
    """Mean over tokens of the L1 norm of what each channel adds to the stream, formed channel by channel."""
    return torch.stack([torch.outer(inner[:, c], weight[:, c]).abs().sum(1).mean() for c in range(inner.shape[1])])


def test_sensitivity(measured):
    _, _, statistics, blocks = measured
    found = statistics["sensitivity"]
    for index, seen in enumerate(blocks):
        assert close(found["attention"][index].double(), added(seen.heads, seen.heads_weight), 1e-5)
        assert close(found["mlp"][index].double(), added(seen.channels, seen.channels_weight), 1e-5)
        for name, stream in (("attention_residual", seen.middle), ("mlp_residual", seen.output)):
            assert float(found[name][index]) == pytest.approx(float(stream.abs().sum(1).mean()), rel=1e-5)


def test_come_scores_whole_kv_heads_relative_to_the_stream(measured):
    """Query head h belongs to KV head h // group: the sum over its channels of what they add, by brute force."""
    _, checkpoint, statistics, blocks = measured
    shape = checkpoint.shape
    found = scores_of(come.CoMe(), statistics, PruningPlan.identity(shape))
    assert found.comparable
    for index, (seen, block) in enumerate(zip(blocks, shape.blocks, strict=True)):
        for head in range(block.kv_heads):
            total = 0.0
            for query in range(block.query_heads):
                if query // block.group == head:
                    for c in range(query * block.head_dim, (query + 1) * block.head_dim):
                        total += float((seen.heads[:, c].abs() * seen.heads_weight[:, c].abs().sum()).mean())
            expected = total / float(seen.middle.abs().sum(1).mean())
            assert float(found.attention[index][head]) == pytest.approx(expected, rel=1e-5)
        assert float(found.block[index]) == pytest.approx(
            float(found.attention[index].sum() + found.mlp[index].sum()), rel=1e-5
        )


def test_leave_one_out_distances(measured):
    """The literal 1 - cos(h, h - v), v computed by zeroing everything but the unit."""
    _, checkpoint, statistics, blocks = measured
    found = scores_of(flexigpt.FlexiGPT(), statistics, PruningPlan.identity(checkpoint.shape))
    for index, (seen, block) in enumerate(zip(blocks, checkpoint.shape.blocks, strict=True)):
        assert float(found.block[index]) == float(statistics["block-influence"]["influence"][index])
        width = block.group * block.head_dim
        for head in range(block.kv_heads):
            alone = torch.zeros_like(seen.heads)
            alone[:, head * width : (head + 1) * width] = seen.heads[:, head * width : (head + 1) * width]
            expected = distance(seen.middle, seen.middle - alone @ seen.heads_weight.T).mean()
            assert float(found.attention[index][head]) == pytest.approx(float(expected), rel=1e-4)
        for channel in range(block.channels):
            alone = torch.zeros_like(seen.channels)
            alone[:, channel] = seen.channels[:, channel]
            expected = distance(seen.output, seen.output - alone @ seen.channels_weight.T).mean()
            assert float(found.mlp[index][channel]) == pytest.approx(float(expected), rel=1e-4, abs=1e-7)


def test_leave_one_out_is_what_cutting_the_unit_does(measured):
    """The stream of a model without the unit, right behind its block."""
    model, checkpoint, statistics, blocks = measured
    kept = tuple(c for c in range(24) if c != 7)
    cut = built(change(PruningPlan.identity(checkpoint.shape), {2: BlockRecipe(parts=(Part(2, None, kept),))}), model)
    stream = []
    cut.model.layers[2].register_forward_hook(lambda m, i, o: stream.append(o.flatten(0, 1)))
    logits(cut, WINDOWS)
    found = float(statistics["leave-one-out"]["mlp"][2][7])
    assert found == pytest.approx(float(distance(blocks[2].output, stream[0].double()).mean()), rel=1e-4, abs=1e-7)


def test_taylor_scores_are_per_sample_autograd(measured):
    model, checkpoint, statistics, _ = measured
    model = copy.deepcopy(model).double().requires_grad_(True)
    found, roles = statistics["taylor"], checkpoint.family.ROLES
    for sample, row in enumerate(SAMPLES):
        model.zero_grad()
        F.cross_entropy(model(row[None]).logits[0, :-1], row[1:]).backward()
        for index, shape in enumerate(checkpoint.shape.blocks):
            for kind, names, units in (
                ("attention", ("query", "key", "value", "attention_output"), shape.kv_heads),
                ("mlp", ("gate", "up", "down"), shape.channels),
            ):
                vector, element = torch.zeros(units, dtype=torch.double), torch.zeros(units, dtype=torch.double)
                for role in names:
                    weight = model.model.layers[index].get_submodule(roles[role]).weight
                    product = (weight * weight.grad).detach()
                    product = product.T if role in ("attention_output", "down") else product  # rows are the unit's
                    rows = product.unflatten(0, (units, -1))
                    vector += rows.sum(2).abs().sum(1)
                    element += rows.abs().sum((1, 2))
                assert close(found[f"vector_{kind}"][index][sample].double(), vector, 1e-5)
                assert close(found[f"element_{kind}"][index][sample].double(), element, 1e-5)


# ---------------------------------------------------------------------------------------- large matrices


def drawn(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@DTYPES
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_taylor_scores_of_a_matrix_taken_in_pieces(columns, dtype):
    """Also in bfloat16 everything behind the given activations, gradients and weights is float32."""
    weight, inner, gradient = (drawn(*s, dtype=dtype) for s in ((700, 650), (2, 5, 650), (2, 5, 700)))
    vector, element = saap.row_scores(LinearTrace(inner, gradient, weight), columns)
    products = torch.einsum("stc,stk,ck->sck", gradient.double(), inner.double(), weight.double())
    axis = 1 if columns else 2
    assert close(vector.double(), products.sum(axis).abs(), 1e-5)
    assert close(element.double(), products.abs().sum(axis), 1e-5)


@DTYPES
def test_leave_one_out_of_a_matrix_taken_in_pieces(dtype):
    """In bfloat16, h.w is rounded once to the dtype that the model computes in; all else is float32."""
    stream, inner, weight = (drawn(*s, dtype=dtype) for s in ((300, 8), (300, 1200), (8, 1200)))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3
    h, a, w = (t.double() for t in (stream, inner, weight))
    expected = torch.stack([distance(h, h - a[:, c : c + 1] * w[:, c]).sum() for c in range(1200)])
    assert close(flexigpt.channel_distances(stream, inner, weight).double(), expected, tolerance)
    alone = [(a[:, k : k + 300] @ w[:, k : k + 300].T) for k in range(0, 1200, 300)]
    expected = torch.stack([distance(h, h - v).sum() for v in alone])
    assert close(flexigpt.head_distances(stream, inner, weight, 4).double(), expected, tolerance)


class Allocations(TorchDispatchMode):
    """Notes the bytes of the largest tensor made while it is on; views of what there was do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        known = {t.untyped_storage().data_ptr() for t in given if isinstance(t, Tensor)}
        if isinstance(found, Tensor) and found.untyped_storage().data_ptr() not in known:
            self.largest = max(self.largest, found.untyped_storage().nbytes())
        return found


@DTYPES
@pytest.mark.parametrize("name", KNOWN)
def test_statistics_make_nothing_of_the_size_of_a_matrix(name, dtype):
    """Blocks are measured within the memory that running them takes: matrices are float32 piece by piece only."""
    tokens, hidden, channels = 2000, 1000, 2000
    stream, inner, weight = (drawn(*s, dtype=dtype) for s in ((tokens, hidden), (tokens, channels), (hidden, channels)))
    if KNOWN[name].backward:
        maps = {
            "up": LinearTrace(stream[:8].view(2, 4, hidden), inner[:8].view(2, 4, channels), weight.T.contiguous()),
            "down": LinearTrace(inner[:8].view(2, 4, channels), stream[:8].view(2, 4, hidden), weight),
        }
        trace: Any = GradientTrace(0, 4, 1, 500, maps)
    else:
        weights = {"attention_weight": weight, "mlp_weight": weight}
        states = {"input": stream, "middle": stream, "output": -stream, "before": (stream,)}
        last = torch.arange(tokens) % 10 == 9
        inner_states = {"attention_inner": inner, "mlp_inner": inner}
        windows = {"last": last, "sequences": range(tokens // 10), "total": tokens // 10}
        trace = BlockTrace(1, 20, 1, **states, **weights, **inner_states, **windows)
    with Allocations() as made:
        KNOWN[name].observe(trace)
    assert 0 < made.largest < weight.numel() * 4 / 3


# ---------------------------------------------------------------------------------------- by hand


def hand_made():
    """A model whose first block adds (0, 1, 1, 0) to a stream of (1, 0, 0, 0), by two channels, and whose second adds nothing."""
    sizes = {"hidden_size": 4, "intermediate_size": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny("llama-biases", num_hidden_layers=2, hidden_act="relu", **sizes)
    for parameter in model.model.layers.parameters():
        parameter.data.zero_()
    model.model.embed_tokens.weight.data[:] = torch.tensor([1.0, 0, 0, 0])
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.bias.data[:] = torch.tensor([1.0, 2.0])
    mlp.up_proj.bias.data[:] = 1.0
    mlp.down_proj.weight.data[:] = torch.tensor([[0, 0], [1.0, 0], [0, 0.5], [0, 0]])
    return model


def test_closed_forms_by_hand():
    checkpoint = opened(hand_made())
    plan = PruningPlan.identity(checkpoint.shape)
    statistics = calibrator(checkpoint).statistics(Planned(plan), KNOWN)
    turned = 1 - 1 / math.sqrt(3)
    assert [float(x) for x in statistics["block-influence"]["influence"]] == pytest.approx([turned, 0], abs=1e-6)
    assert float(statistics["pair-angle"]["all"][1]) == pytest.approx(math.acos(1 / math.sqrt(3)) / math.pi)
    assert statistics["sensitivity"]["mlp"][0].tolist() == [1.0, 1.0]
    assert float(statistics["sensitivity"]["mlp_residual"][0]) == 3.0
    by_come = scores_of(come.CoMe(), statistics, plan)
    assert by_come.mlp[0].tolist() == pytest.approx([1 / 3, 1 / 3])
    assert by_come.attention[0].tolist() == [0.0]
    assert by_come.block.tolist() == pytest.approx([2 / 3, 0])
    by_flexigpt = scores_of(flexigpt.FlexiGPT(), statistics, plan)
    assert by_flexigpt.mlp[0].tolist() == pytest.approx([1 - 2 / math.sqrt(6)] * 2)
    assert by_flexigpt.mlp[1].tolist() == [0.0, 0.0]
    assert float(statistics["taylor"]["element_mlp"][1].abs().max()) == 0.0


# ---------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0, 1e3, 1e5])
@pytest.mark.parametrize("scale", [0.0, 1.5, -0.9, -1.9])
def test_distances_of_rows_do_not_cancel(size, scale):
    """Nearly parallel, nearly opposite, and very unequal rows; float64 is the truth."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(100, 64, generator=generator)
    after = before * (1 + scale) + size * torch.randn(100, 64, generator=generator)
    u, w = (F.normalize(x.double(), dim=-1, eps=0) for x in (before, after))
    truth = (u - w).square().sum(-1) / 2
    assert ((row_distance(before, after).double() - truth) / truth).abs().max() < (1e-5 if scale == 0 else 0.02)
    assert (row_distance(before, after).double() - truth).abs().max() < 1e-6


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 1.0])
def test_leaving_out_something_small_does_not_cancel(size):
    generator = torch.Generator().manual_seed(1)
    h, v = torch.randn(100, 64, generator=generator), size * torch.randn(100, 64, generator=generator)
    u, w = (F.normalize(x, dim=-1, eps=0) for x in (h.double(), h.double() - v.double()))
    truth = (u - w).square().sum(-1) / 2
    found = one_minus_cosine((h * h).sum(-1), (h * v).sum(-1), (v * v).sum(-1)).double()
    naive = (1 - F.cosine_similarity(h, h - v, dim=-1)).double()
    assert ((found - truth) / truth).abs().max() < 1e-4
    if size <= 1e-4:
        assert ((naive - truth) / truth).abs().max() > 0.1


@pytest.mark.parametrize("scale", [-2.0, 0.3, 0.999, 1.2, 3.0])
@pytest.mark.parametrize("size", [1e-2, 1.0])
def test_leaving_out_something_large_turns_the_stream_right_round(scale, size):
    """v along h: the rest points where h did for less than one h, and backwards for more."""
    h, v = drawn(100, 64), scale * drawn(100, 64) + size * drawn(100, 64, seed=1)
    truth = distance(h.double(), h.double() - v.double())
    found = one_minus_cosine((h * h).sum(-1), (h * v).sum(-1), (v * v).sum(-1)).double()
    assert (found - truth).abs().max() < (1e-5 if size == 1.0 else 1e-3)
    assert found.max() <= 2


def test_distances_stay_between_zero_and_two():
    """Also where nearly all of h is left out, and the products cannot tell what remains."""
    generator = torch.Generator().manual_seed(2)
    h = 1e3 * torch.randn(2000, 64, generator=generator)
    v = h + 1e-2 * torch.randn(2000, 64, generator=generator)
    found = one_minus_cosine((h * h).sum(-1), (h * v).sum(-1), (v * v).sum(-1))
    assert found.min() >= 0
    assert found.max() <= 2


def test_vanished_vectors_have_no_direction_and_nan_stays_nan():
    zero, some = torch.zeros(1, 4), torch.ones(1, 4)
    broken = torch.full((1, 4), math.nan)
    assert row_distance(zero, some).tolist() == row_distance(some, zero).tolist() == [1.0]
    assert row_distance(some, some).tolist() == [0.0]
    assert row_distance(some, -some).tolist() == pytest.approx([2.0])
    assert row_distance(some, broken).isnan().all()
    one = torch.ones(1)
    assert one_minus_cosine(one, one, one).tolist() == one_minus_cosine(0 * one, 0 * one, one).tolist() == [1.0]
    assert one_minus_cosine(one, math.nan * one, one).isnan().all()


def test_pieces_cover_everything_once_and_in_order():
    for length, width, least in ((0, 5, 1), (1, 10**9, 1), (1000, 10**6, 300), (10**6, 3, 1), (7, 0, 1)):
        cut = list(pieces(length, width, least))
        assert [i for part in cut for i in range(length)[part]] == list(range(length))
        assert all(len(range(length)[part]) >= least for part in cut[:-1])


@DTYPES
def test_products_and_absolute_sums_are_float32(dtype):
    a, b = drawn(700, 600, dtype=dtype), drawn(600, 50, dtype=dtype, seed=1)
    assert product(a, b).dtype == absolute_sum(a).dtype == torch.float32
    assert close(product(a, b).double(), a.double() @ b.double(), 1e-5 if dtype == torch.float32 else 2.0**-8)
    assert close(absolute_sum(a).double(), a.double().abs().sum(0), 1e-6)


def test_products_of_float16_do_not_overflow():
    large = torch.full((2, 8), 300.0, dtype=torch.float16)
    assert product(large, large.T).tolist() == [[720_000.0] * 2] * 2


def test_standardise():
    assert standardise(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])
    assert standardise(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]
    assert standardise(torch.tensor([5.0])).tolist() == [0.0]
    assert standardise(torch.zeros(0)).shape == (0,)


# ---------------------------------------------------------------------------------------- saap


def taylor(seed=0, samples=6, heads=(4, 4, 2), channels=(8, 8, 8)) -> dict[str, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)

    def made(widths, scale):
        return tuple(scale * torch.rand(samples, w, generator=generator).exp() for w in widths)

    return {
        "vector_attention": made(heads, 3.0),
        "element_attention": made(heads, 50.0),
        "vector_mlp": made(channels, 0.01),
        "element_mlp": made(channels, 0.2),
    }


def objective(log_v, log_e, v, e):
    """J = mean[V / (2 s_v) + E / (2 s_e)] + log(s_v s_e) / 2."""
    return (v * torch.exp(-log_v) / 2 + e * torch.exp(-log_e) / 2).mean() + (log_v + log_e) / 2


@pytest.mark.parametrize("seed", range(3))
def test_the_closed_form_is_the_minimum(seed):
    found = taylor(seed)
    v, e = found["vector_mlp"][0].double().flatten(), found["element_mlp"][0].double().flatten()
    s_v, s_e = saap.noise(v, e)
    logs = torch.tensor([math.log(s_v), math.log(s_e)], dtype=torch.double, requires_grad=True)
    value = objective(logs[0], logs[1], v, e)
    value.backward()
    assert logs.grad.abs().max() < 1e-12
    for step in (-0.1, 0.1):
        assert objective(logs[0] + step, logs[1], v, e) > value
        assert objective(logs[0], logs[1] + step, v, e) > value
    assert saap.noise(v, e, "learned") == pytest.approx((s_v, s_e), rel=1e-4)
    assert saap.noise(1e-9 * v, 1e6 * e, "learned") == pytest.approx((1e-9 * s_v, 1e6 * s_e), rel=1e-4)


def request_of(found) -> PruningRequest:
    model = opened(tiny("llama", num_hidden_layers=3, intermediate_size=8))
    plan = change(PruningPlan.identity(model.shape), {2: BlockRecipe(parts=(Part(2, (0, 1)),))})
    return PruningRequest(plan.new_shape, plan, Budget(plan.shape.parameters, 0.2), Statistics({"taylor": found}))


def fused_by_hand(found: dict[str, tuple[Tensor, ...]], kind: str, scope: str, block: int) -> Tensor:
    """F = V / (2 s_v) + E / (2 s_e) + log(s_v s_e) / 2 of a block, (samples, units)."""
    v, e = found[f"vector_{kind}"], found[f"element_{kind}"]
    pool = range(3) if scope == "module" else [block]
    s_v = float(torch.cat([v[b].flatten() for b in pool]).double().mean())
    s_e = float(torch.cat([e[b].flatten() for b in pool]).double().mean())
    return v[block].double() / (2 * s_v) + e[block].double() / (2 * s_e) + math.log(s_v * s_e) / 2


@pytest.mark.parametrize("scope", ["module", "block"])
@pytest.mark.parametrize("sigma", ["closed", "learned"])
def test_without_stability_saap_is_fusion_alone(scope, sigma):
    found = taylor()
    scores = saap.Saap(stability=0.0, scope=scope, sigma=sigma).score(request_of(found))
    assert not scores.comparable
    total = torch.zeros(3, dtype=torch.double)
    for kind, given in (("attention", scores.attention), ("mlp", scores.mlp)):
        for block in range(3):
            fused = fused_by_hand(found, kind, scope, block).mean(0)
            total[block] += fused.sum()
            expected = (fused - fused.mean()) / fused.std(correction=0)
            assert close(given[block].double(), expected, 1e-4)
    assert close(scores.block.double(), standardise(total), 1e-3)


def test_what_fluctuates_is_kept_less():
    """keep = z(mean) - lambda z(std / mean), both within a (block, kind)."""
    found = taylor()
    scores = saap.Saap(stability=0.7).score(request_of(found))
    v, e = found["vector_mlp"], found["element_mlp"]
    s_v, s_e = (float(torch.cat([x.flatten() for x in t]).double().mean()) for t in (v, e))
    for block in range(3):
        weighted = v[block].double() / (2 * s_v) + e[block].double() / (2 * s_e)
        fluctuation = weighted.std(0, correction=0) / weighted.mean(0)
        expected = standardise(weighted.mean(0)) - 0.7 * standardise(fluctuation)
        assert close(scores.mlp[block].double(), expected, 1e-4)
    steady = {k: tuple(t.mean(0, keepdim=True).expand_as(t) for t in v) for k, v in found.items()}
    with_, without = (saap.Saap(stability=s).score(request_of(steady)) for s in (0.7, 0.0))
    assert close(with_.block, without.block, 1e-3)


def test_scopes_differ_where_blocks_do():
    found = taylor()
    found["vector_mlp"] = tuple(x * (10.0**i) for i, x in enumerate(found["vector_mlp"]))
    module, block = (saap.Saap(scope=s).score(request_of(found)) for s in ("module", "block"))
    assert not close(module.block, block.block, 1e-2)


def test_metrics_score_models_without_some_sub_layers():
    checkpoint = opened(tiny("qwen2"))
    recipes = {0: BlockRecipe(parts=(Part(0, ()),)), 2: BlockRecipe(parts=(Part(2, None, ()),))}
    shared = sharing(checkpoint.shape, {4: 1})
    plan, attached = attached_for(change(shared, recipes))
    statistics = calibrator(checkpoint).statistics(Planned(plan, attached), KNOWN)
    for metric in METRICS:
        scores = scores_of(metric, statistics, plan)
        assert scores.attention[0].shape == scores.mlp[2].shape == (0,)
        assert scores.attention[1].shape == (4,)


def test_scores_are_checked():
    shape = opened(tiny()).shape
    good = Scores(block=torch.ones(5), mlp=tuple(torch.ones(24) for _ in range(5)), comparable=True)
    assert good.check("m", shape) is good
    bad: list[tuple[dict[str, Any], str]] = [
        ({"block": torch.ones(4)}, r"m: block scores: expected shape \(5,\), found \(4,\)"),
        ({"block": torch.tensor([1.0, 2, 3, 4, math.nan])}, "block scores: not finite"),
        ({"block": torch.ones(5).double()}, "expected float32 on the CPU, found torch.float64"),
        ({"mlp": good.mlp[:4]}, "mlp scores for 4 blocks, the model has 5"),
        ({"mlp": (*good.mlp[:2], -good.mlp[2], *good.mlp[3:])}, "mlp scores of block 2: comparable scores must not be"),
        ({"attention": good.mlp}, r"attention scores of block 0: expected shape \(4,\)"),
    ]
    for changes, message in bad:
        with pytest.raises(FlexiError, match=message):
            replace(good, **changes).check("m", shape)


# ---------------------------------------------------------------------------------------- calibration


def test_batches_do_not_matter():
    checkpoint = opened(tiny("mistral"))
    plan = Planned(PruningPlan.identity(checkpoint.shape))
    one, many = (calibrator(checkpoint, rows=r).statistics(plan, KNOWN) for r in (1, 3))
    for name, quantities in one.values.items():
        for quantity, values in quantities.items():
            for a, b in zip(values, many.values[name][quantity], strict=True):
                assert close(a, b)
                assert a.dtype == torch.float32


def merge(shape, first: int, seed: int) -> PruningPlan:
    """Return the concatenation of two neighbouring blocks of a model of this shape."""
    generator = torch.Generator().manual_seed(seed)
    pick = [torch.randperm(4, generator=generator), torch.randperm(24, generator=generator)]
    parts = (
        Part(first, tuple(sorted(pick[0][:3].tolist())), tuple(sorted(pick[1][:10].tolist()))),
        Part(first + 1, tuple(sorted(pick[0][3:].tolist())), tuple(sorted(pick[1][10:].tolist()))),
    )
    whole = list(PruningPlan.identity(shape).blocks)
    whole[first : first + 2] = [BlockRecipe(parts=parts, norms=((first, 0.5), (first + 1, 0.5)))]
    return PruningPlan(shape, tuple(whole))


def test_a_progressive_step_measures_what_a_fresh_start_would(monkeypatch):
    checkpoint = opened(tiny("qwen3", num_hidden_layers=7))
    runs: list[int] = []
    original = Blocks.run
    monkeypatch.setattr(Blocks, "run", lambda self, *a: runs.append(a[1]) or original(self, *a))
    identity = PruningPlan.identity(checkpoint.shape)
    resumed, plan = calibrator(checkpoint), identity
    resumed.statistics(Planned(identity), KNOWN)
    for step, first in enumerate((3, 1, 3)):  # the last one changes nothing before block 3
        plan = plan.compose(merge(plan.new_shape, first, step))
        runs.clear()
        found = resumed.statistics(Planned(plan), FORWARD)
        assert sorted(set(runs)) == list(range(first, len(plan.blocks)))
        resumed.forget([identity, plan])
        fresh = calibrator(checkpoint).statistics(Planned(plan), FORWARD)
        for name in FORWARD:
            for quantity, values in found[name].items():
                assert len(values) == len(plan.blocks)
                assert all(torch.equal(a, b) for a, b in zip(values, fresh[name][quantity], strict=True))
        assert resumed.losses([Planned(plan)]) == calibrator(checkpoint).losses([Planned(plan)])


def test_what_is_known_is_not_measured_again(monkeypatch):
    checkpoint = opened(tiny())
    plan = Planned(PruningPlan.identity(checkpoint.shape))
    taken = calibrator(checkpoint)
    first = taken.statistics(plan, KNOWN)
    monkeypatch.setattr(Blocks, "run", None)
    again = taken.statistics(plan, ["sensitivity", "taylor"])
    assert again["sensitivity"]["mlp"][2] is first["sensitivity"]["mlp"][2]
    with pytest.raises(FlexiError, match="statistic 'pair-angle' was not collected: declare it in `needs`"):
        again["pair-angle"]
    with pytest.raises(FlexiError, match="no plugin offers the statistic 'nothing'; there is block-influence"):
        taken.statistics(plan, ["nothing"])


def test_a_statistic_asked_for_later_is_the_same(monkeypatch):
    checkpoint = opened(tiny())
    plan = Planned(PruningPlan.identity(checkpoint.shape))
    together = calibrator(checkpoint).statistics(plan, FORWARD)
    one_by_one = calibrator(checkpoint)
    for name in FORWARD:
        for quantity, values in one_by_one.statistics(plan, [name])[name].items():
            assert all(torch.equal(a, b) for a, b in zip(values, together[name][quantity], strict=True))


def test_losses_are_transformers_losses():
    model = tiny("llama-tied")
    checkpoint = opened(model)
    plans = [Planned(PruningPlan.identity(checkpoint.shape)), Planned(narrowed(checkpoint.shape, (0, 1), range(9)))]
    plans.append(Planned(*attached_for(sharing(checkpoint.shape, {3: 1}))))
    for one, found in zip(plans, calibrator(checkpoint).losses(plans), strict=True):
        every = logits(built(one.plan, model, one.attached), WINDOWS)
        expected = F.cross_entropy(every[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten())
        assert found == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("measure", ["losses", "turns"])
@pytest.mark.parametrize("seen", [False, True])
def test_what_a_model_is_worth_announces_the_tokens_that_its_blocks_take(measure, seen):
    checkpoint, shown = opened(tiny("llama-tied")), []
    identity = PruningPlan.identity(checkpoint.shape)
    without = Planned(replace(identity, blocks=(*identity.blocks[:2], *identity.blocks[3:])))
    taken = calibrator(checkpoint)
    if seen:  # its states are kept: only what follows the removed block is run
        taken.statistics(Planned(identity), FORWARD)
    for _ in range(2):  # what is known takes nothing
        getattr(taken, measure)([without], noting(shown))
    blocks = len(identity.blocks)
    whole = measure == "turns" and not seen  # the original is run beside it
    runs = blocks - 3 + (0 if seen else blocks if whole else 2)
    assert shown == [("trying 1 model(s)", runs * WINDOWS.numel(), runs * WINDOWS.numel())]


@pytest.mark.parametrize("measure", ["losses", "turns"])
def test_what_a_model_is_worth_is_measured_once(measure, monkeypatch):
    checkpoint = opened(tiny("llama-tied"))
    identity = PruningPlan.identity(checkpoint.shape)
    plans = [Planned(replace(identity, blocks=(*identity.blocks[:i], *identity.blocks[i + 1 :]))) for i in (1, 2)]
    taken = calibrator(checkpoint)
    first = getattr(taken, measure)([plans[0], plans[1], plans[0]])
    monkeypatch.setattr(Blocks, "run", None)
    assert first == getattr(taken, measure)([plans[0], plans[1], plans[0]])
    assert first[0] != first[1]
