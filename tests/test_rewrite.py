"""Rewriting: cut = zeroed, identity = identity, merges by hand, torch-pruning's graph, and folders that load everywhere."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch_pruning
from safetensors.torch import load_file, save_file
from tiny import (
    KINDS,
    attached_for,
    built,
    change,
    close,
    config_of,
    family_of,
    logits,
    narrowed,
    opened,
    sharing,
    tiny,
    tokens,
)
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralForCausalLM, PreTrainedModel
from transformers.utils import logging

from flexi_plugins.budget import without_units
from flexi_plugins.checkpoint import INDEX, Checkpoint, write_tensors
from flexi_plugins.data import BlockRecipe, Part, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.modeling import FlexiForCausalLM
from flexi_plugins.rewrite import PlanWeights, build_model, plain_reason, read_attached, state_dict, write_checkpoint

logging.disable_progress_bar()


def recompute(model):
    """Have a model compute activations again for their gradients, by the name that this release of transformers has."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(model, name) for name in names if hasattr(model, name))()


def uneven(plan):
    """Return a plan whose blocks differ in width, one without attention and one without an MLP."""
    recipes = {
        0: BlockRecipe(parts=(Part(0, (), None),)),
        1: BlockRecipe(parts=(Part(1, (0, 2), (1, 3, 5, 7)),)),
        3: BlockRecipe(parts=(Part(3, (1,), ()),)),
    }
    return change(plan, recipes)


def everything(shape):
    """Return a plan with all that a plain folder cannot hold: sharing, gains, and blocks of different width."""
    plan = uneven(PruningPlan.identity(shape))
    recipes = {
        2: BlockRecipe(parts=(Part(2),), shares=4, rank=3, output_norm=True),
        3: replace(plan.blocks[3], gain=1.5),
    }
    return attached_for(change(plan, recipes, embedding_gain=2.0, final_norm_gain=0.5))


# ---------------------------------------------------------------------------------------- cut = zeroed


def zeroed(model, heads, channels):
    """Return a copy of a model in which the outgoing weights of units are zero: block -> indices."""
    model = copy.deepcopy(model)
    head_dim = opened(model).shape.blocks[0].head_dim
    group = opened(model).shape.blocks[0].group
    for index, block in enumerate(model.model.layers):
        for k in heads.get(index, ()):
            for query in range(k * group, (k + 1) * group):  # query head h belongs to KV head h // group
                block.self_attn.o_proj.weight.data[:, query * head_dim : (query + 1) * head_dim] = 0
        block.mlp.down_proj.weight.data[:, list(channels.get(index, ()))] = 0
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_cut_units_are_zeroed_units(kind):
    model, ids = tiny(kind), tokens()
    shape = opened(model).shape
    every = shape.blocks[0].kv_heads
    heads = {0: [1], 2: [0, 3], 3: list(range(every - 1))}
    channels = {0: range(0, 24, 3), 1: range(1, 24), 4: [0]}

    def kept(gone, width):
        return tuple(u for u in range(width) if u not in gone)

    recipes = {
        i: BlockRecipe(parts=(Part(i, kept(heads.get(i, ()), every), kept(channels.get(i, ()), 24)),)) for i in range(5)
    }
    cut = built(change(PruningPlan.identity(shape), recipes), model)
    assert isinstance(cut, FlexiForCausalLM)
    assert close(logits(cut, ids), logits(zeroed(model, heads, channels), ids))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [(0, 1, 3), (2,)])
def test_uniform_cuts_are_zeroed_units_in_a_plain_model(kind, kept):
    """With three of four KV heads, six query heads do not divide the hidden size of 32."""
    model, ids = tiny(kind, hidden_act="gelu"), tokens()
    shape = opened(model).shape
    every = shape.blocks[0].kv_heads
    gone = {i: [k for k in range(every) if k not in kept] for i in range(5)}
    lost = {i: range(5, 24) for i in range(5)}
    plan = narrowed(shape, kept, range(5))
    cut = built(plan, model)
    assert close(logits(cut, ids), logits(zeroed(model, gone, lost), ids))
    plain = plain_reason(plan, opened(model)) is None
    assert plain == (not isinstance(cut, FlexiForCausalLM))
    assert plain or kind == "llama-biases"


def test_an_absent_sub_layer_is_a_zeroed_one():
    model, ids = tiny("qwen2-mixed"), tokens()
    shape = opened(model).shape
    recipes = {0: BlockRecipe(parts=(Part(0, ()),)), 2: BlockRecipe(parts=(Part(2, None, ()),))}
    recipes[3] = BlockRecipe(parts=(Part(3, (), ()),))
    cut = built(change(PruningPlan.identity(shape), recipes), model)
    heads, channels = {0: range(4), 3: range(4)}, {2: range(24), 3: range(24)}
    assert close(logits(cut, ids), logits(zeroed(model, heads, channels), ids))
    assert not any(n.startswith("model.layers.3.") for n, _ in cut.named_parameters())


