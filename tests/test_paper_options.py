"""The papers' options: what they choose, against what they are said to choose by, on tiny models."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import ClassVar
from unittest import mock

import pytest
import torch
from tiny import change, close, logits, opened, sharing, tiny, tokens

from flexi_plugins.checkpoint import Checkpoint
from flexi_plugins.data import BlockRecipe, Part, PruningPlan, Scores, Statistics
from flexi_plugins.errors import FlexiError
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.generation import continuations
from flexi_plugins.hookspecs import BlockTrace, LinearTrace
from flexi_plugins.metrics import saap
from flexi_plugins.metrics.come import CoMe
from flexi_plugins.metrics.flexigpt import FlexiGPT
from flexi_plugins.metrics.greedy import Greedy
from flexi_plugins.plugins import Plugins, incompatible, own_knob
from flexi_plugins.rewrite import build_model, with_digests
from flexi_plugins.strategies.concat_merge import ConcatMerge
from flexi_plugins.strategies.remove_blocks import RemoveBlocks
from flexi_plugins.strategies.remove_units import RemoveUnits
from flexi_plugins.strategies.share_lora import GAINS, ShareLora, donor_distances
from flexi_plugins.testing.bench import KnownScores, TinyPruner
from flexi_plugins.testing.models import tiny_checkpoint, tiny_config, tiny_model, tiny_tokenizer


def pruner(kind: str = "llama-gqa-tied") -> TinyPruner:
    return TinyPruner(tiny_checkpoint(kind), Plugins.load())


def loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Return the mean negative log-likelihood of ids under a transformers model, nats per token."""
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def without(own: TinyPruner, plan: PruningPlan, gone: set[int]) -> PruningPlan:
    kept = [i for i in range(len(plan.blocks)) if i not in gone]
    return plan.compose(PruningPlan.keep(plan.new_shape, kept))


# ---------------------------------------------------------------------------------------- greedy


def test_a_blocks_greedy_score_is_the_loss_without_it():
    own = pruner()
    plan = PruningPlan.keep(own.checkpoint.shape, (0, 1, 3, 5))
    scores = Greedy().score(own.request(frozenset(), plan)).block
    assert scores is not None
    expected = [loss(build_model(without(own, plan, {i}), own.checkpoint), own.texts[0]) for i in range(4)]
    assert scores.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_greedy_loop_removes_the_block_whose_absence_is_best_each_time():
    own = pruner("llama")
    plan = PruningPlan.identity(own.checkpoint.shape)
    for _ in range(2):
        candidates = [without(own, plan, {i}) for i in range(len(plan.blocks))]
        plan = min(candidates, key=lambda p: loss(build_model(p, own.checkpoint), own.texts[0]))
    found = own.plan(Greedy(), RemoveBlocks(blocks=2, progressive=True), 0.0)
    assert found.blocks == plan.blocks


def test_quality_by_what_is_written_is_sacrebleus_chrf():
    from sacrebleu import corpus_chrf

    own = pruner()
    plan = PruningPlan.keep(own.checkpoint.shape, (0, 2, 4))
    (found,) = own.request(frozenset()).quality([plan], "chrf")
    written, references = continued(own, plan)
    assert found == pytest.approx(-corpus_chrf(written, [references], word_order=2).score)


def continued(own: TinyPruner, plan: PruningPlan) -> tuple[list[str], list[str]]:
    """Return what a plan's model writes behind the first half of each window, token by token, and the second halves."""
    windows, decode = own.texts[0], tiny_tokenizer().decode
    model, half = build_model(plan, own.checkpoint), windows.shape[1] // 2
    rows = windows[:, :half]
    for _ in range(windows.shape[1] - half):
        rows = torch.cat([rows, logits(model, rows)[:, -1].argmax(-1)[:, None]], 1)
    return [decode(row[half:].tolist()) for row in rows], [decode(row[half:].tolist()) for row in windows]


def chrf_of(own: TinyPruner, plan: PruningPlan) -> float:
    """Return minus chrF++ of what a plan's model writes, from sacrebleu's own counts."""
    from sacrebleu.metrics import CHRF

    written, references = continued(own, plan)
    return -CHRF(word_order=2).corpus_score(written, [references]).score


