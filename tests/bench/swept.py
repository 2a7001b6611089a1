"""The engine's side of a comparison: the plans of a grid, made once, and their models measured in one sweep.

Run as a script, this file is the timed process: it opens the model, reads the plans and measures them as a study does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexi_plugins.data import PruningPlan, digest
from flexi_plugins.errors import FlexiError
from flexi_plugins.evaluation import Measurer
from flexi_plugins.evaluators.harness import LOCAL
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.hookspecs import Candidate
from flexi_plugins.plugins import Entry, options_json
from flexi_plugins.progress import Advance, Progress
from flexi_plugins.pruner import Pruner
from flexi_plugins.store import Journal, Store
from flexi_plugins.studyfile import Measure

MODEL = "smollm2-135m"
METRICS = ("flexigpt", "saap", "come")
STRATEGIES = ("share-lora", "concat-merge", "remove-blocks", "remove-units")
TASKS = tuple(LOCAL)


# ------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class Cell:
    """One model to compare. The dense one has no method and ratio 0."""

    ratio: float = 0.0
    metric: str = ""
    strategy: str = ""

    @property
    def label(self) -> str:
        """What the cell is called in tables and file names."""
        return f"{self.metric}-{self.strategy}-{self.ratio:g}" if self.metric else "dense"


def grid(ratios: Iterable[float], metrics: Iterable[str] = METRICS) -> list[Cell]:
    """Return the dense model and every metric x strategy x ratio."""
    return [Cell(), *(Cell(*chosen) for chosen in itertools.product(ratios, metrics, STRATEGIES))]


class Plans:
    """Plans of cells in a folder, each made once; a file is named by all that its plan depends on."""

    def __init__(self, pruner: Pruner, folder: Path, options: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Keep the plans in ``folder``/plans. options: of methods, by their names, where they are not the defaults."""
        self.pruner, self.store = pruner, Store(folder)
        self.options = options or {}

    def methods(self, cell: Cell) -> tuple[Entry, Entry]:
        """Return the metric and the strategy of a cell."""
        entry = self.pruner.plugins.entry
        metric = entry("metric", cell.metric, self.options.get(cell.metric))
        return metric, entry("strategy", cell.strategy, self.options.get(cell.strategy))

    def key(self, cell: Cell) -> str:
        """Return the digest of what the plan of a cell depends on: model, calibration, methods and their versions."""
        pruner = self.pruner
        calibration = [asdict(pruner.calibration), pruner.texts[2], pruner.seed, str(pruner.dtype)]
        methods = [[asdict(e.provenance), options_json(e.object)] for e in self.methods(cell)]
        return digest([pruner.checkpoint.fingerprint(), calibration, methods, cell.ratio])

    def get(self, cells: Sequence[Cell]) -> dict[Cell, Planned]:
        """Return the plans of cells, with one calibration for all that are still to be made."""
        known = {cell: self.read(cell) for cell in cells}
        missing = [cell for cell, planned in known.items() if planned is None]
        if missing:
            self.pruner.calibrate({need for cell in missing for e in self.methods(cell) for need in e.object.needs})
            with self.pruner.progress.stage(f"making {len(missing)} plans", len(missing)) as advance:
                for cell in missing:
                    known[cell] = self._make(cell)
                    advance(1)
        return {cell: planned for cell, planned in known.items() if planned is not None}

    def read(self, cell: Cell) -> Planned | None:
        """Return the plan of a cell, or None if it is still to be made."""
        return self.read_key(self.key(cell) if cell.metric else "")

    def read_key(self, key: str) -> Planned | None:
        """Return the plan that was made under a key, if any; the identity under the empty one."""
        if not key:
            return Planned(PruningPlan.identity(self.pruner.checkpoint.shape))
        stored = self.store.read_plan(key)
        return Planned(*stored) if stored else None

    def _make(self, cell: Cell) -> Planned:
        metric, strategy = self.methods(cell)
        planned = self.pruner.make(metric.object, strategy.object, cell.ratio)
        self.store.write_plan(self.key(cell), planned.plan, planned.attached)
        return planned


