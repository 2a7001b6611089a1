"""Checks of replacement strategies: budgets, truthful reach, plans that are values, and models that plans describe."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import torch

from flexi_plugins.data import ModelShape, PruningPlan
from flexi_plugins.errors import OutOfReach
from flexi_plugins.hookspecs import Budget, ReplacementStrategy
from flexi_plugins.pruner import count_only
from flexi_plugins.rewrite import build_model, needed_tensors
from flexi_plugins.testing.bench import (
    BEST,
    SCORES,
    Bench,
    KnownScores,
    TinyPruner,
    expect,
    snapshot,
    working_choices,
)
from flexi_plugins.testing.models import tiny_tokens

PARTS_OF_REACH = (0.1, 0.35, 0.6, 0.9)


def wants_and_needs_what_there_is(bench: Bench, strategy: ReplacementStrategy) -> None:
    """``wants`` names kinds of scores, ``needs`` statistics that a plugin offers, ``progressive`` says yes or no."""
    expect(
        set(strategy.wants) <= set(SCORES),
        f"expected wants to be some of {', '.join(SCORES)}, found {sorted(strategy.wants)}",
    )
    known = bench.plugins.entries("statistic")
    unknown = sorted(set(strategy.needs) - set(known))
    expect(not unknown, f"expected needs to name statistics, found {unknown}; there is {', '.join(known)}")
    expect(type(strategy.progressive) is bool, f"expected progressive to be a bool, found {strategy.progressive!r}")


def meets_the_budget(bench: Bench, strategy: ReplacementStrategy) -> None:
    """At ratios within reach the plan stores at most (1 - ratio) x the original, on every architecture."""
    for pruner in bench.pruners():
        for ratio in _ratios(strategy, pruner.checkpoint.shape):
            plan = pruner.bounded_plan(KnownScores(), strategy, ratio)
            _expect_met(plan, ratio, pruner.checkpoint.name)


def wastes_nothing(bench: Bench, strategy: ReplacementStrategy) -> None:
    """The plan removes less than one block's parameters more than it was asked to."""
    for pruner in bench.pruners():
        shape = pruner.checkpoint.shape
        for ratio in _ratios(strategy, shape):
            plan = pruner.bounded_plan(KnownScores(), strategy, ratio)
            _expect_tight(plan, ratio, pruner.checkpoint.name)


def _ratios(strategy: ReplacementStrategy, shape: ModelShape) -> list[float]:
    return [part * strategy.reach(shape) for part in PARTS_OF_REACH]


def _expect_met(plan: PruningPlan, ratio: float, where: str) -> None:
    target = Budget(plan.shape.parameters, ratio).target
    expect(
        plan.stored_parameters <= target,
        f"{where} at ratio {ratio:.4f}: expected at most {target:,} stored parameters, found {plan.stored_parameters:,}",
    )


def _expect_tight(plan: PruningPlan, ratio: float, where: str) -> None:
    target = Budget(plan.shape.parameters, ratio).target
    block = max(plan.shape.block_parameters(b) for b in plan.shape.blocks)
    expect(
        plan.stored_parameters > target - block,
        f"{where} at ratio {ratio:.4f}: {plan.stored_parameters:,} of {target:,} allowed parameters are left; expected "
        f"to be within one block ({block:,}) of what is asked for",
    )


def is_finished_when_it_says_so(bench: Bench, strategy: ReplacementStrategy) -> None:
    """Planning ends, with a plan that ``finished`` agrees is finished; a progressive one has not finished at once."""
    pruner = bench.pruner()
    ratio = 0.5 * strategy.reach(pruner.checkpoint.shape)
    budget = Budget(pruner.checkpoint.shape.parameters, ratio)
    plan = pruner.bounded_plan(KnownScores(), strategy, ratio)
    expect(strategy.finished(plan, budget), f"expected finished of its last plan (ratio {plan.ratio:.4f}), found False")
    identity = PruningPlan.identity(pruner.checkpoint.shape)
    if strategy.progressive:
        expect(not strategy.finished(identity, budget), "expected more steps for the untouched model, found finished")


