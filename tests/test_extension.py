"""Extension: which blocks run again and in what order, what they store, how they start, and that they run as any model does."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from tiny import attached_for, built, close, config_of, family_of, logits, narrowed, opened, tiny, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from flexi_plugins.data import BlockRecipe, ModelShape, Part, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.hookspecs import TensorRequest
from flexi_plugins.metrics.flexigpt import FlexiGPT
from flexi_plugins.modeling import FlexiForCausalLM
from flexi_plugins.models import known_config
from flexi_plugins.plugins import Plugins, incompatible
from flexi_plugins.pruner import count_only
from flexi_plugins.rewrite import needed_tensors, with_digests, write_checkpoint
from flexi_plugins.strategies.extend import GAINS, Extend, Order, extend, extension_tensors, spans_reaching
from flexi_plugins.studyfile import read_study
from flexi_plugins.testing.bench import TinyPruner
from flexi_plugins.testing.models import tiny_checkpoint

ORDERS = get_args(Order)
TINYLLAMA = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"


def shape_of(blocks: int = 8) -> ModelShape:
    """Return the shape of a tiny Llama with so many blocks."""
    config = config_of("llama", num_hidden_layers=blocks)
    return family_of(config).shape(config)


def published(name: str) -> ModelShape:
    config = known_config(name)
    return family_of(config).shape(config)


def spelt(plan: PruningPlan) -> str:
    """Return the blocks of a plan in order, 3' being block 3 run again with shared weights."""
    assert all(r.shares in (None, r.sources[0]) for r in plan.blocks)
    return " ".join(f"{r.sources[0]}" + "'" * (r.shares is not None) for r in plan.blocks)


def request_for(plan: PruningPlan, model: nn.Module, **changes: Any) -> TensorRequest:
    return TensorRequest(plan, PruningPlan.identity(plan.shape), opened(model), **changes)


def started(plan: PruningPlan, model: nn.Module, gain: float) -> Any:
    """Return the extended model as it starts at an output gain."""
    made = extension_tensors(request_for(plan, model), gain)
    return built(with_digests(plan, made), model, made)


def trained(model: nn.Module, order: Order, **options: Any) -> tuple[PruningPlan, dict[str, Tensor]]:
    """Return an extension of a tiny model by blocks 1 to 3, whose adapters and output norms are somewhere."""
    return attached_for(extend(opened(model).shape, 1, 3, order=order, rank=3, **options))


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load()


# ---------------------------------------------------------------------------------------- which blocks, in what order


@pytest.mark.parametrize(
    ("order", "repetitions", "expected"),
    [
        ("block", 2, "0 1 2 3 3' 4 4' 5 5' 6 7"),
        ("sequential", 2, "0 1 2 3 4 5 3' 4' 5' 6 7"),
        ("block", 3, "0 1 2 3 3' 3' 4 4' 4' 5 5' 5' 6 7"),
        ("sequential", 3, "0 1 2 3 4 5 3' 4' 5' 3' 4' 5' 6 7"),
    ],
)
def test_blocks_3_to_5_run_again(order: Order, repetitions: int, expected: str) -> None:
    assert spelt(extend(shape_of(), 3, 5, repetitions, order=order)) == expected


def test_the_whole_model_and_a_single_block_can_be_the_span() -> None:
    shape = shape_of(3)
    assert spelt(extend(shape, 0, 2, order="sequential")) == "0 1 2 0' 1' 2'"
    assert spelt(extend(shape, 2, 2)) == "0 1 2 2'"
    assert spelt(extend(shape_of(1))) == "0 0'"


def test_first_runs_are_untouched_and_each_later_one_is_a_block_with_adapters_and_output_norms() -> None:
    plan = extend(shape_of(), 3, 5)
    assert plan.blocks[3] == BlockRecipe(parts=(Part(3),))
    assert plan.blocks[4] == BlockRecipe(parts=(Part(3),), shares=3, rank=2, output_norm=True)  # 32 hidden / 16
    assert {r.rank for r in extend(shape_of(), 3, 5, rank=7).blocks} == {0, 7}
    assert [plan.donor(position) for position in (3, 4, 6, 8)] == [None, 3, 5, 7]


