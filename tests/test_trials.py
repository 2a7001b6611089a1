"""What a model is worth is measured once, in this process or in one before it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from flexi_plugins.data import BlockShape, ModelShape, PruningPlan
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.store import Journal
from flexi_plugins.trials import Trials

SHAPE = ModelShape((BlockShape(2, 1, 8, 16),) * 4, hidden=16, vocabulary=32, tied=True)
PLANS = [Planned(PruningPlan.keep(SHAPE, range(count))) for count in (4, 3, 2)]


def counting(seen: list[int], numbers: dict[int, float]) -> Any:
    """Return a measure that notes how many blocks the models have that it is given, and gives these numbers."""

    def measured(planned: list[Planned]) -> list[float]:
        seen.extend(len(p.plan.blocks) for p in planned)
        return [numbers[len(p.plan.blocks)] for p in planned]

    return measured


def test_each_plan_is_tried_once() -> None:
    trials, seen = Trials(), list[int]()
    measured = counting(seen, {4: 1.0, 3: 2.0, 2: 3.0})
    assert trials.of("loss", [PLANS[0], PLANS[1], PLANS[0]], measured) == [1.0, 2.0, 1.0]
    assert trials.of("loss", PLANS, measured) == [1.0, 2.0, 3.0]
    assert seen == [4, 3, 2]


def test_measures_are_kept_apart() -> None:
    trials, seen = Trials(), list[int]()
    assert trials.of("loss", PLANS[:1], counting(seen, {4: 1.0})) == [1.0]
    assert trials.of("turn", PLANS[:1], counting(seen, {4: 0.5})) == [0.5]
    assert seen == [4, 4]


@pytest.mark.parametrize("number", [1 / 3, math.inf, math.nan])
def test_what_a_journal_holds_is_known_to_another_process(tmp_path: Path, number: float) -> None:
    def setting() -> list[str]:
        return ["model", "text", "float32"]

    first = Trials(Journal(tmp_path), setting)
    first.of("loss", PLANS[:2], counting([], {4: number, 3: 2.0}))
    seen: list[int] = []
    (again, other, new) = Trials(Journal(tmp_path), setting).of("loss", PLANS, counting(seen, {2: 3.0}))
    assert again == pytest.approx(number, abs=0, rel=0, nan_ok=True)
    assert (other, new, seen) == (2.0, 3.0, [2])


def test_of_another_model_or_text_nothing_is_known(tmp_path: Path) -> None:
    Trials(Journal(tmp_path), lambda: ["one"]).of("loss", PLANS[:1], counting([], {4: 1.0}))
    seen: list[int] = []
    assert Trials(Journal(tmp_path), lambda: ["other"]).of("loss", PLANS[:1], counting(seen, {4: 2.0})) == [2.0]
    assert seen == [4]


def test_without_a_journal_the_setting_is_never_asked_for() -> None:
    def setting() -> None:
        raise AssertionError("a model of many gigabytes was hashed for nothing")

    assert Trials(None, setting).of("loss", PLANS[:1], counting([], {4: 1.0})) == [1.0]