def test_greedys_score_by_chrf_is_that_of_what_is_written_without_each_block():
    own = pruner()
    plan = PruningPlan.keep(own.checkpoint.shape, (0, 1, 3, 5))
    scores = Greedy(measure="chrf").score(own.request(frozenset(), plan)).block
    assert scores is not None
    expected = [chrf_of(own, without(own, plan, {i})) for i in range(4)]
    assert scores.tolist() == pytest.approx(expected, rel=1e-4)
    assert max(expected) - min(expected) > 1, "what is written tells blocks apart"


def test_the_greedy_loop_by_chrf_removes_the_block_without_which_the_rest_writes_best_each_time():
    own = pruner("llama")
    plan = PruningPlan.identity(own.checkpoint.shape)
    for _ in range(3):
        plan = min((without(own, plan, {i}) for i in range(1, len(plan.blocks) - 1)), key=lambda p: chrf_of(own, p))
    paper = RemoveBlocks(blocks=3, progressive=True, protect_first=1, protect_last=1)
    assert own.plan(Greedy(measure="chrf"), paper, 0.0).blocks == plan.blocks
    assert own.plan(Greedy(), paper, 0.0).blocks != plan.blocks, "by the loss, others go"


def test_what_is_written_is_written_in_the_compute_dtype():
    """Of a model that is stored in bfloat16 and computed with in float32, what its float32 copy writes."""
    checkpoint = Checkpoint.from_model(tiny_model(tiny_config("llama")).to(torch.bfloat16), Plugins.load().family)
    own = TinyPruner(checkpoint, Plugins.load())
    plan = PruningPlan.keep(checkpoint.shape, (0, 2, 4))
    wide = build_model(plan, checkpoint, dtype=torch.float32)
    written = continuations(wide, own.texts[0][:, :8], 8)
    seen = []

    def noting(model, *given):
        seen.append((model.dtype, continuations(model, own.texts[0][:, :8], 8)))
        return written

    with mock.patch("flexi_plugins.generation.continuations", noting):
        own.request(frozenset()).quality([plan], "chrf")
    [(dtype, found)] = seen
    assert dtype == torch.float32
    assert torch.equal(found, written)


def test_a_model_that_breaks_down_is_infinitely_bad_by_what_it_writes_too():
    model = tiny_model(tiny_config("llama"))
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = math.nan
    own = TinyPruner(Checkpoint.from_model(model, Plugins.load().family), Plugins.load())
    plans = [PruningPlan.keep(own.checkpoint.shape, kept) for kept in ((0, 2, 4), (1, 2, 4))]
    broken, whole = own.request(frozenset()).quality(plans, "chrf")
    assert broken == math.inf
    assert math.isfinite(whole)


def test_quality_by_turn_is_the_distance_of_the_last_blocks_output():
    own = pruner()
    plans = [PruningPlan.keep(own.checkpoint.shape, kept) for kept in ((0, 1, 2, 3, 4), (0, 2, 5))]
    seen = []
    for plan in (PruningPlan.identity(own.checkpoint.shape), *plans):
        model, states = build_model(plan, own.checkpoint), []
        model.model.layers[-1].register_forward_hook(lambda _, args, out, states=states: states.append(out))
        logits(model, own.texts[0])
        seen.append(states[0].double())
    expected = [float(1 - torch.cosine_similarity(seen[0], s, dim=-1).mean()) for s in seen[1:]]
    assert own.request(frozenset()).quality(plans, "turn") == pytest.approx(expected, rel=1e-4)


def test_an_unknown_quality_measure_lists_what_there_is():
    with pytest.raises(FlexiError, match=r"unknown quality measure 'los'.*chrf, loss, turn"):
        pruner().request(frozenset()).quality([], "los")


def test_a_strategy_without_wants_goes_with_no_metric_only():
    free = replace(RemoveBlocks())
    object.__setattr__(free, "wants", frozenset())
    none = Plugins.load().get("metric", "none")
    assert incompatible(none, free) is None
    assert incompatible(CoMe(), free) == "remove-blocks chooses without scores; it goes with the metric none"
    assert incompatible(none, RemoveBlocks()) == "remove-blocks wants block scores, none gives none"