# ---------------------------------------------------------------------------------------- torch-pruning


def through_the_graph(model, layer_of, indices):
    """Return a copy in which torch-pruning cut output units of a map with everything its graph couples to them."""
    cut = copy.deepcopy(model).requires_grad_(True)
    graph = torch_pruning.DependencyGraph().build_dependency(
        cut, example_inputs=tokens(1, 6), forward_fn=lambda m, ids: m(input_ids=ids, use_cache=False).logits
    )
    group = graph.get_pruning_group(layer_of(cut), torch_pruning.prune_linear_out_channels, idxs=list(indices))
    assert graph.check_pruning_group(group)
    group.prune()
    return cut.requires_grad_(False)


def same(ours, theirs):
    """Whether two models have the same weights, bit for bit, and the same answers."""
    state = theirs.state_dict()
    equal = all(torch.equal(p, state[n]) for n, p in ours.state_dict().items())
    return equal and close(logits(theirs, tokens()), logits(ours, tokens()))


def without(shape, block, heads=(), channels=()):
    kept = tuple(k for k in range(shape.blocks[block].kv_heads) if k not in heads)
    part = Part(block, kept, tuple(c for c in range(shape.blocks[block].channels) if c not in channels))
    return change(PruningPlan.identity(shape), {block: BlockRecipe(parts=(part,))})


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
def test_torch_prunings_graph_cuts_the_same_channels():
    model = tiny("llama", num_hidden_layers=3)
    ours = built(without(opened(model).shape, 1, channels=[0, 5, 23]), model)
    assert same(ours, through_the_graph(model, lambda m: m.model.layers[1].mlp.gate_proj, [0, 5, 23]))


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
@pytest.mark.parametrize("root", ["q_proj", "k_proj", "v_proj"])
def test_torch_prunings_graph_cuts_the_same_heads(root):
    model = tiny("llama-mha", num_hidden_layers=3)
    ours = built(without(opened(model).shape, 2, heads=[1, 6]), model)
    rows = [*range(4, 8), *range(24, 28)]
    assert same(ours, through_the_graph(model, lambda m: getattr(m.model.layers[2].self_attn, root), rows))


def test_torch_pruning_cuts_the_same_grouped_heads():
    """Its graph cannot follow keys and values that are repeated for their query heads: each map is cut by itself."""
    model = tiny("llama")
    theirs = copy.deepcopy(model)
    attention, cut = theirs.model.layers[2].self_attn, torch_pruning.pruner.function.LinearPruner()
    for k in (2, 1):
        cut.prune_out_channels(attention.k_proj, list(range(k * 4, (k + 1) * 4)))
        cut.prune_out_channels(attention.v_proj, list(range(k * 4, (k + 1) * 4)))
        cut.prune_out_channels(attention.q_proj, list(range(k * 8, (k + 1) * 8)))
        cut.prune_in_channels(attention.o_proj, list(range(k * 8, (k + 1) * 8)))
    assert same(built(without(opened(model).shape, 2, heads=[1, 2]), model), theirs)


# ---------------------------------------------------------------------------------------- identity, removal, merging


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_that_changes_nothing_changes_nothing(kind):
    model, ids = tiny(kind), tokens()
    same = built(PruningPlan.identity(opened(model).shape), model)
    assert type(same) is type(model)
    assert torch.equal(logits(same, ids), logits(model, ids))
    shared = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in shared for p in same.parameters())  # unchanged weights are not copied


@pytest.mark.parametrize("kind", ["llama-tied", "llama-biases"])
def test_no_initial_value_is_computed_for_weights_that_are_put_in(kind, monkeypatch):
    model = tiny(kind)
    checkpoint = opened(model)
    plan, attached = everything(checkpoint.shape)

    def no(*_, **__):
        pytest.fail("initial values are computed")

    for name in ("normal_", "kaiming_uniform_", "uniform_"):
        monkeypatch.setattr(torch.nn.init, name, no)
    monkeypatch.setattr(PreTrainedModel, "init_weights", no)
    build_model(PruningPlan.identity(checkpoint.shape), checkpoint)
    flexible = build_model(plan, checkpoint, attached)
    assert isinstance(flexible, FlexiForCausalLM)
    Blocks(checkpoint)
    with pytest.raises(pytest.fail.Exception, match="initial values"):
        AutoModelForCausalLM.from_config(model.config)


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2-mixed"])
def test_removed_and_repeated_blocks(kind):
    model, ids = tiny(kind), tokens()
    for order in ([0, 3, 4], [4], [0, 1, 1, 2, 3, 4, 3]):
        expected = copy.deepcopy(model)
        expected.model.layers = nn.ModuleList(copy.deepcopy(model.model.layers[i]) for i in order)
        expected.config.num_hidden_layers = len(order)
        if kind == "qwen2-mixed":
            expected.config.layer_types = [model.config.layer_types[i] for i in order]
        found = built(PruningPlan.keep(opened(model).shape, order), model)
        assert close(logits(found, ids), logits(expected, ids))
        assert found.config.num_hidden_layers == len(order)