def reach_is_truthful(bench: Bench, strategy: ReplacementStrategy) -> None:
    """A ratio just within ``reach`` works; one beyond it, or outside (0, 1), is an OutOfReach that names the reach.

    Whatever the weights and the scores are: an early choice must not leave too little for later steps.
    """
    others = [bench.fresh(seed=seed) for seed in range(1, 5)]
    for seed, pruner in enumerate([*bench.pruners(), *others]):
        shape, where = pruner.checkpoint.shape, pruner.checkpoint.name
        reach = strategy.reach(shape)
        expect(0 < reach < 1, f"{where}: expected a reach between 0 and 1, found {reach}")
        within = reach - 2 / shape.parameters
        _expect_met(pruner.bounded_plan(KnownScores(seed=seed), strategy, within), within, where)
        for ratio in ((1 + reach) / 2, 1.0, 1.5, 0.0, -0.1):
            _expect_refused(pruner, strategy, ratio, reach)


def _expect_refused(pruner: TinyPruner, strategy: ReplacementStrategy, ratio: float, reach: float) -> None:
    where = f"{pruner.checkpoint.name} at ratio {ratio:.4f}"
    request = pruner.request(frozenset(strategy.needs), ratio=ratio)
    try:
        plan = strategy.plan(replace(request, scores=KnownScores().score(request)))
    except OutOfReach as error:
        named = [float(n) for n in re.findall(r"\d+\.\d+", str(error))]
        expect(
            any(abs(n - reach) < 1e-3 for n in named),
            f"{where}: expected the error to name the reachable ratio {reach:.4f}, found {str(error)!r}",
        )
        return
    raise AssertionError(
        f"{where}: expected OutOfReach (reach is {reach:.4f}), found a plan of ratio {plan.ratio:.4f}; see budget.check_reach"
    )


def plan_is_a_value(bench: Bench, strategy: ReplacementStrategy) -> None:
    """A plan is hashable, equals what is read back from its JSON, and says how it was made."""
    for pruner in bench.pruners():
        plan = pruner.bounded_plan(KnownScores(), strategy, 0.5 * strategy.reach(pruner.checkpoint.shape))
        read = PruningPlan.from_json(json.loads(json.dumps(plan.to_json())))
        where = pruner.checkpoint.name
        expect(read == plan and hash(read) == hash(plan), f"{where}: the plan read back from JSON is another one")
        expect(read.hash == plan.hash, f"{where}: the plan read back from JSON has another hash")
        expect(read.to_json() == plan.to_json(), f"{where}: JSON of the plan read back differs, origin included")


def plans_are_repeatable(bench: Bench, strategy: ReplacementStrategy) -> None:
    """The same model, text, scores and seed give the same plan and tensors; the global random state is not read."""
    found = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pruner = bench.fresh()
            found.append(pruner.bounded(KnownScores(), strategy, 0.5 * strategy.reach(pruner.checkpoint.shape)).plan)
    expect(found[0].blocks == found[1].blocks, "two runs with the same seed give different plans")
    expect(found[0] == found[1], "two runs with the same seed give different tensors")


def plan_changes_nothing(bench: Bench, strategy: ReplacementStrategy) -> None:
    """Planning leaves the weights, the statistics and the scores of its request as they are."""
    pruner = bench.fresh()
    ratio = 0.5 * strategy.reach(pruner.checkpoint.shape)
    request = pruner.request(frozenset(strategy.needs), ratio=ratio)
    request = replace(request, scores=KnownScores().score(request))
    changed = snapshot(request, pruner)
    strategy.plan(request)
    pruner.bounded(KnownScores(), strategy, ratio)
    expect(not changed(), f"expected an unchanged request, found another {', '.join(changed()[:3])}")


def makes_its_tensors(bench: Bench, strategy: ReplacementStrategy) -> None:
    """``tensors`` makes exactly what the plan's blocks need beside old weights, of the right shapes, finite."""
    for pruner in bench.pruners():
        planned = pruner.bounded(KnownScores(), strategy, 0.5 * strategy.reach(pruner.checkpoint.shape))
        plan, made, where = planned.plan, planned.attached, pruner.checkpoint.name
        wanted = {name: _wanted_shape(plan, name) for name in needed_tensors(plan)}
        missing, extra = sorted(wanted.keys() - made), sorted(made.keys() - wanted)
        expect(not missing, f"{where}: {len(missing)} tensors of the plan are missing: {', '.join(missing[:3])}")
        expect(not extra, f"{where}: {len(extra)} tensors have no place in the plan: {', '.join(extra[:3])}")
        for name, tensor in made.items():
            expect(
                tuple(tensor.shape) == wanted[name],
                f"{where}: {name}: expected shape {wanted[name]}, found {tuple(tensor.shape)}",
            )
            expect(bool(tensor.isfinite().all()), f"{where}: {name} is not finite")