# ------------------------------------------------------------------------------------------- measuring


class Stages(Progress):
    """Progress that adds up the seconds of every stage by its title."""

    def __init__(self, quiet: bool = False) -> None:
        """Start with nothing."""
        super().__init__(quiet)
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Yield ``advance(n)`` for a stage of ``total`` steps."""
        began = time.monotonic()
        try:
            with super().stage(title, total) as advance:
                yield advance
        finally:  # a stage in a generator ends where that is closed
            self.seconds[title] += time.monotonic() - began


@dataclass(frozen=True)
class Swept:
    """What one sweep answered: documents by label, seconds by part, and what the engine says of itself."""

    documents: Mapping[str, Sequence[Mapping[str, Any]]]
    seconds: Mapping[str, float] = field(default_factory=dict)
    engine: Mapping[str, float] = field(default_factory=dict)


PARTS = {"loading tasks": "tasks", "tokenising": "tokenising", "lm-eval:": "sweep", "scoring": "judging"}


def measure(pruner: Pruner, planned: Mapping[str, Planned], limit: int, softmax_dtype: str = "float32") -> Swept:
    """Measure plans by label on the seven tasks, as a study does, with nothing known beforehand.

    seconds: ``tasks`` (data, requests), ``tokenising``, ``sweep`` and ``judging``.
    """
    stages = pruner.progress = Stages(pruner.progress.console.quiet)
    candidates = [Candidate(label, p.plan) for label, p in planned.items()]
    options = {"tasks": TASKS, "limit": limit, "softmax_dtype": softmax_dtype}
    asked = Measure.model_validate({"evaluator": "lm-eval", **options})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with Measurer(pruner, Journal(folder), folder, list(planned.values())) as measurer:
            outcomes = list(measurer.run(asked, candidates))
            engine = engine_parts(measurer.sweeper)
    for candidate, outcome in zip(candidates, outcomes, strict=True):
        if outcome.failure:
            raise FlexiError(f"{candidate.label}: {outcome.failure}")
    documents = {c.label: [dict(row) for row in o.documents] for c, o in zip(candidates, outcomes, strict=True)}
    seconds = {p: sum(s for t, s in stages.seconds.items() if t.startswith(begin)) for begin, p in PARTS.items()}
    return Swept(documents, seconds, engine)


def engine_parts(sweeper: Any) -> dict[str, float]:
    """Return the engine's own seconds by part: ``reading``, ``building``, ``blocks``, ``head``."""
    return dict(sweeper.blocks.seconds)


# ------------------------------------------------------------------------------------------- the timed process


def main() -> None:
    """Measure the plans that a job file names, and write what was found with the seconds that it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path, help="JSON: plans (label -> key), folder, data, dtype, limit")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--spawned", type=float, required=True)
    asked = parser.parse_args()

    import lm_eval.models.huggingface  # noqa: F401  what takes long to import, so that it counts as starting

    seconds = {"start": time.time() - asked.spawned}
    job = json.loads(asked.job.read_text(encoding="utf-8"))
    began = time.monotonic()
    pruner = Pruner(MODEL, dtype=job["dtype"], device="cpu", data=job["data"], progress=Progress())
    plans = Plans(pruner, Path(job["folder"]))
    found = {label: plans.read_key(key) for label, key in job["plans"].items()}
    missing = [label for label, planned in found.items() if planned is None]
    if missing:
        raise FlexiError(f"bench: found no plan of {', '.join(missing)} in {job['folder']}; they are made beforehand")
    for part in ("tokenizer", "blocks"):
        getattr(pruner, part)  # made at its first use
    seconds["model"] = time.monotonic() - began
    swept = measure(pruner, {label: planned for label, planned in found.items() if planned}, job["limit"])
    result = asdict(swept) | {"seconds": {**seconds, **swept.seconds}}
    asked.output.write_text(json.dumps(result, allow_nan=False), encoding="utf-8")


if __name__ == "__main__":
    main()
