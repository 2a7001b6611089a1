"""Statistics and metrics against direct float64 computations on transformers' own hidden states, and by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from flexi_baselines import flap, llm_pruner, magnitude, shortgpt, sleb, taylor, wanda_sp
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
from flexi_plugins.metrics.greedy import Greedy
from flexi_plugins.numerics import (
    absolute_sum,
    all_finite,
    cross_entropy,
    one_minus_cosine,
    pieces,
    product,
    row_distance,
    standardise,
)
from flexi_plugins.plugins import Plugins
from flexi_plugins.testing.bench import TinyPruner

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
#
# Two blocks on the stream of every token alike, so attention only passes values on. H0.. are query heads (KV head 0 has H0
# and H1), C0, C1 channels; beside each, what it adds to the stream:
#
#   block 0  enters (1, 0, 0, 0)   H0 (0, 1, 0, 0)   H1 (0, 0, 1/2, 0)   H2 (0, 0, 1/2, 0)   H3 0
#            middle (1, 1, 1, 0)   C0 (0, 1, -1, 1)  C1 (0, 0, 2, -1)
#   block 1  enters (1, 2, 2, 0)   H0 (2, 2, 0, 0)   H1 0                H2 (0, -2, 0, 0)    H3 (-1, 0, 0, 0)
#            middle (2, 2, 2, 0)   C0 (0, 0, 1, 1)   C1 (0, 0, -1, 1)
#   leaves   (2, 2, 2, 2)
#
# Every row that reads the stream is parallel to it, so the norms in front let no gradient through, and rows of the head
# are orthogonal to (2, 2, 2, 2): all three tokens are equally likely, and a sample's gradient is the same vector d
# throughout. The rows are 6 (1, -2, -2, 3), 6 (1, 1, -1, -1) and 0; of three targets, the sample A has none of token 0
# and one of token 1, so with (1/3 - share of the targets) per row and the norm's 1/2 its d is (1, -2, -2, 3); B has it
# the other way round, and d = (1, 1, -1, -1). Their mean is (1, -1/2, -3/2, 1).
A, B = [0, 1, 2, 2], [0, 0, 2, 2]
HAND_WINDOWS = torch.tensor([[0, 1, 2, 0], [2, 1, 0, 1]])  # targets: 0 twice, 1 three times, 2 once


def hand_made() -> torch.nn.Module:
    sizes = {
        "hidden_size": 4,
        "intermediate_size": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 2,
    }
    model = tiny("llama", num_hidden_layers=2, hidden_act="relu", vocab_size=3, rms_norm_eps=1e-12, **sizes)
    model.model.embed_tokens.weight[:] = torch.tensor([1.0, 0, 0, 0])
    model.model.norm.weight.fill_(1.0)
    model.lm_head.weight[:] = torch.tensor([[6.0, -12, -12, 18], [6, 6, -6, -6], [0, 0, 0, 0]])
    thirds, ninths = torch.tensor([1.0, 1, 1, 0]) / 3, torch.tensor([1.0, 2, 2, 0]) / 9
    none = torch.zeros(4)
    first, second = model.model.layers
    first.input_layernorm.weight.fill_(1 / 2)  # the maps read (1, 0, 0, 0)
    second.input_layernorm.weight.fill_(3 / 2)  # (1, 2, 2, 0)
    one = torch.tensor([1.0, 0, 0, 0])
    for block, values in ((first, [one, none, 2 * one, none]), (second, [ninths, none, ninths, none])):
        block.post_attention_layernorm.weight.fill_(math.sqrt(3) / 2)  # (1, 1, 1, 0)
        block.self_attn.q_proj.weight.fill_(1.0)  # whatever they are, values are alike
        block.self_attn.k_proj.weight.fill_(1.0)
        block.self_attn.v_proj.weight[:] = torch.stack(values)
        block.self_attn.o_proj.weight.zero_()  # every second column is of a value of 0
    first.self_attn.o_proj.weight[:, ::2] = torch.tensor(
        [[0.0, 1, 0, 0], [0, 0, 1 / 2, 0], [0, 0, 1 / 4, 0], [0] * 4]
    ).T
    second.self_attn.o_proj.weight[:, ::2] = torch.tensor([[2.0, 2, 0, 0], [0] * 4, [0, -2, 0, 0], [-1, 0, 0, 0]]).T
    first.mlp.gate_proj.weight[:] = torch.stack([thirds, thirds])
    first.mlp.up_proj.weight[:] = torch.stack([thirds, 2 * thirds])  # C1 is 2
    first.mlp.down_proj.weight[:] = torch.tensor([[0.0, 1, -1, 1], [0, 0, 1, -1 / 2]]).T
    second.mlp.gate_proj.weight[:] = torch.stack([thirds, 2 * thirds])  # C1 is 2
    second.mlp.up_proj.weight[:] = torch.stack([thirds, thirds])
    second.mlp.down_proj.weight[:] = torch.tensor([[0.0, 0, 1, 1], [0, 0, -1 / 2, 1 / 2]]).T
    return model


def pruner_by_hand(model, windows: Tensor, samples: Tensor) -> TinyPruner:
    plugins = Plugins.load()
    for module in (flap, llm_pruner, shortgpt, taylor, wanda_sp):
        if not plugins.manager.is_registered(module):
            plugins.add(module)
    pruner = TinyPruner(opened(model), plugins)
    pruner.__dict__["texts"] = windows, samples, "by hand"
    return pruner


@pytest.fixture(scope="module")
def by_hand() -> TinyPruner:
    return pruner_by_hand(hand_made(), HAND_WINDOWS, torch.tensor([A, B]))


def hand_scores(pruner: TinyPruner, metric) -> Scores:
    request = pruner.request(frozenset(metric.needs))
    return metric.score(request).check(metric.name, request.shape)


def are(found: Sequence[Tensor] | Tensor | None, expected: Sequence[Sequence[float]] | Sequence[float]) -> bool:
    """Whether values, of units per block or of blocks, are these to five digits."""
    assert found is not None
    rows = [found] if isinstance(found, Tensor) else list(found)
    wanted = [expected] if isinstance(found, Tensor) else list(expected)
    return [r.tolist() for r in rows] == [pytest.approx(w, rel=1e-5, abs=1e-5) for w in wanted]


TURNS = [1 - 1 / 3, 1 - 5 / 6]  # cosines of (1, 0, 0, 0), (1, 2, 2, 0) and (2, 2, 2, 2)


def test_the_hand_made_model_is_what_is_said_of_it():
    seen = reference(hand_made(), HAND_WINDOWS)
    streams = [[1, 0, 0, 0], [1, 1, 1, 0], [1, 2, 2, 0], [2, 2, 2, 0], [2, 2, 2, 2]]
    found = [seen[0].input, seen[0].middle, seen[1].input, seen[1].middle, seen[1].output]
    for states, stream in zip(found, streams, strict=True):
        assert torch.allclose(states, torch.tensor(stream).double().expand(8, 4), atol=1e-9)


def test_shortgpts_scores_by_hand(by_hand):
    """A run of both blocks turns (1, 0, 0, 0) into (2, 2, 2, 2), whose cosine is 1/2: by a third of half a circle."""
    assert are(hand_scores(by_hand, shortgpt.ShortGPT()).block, TURNS)
    one, both = (hand_scores(by_hand, shortgpt.ShortGPT("angular", n)).block for n in (1, 2))
    assert are(one, [math.acos(1 / 3) / math.pi, math.acos(5 / 6) / math.pi])
    assert are(both, [1 / 3, 1 / 3])
    assert float(by_hand.request(frozenset({"pair-angle"})).statistics["pair-angle"]["all"][1]) == pytest.approx(1 / 3)


def test_flexigpts_scores_by_hand(by_hand):
    """1 - cos of the stream with and without: of (1, 1, 1, 0) without KV head 0, (1, 0, 1/2, 0) is left, and so on."""
    found = hand_scores(by_hand, flexigpt.FlexiGPT())
    assert are(found.block, TURNS)
    left = [
        [1.5 / math.sqrt(3 * 1.25), 2.5 / math.sqrt(3 * 2.25)],  # (1, 0, 1/2, 0) and (1, 1, 1/2, 0) of (1, 1, 1, 0)
        [4 / math.sqrt(12 * 4), 18 / math.sqrt(12 * 29)],  # (0, 0, 2, 0) and (3, 4, 2, 0) of (2, 2, 2, 0)
    ]
    assert are(found.attention, [[1 - cosine for cosine in row] for row in left])
    left = [
        [9 / math.sqrt(9 * 12), 5 / math.sqrt(9 * 6)],  # (1, 1, 3, -1) and (1, 2, 0, 1) of (1, 2, 2, 0)
        [12 / math.sqrt(16 * 10), 16 / math.sqrt(16 * 18)],  # (2, 2, 1, 1) and (2, 2, 3, 1) of (2, 2, 2, 2)
    ]
    assert are(found.mlp, [[1 - cosine for cosine in row] for row in left])


def test_comes_and_wanda_sps_scores_by_hand(by_hand):
    """Both add up the absolute sums of what is added: over the stream's own, 3 and 5, then 6 and 8; or a mean over 4 rows."""
    relative = hand_scores(by_hand, come.CoMe())
    assert are(relative.attention, [[1.5 / 3, 0.5 / 3], [4 / 6, 3 / 6]])
    assert are(relative.mlp, [[3 / 5, 3 / 5], [2 / 8, 2 / 8]])
    assert are(relative.block, [2 / 3 + 6 / 5, 7 / 6 + 1 / 2])
    mean = hand_scores(by_hand, wanda_sp.WandaScores())
    assert are(mean.attention, [[1.5 / 4, 0.5 / 4], [4 / 4, 3 / 4]])
    assert are(mean.mlp, [[3 / 4, 3 / 4], [2 / 4, 2 / 4]])


