"""Checks of statistics: the same for the same tokens, however they come in batches, and nothing touched on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flexi_plugins.calibration import Calibrator
from flexi_plugins.data import PruningPlan
from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.hookspecs import Statistic
from flexi_plugins.testing.bench import SAMPLES, WINDOWS, Bench, TinyPruner, difference, expect, uneven_plan
from flexi_plugins.testing.models import tiny_tokens

CLOSE = 1e-4  # relative to the highest value of a quantity
Values = Mapping[str, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Watched:
    """A statistic with ``see`` called around every observation: (trace, what it returned)."""

    statistic: Statistic
    see: Callable[[Any, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]

    @property
    def name(self) -> str:
        """Its name."""
        return self.statistic.name

    @property
    def span(self) -> int:
        """Its span."""
        return self.statistic.span

    @property
    def backward(self) -> bool:
        """Whether it reads gradients."""
        return self.statistic.backward

    def observe(self, trace: Any) -> dict[str, Tensor]:
        """Observe under watch."""
        return self.see(trace, lambda: self.statistic.observe(trace))

    def finish(self, totals: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Finish as it does."""
        return self.statistic.finish(totals, tokens)


def measure(
    pruner: TinyPruner,
    statistic: Any,
    plan: PruningPlan | None = None,
    rows: int = 4,
    windows: Tensor | None = None,
    samples: Tensor | None = None,
) -> Values:
    """Return a statistic's quantities, taken anew on the model of a plan."""
    windows = tiny_tokens(*WINDOWS, seed=1) if windows is None else windows
    samples = tiny_tokens(*SAMPLES, seed=2) if samples is None else samples
    blocks = Blocks(pruner.checkpoint, pruner.dtype)
    calibrator = Calibrator(blocks, windows, samples, {statistic.name: statistic}, rows)
    planned = Planned(plan or PruningPlan.identity(pruner.checkpoint.shape))
    return calibrator.statistics(planned, [statistic.name])[statistic.name]


def declares_span_and_direction(bench: Bench, statistic: Statistic) -> None:
    """``span`` is a number of blocks, and ``backward`` says yes or no."""
    expect(
        type(statistic.span) is int and statistic.span >= 1, f"expected a span of 1 or more, found {statistic.span!r}"
    )
    expect(type(statistic.backward) is bool, f"expected backward to be True or False, found {statistic.backward!r}")


def has_finite_quantities_on_every_model(bench: Bench, statistic: Statistic) -> None:
    """Every architecture gives at least one quantity, a finite tensor for every block."""
    for pruner in bench.pruners():
        _expect_finite(measure(pruner, statistic), pruner.checkpoint.name, len(pruner.checkpoint.shape.blocks))


def has_finite_quantities_on_a_changed_model(bench: Bench, statistic: Statistic) -> None:
    """So does a model that earlier steps narrowed, merged, and stripped of sub-layers."""
    pruner = bench.pruner()
    plan = uneven_plan(pruner.checkpoint.shape)
    _expect_finite(measure(pruner, statistic, plan), "a model with uneven blocks", len(plan.blocks))


def _expect_finite(values: Values, where: str, blocks: int) -> None:
    expect(values, f"{where}: expected at least one quantity, found none")
    for name, tensors in values.items():
        expect(len(tensors) == blocks, f"{where}: expected {name!r} for {blocks} blocks, found {len(tensors)}")
        bad = [i for i, t in enumerate(tensors) if not bool(t.isfinite().all())]
        expect(not bad, f"{where}: {name!r} of block {bad and bad[0]} is not finite")


def does_not_depend_on_batching(bench: Bench, statistic: Statistic) -> None:
    """Rows one at a time, or all at once, give the same quantities.

    Of a backward statistic: samples in another order give the same quantities, or the same in that order.
    """
    pruner, windows, samples = bench.pruner(), tiny_tokens(*WINDOWS, seed=1), tiny_tokens(*SAMPLES, seed=2)
    together = measure(pruner, statistic, rows=len(windows), windows=windows, samples=samples)
    other = measure(pruner, statistic, rows=1, windows=windows, samples=samples.flip(0))
    for name, tensors in together.items():
        for index, (a, b) in enumerate(zip(tensors, other[name], strict=True)):
            worst = difference(a, b)
            if statistic.backward and a.dim():
                worst = min(worst, difference(a, b.flip(0)))
            expect(
                worst < CLOSE,
                f"{name!r} of block {index} depends on how tokens come in batches: all rows at once and one at a time "
                f"differ by {worst:.2g} of its highest value; observe returns sums, finish divides by tokens",
            )


def is_repeatable(bench: Bench, statistic: Statistic) -> None:
    """The same tokens give the same bits; the global random state is not read."""
    runs = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            runs.append(measure(bench.pruner(), statistic))
    for name, tensors in runs[0].items():
        same = all(torch.equal(a, b) for a, b in zip(tensors, runs[1][name], strict=True))
        expect(same, f"two runs on the same tokens differ in {name!r}")


def sums_in_float32(bench: Bench, statistic: Statistic) -> None:
    """Sums over a batch are float32 and finite also when the model runs in bfloat16."""

    def see(trace: Any, observe: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        sums = observe()
        for name, value in sums.items():
            expect(
                value.dtype == torch.float32,
                f"expected float32 sums in a bfloat16 model, found {name!r} in {value.dtype}",
            )
        return sums

    values = measure(bench.in_bfloat16(), Watched(statistic, see))
    _expect_finite(values, "a bfloat16 model", len(bench.pruner().checkpoint.shape.blocks))


def changes_nothing_it_observes(bench: Bench, statistic: Statistic) -> None:
    """Observation leaves activations, gradients and weights as they are."""

    def see(trace: Any, observe: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        copies = {name: tensor.clone() for name, tensor in _tensors(trace).items()}
        sums = observe()
        changed = [name for name, tensor in _tensors(trace).items() if not torch.equal(tensor, copies[name])]
        expect(not changed, f"expected an unchanged trace, found another {', '.join(changed)} at block {trace.index}")
        return sums

    measure(bench.pruner(), Watched(statistic, see))


def _tensors(trace: Any) -> dict[str, Tensor]:
    """Return the tensors of a BlockTrace or GradientTrace by name."""
    found = {}
    for field in fields(trace):
        value = getattr(trace, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value
        elif isinstance(value, tuple):
            found |= {f"{field.name}[{i}]": t for i, t in enumerate(value)}
        elif isinstance(value, Mapping):
            found |= {f"{role} {n}": t for role, inner in value.items() for n, t in _tensors(inner).items()}
    return found


CHECKS = (
    declares_span_and_direction,
    has_finite_quantities_on_every_model,
    has_finite_quantities_on_a_changed_model,
    does_not_depend_on_batching,
    is_repeatable,
    sums_in_float32,
    changes_nothing_it_observes,
)