# ---------------------------------------------------------------------------------------- CoMe


def test_come_p_takes_the_share_with_the_lowest_loss():
    own = pruner()
    found = own.plan(CoMe(), ConcatMerge(ratio="search", granularity=4, merges=1), 0.0)
    request = own.request(CoMe().needs | ConcatMerge().needs)
    request = replace(request, scores=CoMe().score(request))
    first = next(i for i, r in enumerate(found.blocks) if len(r.norm_weights) == 2)
    losses = {}
    for step in range(5):
        plan = ConcatMerge()._merge(request, first, (step / 4, 1 - step / 4))
        losses[plan.blocks] = loss(build_model(plan, own.checkpoint), own.texts[0])
    assert found.blocks == min(losses, key=losses.__getitem__)
    assert len(losses) == 5


def test_a_share_of_one_leaves_the_other_block_only_its_part_in_the_norms():
    """CoMe with ratio (1, 0): all units are the first block's, but the norms are the mean of both."""
    own = pruner()
    request = own.request(CoMe().needs)
    request = replace(request, scores=CoMe().score(request))
    plan = ConcatMerge()._merge(request, 2, (1.0, 0.0))
    heads, channels = range(3), range(96)
    assert plan.blocks[2] == BlockRecipe(parts=(Part(2, tuple(heads), tuple(channels)),), norms=((2, 0.5), (3, 0.5)))
    model = build_model(plan, own.checkpoint).model.layers[2]
    for role, path in own.checkpoint.family.ROLES.items():
        assert torch.equal(model.get_submodule(path).weight, own.checkpoint.block(2)[role])
    norms = [own.checkpoint.read(f"model.layers.{i}.input_layernorm.weight") for i in (2, 3)]
    assert close(model.input_layernorm.weight, (norms[0] + norms[1]) / 2)


def test_pairs_by_loss_are_those_the_model_misses_least():
    own = pruner("llama")
    found = own.plan(CoMe(), ConcatMerge(pairs="sleb", merges=1), 0.0)
    identity = PruningPlan.identity(own.checkpoint.shape)
    losses = [loss(build_model(without(own, identity, {i, i + 1}), own.checkpoint), own.texts[0]) for i in range(5)]
    merged = next(i for i, r in enumerate(found.blocks) if len(r.norm_weights) == 2)
    assert merged == min(range(5), key=losses.__getitem__)


def test_pairs_as_mka_chooses_them_are_the_last():
    found = pruner().plan(CoMe(), ConcatMerge(pairs="mka", merges=2), 0.0)
    assert [tuple(s for s, _ in r.norm_weights) for r in found.blocks] == [(0,), (1,), (2, 3), (4, 5)]


def test_a_pair_can_be_summed_or_lose_a_block_in_the_place_of_concatenation():
    """The same pair and the same shares, and another block made of them."""
    own = pruner()
    plans = {m: own.plan(CoMe(), ConcatMerge(merge=m, merges=2), 0.0) for m in ("concat", "sum", "drop")}
    notes = {m: p.origin["notes"][0].rsplit(",", 1 if m != "concat" else 2)[0] for m, p in plans.items()}
    assert len(set(notes.values())) == 1
    assert [len(p.blocks) for p in plans.values()] == [4, 4, 4]
    mixed = next(r for r in plans["sum"].blocks if r.mix)
    (one, share), (other, rest) = mixed.mix
    assert other == one + 1
    assert share + rest == pytest.approx(1.0)
    position = plans["sum"].blocks.index(mixed)
    block = build_model(plans["sum"], own.checkpoint).model.layers[position]
    gates = [own.checkpoint.block(i)["gate"] for i in (one, other)]
    assert close(block.mlp.gate_proj.weight, share * gates[0] + rest * gates[1])
    gone = one if share < rest else other
    dropped = own.plan(CoMe(), ConcatMerge(merge="drop", merges=1), 0.0)
    kept = [i for i in range(6) if i != gone]
    assert [r.sources for r in dropped.blocks] == [(i,) for i in kept]
    removed = PruningPlan.keep(own.checkpoint.shape, kept)
    one, other = (logits(build_model(plan, own.checkpoint), own.texts[0]) for plan in (dropped, removed))
    assert torch.equal(one, other)


