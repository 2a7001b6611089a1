"""How often blocks run: what is promised about one pass for all metrics, progressive steps and shared prefixes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import attached_for, close, opened, sharing, tiny, tokens

from flexi_plugins import calibration
from flexi_plugins.calibration import Calibrator
from flexi_plugins.data import PruningPlan
from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.execution.readout import Batch
from flexi_plugins.execution.schedule import count_blocks
from flexi_plugins.execution.sweep import Planned, Sweeper
from flexi_plugins.hookspecs import ALL_BLOCKS, BlockTrace
from flexi_plugins.pruner import Calibration, Pruner
from flexi_plugins.strategies.concat_merge import ConcatMerge

BLOCKS, BATCHES = 5, 2
METRICS = ("flexigpt", "saap", "come")


def test_a_donor_of_a_block_in_front_of_a_donor_is_there() -> None:
    """Block 0 runs with the weights of block 2, and block 1, which stands in front of that, with those of block 4."""
    model = tiny("llama-tied")
    shape = opened(model).shape
    plan, attached = attached_for(sharing(shape, {0: 2, 1: 4}))
    shorter = calibration._until(Planned(plan, attached), 0)
    assert len(shorter.plan.blocks) == 5
    assert all(shorter.plan.donor(p) is not None for p in (0, 1))


@dataclass(frozen=True)
class Inputs:
    """How many inputs of blocks in front a statistic sees, and the sum of the oldest."""

    name: str
    span: int
    backward: ClassVar[bool] = False

    def observe(self, trace: BlockTrace) -> dict[str, torch.Tensor]:
        oldest = (*trace.before, trace.input)[0]
        return {"count": torch.tensor([float(len(trace.before))]), "oldest": oldest.double().sum()[None]}

    def finish(self, totals: dict[str, torch.Tensor], tokens: int) -> dict[str, torch.Tensor]:
        return dict(totals)


def test_a_statistic_sees_as_many_blocks_in_front_as_it_asks_for_whatever_others_see() -> None:
    blocks = Blocks(opened(tiny("llama-tied")))
    known = {s.name: s for s in (Inputs("two", 2), Inputs("all", ALL_BLOCKS))}
    calibrators = [Calibrator(blocks, tokens(8, 16), tokens(3, 8), known) for _ in range(2)]
    identity = Planned(PruningPlan.identity(blocks.checkpoint.shape))
    together = calibrators[0].statistics(identity, {"two", "all"})
    alone = calibrators[1].statistics(identity, {"two"})
    batches = float(together["two"]["count"][1])
    assert [float(c) for c in together["two"]["count"]] == [0.0, *[batches] * (BLOCKS - 1)]
    assert [float(c) for c in together["all"]["count"]] == [batches * n for n in range(BLOCKS)]
    assert together["two"]["oldest"] == alone["two"]["oldest"]


@pytest.fixture
def pruner(monkeypatch: pytest.MonkeyPatch) -> Pruner:
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 8 * 16 // BATCHES)
    made = Pruner(opened(tiny("llama-tied")), Calibration(windows=8), dtype="float32")
    made.__dict__["texts"] = (tokens(8, 16), tokens(3, 8, seed=1), "")  # no tokenizer: token ids as they are
    return made


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Collect one entry a block run: whether it ran with gradients."""
    runs: list[bool] = []
    original = Blocks.run

    def run(self, *arguments, **kwargs):
        runs.append(torch.is_grad_enabled())
        return original(self, *arguments, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Blocks, "run", run)
        yield runs


def needs(pruner: Pruner) -> set[str]:
    chosen = [pruner.plugins.get("metric", m).needs for m in METRICS]
    return set().union(*chosen, *(e.object.needs for e in pruner.plugins.entries("strategy").values()))


def test_all_metrics_cost_one_forward_and_one_backward_pass(pruner: Pruner, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch) as runs:
        pruner.calibrate(needs(pruner))
    assert runs.count(True) == BLOCKS, "one recomputation of each block with gradients"
    assert runs.count(False) == BLOCKS * BATCHES + BLOCKS, "one forward pass on the windows, one on the samples"


def test_samples_that_begin_the_windows_need_no_forward_pass_of_their_own(
    pruner: Pruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = tokens(8, 16)
    separate = Calibrator(pruner.blocks, tokens(8, 16, seed=5), windows[:5, :9], pruner.calibrator.known)
    shared = Calibrator(pruner.blocks, windows, windows[:5, :9], pruner.calibrator.known)
    plan = Planned(PruningPlan.identity(pruner.checkpoint.shape))
    reported: list[int] = []
    with counted(monkeypatch) as runs:
        found = shared.statistics(plan, needs(pruner), reported.append)
    assert (runs.count(False), runs.count(True)) == (BLOCKS * BATCHES, BLOCKS)
    assert sum(reported) == BLOCKS * shared.passes(needs(pruner)) == BLOCKS * (8 * 16 + 5 * 9)
    expected = separate.statistics(plan, ["taylor"])["taylor"]
    for quantity, blocks in found["taylor"].items():
        assert all(close(a, b, 1e-5) for a, b in zip(blocks, expected[quantity], strict=True))


def test_one_shot_plans_of_every_metric_cost_no_further_pass(pruner: Pruner, monkeypatch: pytest.MonkeyPatch) -> None:
    pruner.calibrate(needs(pruner))
    with counted(monkeypatch) as runs:
        for metric in METRICS:
            for strategy in ("share-lora", "remove-blocks", "remove-units"):
                pruner.plan(metric, strategy, 0.1)
    assert runs == []


def test_a_progressive_step_starts_at_the_first_changed_block(pruner: Pruner, monkeypatch: pytest.MonkeyPatch) -> None:
    pruner.calibrate(needs(pruner))
    with counted(monkeypatch) as runs:
        plan = pruner.plan("come", ConcatMerge(merges=2), 0.0)
    first = pruner.plan("come", ConcatMerge(merges=1), 0.0)
    changed = next(i for i, recipe in enumerate(first.blocks) if recipe.whole != i)
    assert len(plan.blocks) == BLOCKS - 2
    assert len(runs) == (BLOCKS - 1 - changed) * BATCHES, (
        "the second step runs the first merged block and those after it"
    )


def test_identical_intermediate_plans_run_once(pruner: Pruner, monkeypatch: pytest.MonkeyPatch) -> None:
    pruner.plan("come", ConcatMerge(merges=2), 0.0)
    with counted(monkeypatch) as runs:
        pruner.plan("come", ConcatMerge(merges=2, exponent=1.0), 0.0)
    assert runs == []


def test_shared_prefixes_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = opened(tiny())
    plans = [PruningPlan.identity(checkpoint.shape)]
    plans += [PruningPlan.keep(checkpoint.shape, (i for i in range(BLOCKS) if i != gone)) for gone in range(BLOCKS)]
    with counted(monkeypatch) as runs:
        list(Sweeper(Blocks(checkpoint)).sweep([Planned(p) for p in plans], [Batch(tokens())]))
    shared, alone = count_blocks(plans)
    assert len(runs) == shared
    assert (shared, alone) == (BLOCKS + sum(range(BLOCKS)), BLOCKS + BLOCKS * (BLOCKS - 1))
