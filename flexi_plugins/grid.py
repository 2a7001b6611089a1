"""The cells of a study: every metric x strategy x ratio x recovery x seed, as the records know them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flexi_plugins.data import Cell, PluginVersion
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.hookspecs import ImportanceMetric, Outcome, RecoveryMethod, ReplacementStrategy
from flexi_plugins.plugins import Entry, Plugins, options_json, own_knob
from flexi_plugins.pruner import Pruner, Training
from flexi_plugins.studyfile import StudyFile

EVALUATION = "evaluation "  # heads the groups of a cell's options that its plan does not depend on
TRAINING = ("recovery", "training")  # and those that only its recovered plan depends on


@dataclass
class Work:
    """One cell and what becomes of it while the study runs."""

    cell: Cell
    metric: ImportanceMetric | None = None
    strategy: ReplacementStrategy | None = None
    recovery: RecoveryMethod | None = None
    planned: Planned | None = None
    failure: str = ""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    shared_with: dict[str, int] = field(default_factory=dict)

    @property
    def timing(self) -> dict[str, Any]:
        """What to remember beside a plan: seconds a stage, and how many cells shared them."""
        return {"seconds": self.seconds, "shared_with": self.shared_with}

    def remember(self, timing: Mapping[str, Any]) -> None:
        """Take over what a plan's stages took when it was made."""
        self.seconds |= timing.get("seconds", {})
        self.shared_with |= timing.get("shared_with", {})


class Grid:
    """Makes the cells of a study file. evaluation: the evaluators' options, with digests of what they read."""

    def __init__(
        self,
        file: StudyFile,
        plugins: Plugins,
        pruner: Callable[[int], Pruner],
        evaluation: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.file, self.plugins, self.pruner, self.evaluation = file, plugins, pruner, evaluation

    def works(self) -> list[Work]:
        """Return the cells of the study, the dense model first."""
        works = [Work(self._cell(self.file.seeds[0]))] if self.file.dense else []
        if self.file.dense_recovery:
            trained = [(s, r) for s in self.file.seeds for r in self._recoveries() if _method(r)]
            works += [Work(self._cell(s, recovery=r), recovery=_method(r)) for s, r in trained]
        return works + [
            Work(self._cell(seed, metric, strategy, ratio, r), metric.object, strategy.object, _method(r))
            for seed in self.file.seeds
            for metric, strategy, ratio in combinations(self.file, self.plugins)
            for r in self._recoveries()
        ]

    def _recoveries(self) -> list[Entry]:
        return [self.plugins.entry("recovery", method.name, method.options) for method in self.file.recovery]

    def _cell(
        self,
        seed: int,
        metric: Entry | None = None,
        strategy: Entry | None = None,
        ratio: float = 0.0,
        recovery: Entry | None = None,
    ) -> Cell:
        pruner = self.pruner(seed)
        options: dict[str, Any] = {"dtype": str(pruner.dtype), **self.evaluation}
        used = [self.plugins.entry("evaluator", m.evaluator) for m in self.file.evaluation]
        if metric and strategy:
            options |= {"metric": options_json(metric.object), "strategy": options_json(strategy.object)}
            options["calibration"] = self.file.calibration.model_dump()
            used += [metric, strategy]
            used += [self.plugins.entry("statistic", s) for s in sorted(metric.object.needs | strategy.object.needs)]
        if recovery and _method(recovery):
            options["recovery"] = options_json(recovery.object)
            options["training"] = {
                **self.file.training.model_dump(),
                "text": pruner.training_texts(Training(**self.file.training.model_dump()))[2],
            }
            used.append(recovery)
        return Cell(
            model=self.file.model,
            fingerprint=pruner.checkpoint.fingerprint(),
            corpus_hash=pruner.texts[2] if metric else "",
            metric=metric.object.name if metric else None,
            strategy=strategy.object.name if strategy else None,
            ratio=ratio,
            recovery=recovery.object.name if recovery else "none",
            seed=seed,
            options=json.dumps(options, sort_keys=True),
            plugins=tuple(sorted({e.provenance for e in used}, key=_provenance_order)),
        )


def combinations(file: StudyFile, plugins: Plugins) -> Iterator[tuple[Entry, Entry, float]]:
    """Yield every metric with its strategies and ratios; 0 where an option of the strategy takes the ratio's place."""
    for metric, strategy, ratios in file.combinations:
        chosen = plugins.entry("metric", metric.name, metric.options)
        entry = plugins.entry("strategy", strategy.name, strategy.options)
        for ratio in (0.0,) if own_knob(entry.object) else ratios:
            yield chosen, entry, ratio


def plan_key(cell: Cell) -> str:
    """Return the digest of what the plan of a cell depends on: all of it but its evaluation and its recovery."""
    return replace(_without(cell, TRAINING, ("evaluator", "recovery")), recovery="none").hash


def recovered_key(cell: Cell) -> str:
    """Return the digest of what the recovered plan of a cell depends on: all of it but its evaluation."""
    return _without(cell, (), ("evaluator",)).hash


def _without(cell: Cell, groups: tuple[str, ...], kinds: tuple[str, ...]) -> Cell:
    options = json.loads(cell.options)
    kept = {k: v for k, v in options.items() if not k.startswith(EVALUATION) and k not in groups}
    plugins = tuple(p for p in cell.plugins if p.kind not in kinds)
    return replace(cell, options=json.dumps(kept, sort_keys=True), plugins=plugins)


def _method(recovery: Entry) -> RecoveryMethod | None:
    return None if recovery.object.name == "none" else recovery.object


def _provenance_order(version: PluginVersion) -> tuple[str, str]:
    return version.kind, version.name