def test_tiled_query_heads_are_those_of_the_released_code():
    """KV heads {2, 5} of 8 with groups of 4: the mask is repeated, so that query heads 2, 5, 10, 13, ... are taken."""
    model = tiny("llama", hidden_size=64, num_attention_heads=32, num_key_value_heads=8)
    shape = opened(model).shape
    kept = (2, 5)
    tiled = ConcatMerge(heads="tiled")._query_heads(shape.blocks[0], kept)
    assert tiled == (2, 5, 10, 13, 18, 21, 26, 29)
    plan = change(PruningPlan.identity(shape), {1: BlockRecipe(parts=(Part(1, kept, None, tiled),))})
    assert PruningPlan.from_json(plan.to_json()) == plan
    block = build_model(plan, opened(model)).model.layers[1].self_attn
    original = model.model.layers[1].self_attn
    mask = torch.zeros(8, dtype=torch.bool)
    mask[list(kept)] = True
    query = original.q_proj.weight.view(32, 2, 64)[mask.repeat(4)].flatten(0, 1)
    assert torch.equal(block.q_proj.weight, query)
    assert torch.equal(block.o_proj.weight, original.o_proj.weight.view(64, 32, 2)[:, mask.repeat(4)].flatten(1))
    assert ConcatMerge()._query_heads(shape.blocks[0], kept) is None


def test_query_heads_must_be_as_many_as_the_kv_heads_ask_for():
    shape = opened(tiny()).shape
    with pytest.raises(FlexiError, match="query heads of block 1: expected 4 for these KV heads, found 3"):
        PruningPlan(shape, (BlockRecipe(parts=(Part(1, (0, 1), None, (0, 1, 2)),)),))


# ---------------------------------------------------------------------------------------- SAAP


@pytest.mark.parametrize("order", ["first", "second", "mix"])
@pytest.mark.parametrize("columns", [False, True])
def test_taylor_scores_of_every_order(order, columns):
    generator = torch.Generator().manual_seed(0)
    inner, gradient = torch.randn(3, 5, 7, generator=generator), torch.randn(3, 5, 4, generator=generator)
    weight = torch.randn(4, 7, generator=generator)
    terms = torch.einsum("stc,str->src", inner, gradient) * weight
    terms = terms.transpose(1, 2) if columns else terms
    effect = {"first": torch.abs, "second": torch.square, "mix": lambda t: (t - t * t / 2).abs()}[order]
    vector, element = saap.row_scores(LinearTrace(inner, gradient, weight), columns, order)
    assert close(vector, effect(terms.sum(2)))
    assert close(element, effect(terms).sum(2))


def test_every_order_and_reading_gives_plans():
    own = pruner()
    found = {}
    for order, fluctuation in itertools.product(("first", "second", "mix"), ("samples", "units", "rates")):
        metric = saap.Saap(order=order, fluctuation=fluctuation)
        plan = own.plan(metric, RemoveUnits(multiple=1, protect_first=0, protect_last=0), 0.2)
        assert plan.ratio >= 0.2
        found[order, fluctuation] = plan.blocks
    assert len(set(found.values())) == len(found)


def test_with_rates_each_blocks_share_follows_its_spread():
    """Twice the coefficient of variation, twice the share of units under any threshold."""
    metric = saap.Saap(fluctuation="rates")
    base = torch.linspace(1.0, 2.0, 100)
    steady, spread = 10 + base, 10 + 2 * base - 1.5  # the same mean, twice the deviation
    scores = [metric.keep(values[None].expand(3, -1), torch.tensor(0.0)) for values in (steady, spread)]
    threshold = float(scores[0][20])
    gone = [int((s < threshold).sum()) for s in scores]
    assert gone[0] == 20
    assert gone[1] == pytest.approx(40, abs=1)