def test_a_block_that_is_there_twice_has_weights_of_its_own(tmp_path):
    model, ids = tiny(), tokens()
    plan = PruningPlan.keep(opened(model).shape, [0, 1, 1, 2])
    found = built(plan, model)
    write_checkpoint(plan, opened(model), None, tmp_path / "x")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "x"), ids), logits(found, ids))
    first, second = found.model.layers[1:3]
    assert torch.equal(first.mlp.up_proj.weight, second.mlp.up_proj.weight)
    assert first.mlp.up_proj.weight.data_ptr() != second.mlp.up_proj.weight.data_ptr()


def test_a_concat_merge_by_hand():
    model, ids = tiny("qwen2"), tokens()
    shape = opened(model).shape
    recipe = BlockRecipe(parts=(Part(1, (0, 3), (2, 5, 7)), Part(2, (1,), (0, 1))), norms=((1, 0.5), (2, 0.5)))
    plan = PruningPlan(shape, (BlockRecipe(parts=(Part(0),)), recipe, BlockRecipe(parts=(Part(4),))))
    found = built(plan, model).state_dict()
    one, two = (model.model.layers[i].state_dict() for i in (1, 2))
    rows = [*range(0, 4), *range(12, 16)], list(range(4, 8))
    queries = [*range(0, 8), *range(24, 32)], list(range(8, 16))  # query heads 0, 1, 6, 7 and 2, 3
    channels = [2, 5, 7], [0, 1]

    def cat(name, units, dimension=0):
        return torch.cat(
            [s[name].index_select(dimension, torch.tensor(u)) for s, u in zip((one, two), units, strict=True)],
            dimension,
        )

    expected = {
        "self_attn.q_proj.weight": cat("self_attn.q_proj.weight", queries),
        "self_attn.q_proj.bias": cat("self_attn.q_proj.bias", queries),
        "self_attn.k_proj.weight": cat("self_attn.k_proj.weight", rows),
        "self_attn.k_proj.bias": cat("self_attn.k_proj.bias", rows),
        "self_attn.v_proj.weight": cat("self_attn.v_proj.weight", rows),
        "self_attn.v_proj.bias": cat("self_attn.v_proj.bias", rows),
        "self_attn.o_proj.weight": cat("self_attn.o_proj.weight", queries, 1),
        "mlp.gate_proj.weight": cat("mlp.gate_proj.weight", channels),
        "mlp.up_proj.weight": cat("mlp.up_proj.weight", channels),
        "mlp.down_proj.weight": cat("mlp.down_proj.weight", channels, 1),
        "input_layernorm.weight": (one["input_layernorm.weight"] + two["input_layernorm.weight"]) / 2,
        "post_attention_layernorm.weight": (
            one["post_attention_layernorm.weight"] + two["post_attention_layernorm.weight"]
        )
        / 2,
    }
    assert {n for n in found if n.startswith("model.layers.1.")} == {f"model.layers.1.{n}" for n in expected}
    assert all(close(found[f"model.layers.1.{n}"], t, 1e-7) for n, t in expected.items())
    assert logits(built(plan, model), ids).isfinite().all()


def test_two_halves_of_a_block_are_the_block():
    """Concatenating all units of a block with none of another, in any split, gives the block back."""
    model, ids = tiny("qwen3-biases"), tokens()
    shape = opened(model).shape
    split = BlockRecipe(parts=(Part(2, (0, 1), tuple(range(9))), Part(2, (2, 3), tuple(range(9, 24)))))
    assert close(logits(built(change(PruningPlan.identity(shape), {2: split}), model), ids), logits(model, ids))


def test_a_mix_is_the_weighted_sum_of_blocks():
    model, ids = tiny("llama-biases"), tokens()
    shape = opened(model).shape
    plan = change(PruningPlan.identity(shape), {1: BlockRecipe(mix=((1, 0.25), (3, 0.75)))})
    expected = copy.deepcopy(model)
    for name, parameter in expected.model.layers[1].named_parameters():
        parameter.data = 0.25 * parameter + 0.75 * model.model.layers[3].get_parameter(name)
    assert close(logits(built(plan, model), ids), logits(expected, ids))


