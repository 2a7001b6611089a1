"""The engine: a swept plan = the plan alone = the exported model; likelihoods, journals, shared prefixes, gradients."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import attached_for, built, change, close, logits, narrowed, opened, random_plan, sharing, tiny, tokens
from torch import nn
from torch.nn import functional as F

from flexi_plugins.data import BlockRecipe, Part, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.execution import backward, sweep
from flexi_plugins.execution.backward import backward_sweep
from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.execution.likelihoods import likelihoods
from flexi_plugins.execution.packing import pack
from flexi_plugins.execution.readout import Batch, read_out
from flexi_plugins.execution.schedule import Prefixes, count_blocks
from flexi_plugins.execution.sweep import Planned, Sweeper
from flexi_plugins.precision import products
from flexi_plugins.rewrite import build_model, with_digests

VOCABULARY = 61
KINDS = ["llama-biases", "mistral", "qwen2-mixed", "qwen3"]


def zoo(shape) -> list[Planned]:
    """Return plans of every form, and some random ones; several share prefixes."""
    whole = PruningPlan.identity(shape)
    absent = {0: BlockRecipe(parts=(Part(0, ()),)), 2: BlockRecipe(parts=(Part(2, None, ()),))}
    gained = change(whole, {1: BlockRecipe(parts=(Part(1),), gain=1.5)}, embedding_gain=2.0, final_norm_gain=0.5)
    found = [
        Planned(whole),
        Planned(PruningPlan.keep(shape, [0, 1, 3, 4])),
        Planned(narrowed(shape, (0, 1, 3), range(10))),
        Planned(change(whole, absent)),
        Planned(gained),
        Planned(*attached_for(sharing(shape, {3: 1}), seed=1)),
        Planned(*attached_for(sharing(shape, {3: 1}), seed=2)),
    ]
    return found + [Planned(random_plan(shape, random.Random(seed), closed=False)) for seed in range(5)]


def all_reads(positions: Sequence[tuple[int, int]]) -> tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]:
    """Read the log-probability of every token of the vocabulary at these (row, column) positions."""
    return tuple((row, (column,), (token,)) for row, column in positions for token in range(VOCABULARY))


def swept(sweeper, planned, ids, positions, **options) -> list[torch.Tensor]:
    """Return log-probabilities (positions, vocabulary) of every plan."""
    batch = Batch(ids, all_reads(positions))
    ((_, answers),) = sweeper.sweep(planned, [batch], **options)
    return [torch.tensor([a for a, _ in answers[i]]).view(-1, VOCABULARY) for i in range(len(planned))]


def read(model: nn.Module, ids, positions) -> torch.Tensor:
    """Return the same from a transformers model."""
    found = logits(model, ids).float().log_softmax(-1)
    return torch.stack([found[row, column] for row, column in positions])


# ---------------------------------------------------------------------------------------- swept = alone = exported


@pytest.mark.parametrize("kind", KINDS)
def test_many_plans_swept_together_are_each_plan_alone_and_its_exported_model(kind):
    model = tiny(kind)
    checkpoint = opened(model)
    planned, ids = zoo(checkpoint.shape), tokens(2, 12)
    positions = [(0, 0), (1, 4), (0, 11)]
    blocks = Blocks(checkpoint)
    together = swept(Sweeper(blocks), planned, ids, positions)
    for one, found in zip(planned, together, strict=True):
        alone = swept(Sweeper(Blocks(checkpoint)), [one], ids, positions)[0]
        assert torch.equal(found, alone)
        exported = read(build_model(one.plan, checkpoint, one.attached), ids, positions)
        assert close(found, exported, 1e-6)
    assert not close(together[5], together[6])  # equal recipes with other adapters are other blocks


def test_in_bfloat16_too():
    checkpoint = opened(tiny("llama"))
    planned, ids, positions = zoo(checkpoint.shape), tokens(2, 12), [(0, 3), (1, 11)]
    together = swept(Sweeper(Blocks(checkpoint, torch.bfloat16)), planned, ids, positions)
    for one, found in zip(planned, together, strict=True):
        exported = build_model(one.plan, checkpoint, one.attached, torch.bfloat16)
        with products(torch.bfloat16, torch.device("cpu")):
            assert close(found, read(exported, ids, positions), 1e-6)


def test_the_final_logits_are_transformers_logits_to_the_bit():
    model, ids = tiny("qwen2-mixed"), tokens(3, 12)
    blocks, plan = Blocks(opened(model)), PruningPlan.identity(opened(model).shape)
    with torch.no_grad():
        hidden = blocks.embed(ids)
        arguments = blocks.arguments(hidden)
        for position in range(5):
            hidden = blocks.run(plan, position, {}, hidden, arguments)
        assert torch.equal(blocks.logits(hidden), logits(model, ids))


def test_what_follows_a_row_does_not_change_it():
    checkpoint = opened(tiny("mistral"))
    planned = zoo(checkpoint.shape)[:4]
    ids = tokens(1, 7)
    padded = torch.cat([torch.cat([ids, tokens(1, 6, seed=1)], 1), tokens(2, 13, seed=2)])
    positions = [(0, 2), (0, 6)]
    short = swept(Sweeper(Blocks(checkpoint)), planned, ids, positions)
    long = swept(Sweeper(Blocks(checkpoint)), planned, padded, positions)
    assert all(close(a, b) for a, b in zip(short, long, strict=True))


def test_reads_of_several_tokens_add_up():
    model = tiny()
    ids = tokens(2, 9)
    plan = Planned(PruningPlan.identity(opened(model).shape))
    reads = ((0, range(2, 6), ids[0, 3:7].tolist()), (1, (0,), (int(ids[1, 1]),)), (1, (4, 7, 5), (3, 1, 4)))
    ((_, answers),) = Sweeper(Blocks(opened(model))).sweep([plan], [Batch(ids, reads)])
    found = logits(model, ids).log_softmax(-1)
    for (row, columns, targets), (score, greedy) in zip(reads, answers[0], strict=True):
        expected = sum(float(found[row, c, t]) for c, t in zip(columns, targets, strict=True))
        assert score == pytest.approx(expected, rel=1e-5)
        assert greedy == all(int(found[row, c].argmax()) == t for c, t in zip(columns, targets, strict=True))


def test_greedy_answers_are_seen():
    model = tiny()
    ids = tokens(1, 5)
    best = logits(model, ids)[0].argmax(-1).tolist()
    reads = ((0, (1, 2, 3), tuple(best[1:4])), (0, (1, 2), (best[1], (best[2] + 1) % VOCABULARY)))
    plan = Planned(PruningPlan.identity(opened(model).shape))
    ((_, answers),) = Sweeper(Blocks(opened(model))).sweep([plan], [Batch(ids, reads)])
    assert [g for _, g in answers[0]] == [True, False]


# ---------------------------------------------------------------------------------------- the trie


def test_shared_prefixes_run_once():
    shape = opened(tiny()).shape
    whole = PruningPlan.identity(shape)
    last = change(whole, {4: BlockRecipe(parts=(Part(4, (0,)),))})
    first = change(whole, {0: BlockRecipe(parts=(Part(0, (0,)),))})
    scaled = replace(whole, embedding_gain=2.0)
    one, other = (Planned(*attached_for(sharing(shape, {3: 1}), seed=s)).plan for s in (1, 2))
    assert count_blocks([whole]) == (5, 5)
    assert count_blocks([whole, whole]) == (5, 10)
    assert count_blocks([whole, last]) == (6, 10)
    assert count_blocks([whole, first]) == (10, 10)  # what follows another block has other states
    assert count_blocks([whole, scaled]) == (10, 10)
    assert count_blocks([whole, PruningPlan.keep(shape, [0, 1, 2])]) == (5, 8)
    assert count_blocks([whole, one, other]) == (9, 15)
    assert count_blocks([whole, replace(whole, final_norm_gain=0.5)]) == (5, 10)


def test_the_sweep_runs_what_was_counted(monkeypatch):
    checkpoint = opened(tiny())
    planned = zoo(checkpoint.shape)
    runs = []
    original = Blocks.run
    monkeypatch.setattr(Blocks, "run", lambda self, *a: runs.append(a[1]) or original(self, *a))
    passed = []
    batches = [Batch(tokens(2, 5), ((0, (1,), (2,)),)), Batch(tokens(1, 4), ((0, (1,), (2,)),))]
    list(Sweeper(Blocks(checkpoint)).sweep(planned, batches, advance=passed.append))
    shared, alone = count_blocks([p.plan for p in planned])
    assert len(runs) == 2 * shared < 2 * alone
    assert sum(passed) == shared * (10 + 4)


def test_equal_prefixes_have_equal_numbers_between_sweeps():
    shape = opened(tiny()).shape
    prefixes = Prefixes()
    whole, cut = prefixes.of(PruningPlan.identity(shape)), prefixes.of(PruningPlan.keep(shape, [0, 1, 3]))
    assert whole[:3] == cut[:3]
    assert whole[3] != cut[3]
    assert prefixes.of(PruningPlan.identity(shape)) == whole


def test_kept_states_give_the_same_numbers_and_are_not_run_again(monkeypatch):
    checkpoint, ids, positions = opened(tiny("qwen2-mixed")), tokens(2, 12), [(0, 2), (1, 11)]
    planned = zoo(checkpoint.shape)
    fresh = swept(Sweeper(Blocks(checkpoint)), planned, ids, positions)
    sweeper = Sweeper(Blocks(checkpoint))
    swept(sweeper, planned[:1], ids, positions, keep=True)
    runs = []
    original = Blocks.run
    monkeypatch.setattr(Blocks, "run", lambda self, *a: runs.append(a[1]) or original(self, *a))
    again = swept(sweeper, planned, ids, positions, keep=True)
    assert all(torch.equal(a, b) for a, b in zip(again, fresh, strict=True))
    assert len(runs) == count_blocks([p.plan for p in planned])[0] - 5


def test_a_plan_that_breaks_down_takes_nobody_along():
    checkpoint, ids, positions = opened(tiny()), tokens(2, 8), [(0, 2), (1, 7)]
    planned = zoo(checkpoint.shape)
    _, attached = attached_for(sharing(checkpoint.shape, {3: 1}))
    attached["blocks.3.down.lora_a"][0, 0] = math.nan
    broken = Planned(with_digests(sharing(checkpoint.shape, {3: 1}), attached), attached)
    found = swept(Sweeper(Blocks(checkpoint)), [*planned[:3], broken, *planned[3:]], ids, positions)
    expected = swept(Sweeper(Blocks(checkpoint)), planned, ids, positions)
    assert found[3].isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(found[:3] + found[4:], expected, strict=True))
    assert all(e.isfinite().all() for e in expected)


def test_attached_tensors_without_digests_are_refused():
    """Else plans with equal recipes and other adapters would be taken for the same."""
    plan = sharing(opened(tiny()).shape, {3: 1})
    _, attached = attached_for(plan)
    with pytest.raises(FlexiError, match=r"'blocks\.3\.attention\.output_norm' has no digest in the plan"):
        Planned(plan, attached)


def test_a_plan_without_its_adapters_is_refused():
    checkpoint = opened(tiny())
    with pytest.raises(FlexiError, match="16 attached tensors are missing"):
        swept(Sweeper(Blocks(checkpoint)), [Planned(sharing(checkpoint.shape, {3: 1}))], tokens(1, 5), [(0, 2)])


def test_forgotten_blocks_are_built_again():
    checkpoint, ids, positions = opened(tiny()), tokens(2, 6), [(0, 2)]
    planned = zoo(checkpoint.shape)
    sweeper = Sweeper(Blocks(checkpoint))
    first = swept(sweeper, planned, ids, positions)
    sweeper.blocks.keep_only([planned[0].plan])
    assert len(sweeper.blocks._built) == 5
    assert all(torch.equal(a, b) for a, b in zip(first, swept(sweeper, planned, ids, positions), strict=True))


# ---------------------------------------------------------------------------------------- likelihoods


def some_requests(count: int = 30, seed: int = 0):
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        context = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9)))
        made.append((context, tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 4)))))
    return [*made, made[3], made[0]]


class Journal:
    """Keeps answers in memory as JSON would; dies when asked for more than ``lives`` groups."""

    def __init__(self, lives: float = math.inf) -> None:
        self.kept: dict[tuple[str, str], list[Any]] = {}
        self.lives = lives

    def get(self, plan_hash, group_hash):
        return self.kept.get((plan_hash, group_hash))

    def put(self, plan_hash, group_hash, answers):
        if len(self.kept) >= self.lives:
            raise KeyboardInterrupt
        self.kept[plan_hash, group_hash] = [list(a) for a in answers]


class Progress:
    """Notes what is reported."""

    def __init__(self) -> None:
        self.totals: list[int] = []
        self.done = 0

    @contextmanager
    def __call__(self, title, total):
        self.totals.append(total)
        yield self.advance

    def advance(self, count):
        self.done += count


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr("flexi_plugins.execution.likelihoods.BATCH_TOKENS", 40)


def answer(planned, requests, journal, checkpoint=None, setting="s", progress=None, **more):
    checkpoint = checkpoint or opened(tiny())
    progress = progress or Progress()
    return likelihoods(Sweeper(Blocks(checkpoint)), planned, requests, journal, setting, progress, "answering", **more)


def test_likelihoods_are_those_of_the_exported_model(small_groups):
    model = tiny("qwen2-mixed")
    planned = zoo(opened(model).shape)
    requests = some_requests()
    found = answer(planned, requests, None, opened(model))
    for one, answers in zip(planned, found, strict=True):
        exported = built(one.plan, model, one.attached)
        assert len(answers) == len(requests)
        for (context, continuation), (score, greedy) in zip(requests, answers, strict=True):
            every = logits(exported, torch.tensor([[*context, *continuation]]))[0].log_softmax(-1)
            rows = every[len(context) - 1 : -1]
            expected = float(rows.gather(1, torch.tensor(continuation)[:, None]).sum())
            assert score == pytest.approx(expected, rel=1e-5, abs=1e-5)
            assert greedy == (rows.argmax(-1).tolist() == list(continuation))


def test_rounded_likelihoods_are_those_of_a_softmax_in_bfloat16(small_groups):
    """As lm-eval's HFLM has it: log-probabilities in the dtype of the model, the targets' added up in it."""
    model = tiny()
    requests, journal = some_requests(), Journal()
    planned = [Planned(PruningPlan.identity(opened(model).shape))]
    (found,) = answer(planned, requests, journal, opened(model), rounding=torch.bfloat16)
    for (context, continuation), (score, _greedy) in zip(requests, found, strict=True):
        every = logits(model, torch.tensor([[*context, *continuation]]))[0].log_softmax(-1).bfloat16()
        rows = every[len(context) - 1 : -1]
        assert score == float(rows.gather(1, torch.tensor(continuation)[:, None]).sum())
    (exact,) = answer(planned, requests, journal, opened(model))
    assert exact != found, "what is rounded is not taken from the journal for what is not"
    assert [greedy for _, greedy in exact] == [greedy for _, greedy in found]


def test_a_killed_sweep_goes_on_where_it_was(small_groups, monkeypatch):
    checkpoint = opened(tiny())
    planned, requests = zoo(checkpoint.shape)[:4], some_requests()
    whole = answer(planned, requests, None, checkpoint)
    groups = len(pack(requests, 40))
    assert groups >= 5
    journal = Journal(lives=2 * 4 + 1)  # in the middle of the third group
    with pytest.raises(KeyboardInterrupt):
        answer(planned, requests, journal, checkpoint)
    assert len(journal.kept) == 9
    journal.lives = math.inf
    progress = Progress()
    ran = []
    monkeypatch.setattr(sweep, "read_out", lambda *a: ran.append(1) or read_out(*a))
    resumed = answer(planned, requests, journal, checkpoint, progress=progress)
    assert resumed == whole
    assert len(ran) == groups * 4 - 9
    assert progress.done == progress.totals[0] > 0
    ran.clear()
    assert answer(planned, requests, journal, checkpoint) == whole
    assert not ran


def test_another_setting_another_plan_or_another_group_is_run_again(small_groups):
    planned, requests, journal = zoo(opened(tiny()).shape)[:1], some_requests(), Journal()
    answer(planned, requests, journal)
    before = len(journal.kept)
    answer(planned, requests, journal)
    assert len(journal.kept) == before
    answer(planned, requests, journal, setting=["another model"])
    assert len(journal.kept) == 2 * before
    answer(zoo(opened(tiny()).shape)[1:2], requests, journal)
    assert len(journal.kept) == 3 * before
    answer(planned, [((1, 2), (3,))], journal)
    assert len(journal.kept) == 3 * before + 1


def test_equal_plans_get_equal_answers(small_groups):
    plan = zoo(opened(tiny()).shape)[1]
    first, second = answer([plan, plan], some_requests(), Journal())
    assert first == second


@pytest.mark.parametrize("request_", [((), (1,)), ((1,), ())])
def test_a_request_needs_context_and_continuation(request_):
    with pytest.raises(ValueError, match="at least one token of context and one of continuation"):
        answer(zoo(opened(tiny()).shape)[:1], [request_], None)


# ---------------------------------------------------------------------------------------- gradients


def whole_model_gradients(model, ids):
    """Return each sample's loss, and its own gradients of all parameters, by autograd on the whole model."""
    losses, gradients = [], []
    for row in ids:
        model.zero_grad()
        found = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(found, row[1:])
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return torch.stack(losses), gradients