def test_with_rates_no_block_loses_its_lowest_unit_just_for_being_the_lowest():
    metric = saap.Saap(fluctuation="rates")
    few = metric.keep(torch.tensor([[1.0, 1.01, 1.02]]), torch.tensor(0.0))
    many = metric.keep(torch.linspace(1.0, 3.0, 24)[None], torch.tensor(0.0))
    assert float(few.min()) > float(many[3])


def test_keep_scores_are_ranked_as_they_are():
    """z(mean) - lambda z(fluctuation): standardised once more, each block's lambda would be another one."""
    own = pruner()
    assert all(
        saap.Saap(fluctuation=reading).score(own.request(saap.Saap().needs)).rule == "undivided"
        for reading in ("samples", "units", "rates")
    )


def test_one_sample_has_no_fluctuation():
    own = pruner()
    request = own.request(saap.Saap().needs)
    name = saap.Taylor().name
    single = {k: tuple(t[:1] for t in v) for k, v in request.statistics[name].items()}
    request = replace(request, statistics=Statistics({name: single}))
    with pytest.raises(
        FlexiError, match="at least 2 gradient samples for what fluctuates over them, found 1; give more"
    ):
        saap.Saap().score(request)
    assert saap.Saap(stability=0.0).score(request).mlp is not None


def test_choices_by_loss_end_where_every_choice_breaks_the_model():
    own = pruner()
    request = own.request(CoMe().needs | ConcatMerge().needs)
    request = replace(request, scores=CoMe().score(request), quality=lambda plans, *_: [math.inf] * len(plans))
    for strategy in (ConcatMerge(ratio="search", merges=1), ConcatMerge(pairs="sleb", merges=1)):
        with pytest.raises(
            FlexiError, match=r"concat-merge: any .* leaves a model that breaks down: none of \d+ losses"
        ):
            strategy.plan(request)
    with pytest.raises(FlexiError, match="greedy: any block that goes leaves a model that breaks down"):
        Greedy().score(request)


def test_the_units_reading_is_the_fused_score_within_its_block():
    values = torch.rand(4, 9, generator=torch.Generator().manual_seed(0))
    kept = saap.Saap(fluctuation="units").keep(values, torch.tensor(0.3))
    mean = values.mean(0)
    assert close(kept, (mean - mean.mean()) / mean.std(correction=0))


def test_a_metric_may_say_how_its_units_are_ranked():
    shape = opened(tiny()).shape
    low = Scores(attention=tuple(torch.ones(4) for _ in shape.blocks), mlp=tuple(torch.ones(24) for _ in shape.blocks))
    from flexi_plugins.budget import priorities

    attention, _ = priorities(replace(low, rule="undivided"), shape, "auto")
    assert attention[0].tolist() == [1.0] * 4
    attention, _ = priorities(low, shape, "auto")
    assert attention[0].tolist() == [0.0] * 4
    attention, _ = priorities(replace(low, rule="undivided"), shape, "standardised")
    assert attention[0].tolist() == [0.0] * 4


# ---------------------------------------------------------------------------------------- FlexiGPT


def test_the_ablations_of_the_donor_distance_are_plain_norms():
    checkpoint = opened(tiny())
    pairs = [(0, 1), (2, 4)]
    plain = donor_distances(checkpoint, checkpoint.shape, pairs, 3, "exact", "frobenius")
    tails = donor_distances(checkpoint, checkpoint.shape, pairs, 3, "exact", "difference")
    for i, j in pairs:
        differences = [w.double() - checkpoint.block(j)[role].double() for role, w in checkpoint.block(i).items()]
        assert plain[frozenset((i, j))] == pytest.approx(sum(float(d.norm()) for d in differences), rel=1e-5)
        expected = sum(float(torch.linalg.svdvals(d)[3:].norm()) for d in differences)
        assert tails[frozenset((i, j))] == pytest.approx(expected, rel=1e-4)


def test_the_calibrated_gain_is_the_one_with_the_lowest_loss():
    own = pruner()
    planned = own.make(FlexiGPT(), ShareLora(blocks=2, output_gain="calibrated"), 0.0)
    (gain,) = {float(t.unique()) for n, t in planned.attached.items() if n.endswith("output_norm")}
    losses = {}
    for candidate in GAINS:
        other = own.make(FlexiGPT(), ShareLora(blocks=2, output_gain=candidate), 0.0)
        losses[candidate] = loss(build_model(other.plan, own.checkpoint, other.attached), own.texts[0])
    assert gain == pytest.approx(min(losses, key=losses.__getitem__))