def test_greedys_and_slebs_scores_by_hand(by_hand):
    """The next-token loss of what is left, from its logits."""

    # Without block 0, block 1 runs on (1, 0, 0, 0): the norm of its attention makes that (3, 0, 0, 0), whose values are a
    # third of before, so (1/3, 0, 0, 0) is added. Its MLP reads (sqrt 3, 0, 0, 0), of which gate and up are 1 / sqrt 3 of
    # before, so (0, 0, 0, 2/3) is added. (4/3, 0, 0, 2/3) is (2, 0, 0, 1) x 2 / sqrt 5 behind the last norm. Without block
    # 1, (1, 2, 2, 0) is there two thirds of itself.
    def loss(*scores: float) -> float:  # of the tokens 0 and 1; 2 has 0
        return math.log(sum(math.exp(s) for s in (*scores, 0.0))) - scores[0] * 2 / 6 - scores[1] * 3 / 6

    five = math.sqrt(5)
    without = [
        loss(2 / five * (2 * 6 + 18), 2 / five * (2 * 6 - 6)),
        loss(2 / 3 * (6 - 24 - 24), 2 / 3 * (6 + 12 - 12)),
    ]
    assert are(hand_scores(by_hand, Greedy()).block, without)
    assert are(hand_scores(by_hand, sleb.Sleb(early_barrier=0, latter_barrier=0)).block, without)
    assert are(hand_scores(by_hand, sleb.Sleb(early_barrier=1, latter_barrier=0)).block, [without[1] + 1, without[1]])