@pytest.mark.parametrize("order", ORDERS)
def test_a_number_of_blocks_is_made_of_the_middle(order: Order) -> None:
    """TinyLlama's 14 and SmolLM2's 6 added blocks: as many lie in front of the span as behind it."""
    for name, blocks, span in ((TINYLLAMA, 36, range(4, 18)), ("smollm2-135m", 36, range(12, 18))):
        plan = extend(published(name), blocks=blocks, order=order)
        assert len(plan.blocks) == 36
        assert [r.sources[0] for r in plan.blocks if r.shares is not None] == list(span)


def test_the_recipe_makes_36_blocks_of_tinyllama_and_compares_two_orders(plugins: Plugins) -> None:
    """From the shape alone: no weights, and no training."""
    recipe = Path(__file__).parents[1] / "baselines" / "recipes" / "extend-tinyllama.toml"
    study = read_study(recipe, plugins)
    assert (study.model, len(published(study.model).blocks)) == (TINYLLAMA, 22)
    plans = [
        count_only(published(study.model), plugins.get("strategy", method.name, method.options), 0.0)
        for _, method, _ in study.combinations
    ]
    assert [len(plan.blocks) for plan in plans] == [36, 36]
    assert {sum(r.shares is not None for r in plan.blocks) for plan in plans} == {14}
    one, other = ([r.sources[0] for r in plan.blocks] for plan in plans)
    assert sorted(one) == sorted(other)
    assert one != other


def test_a_span_and_a_number_of_blocks_give_the_repetitions() -> None:
    assert spelt(extend(shape_of(), 3, 5, blocks=14)) == spelt(extend(shape_of(), 3, 5, 3))
    assert spelt(extend(shape_of(), blocks=14, repetitions=4)) == spelt(extend(shape_of(), 3, 4, 4))


def test_without_any_option_it_is_what_the_paper_did_to_tinyllama() -> None:
    assert extend(published(TINYLLAMA)) == extend(published(TINYLLAMA), blocks=36)


def test_the_spans_that_reach_a_number_of_blocks() -> None:
    assert spans_reaching(22, 36) == [(14, 2), (7, 3), (2, 8), (1, 15)]
    assert spans_reaching(30, 36) == [(6, 2), (3, 3), (2, 4), (1, 7)]
    assert spans_reaching(4, 14) == [(2, 6), (1, 11)]  # five or ten blocks there are not
    for length, times in spans_reaching(8, 20):
        assert len(extend(shape_of(), 0, length - 1, times).blocks) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 3}, "start and end belong together, found start = 3, end = None"),
        ({"end": 3, "blocks": 12}, "start and end belong together, found start = None, end = 3"),
        ({"start": 5, "end": 3}, "start = 5, end = 3, expected 0 <= start <= end <= 7 on this model"),
        ({"start": 3, "end": 8}, "start = 3, end = 8, expected 0 <= start <= end <= 7 on this model"),
        ({"start": -1, "end": 3}, "start = -1, end = 3, expected 0 <= start"),
        ({"start": 3, "end": 5, "repetitions": 1}, "repetitions = 1, expected at least 2"),
        ({"blocks": 8}, "blocks = 8, expected more than the 8 of this model"),
        ({"start": 3, "end": 5, "blocks": 10}, "makes 10 blocks of 8; possible are, .*: 2 x 2, 1 x 3$"),
        ({"start": 3, "end": 5, "blocks": 9}, "makes 9 blocks of 8; possible are, .*: 1 x 2$"),
        (
            {"start": 3, "end": 5, "blocks": 14, "repetitions": 2},
            "makes 14 blocks of 8; .*: 6 x 2, 3 x 3, 2 x 4, 1 x 7$",
        ),
        ({"blocks": 13, "repetitions": 3}, "makes 13 blocks of 8; .*: 5 x 2, 1 x 6$"),
        ({"blocks": 30}, "makes 30 blocks of 8; .*: 2 x 12, 1 x 23$"),
        ({"order": "zigzag"}, "unknown order 'zigzag': there is block, sequential"),
        ({"rank": -1}, "rank = -1, expected at least 0"),
    ],
)
def test_what_is_not_possible_is_said_with_what_is(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FlexiError, match=f"extend: .*{message}"):
        extend(shape_of(), **options)