@pytest.mark.parametrize("kind", ["llama-gqa-tied", "qwen3"])
def test_the_draft_is_the_model_without_its_replaced_blocks_on_the_same_storage(kind):
    own = pruner(kind)
    planned = own.make(KnownScores(), ShareLora(blocks=2), 0.0)
    model = own.model(planned)
    draft = model.draft()
    kept = [i for i, r in enumerate(planned.plan.blocks) if r.shares is None]
    removed = build_model(PruningPlan.keep(own.checkpoint.shape, kept), own.checkpoint)
    assert close(logits(draft, own.texts[0]), logits(removed, own.texts[0]))
    names = {t.data_ptr() for t in model.parameters()}
    assert all(t.data_ptr() in names for t in draft.parameters())


def test_self_speculative_decoding_writes_what_the_model_writes_alone():
    own = pruner()
    model = own.model(own.make(KnownScores(), ShareLora(blocks=2, output_gain=0.3), 0.0))
    prompt = own.texts[0][:1, :8]
    options = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    alone = model.generate(prompt, **options)
    together = model.generate(prompt, assistant_model=model.draft(), **options)
    assert torch.equal(alone, together)


# ---------------------------------------------------------------------------------------- tensors of a block's own


def owning(shape, position: int, *own: str) -> PruningPlan:
    recipe = PruningPlan.identity(shape).blocks[position]
    return change(PruningPlan.identity(shape), {position: replace(recipe, own=tuple(sorted(own)))})


@pytest.mark.parametrize("kind", ["llama", "llama-biases", "qwen2", "mistral"])
def test_a_block_may_have_weights_and_biases_of_its_own(kind, tmp_path):
    """They take the place of the old ones; a bias where there was none is counted, and the engine runs it too."""
    from transformers import AutoModelForCausalLM

    model = tiny(kind)
    checkpoint, ids = opened(model), tokens()
    plan = owning(checkpoint.shape, 2, "down.bias", "down.weight")
    weight = torch.randn(32, 24, generator=torch.Generator().manual_seed(0))
    attached = {"blocks.2.down.weight": weight, "blocks.2.down.bias": weight[:, 0].clone()}
    plan = with_digests(plan, attached)
    made = build_model(plan, checkpoint, attached)
    down = model.model.layers[2].mlp.down_proj
    down.weight, down.bias = torch.nn.Parameter(weight, False), torch.nn.Parameter(weight[:, 0].clone(), False)
    assert torch.equal(logits(made, ids), logits(model, ids))
    assert sum(p.numel() for p in made.parameters()) == plan.stored_parameters
    assert (plan.not_plain() is None) == checkpoint.shape.mlp_bias
    own = TinyPruner(checkpoint, Plugins.load())
    own.write(Planned(plan, attached), tmp_path / "own")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "own").eval(), ids), logits(model, ids))
    own.__dict__["texts"] = (ids, ids, "ids")
    (found,) = own.calibrator.losses([Planned(plan, attached)])
    assert found == pytest.approx(loss(model, ids), rel=1e-5)


def test_tensors_of_their_own_go_with_blocks_that_later_steps_leave_whole():
    shape = opened(tiny()).shape
    first = replace(owning(shape, 2, "down.weight"), tensors=(("blocks.2.down.weight", "a" * 64),))
    removed = first.compose(PruningPlan.keep(shape, (0, 2, 4)))
    assert removed.blocks[1].own == ("down.weight",)
    assert removed.tensors == (("blocks.1.down.weight", "a" * 64),)
    again = first.compose(owning(shape, 2, "attention_output.weight", "down.weight"))
    assert again.blocks[2].own == ("attention_output.weight", "down.weight")
    assert again.tensors == ()  # what is made anew is no longer there
    narrower = change(PruningPlan.identity(shape), {2: BlockRecipe(parts=(Part(2, (0,), None),))})
    with pytest.raises(FlexiError, match=r"takes units of block 2, which has tensors of its own \(down.weight\)"):
        first.compose(narrower)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (("norm.weight",), "'norm.weight', expected ROLE.weight or ROLE.bias"),
        (("down.weight", "down.bias"), "must be sorted"),
    ],
)
def test_wrong_names_of_own_tensors_are_refused(own, message):
    shape = opened(tiny()).shape
    with pytest.raises(FlexiError, match=message):
        PruningPlan(shape, (BlockRecipe(parts=(Part(0),), own=own),))


