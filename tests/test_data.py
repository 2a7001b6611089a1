"""Plans and shapes: exact parameter counts, rules of validity, JSON, and composition."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import pytest
from tiny import KINDS, built, change, close, family_of, logits, narrowed, opened, random_plan, sharing, tiny, tokens
from torch import nn

from flexi_plugins.checkpoint import Checkpoint
from flexi_plugins.data import BlockRecipe, BlockShape, ModelShape, Part, PruningPlan
from flexi_plugins.errors import FlexiError, OutOfReach
from flexi_plugins.modeling import resized_config
from flexi_plugins.models import known_config
from flexi_plugins.pruner import count_only
from flexi_plugins.rewrite import build_model
from flexi_plugins.strategies.concat_merge import ConcatMerge
from flexi_plugins.strategies.remove_blocks import RemoveBlocks
from flexi_plugins.strategies.remove_units import RemoveUnits
from flexi_plugins.strategies.share_lora import ShareLora

SHAPE = ModelShape((BlockShape(8, 4, 4, 24),) * 5, hidden=32, vocabulary=61, tied=False)


def shape_of(name: str) -> ModelShape:
    config = known_config(name)
    return family_of(config).shape(config)


# ---------------------------------------------------------------------------------------- exact numbers


def test_llama_7b_has_its_published_number_of_parameters():
    assert shape_of("huggyllama/llama-7b").parameters == 6_738_415_616
    assert shape_of("smollm2-135m").parameters == 134_515_008


@pytest.mark.parametrize(
    ("model", "last", "left"),
    [
        ("huggyllama/llama-7b", 29, 5_422_977_024),
        ("lmsys/vicuna-7b-v1.3", 29, 5_422_977_024),
        ("meta-llama/Llama-3.1-8B", 29, 6_612_586_496),
        ("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", 17, 945_907_712),
    ],
)
def test_llm_pruners_quarter_of_the_groups(model, last, left):
    plan = count_only(shape_of(model), RemoveUnits(mode="uniform", fraction=0.25, first=4, last=last), 0.2)
    assert plan.stored_parameters == left
    assert not plan.origin  # nothing was rounded


def test_ten_removed_blocks_of_llama_2_7b():
    plan = count_only(shape_of("meta-llama/Llama-2-7b-hf"), RemoveBlocks(blocks=10), 0.5)
    assert round(100 * plan.ratio, 2) == 30.03


def test_nine_shared_blocks_store_little_more_than_none():
    shape = shape_of("meta-llama/Llama-2-7b-hf")
    shared = count_only(shape, ShareLora(blocks=9), 0.5)
    removed = count_only(shape, RemoveBlocks(blocks=9), 0.5)
    assert {r.rank for r in shared.blocks if r.shares is not None} == {256}
    assert round(100 * (shared.stored_parameters / removed.stored_parameters - 1), 2) == 3.66
    assert shared.runtime_parameters > shape.parameters


@pytest.mark.parametrize(("model", "reach"), [("huggyllama/llama-7b", 48.05), ("smollm2-135m", 39.48)])
def test_concatenation_reaches_half_of_the_blocks_and_repeat_beyond(model, reach):
    shape = shape_of(model)
    most = math.floor(ConcatMerge().reach(shape) * 1e4) / 1e4
    assert ConcatMerge().reach(shape) * 100 == pytest.approx(reach, abs=0.01)
    assert len(count_only(shape, ConcatMerge(), most).blocks) == len(shape.blocks) / 2
    with pytest.raises(OutOfReach, match=f"up to {most:.4f}"):
        count_only(shape, ConcatMerge(), most + 0.01)
    assert count_only(shape, ConcatMerge(repeat=True), most + 0.1).ratio >= most + 0.1


@pytest.mark.parametrize(
    ("arguments", "key", "expected"),
    [
        (
            "huggyllama/llama-7b remove-units mode=uniform fraction=0.25 first=4 last=29",
            "stored_parameters",
            5_422_977_024,
        ),
        ("meta-llama/Llama-2-7b-hf remove-blocks blocks=10", "ratio", pytest.approx(0.3003, abs=5e-5)),
    ],
)
def test_the_command_line_prints_them(arguments, key, expected):
    model, strategy, *options = arguments.split()
    command = [sys.executable, "-m", "flexi_plugins.cli", "plan", "--count-only", "--json"]
    command += ["--model", model, "--strategy", strategy, *(x for o in options for x in ("--strategy-option", o))]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found[key] == expected


# ---------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_transformers_model(kind):
    model = tiny(kind)
    assert opened(model).shape.parameters == sum(p.numel() for p in model.parameters())
    promised = opened(model).tensor_names()
    assert promised == {n: tuple(p.shape) for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["llama", "llama-biases", "qwen2", "qwen3"])
def test_a_units_cost_is_what_the_model_loses(kind):
    shape = opened(tiny(kind)).shape
    heads, channels = narrowed(shape, range(1, 4), None), narrowed(shape, None, range(1, 24))
    count = len(shape.blocks)
    assert shape.parameters - heads.stored_parameters == count * shape.head_cost(shape.blocks[0])
    assert shape.parameters - channels.stored_parameters == count * shape.channel_cost()


def test_run_time_parameters_and_macs_are_those_of_the_model():
    model = tiny("llama-tied")
    shape = opened(model).shape
    plan = change(PruningPlan.identity(shape), {1: BlockRecipe(parts=(Part(1, (0, 2), tuple(range(7))),))})
    found = built(plan, model)
    assert plan.runtime_parameters == sum(p.numel() for p in found.parameters())
    assert plan.macs_per_token == sum(m.weight.numel() for m in found.modules() if isinstance(m, nn.Linear))
    shared = sharing(shape, {1: 0, 3: 2}, rank=5)
    maps = shape.maps(shape.blocks[0])
    adapters = sum(5 * (r + c) for r, c in maps.values())
    assert shared.runtime_parameters == shape.parameters + 2 * (adapters + 2 * shape.hidden)
    assert shared.macs_per_token == PruningPlan.identity(shape).macs_per_token + 2 * adapters
    assert shared.stored_parameters == shared.runtime_parameters - 2 * sum(r * c for r, c in maps.values())


# ---------------------------------------------------------------------------------------- validity

WHOLE = PruningPlan.identity(SHAPE).blocks
UNEVEN = replace(
    SHAPE, blocks=(BlockShape(8, 4, 4, 24), BlockShape(8, 4, 4, 16), BlockShape(4, 4, 4, 24), *SHAPE.blocks[3:])
)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (BlockRecipe(), "expected parts or a mix, found neither"),
        (BlockRecipe(parts=(Part(0),), mix=((0, 1.0),)), "expected parts or a mix, found both"),
        (BlockRecipe(parts=(Part(5),)), "source 5 is not one of the model's blocks 0..4"),
        (BlockRecipe(parts=(Part(-1),)), "source -1 is not one"),
        (BlockRecipe(mix=((0, 1.0), (7, 1.0))), "source 7 is not one"),
        (BlockRecipe(parts=(Part(0),), norms=((9, 1.0),)), "source 9 is not one"),
        (BlockRecipe(parts=(Part(0),), shares=8), "source 8 is not one"),
        (BlockRecipe(mix=((0, math.nan), (1, 1.0))), "coefficients must be finite"),
        (BlockRecipe(parts=(Part(0),), norms=((0, math.inf),)), "coefficients must be finite"),
        (BlockRecipe(parts=(Part(1, (1, 0)),)), "KV heads of block 1: indices must ascend"),
        (BlockRecipe(parts=(Part(1, (1, 1)),)), "KV heads of block 1: indices must ascend"),
        (BlockRecipe(parts=(Part(1, (0, 4)),)), r"KV heads of block 1: expected indices in 0..3, found 0..4"),
        (BlockRecipe(parts=(Part(1, None, (0, 24)),)), r"channels of block 1: expected indices in 0..23, found 0..24"),
        (BlockRecipe(parts=(Part(0),), gain=0.0), "gain: expected a positive number, found 0"),
        (BlockRecipe(parts=(Part(0),), gain=math.nan), "gain: expected a positive number, found nan"),
        (BlockRecipe(parts=(Part(0),), rank=2), "adapters and output norms belong to blocks that share"),
        (BlockRecipe(parts=(Part(0),), output_norm=True), "adapters and output norms belong to blocks that share"),
        (BlockRecipe(parts=(Part(2),), shares=0, rank=-1), "adapter rank must not be negative, found -1"),
        (BlockRecipe(parts=(Part(2, (0,)),), shares=0), "only a whole block can run with the weights of another"),
        (BlockRecipe(mix=((2, 1.0),), shares=0), "only a whole block can run with the weights of another"),
        (BlockRecipe(parts=(Part(2),), shares=2), "its donor, block 2, is not whole and unshared in this plan"),
    ],
)
def test_an_invalid_block_is_named(recipe, message):
    with pytest.raises(FlexiError, match=rf"plan: block 2.*{message}"):
        PruningPlan(SHAPE, (*WHOLE[:2], recipe, *WHOLE[3:]))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (BlockRecipe(parts=(Part(0), Part(2))), "differ in head size, heads per group or attention type"),
        (BlockRecipe(mix=((0, 0.5), (1, 0.5))), "a mix needs blocks of one width"),
        (BlockRecipe(parts=(Part(1),), shares=0), "its donor, block 0, has another width"),
    ],
)
def test_blocks_that_do_not_fit_together_are_named(recipe, message):
    blocks = PruningPlan.identity(UNEVEN).blocks
    with pytest.raises(FlexiError, match=rf"plan: block 1.*{message}"):
        PruningPlan(UNEVEN, (blocks[0], recipe, *blocks[2:]))


def test_attention_types_do_not_mix():
    shape = replace(SHAPE, blocks=(SHAPE.blocks[0], replace(SHAPE.blocks[1], attention_type="sliding_attention")))
    with pytest.raises(FlexiError, match=r"block 0: blocks .* differ in .* attention type"):
        PruningPlan(shape, (BlockRecipe(parts=(Part(0, (0,)), Part(1, (1,)))),))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": ()}, "no block is left"),
        ({"embedding_gain": 0.0}, "embedding_gain: expected a positive number, found 0"),
        ({"final_norm_gain": math.inf}, "final_norm_gain: expected a positive number"),
        ({"tensors": (("blocks.9.query.lora_a", "x"),)}, "'blocks.9.query.lora_a' belongs to no block"),
        ({"tensors": (("head.bias", "x"),)}, "'head.bias' belongs to no block"),
    ],
)
def test_a_plan_is_valid_as_a_whole(changes, message):
    with pytest.raises(FlexiError, match=message):
        replace(PruningPlan.identity(SHAPE), **changes)


def test_a_donor_has_no_biases_that_the_original_has_not():
    shape = SHAPE
    blocks = list(PruningPlan.identity(shape).blocks)
    blocks[0] = replace(blocks[0], own=("query.bias",))
    blocks[1] = BlockRecipe(parts=(Part(1),), shares=0, rank=1)
    with pytest.raises(FlexiError, match="block 1: its donor, block 0, has biases that no block of the original has"):
        PruningPlan(shape, tuple(blocks))


def test_a_donor_must_stay():
    plan = sharing(SHAPE, {3: 1})
    with pytest.raises(FlexiError, match="block 2: its donor, block 1, is not whole"):
        replace(plan, blocks=(plan.blocks[0], *plan.blocks[2:]))
    with pytest.raises(FlexiError, match="block 3: its donor, block 1, is not whole"):
        change(plan, {1: BlockRecipe(parts=(Part(1, (0, 1)),))})


# ---------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("seed", range(10))
def test_a_plan_survives_json(seed):
    plan = random_plan(SHAPE, random.Random(seed), closed=False)
    plan = replace(plan, tensors=(("blocks.0.query.lora_a", "00ff"),), origin={"metric": "x"}, embedding_gain=1.25)
    text = json.dumps(plan.to_json())
    again = PruningPlan.from_json(json.loads(text))
    assert again == plan
    assert again.hash == plan.hash
    assert again.origin == plan.origin
    assert replace(plan, origin={}).hash == plan.hash
    assert replace(plan, embedding_gain=1.5).hash != plan.hash


def test_hashes_do_not_change_between_versions():
    plan = change(sharing(SHAPE, {3: 1}), {0: BlockRecipe(parts=(Part(0, (0, 2), (1,)),), gain=1.5)})
    assert plan.hash == "4a678b1a8aa437d0ea79db5ee2c6cc0b70dca446f747f2df9955ee3b1593be1b"


@pytest.mark.parametrize("damage", [lambda v: v.pop("blocks"), lambda v: v["blocks"][0].update(extra=1)])
def test_a_file_that_is_no_plan_says_so(damage):
    value = PruningPlan.identity(SHAPE).to_json()
    damage(value)
    with pytest.raises(FlexiError, match="plan file: not a plan of this version"):
        PruningPlan.from_json(value)


def test_rules_hold_for_files_too():
    value = PruningPlan.identity(SHAPE).to_json()
    value["blocks"][1]["parts"][0]["kv_heads"] = [9]
    with pytest.raises(FlexiError, match=r"block 1: KV heads of block 1: expected indices in 0\.\.3"):
        PruningPlan.from_json(value)


# ---------------------------------------------------------------------------------------- composition


def reopened(model: nn.Module, plan: PruningPlan, original: Checkpoint) -> Checkpoint:
    """Return the model of a plan as a checkpoint of its own, also where no plain configuration could describe it."""
    config = resized_config(original.config, len(plan.blocks))
    again = Checkpoint("again", config, original.family, model.state_dict().__getitem__, None)
    again.shape = plan.new_shape
    return again


@pytest.mark.parametrize("kind", ["llama-biases", "qwen2-mixed"])
def test_a_plan_of_a_plan_is_a_plan_of_the_original(kind):
    model, ids, composed = tiny(kind), tokens(2, 9), 0
    original = opened(model)
    for seed in range(12):
        rng = random.Random(seed)
        first = random_plan(original.shape, rng, closed=False)
        if any(r.gain != 1.0 for r in first.blocks):
            first = replace(first, blocks=tuple(replace(r, gain=1.0) for r in first.blocks))
        second = random_plan(first.new_shape, rng, closed=False)
        if any(r.mix for r in first.blocks):
            with suppress(FlexiError):  # units of a mix of blocks do not compose
                first.compose(second)
            continue
        both = first.compose(second)
        again = reopened(build_model(first, original), first, original)
        assert both.new_shape == second.new_shape
        assert both.stored_parameters == second.stored_parameters
        assert close(logits(build_model(both, original), ids), logits(build_model(second, again), ids)), seed
        composed += 1
    assert composed >= 5


def test_composition_is_associative():
    for seed in range(30):
        rng = random.Random(seed)
        a = random_plan(SHAPE, rng)
        a = replace(a, blocks=tuple(replace(r, gain=1.0) for r in a.blocks))
        b = random_plan(a.new_shape, rng)
        b = replace(b, blocks=tuple(replace(r, gain=1.0) for r in b.blocks))
        c = random_plan(b.new_shape, rng)
        left, right = a.compose(b).compose(c), a.compose(b.compose(c))
        assert [r.parts for r in left.blocks] == [r.parts for r in right.blocks]
        for x, y in zip(left.blocks, right.blocks, strict=True):
            assert dict(x.norm_weights) == pytest.approx(dict(y.norm_weights))
            assert dict(x.bias_weights) == pytest.approx(dict(y.bias_weights))
            assert x.gain == y.gain


def test_mixes_of_whole_blocks_compose():
    model, ids = tiny(), tokens()
    original = opened(model)
    shape = original.shape
    first = PruningPlan(shape, (BlockRecipe(mix=((0, 0.5), (1, 0.5))), *WHOLE[2:]))
    second = PruningPlan(first.new_shape, (BlockRecipe(mix=((0, 0.5), (1, 0.25), (2, 0.25))), BlockRecipe((Part(3),))))
    both = first.compose(second)
    assert both.blocks[0].mix == ((0, 0.25), (1, 0.25), (2, 0.25), (3, 0.25))
    again = reopened(build_model(first, original), first, original)
    assert close(logits(build_model(both, original), ids), logits(build_model(second, again), ids))


def test_identity_changes_nothing_on_either_side():
    plan = random_plan(SHAPE, random.Random(3))
    assert PruningPlan.identity(SHAPE).compose(plan) == plan
    assert plan.compose(PruningPlan.identity(plan.new_shape)) == plan


def test_gains_multiply_and_pass_on():
    gain = {i: replace(WHOLE[i], gain=g) for i, g in ((1, 2.0), (2, 3.0), (4, 5.0))}
    first = change(PruningPlan.identity(SHAPE), gain, embedding_gain=2.0, final_norm_gain=0.5)
    step = PruningPlan.keep(SHAPE, [0, 3, 4])
    step = replace(step, blocks=(*step.blocks[:2], replace(step.blocks[2], gain=7.0)), embedding_gain=3.0)
    both = first.compose(step)
    assert [r.gain for r in both.blocks] == [1.0, 6.0, 35.0]  # those of the removed 1 and 2 pass to 3
    assert (both.embedding_gain, both.final_norm_gain) == (6.0, 0.5)


def test_a_gain_composes_with_any_block():
    shared = sharing(SHAPE, {3: 1})
    mixed = PruningPlan(SHAPE, (*WHOLE[:3], BlockRecipe(mix=((3, 0.5), (4, 0.5)))))
    for first in (shared, mixed):
        step = change(PruningPlan.identity(first.new_shape), {3: BlockRecipe(parts=(Part(3),), gain=2.0)})
        assert first.compose(step).blocks[3] == replace(first.blocks[3], gain=2.0)


def test_shared_blocks_survive_removal_elsewhere():
    both = sharing(SHAPE, {3: 1}).compose(PruningPlan.keep(SHAPE, [1, 2, 3]))
    assert both == replace(sharing(SHAPE, {3: 1}), blocks=sharing(SHAPE, {3: 1}).blocks[1:4])
    removed = PruningPlan.keep(SHAPE, [0, 2, 4])  # then block 2 (once 4) shares the weights of block 1 (once 2)
    both = removed.compose(sharing(removed.new_shape, {2: 1}))
    assert both.blocks[2] == BlockRecipe(parts=(Part(4),), shares=2, rank=2, output_norm=True)


def test_attached_tensors_follow_their_block():
    shared = replace(sharing(SHAPE, {3: 1}), tensors=(("blocks.3.query.lora_a", "d"),))
    both = shared.compose(PruningPlan.keep(SHAPE, [1, 3, 4]))
    assert both.tensors == (("blocks.1.query.lora_a", "d"),)


MIXED = PruningPlan(SHAPE, (BlockRecipe(mix=((0, 0.5), (1, 0.5))), *WHOLE[2:]))
GAINED = change(PruningPlan.identity(SHAPE), {1: replace(WHOLE[1], gain=2.0)})


@pytest.mark.parametrize(
    ("first", "recipe", "message"),
    [
        (sharing(SHAPE, {0: 2}), BlockRecipe(parts=(Part(0, (1,)),)), "block 0 takes units of block 0, which shares"),
        (MIXED, BlockRecipe(parts=(Part(0, (1,)),)), "block 0 takes units of a mix of blocks"),
        (
            narrowed(SHAPE, [0], None),
            BlockRecipe(mix=((0, 0.5), (1, 0.5))),
            "block 0 mixes block 0, which is not whole",
        ),
        (GAINED, BlockRecipe(parts=(Part(0, (0,)), Part(1, (1,)))), "block 0 merges blocks with gains"),
        (MIXED, BlockRecipe(parts=(Part(0),), shares=1), "block 0 shares weights with a block that an earlier step"),
    ],
)
def test_what_does_not_compose_is_an_error_that_names_the_block(first, recipe, message):
    shape = first.new_shape
    step = change(PruningPlan.identity(shape), {0: recipe})
    with pytest.raises(FlexiError, match=f"compose: {message}"):
        first.compose(step)


def test_removing_a_donor_is_an_error():
    with pytest.raises(FlexiError, match="block 2: its donor, block 1, is not whole"):
        sharing(SHAPE, {3: 1}).compose(PruningPlan.keep(SHAPE, [0, 2, 3]))


def test_a_step_for_another_model_is_refused():
    with pytest.raises(FlexiError, match="made for a model of another shape"):
        PruningPlan.keep(SHAPE, [0, 1]).compose(PruningPlan.identity(SHAPE))
