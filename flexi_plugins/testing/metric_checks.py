"""Checks of importance metrics: shapes and promises of scores, and what follows from what scores mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flexi_plugins.data import Scores
from flexi_plugins.hookspecs import ImportanceMetric
from flexi_plugins.testing.bench import (
    SCORES,
    Bench,
    TinyPruner,
    difference,
    expect,
    named_scores,
    permuted,
    silenced,
    snapshot,
    uneven_plan,
    working_choices,
)

CLOSE = 1e-3  # relative to the highest score: sums over units in another order differ in the last digits
BLOCK = 2  # the block that is changed


def scores_of(pruner: TinyPruner, metric: ImportanceMetric) -> Scores:
    """Return a metric's checked scores of a pruner's model."""
    request = pruner.request(frozenset(metric.needs))
    return metric.score(request).check(f"tiny model {pruner.checkpoint.name!r}", request.shape)


def needs_known_statistics(bench: Bench, metric: ImportanceMetric) -> None:
    """Every statistic in ``needs`` is offered by a plugin."""
    known = bench.plugins.entries("statistic")
    unknown = sorted(set(metric.needs) - set(known))
    expect(not unknown, f"expected needs to name statistics, found {unknown}; there is {', '.join(known)}")


def gives_what_it_declares(bench: Bench, metric: ImportanceMetric) -> None:
    """``gives`` names kinds of scores, and exactly those are there."""
    expect(
        metric.gives and set(metric.gives) <= set(SCORES),
        f"expected gives to be some of {', '.join(SCORES)}, found {sorted(metric.gives)}",
    )
    scores = metric.score(bench.pruner().request(frozenset(metric.needs)))
    found = {kind for kind in SCORES if getattr(scores, kind) is not None}
    expect(found == set(metric.gives), f"gives says {sorted(metric.gives)}, score returned {sorted(found)}")


def scores_fit_every_model(bench: Bench, metric: ImportanceMetric) -> None:
    """Scores of every architecture have the right shapes, are finite, and not negative if they are comparable."""
    for pruner in bench.pruners():
        scores_of(pruner, metric)


def scores_fit_a_changed_model(bench: Bench, metric: ImportanceMetric) -> None:
    """Scores fit a model that earlier steps narrowed, merged, and stripped of sub-layers."""
    pruner = bench.pruner()
    plan = uneven_plan(pruner.checkpoint.shape)
    request = pruner.request(frozenset(metric.needs), plan)
    metric.score(request).check("a model with uneven blocks", request.shape)


def scores_are_finite_in_bfloat16(bench: Bench, metric: ImportanceMetric) -> None:
    """Scores of a model that is stored and run in bfloat16 are finite float32."""
    scores_of(bench.in_bfloat16(), metric)


def scores_are_repeatable(bench: Bench, metric: ImportanceMetric) -> None:
    """The same model, text and seed give the same bits; the global random state is not read."""
    runs = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            runs.append(named_scores(scores_of(bench.fresh(), metric)))
    differing = [n for n in runs[0] if not torch.equal(runs[0][n], runs[1][n])]
    expect(not differing, f"two runs with the same seed differ in {', '.join(differing[:3])}")


def score_changes_nothing(bench: Bench, metric: ImportanceMetric) -> None:
    """Scoring leaves the weights and the statistics of its request as they are."""
    pruner = bench.fresh()
    request = pruner.request(frozenset(metric.needs))
    changed = snapshot(request, pruner)
    metric.score(request)
    expect(not changed(), f"expected an unchanged request, found another {', '.join(changed()[:3])}")


def permuted_units_permute_scores(bench: Bench, metric: ImportanceMetric) -> None:
    """Renaming the KV heads and channels of a block renames their scores and changes nothing else.

    KV head k owns the query heads k * group .. (k + 1) * group - 1.
    """
    for kind in ("llama-gqa-tied", "llama-bias", "qwen3"):
        pruner = bench.pruner(kind)
        block = pruner.checkpoint.shape.blocks[BLOCK]
        heads, channels = _order(block.kv_heads), _order(block.channels)
        other = bench.changed(pruner, permuted(pruner.checkpoint, BLOCK, heads, channels))
        before, after = named_scores(scores_of(pruner, metric)), named_scores(scores_of(other, metric))
        for name, order in ((f"attention scores of block {BLOCK}", heads), (f"mlp scores of block {BLOCK}", channels)):
            if name in before:
                before[name] = before[name][order]
        _expect_close(before, after, f"{kind}: with the units of block {BLOCK} in another order")


def _order(count: int) -> list[int]:
    return [*range(1, count), 0]


def _expect_close(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    for name, value in expected.items():
        worst = difference(value, found[name])
        expect(worst < CLOSE, f"{where} the {name} differ by {worst:.2g} of the highest: {_few(value, found[name])}")


def _few(a: Tensor, b: Tensor) -> str:
    return f"expected {_numbers(a[:4].tolist())} ..., found {_numbers(b[:4].tolist())} ..."


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.4g}" for v in values)


def dead_units_score_low(bench: Bench, metric: ImportanceMetric) -> None:
    """The best unit of a block, its outgoing weights set to zero, does no harm when lost, and its score says so.

    Its score is then the lowest of the block if scores are comparable, and else below the mean of the others.
    """
    pruner = bench.pruner()
    before = scores_of(pruner, metric)
    best = {k: int(getattr(before, k)[BLOCK].argmax()) for k in ("attention", "mlp") if getattr(before, k) is not None}
    if not best:
        return
    dead = silenced(pruner.checkpoint, BLOCK, best.get("attention", 0), best.get("mlp", 0))
    after = scores_of(bench.changed(pruner, dead), metric)
    for kind, unit in best.items():
        _expect_low(getattr(after, kind)[BLOCK], unit, f"{kind} scores of block {BLOCK}", after.comparable)


def dead_blocks_score_low(bench: Bench, metric: ImportanceMetric) -> None:
    """A block whose outgoing weights are zero does nothing: its score is the lowest, or at least below the mean."""
    pruner = bench.pruner()
    before = scores_of(pruner, metric)
    if before.block is None:
        return
    best = int(before.block.argmax())
    after = scores_of(bench.changed(pruner, silenced(pruner.checkpoint, best, None, None)), metric)
    assert after.block is not None
    _expect_low(after.block, best, "block scores", after.comparable)


def _expect_low(scores: Tensor, unit: int, what: str, lowest: bool) -> None:
    value, rest = float(scores[unit]), scores[[i for i in range(len(scores)) if i != unit]]
    bound = float(rest.min()) + CLOSE * float(scores.abs().max()) if lowest else float(rest.mean())
    expect(
        value <= bound,
        f"{what}: unit {unit} adds nothing to the residual stream; expected its score to be "
        f"{'the lowest' if lowest else 'below the mean of the others'}, found {value:.4g} among {float(rest.min()):.4g} "
        f"... {float(rest.max()):.4g}, mean {float(rest.mean()):.4g} (higher means keep)",
    )


def every_choice_works(bench: Bench, metric: ImportanceMetric) -> None:
    """Every choice of an option gives scores that fit, or says in a FlexiError what it needs; one of each option works."""
    pruner = bench.pruner()
    shape = pruner.checkpoint.shape
    for other, scores in working_choices(metric, lambda m: m.score(pruner.request(frozenset(m.needs)))):
        scores.check(f"{other}", shape)


CHECKS = (
    needs_known_statistics,
    gives_what_it_declares,
    scores_fit_every_model,
    scores_fit_a_changed_model,
    scores_are_finite_in_bfloat16,
    scores_are_repeatable,
    score_changes_nothing,
    permuted_units_permute_scores,
    dead_units_score_low,
    dead_blocks_score_low,
    every_choice_works,
)
