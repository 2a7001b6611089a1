"""Checks of recovery methods: a whole model comes back, and the original's weights stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexi_plugins.data import BlockRecipe, Part, PruningPlan
from flexi_plugins.hookspecs import RecoveryMethod, RecoveryRequest
from flexi_plugins.testing.bench import Bench, TinyPruner, difference, expect, snapshot
from flexi_plugins.testing.models import tiny_tokens


def recovered(pruner: TinyPruner, method: RecoveryMethod) -> tuple[nn.Module, PruningPlan]:
    """Recover a model with one block removed and one narrowed, on a few windows of random ids."""
    shape = pruner.checkpoint.shape
    whole = [BlockRecipe(parts=(Part(i),)) for i in range(2, len(shape.blocks))]
    plan = PruningPlan(shape, (BlockRecipe(parts=(Part(0, (0, 2), tuple(range(0, 96, 2))),)), *whole))
    windows = list(tiny_tokens(8, 24, seed=1))
    model = method.recover(RecoveryRequest(pruner.model(plan), plan, 0, 8 * 24, windows))
    expect(isinstance(model, nn.Module), f"expected recover to return a model, found {type(model).__name__}")
    return model, plan


def logits(model: nn.Module) -> Tensor:
    """Return a model's logits of two rows of random ids."""
    with torch.no_grad():
        return model.eval()(tiny_tokens(2, 12)).logits


def returns_a_model_that_runs(bench: Bench, method: RecoveryMethod) -> None:
    """The recovered model gives finite logits and stores no more parameters than the plan allows it."""
    model, plan = recovered(bench.fresh(), method)
    expect(bool(logits(model).isfinite().all()), "the logits of the recovered model are not finite")
    count = sum(p.numel() for p in model.parameters())
    expect(
        count <= plan.stored_parameters,
        f"the pruned model stores {plan.stored_parameters:,} parameters, the recovered one {count:,}; merge adapters first",
    )


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
            found.append(logits(recovered(bench.fresh(), method)[0]))
    worst = difference(*found)
    expect(worst < 1e-6, f"two runs with the same seed differ by {worst:.2g} of the highest logit")


CHECKS = (returns_a_model_that_runs, leaves_the_original_alone, is_repeatable)