# Taylor terms w g of what is added are d times it, entry by entry; a value's row, and gate and up, have together the sum
# of that over what they make (of all their query heads), with one sign each. So a KV head has |v| of its value and what
# is added by its query heads, a channel twice its sum and what is added. Query and key have none: their values are alike.
VECTOR_ATTENTION = [[[6, 2], [2, 1]], [[4, 8], [8, 6]]]  # block, then sample A and B, then unit
ELEMENT_ATTENTION = [[[6, 2], [2, 1]], [[8, 8], [8, 6]]]  # block 1, KV head 0, A: (2, -4) is 2 + 6
VECTOR_MLP = [[[9, 21], [3, 3]], [[3, 15], [6, 0]]]  # block 0, C0, A: (0, 1, -1, 1) has (0, -2, 2, 3): 3 x 3
ELEMENT_MLP = [[[13, 21], [5, 5]], [[7, 15], [6, 2]]]  # 2 x 3 + 7


def test_taylor_scores_of_each_sample_by_hand(by_hand):
    found = by_hand.request(frozenset({"taylor"})).statistics["taylor"]
    for name, expected in (
        ("vector_attention", VECTOR_ATTENTION),
        ("element_attention", ELEMENT_ATTENTION),
        ("vector_mlp", VECTOR_MLP),
        ("element_mlp", ELEMENT_MLP),
    ):
        for block in (0, 1):
            assert are(list(found[name][block]), expected[block])