def test_gains_scale_the_stream_where_they_say():
    model, ids = tiny(), tokens()
    shape = opened(model).shape
    plan = change(
        PruningPlan.identity(shape),
        {2: BlockRecipe(parts=(Part(2),), gain=1.5)},
        embedding_gain=2.0,
        final_norm_gain=0.25,
    )
    hooked = copy.deepcopy(model)
    hooked.model.embed_tokens.register_forward_hook(lambda m, i, o: o * 2.0)
    hooked.model.layers[2].register_forward_pre_hook(lambda m, a: (a[0] * 1.5, *a[1:]))
    hooked.model.norm.register_forward_hook(lambda m, i, o: o * 0.25)
    assert close(logits(built(plan, model), ids), logits(hooked, ids))


@pytest.mark.parametrize("kind", ["llama", "llama-biases", "qwen3-biases"])
def test_a_sharing_block_computes_what_its_definition_says(kind):
    """Donor's maps plus adapters, own norms and biases; both outputs normalised with their gains."""
    model, ids = tiny(kind), tokens()
    plan, attached = attached_for(sharing(opened(model).shape, {3: 1}, rank=3))
    expected = copy.deepcopy(model)
    block, donor = expected.model.layers[3], model.model.layers[1]
    for role, path in family_of(model.config).ROLES.items():
        low = attached[f"blocks.3.{role}.lora_a"] @ attached[f"blocks.3.{role}.lora_b"]
        block.get_submodule(path).weight.data = donor.get_submodule(path).weight + low

    def normalised(gain):
        def hook(module, inputs, output):
            h = output[0] if isinstance(output, tuple) else output
            h = (h - h.mean(-1, keepdim=True)) / h.std(-1, correction=0, keepdim=True) * gain
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return hook

    block.self_attn.register_forward_hook(normalised(attached["blocks.3.attention.output_norm"]))
    block.mlp.register_forward_hook(normalised(attached["blocks.3.mlp.output_norm"]))
    assert close(logits(built(plan, model, attached), ids), logits(expected, ids))


def test_missing_adapters_are_an_error():
    model = tiny()
    plan = sharing(opened(model).shape, {3: 1})
    with pytest.raises(FlexiError, match=r"16 attached tensors are missing \(blocks.3.query.lora_a"):
        built(plan, model)


@pytest.mark.parametrize("kind", ["llama-biases", "qwen2"])
def test_the_weights_that_metrics_see_are_those_of_the_plans_model(kind):
    model = tiny(kind)
    checkpoint = opened(model)
    mixed = change(PruningPlan.identity(checkpoint.shape), {1: BlockRecipe(mix=((1, 0.25), (3, 0.75)))})
    for plan, attached in (everything(checkpoint.shape), (merged(checkpoint.shape), {}), (mixed, {})):
        found, weights = build_model(plan, checkpoint, attached), PlanWeights(plan, checkpoint, attached)
        for index, block in enumerate(plan.new_shape.blocks):
            assert weights.block(index).keys() == plan.shape.maps(block).keys()
            for role, weight in weights.block(index).items():
                layer = found.model.layers[index].get_submodule(checkpoint.family.ROLES[role])
                assert torch.equal(weight, layer.weight)


def test_what_is_cached_belongs_to_one_plan():
    checkpoint = opened(tiny())
    whole, cut = PruningPlan.identity(checkpoint.shape), PruningPlan.keep(checkpoint.shape, [0, 1])
    made = [PlanWeights(p, checkpoint, {}).cached("x", object) for p in (whole, whole, cut)]
    assert made[0] is made[1] is not made[2]