def test_a_sharing_block_has_no_tensors_of_its_own():
    shape = opened(tiny()).shape
    plan = sharing(shape, {3: 1})
    with pytest.raises(FlexiError, match="shares weights has adapters"):
        change(plan, {3: replace(plan.blocks[3], own=("down.bias",))})


# ---------------------------------------------------------------------------------------- the contract


def test_an_option_takes_the_ratios_place_where_its_strategy_says_so():
    @dataclass(frozen=True)
    class Plain:
        blocks: int | None = 3

    @dataclass(frozen=True)
    class Threshold:
        T: float | None = None
        knobs: ClassVar[tuple[str, ...]] = ("T",)

    assert not own_knob(Plain())
    assert not own_knob(Threshold())
    assert own_knob(Threshold(T=0.0))
    assert own_knob(RemoveBlocks(blocks=1))


def test_what_a_batch_says_of_its_sequences_stands_in_their_places():
    nothing = torch.zeros(0)
    seen = {"attention_inner": None, "mlp_inner": None, "attention_weight": None, "mlp_weight": None}
    states = {"input": nothing, "middle": nothing, "output": nothing, "before": (), "last": nothing}
    trace = BlockTrace(0, 1, 1, **states, **seen, sequences=range(1, 3), total=4)
    assert trace.among_all(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist() == [[0, 0], [1, 2], [3, 4], [0, 0]]


# ------------------------------------------------------------------------------- what the papers leave out


def test_adapters_can_start_at_a_zero_product():
    """As many of them as at the SVD's start, and the block runs with its donor's maps."""
    own, method = pruner(), ShareLora(blocks=2, adapters="zero")
    planned, svd = own.make(KnownScores(), method, 0.0), own.make(KnownScores(), ShareLora(blocks=2), 0.0)
    assert {n: t.shape for n, t in planned.attached.items()} == {n: t.shape for n, t in svd.attached.items()}
    for name, tensor in planned.attached.items():
        if name.endswith("lora_a"):
            assert not tensor.any()
        if name.endswith("lora_b"):
            assert torch.allclose(tensor @ tensor.T, torch.eye(len(tensor)), atol=1e-5)
    again = own.make(KnownScores(), method, 0.0)
    assert all(torch.equal(tensor, again.attached[name]) for name, tensor in planned.attached.items())


def test_outputs_need_not_be_normalised():
    own = pruner()
    planned = own.make(KnownScores(), ShareLora(blocks=2, output_norm=False), 0.0)
    normalised = own.make(KnownScores(), ShareLora(blocks=2), 0.0)
    assert not any(r.output_norm for r in planned.plan.blocks)
    assert not [name for name in planned.attached if name.endswith("output_norm")]
    shape = planned.plan.shape
    assert normalised.plan.stored_parameters - planned.plan.stored_parameters == 2 * 2 * shape.hidden
    assert bool(own.model(planned)(own.texts[0][:1, :8]).logits.isfinite().all())


def test_one_form_of_saaps_scores_alone_is_its_own_term_of_both():
    vector, element = [torch.rand(3, 4), torch.rand(3, 5)], [torch.rand(3, 4), torch.rand(3, 5)]
    fused, alone = (
        saap.Saap().fused(vector, element),
        [saap.Saap(form=f).fused(vector, element) for f in ("vector", "element")],
    )
    for both, *single in zip(fused, *alone, strict=True):
        assert torch.allclose(both[0], single[0][0] + single[1][0])
        assert both[1] == pytest.approx(single[0][1] + single[1][1])
    mean = torch.cat([v.flatten() for v in vector]).mean()
    assert torch.allclose(alone[0][0][0], vector[0] / (2 * mean))