def test_saaps_scores_by_hand(by_hand):
    """From the Taylor scores above: s_v = 37 / 8 and s_e = 41 / 8 of attention, 60 / 8 and 74 / 8 of the MLP."""
    # Fused, attention has 4 V / 37 + 4 E / 41 and the MLP V / 15 + 2 E / 37. Of two units, standardising leaves +1 for the
    # greater and -1 for the less: of the mean over samples and, less a tenth, of the fluctuation |A - B| / (A + B).
    found = hand_scores(by_hand, saap.Saap())
    # block 0: KV head 0 has 4 times (6 / 37 + 6 / 41) / 6 and fluctuates by 4 / 8; 1 by 1 / 3. Block 1: sums over samples
    # of 48 / 37 + 64 / 41 < 56 / 37 + 56 / 41, fluctuation 0.151 > 0.143
    assert are(found.attention, [[1 - 0.1, -1 + 0.1], [-1 - 0.1, 1 + 0.1]])
    # block 0: 1.30 and 0.47, 2.54 and 0.47; block 1: 0.58 and 0.72, 1.81 and 0.11
    assert are(found.mlp, [[-1 + 0.1, 1 - 0.1], [-1 + 0.1, 1 - 0.1]])
    # with all units: 5.48 and 1.56 in block 0, fluctuating by 0.56; 5.25 and 3.71 in block 1, by 0.17
    assert are(found.block, [-1 - 0.1, 1 + 0.1])
    # mean / std of two values is their sum by their difference; ranks 1/4 and 3/4
    rates = hand_scores(by_hand, saap.Saap(fluctuation="rates")).attention
    sums = [[8 * (4 / 37 + 4 / 41), 3 * (4 / 37 + 4 / 41)], [48 / 37 + 64 / 41, 56 / 37 + 56 / 41]]
    steady = [(a + b) / abs(a - b) for a, b in sums]
    assert rates is not None
    assert are(rates[0], [3 / 4 * steady[0], 1 / 4 * steady[0]])
    assert rates[1].tolist() == pytest.approx([1 / 4 * steady[1], 3 / 4 * steady[1]], rel=1e-3)  # of a small difference