@pytest.mark.parametrize("options", [{"output_gain": 0.0}, {"output_gain": -1.0}, {"tolerance": 0.0}])
def test_gains_and_tolerances_are_positive(options: dict[str, float]) -> None:
    with pytest.raises(FlexiError, match=r"extend: (output_gain|tolerance) = (0|-1), expected a positive"):
        count_only(shape_of(), Extend(**options), 0.0)


# ---------------------------------------------------------------------------------------- what it stores


def test_the_parameters_of_smollm2_are_counted_by_hand() -> None:
    """Six times: adapters of rank 36 on seven maps, two output norms and two norms of 576."""
    plan = extend(published("smollm2-135m"), blocks=36)
    adapters = 36 * (2 * (576 + 576) + 2 * (192 + 576) + 3 * (1536 + 576))
    assert plan.shape.parameters == 134_515_008
    assert plan.stored_parameters == 134_515_008 + 6 * (adapters + 4 * 576) == 136_726_848
    block = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576 + 2 * 576
    assert plan.runtime_parameters == 134_515_008 + 6 * (block + adapters + 2 * 576)
    assert plan.ratio == pytest.approx(-6 * (adapters + 4 * 576) / 134_515_008)


def test_the_parameters_of_tinyllama_are_counted_by_hand() -> None:
    """At the paper's rank of 256: 9.2 million a repetition, 11.7 % of the model for fourteen."""
    plan = extend(published(TINYLLAMA), blocks=36, rank=256)
    adapters = 256 * (2 * (2048 + 2048) + 2 * (256 + 2048) + 3 * (5632 + 2048))
    assert adapters == 9_175_040
    assert plan.stored_parameters == 1_100_048_384 + 14 * (adapters + 4 * 2048) == 1_228_613_632