def test_another_dtype():
    model = tiny()
    plan, attached = everything(opened(model).shape)
    half = build_model(plan, opened(model), attached, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.config.dtype == torch.bfloat16
    assert close(logits(half, tokens()).float(), logits(built(plan, model, attached), tokens()), 0.1)


# ---------------------------------------------------------------------------------------- folders


def write(kind, folder, plan_of, **changes):
    """Write a plan's folder and return its path, and the model of the plan in memory."""
    model = tiny(kind, **changes)
    checkpoint = opened(model)
    made = plan_of(checkpoint.shape)
    plan, attached = made if isinstance(made, tuple) else (made, {})
    write_checkpoint(plan, checkpoint, attached, folder)
    return plan, build_model(plan, checkpoint, attached)


def merged(shape):
    recipe = BlockRecipe(
        parts=(Part(1, (0, 3), tuple(range(9))), Part(2, (1, 2), tuple(range(15)))), norms=((1, 0.5), (2, 0.5))
    )
    whole = PruningPlan.identity(shape).blocks
    return PruningPlan(shape, (whole[0], recipe, *whole[3:]))


def narrowed_and_removed(shape):
    narrow = narrowed(shape, (0, 2, 3), range(16))
    return narrow.compose(PruningPlan.keep(narrow.new_shape, [0, 1, 3]))


ROPE = {"rope_type": "default", "rope_theta": 777.0}
SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
PLAIN = {
    "removed": ("llama", lambda s: PruningPlan.keep(s, [0, 2, 4]), {"rope_parameters": ROPE}),
    "merged": ("llama-tied", merged, {}),
    "llama-form": ("llama", lambda s: narrowed(s, (0, 3), range(16)), {}),
    "mistral-form": ("llama", lambda s: narrowed(s, (0, 1, 3), range(8)), {"rope_parameters": SCALED}),
    "mistral": ("mistral", lambda s: narrowed(s, (1, 2, 3), range(8)), {}),
    "qwen2": ("qwen2-mixed", narrowed_and_removed, {}),
    "qwen3": ("qwen3-biases", lambda s: narrowed(s, (2,), range(16)), {}),
}

LOAD = """
    import json, sys, torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()
    found = {}
    for folder in sys.argv[1:]:
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = torch.load(folder + "/ids.pt")
        sampling = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            torch.save(model(ids).logits, folder + "/logits.pt")
        cached, plain = (model.generate(ids, use_cache=c, **sampling).tolist() for c in (True, False))
        found[folder] = [type(model).__name__, cached == plain]
    found["ours"] = "flexi_plugins" in sys.modules
    print(json.dumps(found))
"""


def python(code, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Write every plain folder, and load all of them in one process that never sees this package."""
    root = tmp_path_factory.mktemp("plain")
    models = {}
    for name, (kind, plan_of, changes) in PLAIN.items():
        models[name] = write(kind, root / name, plan_of, **changes)
        torch.save(tokens(2, 11), root / name / "ids.pt")
    found = json.loads(python(LOAD, *(root / n for n in models)))
    return root, models, found


def test_plain_folders_are_loaded_without_this_package(plain):
    assert plain[2]["ours"] is False


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_folder_answers_as_the_plan_does(plain, name):
    root, models, found = plain
    plan, model = models[name]
    kind, cached = found[str(root / name)]
    expected = {"llama-form": "LlamaForCausalLM", "mistral-form": "MistralForCausalLM"}
    assert kind == expected.get(name, type(tiny(PLAIN[name][0])).__name__)
    assert cached, "generation with a cache differs from generation without"
    assert close(torch.load(root / name / "logits.pt"), logits(model, tokens(2, 11)))
    assert PruningPlan.from_json(json.loads((root / name / "plan.json").read_text())) == plan


def test_config_json_has_the_rotary_base_both_ways(plain):
    """Releases before 5 know rope_theta and rope_scaling only, and would use 10000."""
    root = plain[0]
    values = json.loads((root / "removed" / "config.json").read_text())
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 777.0
    assert values["rope_scaling"] is None
    values = json.loads((root / "mistral-form" / "config.json").read_text())
    assert (values["rope_theta"], values["rope_scaling"]["factor"]) == (500.0, 2.0)
    assert values["sliding_window"] is None
    assert values["architectures"] == ["MistralForCausalLM"]


FORMS = {
    "uneven": lambda s: uneven(PruningPlan.identity(s)),
    "shared": lambda s: attached_for(sharing(s, {1: 3, 4: 2})),
    "everything": everything,
}


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "mistral", "qwen2-mixed", "qwen3"])
@pytest.mark.parametrize("form", FORMS)
def test_saved_and_reloaded_models_agree(tmp_path, kind, form):
    plan, model = write(kind, tmp_path / "x", FORMS[form])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert isinstance(again, FlexiForCausalLM)
    assert close(logits(again, tokens()), logits(model, tokens()))
    stored = load_file(tmp_path / "x" / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == plan.stored_parameters
    assert sum(p.numel() for p in again.parameters()) == plan.stored_parameters
    assert PruningPlan.from_json(json.loads((tmp_path / "x" / "plan.json").read_text())) == plan
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        again.generate(tokens(), use_cache=True, **options), again.generate(tokens(), use_cache=False, **options)
    )


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2-mixed"])
def test_a_cache_fed_token_by_token(kind):
    """Also where the first block has no attention, and where sliding windows end before the text does."""
    model = tiny(kind)
    plan, attached = everything(opened(model).shape)
    found, ids = built(plan, model, attached), tokens(2, 16)
    expected = logits(found, ids)
    with torch.no_grad():
        output = found(ids[:, :3], use_cache=True)
        for position in range(3, 16):
            output = found(ids[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True)
            assert close(output.logits[:, 0], expected[:, position])


def test_padding_on_the_left():
    model = tiny("llama")
    plan, attached = everything(opened(model).shape)
    found, ids = built(plan, model, attached), tokens(1, 8)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 8])
    with torch.no_grad():
        output = found(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    assert close(output[:, 3:], logits(found, ids))


def test_attached_tensors_lie_beside_the_plan(tmp_path):
    plan, _ = write("llama", tmp_path / "x", everything)
    beside = load_file(tmp_path / "x" / "plan.tensors")
    assert {n for n, _ in plan.tensors} == set(beside)
    assert all(torch.equal(t, everything(plan.shape)[1][n]) for n, t in beside.items())


def test_tensors_beside_a_plan_are_those_it_was_saved_with(tmp_path):
    plan, _ = write("llama", tmp_path / "x", everything)
    file = tmp_path / "x" / "plan.tensors"
    tensors = read_attached(plan, file)
    assert all(torch.equal(t, everything(plan.shape)[1][n]) for n, t in tensors.items())
    save_file({**tensors, "blocks.2.down.lora_a": 2 * tensors["blocks.2.down.lora_a"]}, file)
    with pytest.raises(FlexiError, match=r"holds other tensors than the plan was saved with: blocks\.2\.down\.lora_a"):
        read_attached(plan, file)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(FlexiError, match=f"cannot read its tensors in {file}"):
        read_attached(plan, file)


def test_shards_hold_the_same_as_one_file(tmp_path):
    model = tiny("llama")
    plan, attached = everything(opened(model).shape)
    tensors = dict(state_dict(plan, opened(model), attached))
    for name, size in (("one", 2**30), ("many", 3000)):
        (tmp_path / name).mkdir()
        write_tensors(tmp_path / name, iter(tensors.items()), size)
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 5
    assert set(index["weight_map"].values()) == set(files)
    parts = [load_file(tmp_path / "many" / f) for f in files]
    assert all(sum(t.nbytes for t in p.values()) <= 3000 or len(p) == 1 for p in parts)
    together = {n: t for p in parts for n, t in p.items()}
    single = load_file(tmp_path / "one" / "model.safetensors")
    assert together.keys() == single.keys() == tensors.keys()
    assert all(torch.equal(together[n], single[n]) and torch.equal(single[n], tensors[n]) for n in single)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in single.values())


def test_a_sharded_folder_is_read_like_any_other(tmp_path):
    model, ids = tiny("llama-tied"), tokens()
    model.save_pretrained(tmp_path / "x", max_shard_size="8KB")
    checkpoint = Checkpoint.from_folder(tmp_path / "x", family_of)
    assert (tmp_path / "x" / INDEX).is_file()
    assert torch.equal(logits(build_model(PruningPlan.identity(checkpoint.shape), checkpoint), ids), logits(model, ids))
    assert checkpoint.fingerprint() == checkpoint.resident().fingerprint()
    assert checkpoint.fingerprint() == Checkpoint.from_folder(tmp_path / "x", family_of).resident().fingerprint()


def test_what_lies_beside_the_weights_is_copied(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "x")
    (tmp_path / "x" / "tokenizer.json").write_text("{}")
    (tmp_path / "x" / "pytorch_model.bin.index.json").write_text("{}")
    (tmp_path / "x" / "pytorch_model.bin").write_text("pickle")
    checkpoint = Checkpoint.from_folder(tmp_path / "x", family_of)
    write_checkpoint(PruningPlan.keep(checkpoint.shape, [0, 1]), checkpoint, None, tmp_path / "y")
    assert {p.name for p in (tmp_path / "y").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "plan.json",
        "tokenizer.json",
    }


def test_a_checkpoint_of_several_dtypes_is_built_in_that_of_its_embedding():
    model = tiny().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    made = built(PruningPlan.keep(opened(model).shape, [0, 1, 3]), model)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    assert bool(logits(made, tokens()).isfinite().all())


# ---------------------------------------------------------------------------------------- what goes wrong


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    checkpoint = opened(tiny())

    def broken(name):
        if "layers.3" in name:
            raise OSError("disk full")
        return Checkpoint.from_model(tiny(), family_of).read(name)

    checkpoint.read = broken
    with pytest.raises(FlexiError, match="cannot be written: disk full; nothing was left behind"):
        write_checkpoint(PruningPlan.identity(checkpoint.shape), checkpoint, None, tmp_path / "sub" / "x")
    assert list((tmp_path / "sub").iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tmp_path):
    checkpoint = opened(tiny())
    with pytest.raises(FlexiError, match="exists already"):
        write_checkpoint(PruningPlan.identity(checkpoint.shape), checkpoint, None, tmp_path)


@pytest.fixture
def folder(tmp_path):
    tiny().save_pretrained(tmp_path / "x", max_shard_size="16KB")
    return tmp_path / "x"


def last_shard(folder: Path) -> tuple[Path, str]:
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    name = max(index, key=lambda n: (index[n], n))
    return folder / index[name], name


def test_a_truncated_shard_is_named_with_its_tensor(folder):
    file, _ = last_shard(folder)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(FlexiError, match=rf"{file} is truncated: tensor '.*' ends beyond the file"):
        Checkpoint.from_folder(folder, family_of)
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(FlexiError, match=rf"{file} is truncated: its header is longer than the file"):
        Checkpoint.from_folder(folder, family_of)


def test_a_missing_shard_is_named_with_a_tensor(folder):
    file, _ = last_shard(folder)
    file.unlink()
    with pytest.raises(FlexiError, match=rf"{file} is missing \(it holds '.*', says {INDEX}\)"):
        Checkpoint.from_folder(folder, family_of)


def test_a_tensor_of_another_shape_is_named(folder):
    file, name = last_shard(folder)
    save_file({**load_file(file), name: torch.zeros(3, 2)}, file)
    with pytest.raises(FlexiError, match=rf"{file}: tensor '{name}' has shape \[3, 2\], config.json promises"):
        Checkpoint.from_folder(folder, family_of)


def test_a_missing_tensor_is_named(folder):
    file, name = last_shard(folder)
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if n != name} | {"other": torch.zeros(1)}, file)
    with pytest.raises(FlexiError, match=rf"{file}: tensor '{name}' is not in it"):
        Checkpoint.from_folder(folder, family_of)
    save_file(tensors, file)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 6}))
    with pytest.raises(FlexiError, match=r"tensor 'model.layers.5.* is missing; config.json promises shape"):
        Checkpoint.from_folder(folder, family_of)


def test_a_damaged_index_is_named(folder):
    (folder / INDEX).write_text('{"weight_map": {')
    with pytest.raises(FlexiError, match=f"{folder / INDEX} is not an index of shards"):
        Checkpoint.from_folder(folder, family_of)


def test_pickles_are_never_loaded(folder):
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    with pytest.raises(FlexiError, match=r"expected model\.safetensors or .*, found none"):
        Checkpoint.from_folder(folder, family_of)
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(FlexiError, match=r"found pytorch_model\.bin, which is a pickle and is never loaded"):
        Checkpoint.from_folder(folder, family_of)


def test_a_folder_without_a_usable_configuration(folder):
    file = folder / "config.json"
    text = file.read_text()
    for damaged in (text[:40], json.dumps({**json.loads(text), "model_type": "nothing"})):
        file.write_text(damaged)
        with pytest.raises(FlexiError, match=r"config\.json"):
            Checkpoint.from_folder(folder, family_of)
    file.unlink()
    with pytest.raises(FlexiError, match=r"no config\.json in the folder"):
        Checkpoint.from_folder(folder, family_of)


# ---------------------------------------------------------------------------------------- FlexiForCausalLM


@pytest.fixture
def flexible():
    model = tiny("llama-tied")
    plan, attached = everything(opened(model).shape)
    return build_model(plan, opened(model), attached), plan


def test_attention_implementations_agree(flexible, tmp_path):
    model, ids = flexible[0], tokens()
    expected = logits(model, ids)
    model.set_attn_implementation("eager")
    assert close(logits(model, ids), expected)
    assert not torch.equal(logits(model, ids), expected) or model.model.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path / "x")
    for name in ("eager", "sdpa"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "x", attn_implementation=name)
        assert {
            b.self_attn.config._attn_implementation for b in again.model.layers if hasattr(b.self_attn, "config")
        } == {name}
        assert close(logits(again, ids), expected)


def test_a_vocabulary_that_was_resized_is_written_and_read(flexible, tmp_path):
    model = flexible[0]
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "x")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert again.get_input_embeddings().weight.shape[0] == again.config.vocab_size == 70
    assert close(logits(again, tokens()), logits(model, tokens()))


def test_the_configuration_says_whether_there_is_a_cache(flexible):
    model = flexible[0]
    assert model(tokens()).past_key_values is not None
    model.config.use_cache = False
    assert model(tokens()).past_key_values is None
    assert model(tokens(), use_cache=True).past_key_values is not None


def test_weights_that_are_not_at_hand_are_an_error(flexible):
    """accelerate leaves those of an offloaded block on no device, and a product with them would be noise."""
    model, plan = flexible
    [position] = [i for i, recipe in enumerate(plan.blocks) if recipe.shares is not None]
    donor = model.model.layers[plan.donor(position)]
    donor.mlp.up_proj.weight = nn.Parameter(donor.mlp.up_proj.weight.to("meta"), requires_grad=False)
    share = model.model.layers[position].mlp.up_proj
    with pytest.raises(
        FlexiError, match=r"with the weights of another one that is offloaded .* load the model without"
    ):
        share(torch.ones(2, share.lora_b.shape[1]))


def test_attentions_and_hidden_states_can_be_asked_for(flexible):
    model = flexible[0]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(tokens(), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 6
    assert [a.shape[1] for a in output.attentions] == [4, 8, 2, 8]  # query heads; the first block has no attention


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_touches_only_what_requires_a_gradient(flexible, checkpointing):
    model = flexible[0]
    before = {n: p.clone() for n, p in model.named_parameters()}
    adapters = [n for n in before if "lora_" in n or "output_norm" in n]
    assert len(adapters) == 2 * 7 + 2
    for name in adapters:
        model.get_parameter(name).requires_grad_(True)
    if checkpointing:
        recompute(model)
    model.train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first = model(tokens(), labels=tokens()).loss
    first.backward()
    optimiser.step()
    assert model(tokens(), labels=tokens()).loss.item() < first.item()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(adapters)


def test_gradient_checkpointing_gives_the_same_gradients(flexible):
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(flexible[0]).requires_grad_(True).train()
        if checkpointing:
            recompute(model)
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert all(close(gradients[1][n], g) for n, g in gradients[0].items())


def test_the_loss_is_transformers_loss():
    model = tiny()
    plan = change(PruningPlan.identity(opened(model).shape), {}, final_norm_gain=1.0000001)
    found = built(plan, model)
    assert isinstance(found, FlexiForCausalLM)
    with torch.no_grad():
        ours, theirs = (m(tokens(), labels=tokens(), logits_to_keep=0).loss for m in (found, model))
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
        assert close(found(tokens(), logits_to_keep=2).logits, logits(model, tokens())[:, -2:])


def test_a_copy_has_a_life_of_its_own(flexible):
    model, ids = flexible[0], tokens()
    expected = logits(model, ids)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, ids), expected)
    other.model.layers[4].mlp.down_proj.weight.data *= 2  # the donor of block 2
    sharing_block = other.model.layers[2].mlp.down_proj
    assert sharing_block.donor is other.model.layers[4].mlp.down_proj
    assert torch.equal(logits(model, ids), expected)
    assert not torch.equal(logits(other, ids), expected)


def test_saved_by_transformers_itself(flexible, tmp_path):
    model, plan = flexible
    model.save_pretrained(tmp_path / "x")
    assert sum(t.numel() for t in load_file(tmp_path / "x" / "model.safetensors").values()) == plan.stored_parameters
    again, report = FlexiForCausalLM.from_pretrained(tmp_path / "x", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_moving_a_model_keeps_donors(flexible):
    model = flexible[0].to(torch.bfloat16)
    block = model.model.layers[2]
    assert block.mlp.up_proj.donor is model.model.layers[4].mlp.up_proj
    assert block.mlp.up_proj.weight.dtype == torch.bfloat16
    assert logits(model, tokens()).isfinite().all()


# ---------------------------------------------------------------------------------------- import order

ORDERS = {
    "ours": "import flexi_plugins; from transformers import LlamaForCausalLM",
    "theirs": "from transformers import AutoModelForCausalLM; import flexi_plugins",
    "the model itself": "import flexi_plugins.modeling",
}
LIGHT = "import flexi_plugins, flexi_plugins.hookspecs; assert not {'torch', 'transformers'} & set(sys.modules)"
LOAD_OURS = """
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
assert AutoConfig.from_pretrained(folder).model_type == "flexi"
assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ == "FlexiForCausalLM"
"""
FORK = """
    import os, sys
    def child(code):
        process = os.fork()
        if not process:
            status = 1
            try:
                exec(code)
                status = 0
            finally:
                os._exit(status)
        return process
    light, load, folder, *orders = sys.argv[1:]
    processes = [child(light)]
    import torch  # once, for all that follow
    processes += [child(order + load) for order in orders]
    print(*(os.waitpid(p, 0)[1] for p in processes))
"""


def test_folders_open_in_either_order_of_imports(flexible, tmp_path):
    """Each order in a process of its own; the first of them checks that importing this package loads no torch."""
    flexible[0].save_pretrained(tmp_path / "x")
    assert python(FORK, LIGHT, LOAD_OURS, tmp_path / "x", *ORDERS.values()).split() == ["0"] * (1 + len(ORDERS))


def test_the_twin_of_a_llama_is_exact():
    """Mistral without a sliding window computes what Llama does, where Llama's configuration refuses the heads."""
    config = config_of("llama")
    plan = narrowed(opened(tiny()).shape, (0, 1, 2), None)
    if hasattr(config, "validate_architecture"):  # the oldest releases look at no heads
        with pytest.raises(Exception, match="not a multiple of the number of attention"):
            type(config).from_dict({**config.to_dict(), "num_attention_heads": 6, "num_key_value_heads": 3})
    assert isinstance(built(plan, tiny()), MistralForCausalLM)
    assert isinstance(built(narrowed(plan.shape, (0, 1), None), tiny()), LlamaForCausalLM)


def test_units_are_taken_where_the_weights_are():
    """On a GPU indices have to be there as well."""

    class Weight:
        device = torch.device("meta")

        def index_select(self, dimension, index):
            assert index.device == self.device
            return torch.empty(len(index))

    checkpoint = opened(tiny("llama"))
    plan = without_units(checkpoint.shape, {(1, "mlp"): [0, 3], (1, "attention"): [1]})
    away = Checkpoint("away", checkpoint.config, checkpoint.family, lambda name: Weight(), None)
    for role, weight in PlanWeights(plan, away, {}).block(1).items():
        assert weight.device.type == "cpu", role  # what index_select gave