def test_llm_pruners_scores_by_hand(by_hand):
    """By the mean gradient, d = (1, -1/2, -3/2, 1)."""
    # Of block 0, H0 to H3 have -1/2, -3/4, -3/4, 0, C0 has (-1/2, 3/2, 1) and C1 (-3, -1); of block 1, H0 to H3 have
    # (2, -1), 0, 1, -1, C0 has (-3/2, 1) and C1 (3/2, 1).
    element = hand_scores(by_hand, llm_pruner.LlmPruner("param_first"))
    assert are(element.attention, [[1.25 + 1.25, 0.75 + 0.75], [1 + 3, 0 + 2]])
    assert are(element.mlp, [[2 * 2 + 3, 2 * 4 + 4], [2 * 0.5 + 2.5, 2 * 2.5 + 2.5]])
    vector = hand_scores(by_hand, llm_pruner.LlmPruner("vectorize"))
    assert are(vector.attention, [[1.25 + 1.25, 0.75 + 0.75], [1 + 1, 0 + 2]])
    assert are(vector.mlp, [[3 * 2, 3 * 4], [3 * 0.5, 3 * 2.5]])


def test_taylors_scores_by_hand(by_hand):
    """All |w g| by the same d: values, output, gate and up, down, and the two norms."""
    # A norm has for each column what all that reads it has, with its sign: the values of block 0 -5/4 - 3/4, of block 1
    # 1 + 0; gate and up of C0 and C1 of block 0 twice 2 - 4, of block 1 twice -1/2 + 5/2.
    blocks = [
        (1.25 + 0.75) + (1.25 + 0.75) + 2 * (2 + 4) + (3 + 4) + (2 + 4),
        (1 + 0) + (3 + 2) + 2 * (0.5 + 2.5) + (2.5 + 2.5) + (1 + 4),
    ]
    assert are(hand_scores(by_hand, taylor.Taylor()).block, blocks)


def test_magnitudes_scores_by_hand(by_hand):
    """Query and key, values, output, gate, up, down, and the two norms of four weights."""
    blocks = [
        48 + 3 + 1.75 + 2 + 3 + 4.5 + 4 / 2 + 4 * math.sqrt(3) / 2,
        48 + 10 / 9 + 7 + 3 + 2 + 3 + 4 * 3 / 2 + 4 * math.sqrt(3) / 2,
    ]
    assert are(hand_scores(by_hand, magnitude.Magnitude()).block, blocks)