def _wanted_shape(plan: PruningPlan, name: str) -> tuple[int, ...]:
    _, position, role, kind = name.split(".")
    if kind == "output_norm":
        return (plan.shape.hidden,)
    recipe = plan.blocks[int(position)]
    rows, columns = plan.shape.maps(plan.block_shape(recipe))[role]
    if kind in ("weight", "bias"):
        return (rows, columns) if kind == "weight" else (rows,)
    rank = min(recipe.rank, rows, columns)
    return (rows, rank) if kind == "lora_a" else (rank, columns)


def model_is_what_the_plan_says(bench: Bench, strategy: ReplacementStrategy) -> None:
    """The plan's model runs, gives finite logits, and has as many parameters as the plan counts."""
    for pruner in bench.pruners():
        planned = pruner.bounded(KnownScores(), strategy, 0.5 * strategy.reach(pruner.checkpoint.shape))
        plan, model = planned.plan, build_model(planned.plan, pruner.checkpoint, planned.attached)
        with torch.no_grad():
            logits = model(tiny_tokens(2, 12)).logits
        where = pruner.checkpoint.name
        expect(bool(logits.isfinite().all()), f"{where}: the logits of the plan's model are not finite")
        count = sum(p.numel() for p in model.parameters())
        expect(
            count == plan.stored_parameters,
            f"{where}: the plan counts {plan.stored_parameters:,} stored parameters, its model has {count:,}",
        )


def counts_without_weights(bench: Bench, strategy: ReplacementStrategy) -> None:
    """Without weights and statistics (``request.counting``) it makes a plan of the same size, or nearly so.

    Exactly the same where blocks go as a whole; units of several sizes may add up to another sum.
    """
    for pruner in bench.pruners():
        shape = pruner.checkpoint.shape
        ratio = 0.5 * strategy.reach(shape)
        plan = pruner.bounded_plan(KnownScores(), strategy, ratio)
        counted = count_only(shape, strategy, ratio)
        _expect_met(counted, ratio, f"counting {pruner.checkpoint.name}")
        _expect_tight(counted, ratio, f"counting {pruner.checkpoint.name}")
        whole = all(b in shape.blocks for p in (plan, counted) for b in p.new_shape.blocks)
        expect(
            counted.stored_parameters == plan.stored_parameters or not whole,
            f"{pruner.checkpoint.name} at ratio {ratio:.4f}: counting gives {counted.stored_parameters:,} stored "
            f"parameters, the plan itself {plan.stored_parameters:,}",
        )


def keeps_what_scores_highest(bench: Bench, strategy: ReplacementStrategy) -> None:
    """What scores a hundred times the rest stays, wherever anything of its kind stays; of what ``wants`` names."""
    pruner = bench.pruner()
    shape = pruner.checkpoint.shape
    for comparable in (True, False):
        plan = pruner.bounded_plan(KnownScores(comparable), strategy, 0.35 * strategy.reach(shape))
        if "block" in strategy.wants:
            whole = [replace(r, gain=1.0, own=()).whole for r in plan.blocks]
            expect(BEST in whole, f"block {BEST} scores highest and is not kept whole; kept are {whole}")
        for kind, field in (("attention", "kv_heads"), ("mlp", "channels")):
            if kind in strategy.wants:
                _expect_best_units(plan, kind, field)


def _expect_best_units(plan: PruningPlan, kind: str, field: str) -> None:
    for recipe in plan.blocks:
        for part in recipe.parts:
            units = getattr(part, field)
            expect(
                not units or BEST in units,
                f"unit {BEST} has the highest {kind} score of block {part.source} and goes, while others stay",
            )


def every_choice_works(bench: Bench, strategy: ReplacementStrategy) -> None:
    """Every choice of an option gives a plan that meets the budget, or says in a FlexiError what it needs; one works."""
    pruner = bench.pruner()
    shape = pruner.checkpoint.shape

    def planned(other: ReplacementStrategy) -> tuple[PruningPlan, float]:
        ratio = 0.5 * other.reach(shape)
        return pruner.bounded_plan(KnownScores(), other, ratio), ratio

    for other, (plan, ratio) in working_choices(strategy, planned):
        _expect_met(plan, ratio, f"{other}")


CHECKS = (
    wants_and_needs_what_there_is,
    meets_the_budget,
    wastes_nothing,
    is_finished_when_it_says_so,
    reach_is_truthful,
    plan_is_a_value,
    plans_are_repeatable,
    plan_changes_nothing,
    makes_its_tensors,
    model_is_what_the_plan_says,
    counts_without_weights,
    keeps_what_scores_highest,
    every_choice_works,
)