@pytest.mark.parametrize("kind", ["llama-tied", "llama-biases", "qwen3-biases"])
def test_a_model_and_its_file_hold_what_the_plan_counts(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    plan, attached = trained(model, "sequential", repetitions=3)
    assert sum(p.numel() for p in built(plan, model, attached).parameters()) == plan.stored_parameters
    write_checkpoint(plan, opened(model), attached, tmp_path / "x")
    stored = load_file(tmp_path / "x" / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == plan.stored_parameters


# ---------------------------------------------------------------------------------------- what it computes


def normalised(gain: Tensor) -> Callable[..., Any]:
    """Return a hook that normalises a sub-layer's output (eq. 6)."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-6).sqrt() * gain
        return (h, *output[1:]) if isinstance(output, tuple) else h

    return hook


def by_hand(model: Any, blocks: Iterable[str], attached: dict[str, Tensor]) -> Any:
    """Return a transformers model of these blocks: repetitions (3') have adapters in their weights, and hooks."""
    layers = []
    for position, name in enumerate(blocks):
        layer = copy.deepcopy(model.model.layers[int(name.rstrip("'"))])
        if name.endswith("'"):
            for role, path in family_of(model.config).ROLES.items():
                a, b = (attached[f"blocks.{position}.{role}.lora_{letter}"] for letter in "ab")
                layer.get_submodule(path).weight.data += a @ b
            layer.self_attn.register_forward_hook(normalised(attached[f"blocks.{position}.attention.output_norm"]))
            layer.mlp.register_forward_hook(normalised(attached[f"blocks.{position}.mlp.output_norm"]))
        layers.append(layer)
    expected = copy.deepcopy(model)
    expected.model.layers = nn.ModuleList(layers)
    expected.config.num_hidden_layers = len(layers)
    return expected


@pytest.mark.parametrize("kind", ["llama", "llama-biases"])
@pytest.mark.parametrize(("order", "blocks"), [("block", "0 1 1' 2 2' 3 3' 4"), ("sequential", "0 1 2 3 1' 2' 3' 4")])
def test_an_extended_model_is_transformers_blocks_in_this_order(kind: str, order: Order, blocks: str) -> None:
    model, ids = tiny(kind), tokens()
    plan, attached = trained(model, order)
    expected = logits(by_hand(model, blocks.split(), attached), ids)
    assert close(logits(built(plan, model, attached), ids), expected, 1e-4)
    assert not close(expected, logits(model, ids), 0.1)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2-mixed"])
@pytest.mark.parametrize("order", ORDERS)
def test_what_it_writes_with_a_cache_is_what_it_writes_without(kind: str, order: Order) -> None:
    """Also where sliding windows of five tokens end before the text does."""
    model = tiny(kind)
    plan, attached = trained(model, order)
    extended = built(plan, model, attached)
    assert isinstance(extended, FlexiForCausalLM)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, plain = (extended.generate(tokens(), use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2-mixed"])
@pytest.mark.parametrize("order", ORDERS)
def test_an_exported_folder_gives_the_same_logits_in_transformers(kind: str, order: Order, tmp_path: Path) -> None:
    model = tiny(kind)
    plan, attached = trained(model, order)
    write_checkpoint(plan, opened(model), attached, tmp_path / "x")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert type(again) is FlexiForCausalLM
    assert close(logits(again, tokens()), logits(built(plan, model, attached), tokens()))
    assert PruningPlan.from_json(json.loads((tmp_path / "x" / "plan.json").read_text())) == plan


def test_the_draft_of_an_extended_model_is_the_unextended_one() -> None:
    model = tiny()
    plan, attached = trained(model, "block")
    assert close(logits(built(plan, model, attached).draft(), tokens()), logits(model, tokens()))


@pytest.mark.parametrize("kind", ["llama-gqa-tied", "qwen2-mixed"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_sweep_runs_it_as_the_model_in_memory_runs(kind: str, order: Order, plugins: Plugins) -> None:
    """Sources that go back, from 4 to 1, take the sweep a second pass over the checkpoint."""
    own = TinyPruner(tiny_checkpoint(kind), plugins)
    planned = Planned(*attached_for(extend(own.checkpoint.shape, 1, 4, order=order)))
    [found] = own.calibrator.losses([planned])
    assert found == pytest.approx(loss(own.model(planned), own.texts[0]), rel=1e-4)


def loss(model: nn.Module, ids: Tensor) -> float:
    """Return the mean negative log-likelihood of ids under a transformers model, nats per token."""
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


# ---------------------------------------------------------------------------------------- how it starts


@pytest.mark.parametrize("order", ORDERS)
def test_with_a_smaller_gain_it_starts_nearer_to_the_unextended_model(order: Order) -> None:
    model, ids = tiny(), tokens()
    plan, expected = extend(opened(model).shape, 1, 3, order=order), logits(model, ids)
    away = [float((logits(started(plan, model, gain), ids) - expected).abs().max()) for gain in (1e-1, 1e-3, 1e-5)]
    assert away[0] > 10 * away[1] > 100 * away[2]
    assert close(logits(started(plan, model, 1e-5), ids), expected, 1e-3)


@pytest.mark.parametrize("rank", [0, 3, 64])
def test_adapters_start_as_zero_times_orthonormal_rows(rank: int) -> None:
    """The rank of a map is at most its smaller side."""
    model = tiny()
    plan = extend(opened(model).shape, 1, 3, rank=rank)
    made = extension_tensors(request_for(plan, model), 0.25)
    assert sorted(made) == sorted(needed_tensors(plan))
    for name, tensor in made.items():
        _, position, role, kind = name.split(".")
        if kind == "output_norm":
            assert tensor.tolist() == [0.25] * 32
            continue
        rows, columns = plan.shape.maps(plan.shape.blocks[int(position) // 2])[role]
        size = min(rank, rows, columns)
        assert tensor.shape == ((rows, size) if kind == "lora_a" else (size, columns))
        assert close(tensor @ tensor.T, torch.eye(size)) if kind == "lora_b" else not tensor.any()


def test_adapters_are_drawn_with_the_seed_and_each_for_itself() -> None:
    model = tiny()
    plan = extend(opened(model).shape, 1, 2, 3)
    first, same, other = (extension_tensors(request_for(plan, model, seed=seed), 0.1) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    drawn = [t for made in (first, other) for n, t in made.items() if n.endswith(".query.lora_b")]
    assert len(drawn) == 8
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_new_tensors_are_of_the_weights_dtype_and_attached_ones_are_left_alone() -> None:
    model = tiny().to(torch.bfloat16)
    plan = extend(opened(model).shape, 1, 3)
    made = extension_tensors(request_for(plan, model), 0.1)
    assert {t.dtype for t in made.values()} == {torch.bfloat16}
    known = {n: t for n, t in made.items() if n.startswith("blocks.2.")}
    assert known
    rest = extension_tensors(request_for(plan, model, attached=known), 0.1)
    assert rest.keys() == made.keys() - known.keys()


@pytest.mark.parametrize("order", ORDERS)
def test_both_adapters_train(order: Order) -> None:
    """B stands still at first, since A is zero; from the first step of A on it learns as well."""
    model, ids = tiny(), tokens()
    extended = started(extend(opened(model).shape, 1, 3, order=order, rank=3), model, 0.1).train()
    adapters = {n: p.requires_grad_(True) for n, p in extended.named_parameters() if "lora_" in n}
    assert len(adapters) == 3 * 7 * 2
    optimiser = torch.optim.SGD(adapters.values(), lr=0.1)
    extended(ids, labels=ids).loss.backward()
    for name, parameter in adapters.items():
        assert bool(parameter.grad.any()) == name.endswith("lora_a"), name
    optimiser.step()
    optimiser.zero_grad()
    extended(ids, labels=ids).loss.backward()
    assert all(bool(parameter.grad.any()) for parameter in adapters.values())


# ---------------------------------------------------------------------------------------- the calibrated gain


def gain_of(tensors: dict[str, Tensor]) -> float:
    """Return the one gain of the output norms."""
    [gain] = {float(t[0]) for n, t in tensors.items() if n.endswith("output_norm") and len(t.unique()) == 1}
    return gain


def chosen(losses: Sequence[float], **options: Any) -> float:
    """Return the gain that is chosen where the candidates have these losses, behind the unextended model's."""
    model = tiny()
    plan = extend(opened(model).shape, 1, 3)
    before = PruningPlan.identity(plan.shape)

    def quality(plans: Any, measure: str, tensors: Any) -> list[float]:
        assert plans == [before, *[plan] * len(GAINS)]
        assert measure == "loss"
        assert tensors[0] == {}
        assert [gain_of(made) for made in tensors[1:]] == pytest.approx(GAINS)
        return [*losses]

    return gain_of(Extend(**options).tensors(request_for(plan, model, quality=quality)))


def test_the_largest_gain_that_starts_near_enough_is_chosen() -> None:
    """log(1.01) is 0.00995; a model that starts better than the unextended one is near enough."""
    more = [0.0, 0.001, 0.0, 0.0099, 0.0100, -0.5, 0.009, 0.02, 1.0, math.inf]  # the unextended model first
    assert chosen([3.0 + m for m in more]) == pytest.approx(GAINS[5])
    assert chosen([3.0 + m for m in more], tolerance=0.03) == pytest.approx(GAINS[6])
    assert chosen([3.0 + m for m in more], tolerance=2.0) == pytest.approx(GAINS[7])


def test_losses_are_compared_with_the_unextended_models() -> None:
    assert chosen([3.0, *[3.5] * 8, 3.001]) == pytest.approx(GAINS[8])
    with pytest.raises(FlexiError, match=r"extend: at every output gain of 0\.0001\.\.1 .* 0\.5 nats per token above"):
        chosen([3.0, *[4.0] * 8, 3.5])


def test_a_gain_that_is_given_is_not_calibrated() -> None:
    model = tiny()
    request = request_for(extend(opened(model).shape, 1, 3), model)  # which cannot run candidate plans
    assert gain_of(Extend(output_gain=0.5).tensors(request)) == 0.5


@pytest.mark.parametrize("kind", ["llama-gqa-tied", "mistral"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_start_is_within_a_percent_of_the_unextended_perplexity(kind: str, order: Order, plugins: Plugins) -> None:
    own = TinyPruner(tiny_checkpoint(kind), plugins)
    ids, strategy = own.texts[0], Extend(start=1, end=4, order=order)
    unextended = loss(own.model(PruningPlan.identity(own.checkpoint.shape)), ids)
    near = []
    for gain in GAINS:
        candidate = own.make("none", replace(strategy, output_gain=gain), 0.0)
        if math.exp(loss(own.model(candidate), ids) - unextended) <= 1.01:
            near.append(gain)
    found = own.make("none", strategy, 0.0)
    assert gain_of(dict(found.attached)) == pytest.approx(max(near))
    assert math.exp(loss(own.model(found), ids) - unextended) <= 1.01


# ---------------------------------------------------------------------------------------- plans of it, and as a plugin


@pytest.mark.parametrize("order", ORDERS)
def test_a_plan_survives_json(order: Order) -> None:
    plan, _ = attached_for(extend(shape_of(), 3, 5, 3, order=order))
    read = PruningPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert read == plan
    assert read.hash == plan.hash


@pytest.mark.parametrize("order", ORDERS)
def test_taking_the_repetitions_away_gives_the_original_back(order: Order) -> None:
    plan = extend(shape_of(), 3, 5, order=order)
    first = [p for p, r in enumerate(plan.blocks) if r.shares is None]
    assert plan.compose(PruningPlan.keep(plan.new_shape, first)).is_identity


def test_what_is_removed_in_front_of_it_stays_removed() -> None:
    pruned = PruningPlan.keep(shape_of(), [0, 2, 3, 5, 7])
    plan = pruned.compose(extend(pruned.new_shape, 1, 3, order="sequential"))
    assert spelt(plan) == "0 2 3 5 2' 3' 5' 7"
    extended = extend(shape_of(), 3, 5)
    assert spelt(extended.compose(PruningPlan.keep(extended.new_shape, range(2, 11)))) == "2 3 3' 4 4' 5 5' 6 7"


def test_a_block_that_others_run_with_cannot_go_and_a_changed_one_cannot_be_repeated() -> None:
    plan = extend(shape_of(), 3, 5)
    without = [p for p in range(len(plan.blocks)) if p != 3]
    with pytest.raises(FlexiError, match="its donor, block 3, is not whole and unshared in this plan"):
        plan.compose(PruningPlan.keep(plan.new_shape, without))
    narrow = narrowed(shape_of(), (0, 2), None)
    with pytest.raises(FlexiError, match="block 4 shares weights with a block that an earlier step changed"):
        narrow.compose(extend(narrow.new_shape, 3, 5))


def test_it_goes_with_no_metric_and_takes_no_ratio() -> None:
    assert incompatible(FlexiGPT(), Extend()) == "extend chooses without scores; it goes with the metric none"
    shape = published("smollm2-135m")
    assert count_only(shape, Extend(blocks=36, order="sequential", rank=8), 0.0) == extend(
        shape, blocks=36, order="sequential", rank=8
    )


def test_a_plan_that_was_read_gets_its_tensors_again(plugins: Plugins) -> None:
    own = TinyPruner(tiny_checkpoint("qwen3"), plugins)
    made = own.make("none", Extend(blocks=9, repetitions=4, output_gain=0.01, rank=2), 0.0)
    assert spelt(made.plan) == "0 1 2 2' 2' 2' 3 4 5"
    bare = replace(made.plan, tensors=()).to_json()
    again = own.attach(PruningPlan.from_json(json.loads(json.dumps(bare))))
    assert again.plan == made.plan