def test_flaps_scores_by_hand():
    """Fluctuations of (1/2 difference of two values)^2 x squared norm of the column, standardised by hand."""
    # Windows of one token each: streams (1, 0, ..) and (0, 1, ..), which every unit reads, so it has two values. What is
    # added keeps both streams equally long, and the norms, set to that length, leave them as they are.
    sizes = {
        "hidden_size": 4,
        "intermediate_size": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 2,
    }
    model = tiny("llama", num_hidden_layers=2, hidden_act="relu", vocab_size=2, rms_norm_eps=1e-12, **sizes)
    model.model.embed_tokens.weight[:] = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]])
    first, second = model.model.layers
    made = [  # the squared length, then for each channel its two values and what it adds for a value of 1
        (1, first.input_layernorm, first.self_attn.v_proj, first.self_attn.o_proj,
         [(1, -1), (1, -1), (1, -1), (1, 1)], [(0, 0, 1, 0), (0, 0, -1, 0), (0, 0, 1, 1), (0, 0, 1, -1)]),
        (5, first.post_attention_layernorm, first.mlp.up_proj, first.mlp.down_proj,  # (1, 0, 2, 0), (0, 1, 0, -2)
         [(1, 1), (1, -1), (1, -1)], [(0, 0, -1, 1), (0, 0, 0, 1), (0, 0, 1, -2)]),
        (5, second.input_layernorm, second.self_attn.v_proj, second.self_attn.o_proj,  # (1, 0, 2, 0), (0, 1, -2, 0)
         [(3, -1), (1, 1), (2, 0), (0, 0)], [(0, 0, 0, 1), (0, 0, -1, -2), (0, 0, 1, 1), (1, 2, 3, 4)]),
        (19, second.post_attention_layernorm, second.mlp.up_proj, second.mlp.down_proj,  # (1, 0, 3, 3), (0, 1, -3, -3)
         [(2, -2), (1, 1), (0, 2)], [(1, 0, 0, 0), (1, 2, 3, 4), (0, 1, 1, 0)]),
    ]  # fmt: skip
    for length, norm, reads, writes, values, columns in made:
        norm.weight.fill_(math.sqrt(length) / 2)
        reads.weight.zero_()
        reads.weight[:, :2] = torch.tensor(values).float()
        writes.weight[:] = torch.tensor(columns).float().T
    for block in (first, second):
        block.mlp.gate_proj.weight[:] = torch.tensor([1.0, 1, 0, 0])  # 1 for both
    pruner = pruner_by_hand(model, torch.tensor([[0, 0], [1, 1]]), torch.tensor([[0, 1]]))
    spread = math.sqrt(172 / 3)
    for variance in ("paper", "released"):  # of two windows, they are the same
        found = hand_scores(pruner, flap.Fluctuation(variance=variance))
        # attention squares once more and takes a head's mean: 1, 1, 4, 0 - 3/2 = -1/2, -1/2, 5/2, -3/2; 16, 0, 4, 0 - 5
        assert are(found.attention, [[-0.5 / math.sqrt(3), 0.5 / math.sqrt(3)], [3 / spread, -3 / spread]])
        assert are(
            found.mlp, [[-2 / math.sqrt(7), -1 / math.sqrt(7), 3 / math.sqrt(7)], [1, -1, 0]]
        )  # 0, 1, 5; 4, 0, 2


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_found_wherever_it_stands(dtype):
    largest = torch.finfo(dtype).max
    assert all_finite(torch.zeros(0, 3, dtype=dtype))
    assert all_finite(torch.tensor([largest, -largest, 0.0], dtype=dtype))
    for broken in (math.nan, math.inf, -math.inf):
        for place in (0, 517, 1000):
            values = drawn(7, 143, dtype=dtype).flatten()
            values[place] = broken
            assert not all_finite(values.reshape(7, 143))


def test_products_of_float16_do_not_overflow():
    large = torch.full((2, 8), 300.0, dtype=torch.float16)
    assert product(large, large.T).tolist() == [[720_000.0] * 2] * 2


@DTYPES
@pytest.mark.parametrize("ignored", [(), (0, 3, 699), range(700)])
def test_cross_entropy_in_pieces_is_that_of_torch(dtype, ignored):
    """Of more rows than a piece has; the gradient has the dtype of the logits, and none where no label is."""
    logits = [(4 * drawn(700, 1000, dtype=dtype)).requires_grad_() for _ in range(2)]
    labels = torch.randint(1000, (700,), generator=torch.Generator().manual_seed(1))
    labels[list(ignored)] = -100
    expected = F.cross_entropy(logits[0].float(), labels, reduction="sum")
    found = cross_entropy(logits[1], labels)
    for loss in (expected, found):
        (0.3 * loss).backward()
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert logits[1].grad.dtype == dtype
    assert close(logits[1].grad.double(), logits[0].grad.double(), 1e-6 if dtype == torch.float32 else 2.0**-8)
    assert not logits[1].grad[list(ignored)].any()


def test_standardise():
    assert standardise(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])
    assert standardise(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]
    assert standardise(torch.tensor([5.0])).tolist() == [0.0]
    assert standardise(torch.zeros(0)).shape == (0,)


# ---------------------------------------------------------------------------------------- saap


def drawn_taylor(seed=0, samples=6, heads=(4, 4, 2), channels=(8, 8, 8)) -> dict[str, tuple[Tensor, ...]]:
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
    found = drawn_taylor(seed)
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
    assert saap.noise(0 * v, 1e-25 * e, "learned") == pytest.approx((1e-30, 1e-25 * s_e), rel=1e-4)


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
    found = drawn_taylor()
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
    found = drawn_taylor()
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
    found = drawn_taylor()
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
