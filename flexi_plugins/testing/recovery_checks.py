"""Checks of recovery methods: a whole model comes back that is a plan again, and the original's weights stay as they are."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from flexi_plugins.data import BlockRecipe, Part, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.hookspecs import Recovered, RecoveryMethod, RecoveryRequest, TensorRequest, TrainingText
from flexi_plugins.recovered import planned_of
from flexi_plugins.rewrite import with_digests
from flexi_plugins.strategies.share_lora import ShareLora
from flexi_plugins.testing.bench import Bench, TinyPruner, difference, expect, snapshot
from flexi_plugins.testing.models import tiny_tokens

WINDOWS, LENGTH = 8, 24


def pruned(pruner: TinyPruner) -> list[Planned]:
    """Return models to recover: one with a block removed, one merged and one narrowed; one with a block that shares weights."""
    shape = pruner.checkpoint.shape
    merged = BlockRecipe(parts=(Part(3, (0,), tuple(range(48))), Part(4, (1, 2), tuple(range(48, 96)))))
    first = BlockRecipe(parts=(Part(0, (0, 2), tuple(range(0, 96, 2))),))
    cut = PruningPlan(shape, (first, BlockRecipe(parts=(Part(2),)), merged, BlockRecipe(parts=(Part(5),))))
    blocks = list(PruningPlan.identity(shape).blocks)
    blocks[3] = BlockRecipe(parts=(Part(3),), shares=1, rank=4, output_norm=True)
    shared = PruningPlan(shape, tuple(blocks))
    made = ShareLora(output_gain=0.3).tensors(TensorRequest(shared, shared, pruner.checkpoint))
    return [Planned(cut), Planned(with_digests(shared, made), made)]


def recover(pruner: TinyPruner, planned: Planned, method: RecoveryMethod, folder: Path) -> Recovered:
    """Recover a model on a few windows of random ids."""
    ids = tiny_tokens(WINDOWS, LENGTH, seed=1)
    held_out = tiny_tokens(2, LENGTH, seed=2)
    found = method.recover(
        RecoveryRequest(
            model=pruner.model(planned),
            plan=planned.plan,
            text=TrainingText(ids, ids.clone()),
            held_out=TrainingText(held_out, held_out.clone()),
            tokens=WINDOWS * LENGTH,
            seed=0,
            folder=folder,
            teacher=pruner.teacher,
            progress=pruner.progress.stage,
            say=pruner.progress.say,
        )
    )
    expect(isinstance(found, Recovered), f"expected recover to return Recovered, found {type(found).__name__}")
    expect(isinstance(found.model, nn.Module), f"expected a model, found {type(found.model).__name__}")
    return found


def recovered(pruner: TinyPruner, method: RecoveryMethod) -> tuple[Recovered, Planned]:
    """Recover the first of the models that the method takes; one that it does not take it refuses, or a FlexiError says why."""
    problems = []
    for planned in pruned(pruner):
        if reason := method.refuses(planned.plan):
            problems.append(reason)
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                return recover(pruner, planned, method, Path(folder)), planned
            except FlexiError as error:
                problems.append(str(error))
    raise AssertionError(f"it recovers neither a cut model nor one with shared weights: {'; '.join(problems)}")


def logits(model: nn.Module) -> Tensor:
    """Return a model's logits of two rows of random ids."""
    with torch.no_grad():
        return model.eval()(tiny_tokens(2, 12)).logits


def returns_a_model_that_runs(bench: Bench, method: RecoveryMethod) -> None:
    """The recovered model gives finite logits and stores as many parameters as the plan says."""
    found, planned = recovered(bench.fresh(), method)
    expect(bool(logits(found.model).isfinite().all()), "the logits of the recovered model are not finite")
    count = sum(p.numel() for p in found.model.parameters())
    stored = planned.plan.stored_parameters
    expect(
        count == stored,
        f"the pruned model stores {stored:,} parameters, the recovered one {count:,}; merge adapters into the weights",
    )


def comes_back_as_a_plan(bench: Bench, method: RecoveryMethod) -> None:
    """What was trained are the tensors of a plan, whose model computes what the recovered model does."""
    pruner = bench.fresh()
    found, planned = recovered(pruner, method)
    before = pruner.model(planned).state_dict()
    again = pruner.model(planned_of(found.model, planned, before, pruner.checkpoint))
    worst = difference(logits(found.model), logits(again))
    expect(worst < 1e-5, f"the plan of the recovered model gives other logits, by {worst:.2g} of the highest")


def curve_is_in_order(bench: Bench, method: RecoveryMethod) -> None:
    """Points of the loss curve name their tokens, which grow and end within one window of the budget."""
    found, _ = recovered(bench.fresh(), method)
    tokens = [point["tokens"] for point in found.curve]
    expect(tokens == sorted(tokens), f"expected tokens in ascending order, found {tokens}")
    last = tokens[-1] if tokens else 0
    expect(last < (WINDOWS + 1) * LENGTH, f"a budget of {WINDOWS * LENGTH} tokens, found {last}")


def leaves_the_original_alone(bench: Bench, method: RecoveryMethod) -> None:
    """The original's weights, which the pruned model shares, are not trained with it: clone before an update in place."""
    pruner = bench.fresh()
    changed = snapshot(pruner.request(frozenset()), pruner)
    recovered(pruner, method)
    expect(not changed(), f"expected the original's weights unchanged, found another {', '.join(changed()[:3])}")


def is_repeatable(bench: Bench, method: RecoveryMethod) -> None:
    """The same model, text and seed give the same model, whatever the global random state was."""
    found = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found.append(logits(recovered(bench.fresh(), method)[0].model))
    worst = difference(*found)
    expect(worst < 1e-6, f"two runs with the same seed differ by {worst:.2g} of the highest logit")


CHECKS = (
    returns_a_model_that_runs,
    comes_back_as_a_plan,
    curve_is_in_order,
    leaves_the_original_alone,
    is_repeatable,
)