@pytest.mark.parametrize("kind", ["llama-tied", "mistral", "qwen2-mixed", "qwen3-biases"])
@pytest.mark.parametrize("form", [0, 1, 3, 4, 5])
def test_gradients_are_autograds_on_the_whole_model(kind, form, monkeypatch):
    monkeypatch.setattr(backward, "HEAD_ROWS", 4)  # the loss of a sample in three pieces
    model, ids = tiny(kind), tokens(3, 10)
    checkpoint = opened(model)
    planned = zoo(checkpoint.shape)[form]
    visited = {}
    losses = backward_sweep(Sweeper(Blocks(checkpoint)), planned, ids, lambda t: visited.update({t.index: t}))
    exported = built(planned.plan, model, planned.attached).requires_grad_(True)
    expected, gradients = whole_model_gradients(exported, ids)
    assert close(losses, expected)
    assert list(visited) == list(reversed(range(len(planned.plan.blocks))))
    roles = checkpoint.family.ROLES
    donors = {1} if form == 5 else set()
    for position, trace in visited.items():
        block = planned.plan.block_shape(planned.plan.blocks[position])
        assert (trace.kv_heads, trace.group, trace.head_dim) == (block.kv_heads, block.group, block.head_dim)
        assert set(trace.maps) == set(checkpoint.shape.maps(block))
        for role, found in trace.maps.items():
            path = f"{checkpoint.family.block_prefix(position)}{roles[role]}"
            layer = exported.get_submodule(path)
            assert close(found.weight, layer.weight.detach(), 1e-6)
            for sample in range(3):
                product = found.output_gradient[sample].T @ found.input[sample]
                if position == 3 and form == 5:  # a sharing block: through its adapters
                    name, own = f"{path}.lora_a", product @ layer.lora_b.detach().T
                elif position in donors:
                    other = visited[3].maps[role]
                    name = f"{path}.weight"
                    own = product + other.output_gradient[sample].T @ other.input[sample]
                else:
                    name, own = f"{path}.weight", product
                assert close(own, gradients[sample][name], 1e-5), (position, role, sample)


def test_gradients_of_a_sample_do_not_depend_on_the_others():
    checkpoint = opened(tiny())
    plan = Planned(PruningPlan.identity(checkpoint.shape))
    one, many = {}, {}
    backward_sweep(Sweeper(Blocks(checkpoint)), plan, tokens(4, 8)[2:3], lambda t: one.update({t.index: t}))
    backward_sweep(Sweeper(Blocks(checkpoint)), plan, tokens(4, 8), lambda t: many.update({t.index: t}))
    for index in range(5):
        for role in one[index].maps:
            assert close(one[index].maps[role].output_gradient[0], many[index].maps[role].output_gradient[2])
