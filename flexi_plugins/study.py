"""A study: every metric x strategy x ratio x seed, stage by stage, resumable. Read this to see how it all fits together.

Seed by seed: statistics of the dense model are taken once for all metrics; scores become plans, cell by cell; all plans
are measured in one sweep per evaluator; then the models that are to be recovered are trained, one after another, and
measured in the same way. Every cell's record is written as soon as it is whole. Whatever is finished is never redone.
"""

from __future__ import annotations

import datetime
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from flexi_plugins.budget import check_reach
from flexi_plugins.corpora.files import data_folder
from flexi_plugins.data import Cell, PruningPlan, Record, Status, digest
from flexi_plugins.errors import FlexiError
from flexi_plugins.evaluation import Measurer, described
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.files import alone
from flexi_plugins.grid import EVALUATION, Grid, Work, combinations, plan_key, recovered_key
from flexi_plugins.hookspecs import Budget, Candidate, Outcome
from flexi_plugins.machine import Machine, peak_memory
from flexi_plugins.models import open_model
from flexi_plugins.plugins import Plugins, incompatible, named, told
from flexi_plugins.progress import Progress
from flexi_plugins.pruner import Calibration, Pruner, Training, resident
from flexi_plugins.recovery.refusal import refusal
from flexi_plugins.report import write_paired, write_reports
from flexi_plugins.store import Journal, Store, commit, environment, write_traceback
from flexi_plugins.studyfile import Measure, StudyFile


class Study:
    """One study file in one folder. ``run`` finishes what is not finished and writes the reports."""

    def __init__(
        self,
        file: StudyFile,
        folder: Path,
        data: Path | None,
        plugins: Plugins,
        progress: Progress | None = None,
        machine: Machine | None = None,
    ) -> None:
        self.file, self.folder, self.data, self.plugins = file, folder, data_folder(data), plugins
        self.machine = machine or Machine()
        self.progress = progress or Progress(quiet=True)
        self.store, self.journal = Store(folder, self.progress.say), Journal(folder)
        self.code = commit()  # of what is running, whatever becomes of the checkout meanwhile

    def run(self) -> list[Record]:
        """Run every cell that has no complete record; return the records of all cells of the study.

        One process at a time runs in a folder: another one raises a FlexiError.
        """
        with alone(self.folder):
            return self._run()

    def _run(self) -> list[Record]:
        self.check_reach()
        works = self.works()
        for method in {id(w.recovery): w.recovery for w in works if w.recovery}.values():
            with named("recovery", method.name):
                self.pruners[self.file.seeds[0]].check_recovery(method)
        self.store.select(w.cell for w in works)
        todo = [w for w in works if not self._is_done(w.cell)]
        self.progress.say(f"study {self.file.name}: {len(works)} cells, {len(works) - len(todo)} of them done before")
        for seed in self.file.seeds:  # one after the other, so that a long study has whole results early
            chosen = [w for w in todo if w.cell.seed == seed]
            if chosen:
                trained = [w for w in chosen if w.recovery is not None]
                self.make_plans(chosen)
                self.measure([w for w in chosen if w.recovery is None])
                self.recover(trained)
                self.measure(trained)
        records = [r for r in (self.store.get(w.cell) for w in works) if r is not None]
        failed = any(r.status == "failed" for r in records)  # is tried again, and knows the rest then
        if todo and not failed:
            self.journal.clear()
        write_paired(self.store, records, self.folder, self.file.name)
        write_reports(self.plugins, records, self.folder, self.file.name)  # last, since a plugin's format may fail
        return records

    # -- cells

    @cached_property
    def checkpoint(self) -> Any:
        """The model, opened once."""
        return resident(open_model(self.file.model, self.plugins.family), self.machine)

    @cached_property
    def pruners(self) -> dict[int, Pruner]:
        """One pruner a calibration seed."""
        calibration = Calibration(**self.file.calibration.model_dump())
        first, *others = self.file.seeds
        pruner = Pruner(
            self.checkpoint,
            calibration,
            seed=first,
            data=self.data,
            dtype=self.file.dtype,
            device=self.machine.device,
            memory=self.machine.memory,
            plugins=self.plugins,
            progress=self.progress,
            journal=self.journal,
        )
        return {first: pruner} | {seed: pruner.calibrated(calibration, seed) for seed in others}

    @cached_property
    def training(self) -> Training:
        """The text of recoveries."""
        return Training(**self.file.training.model_dump())

    def check_reach(self) -> None:
        """Raise one error with every ratio that a strategy cannot meet on this model."""
        problems = []
        for _, strategy, ratio in combinations(self.file, self.plugins):
            try:
                if ratio:
                    reach = strategy.object.reach(self.checkpoint.shape)
                    check_reach(strategy.object.name, Budget(self.checkpoint.shape.parameters, ratio), reach)
            except FlexiError as error:
                problems.append(str(error))
            except Exception:  # a plugin may fail in any way: its cells will say so
                continue
        if problems:
            raise FlexiError("\n".join(dict.fromkeys(problems)))

    def works(self) -> list[Work]:
        """Return the cells of the study, the dense model first; one that is asked for twice is there once."""
        works: dict[str, Work] = {}
        for work in Grid(self.file, self.plugins, self.pruners.__getitem__, self._evaluation).works():
            if work.cell.hash in works:
                self.progress.say(f"{work.cell.label} is asked for twice with the same options, and runs once")
            works.setdefault(work.cell.hash, work)
        return list(works.values())

    @cached_property
    def _evaluation(self) -> dict[str, dict[str, Any]]:
        """The evaluators' options, each with a digest of what it reads, where it reads anything."""
        evaluators = [(m, self.plugins.get("evaluator", m.evaluator, m.options)) for m in self.file.evaluation]
        return {EVALUATION + self._key(m): described(e, self.data, self.plugins) for m, e in evaluators}

    def _is_done(self, cell: Cell) -> bool:
        record = self.store.get(cell)
        return record is not None and record.status != "failed"

    # -- plans

    def make_plans(self, works: Sequence[Work]) -> None:
        """Make the plans of one seed's cells; a cell that fails is recorded, the others go on.

        The highest ratio comes first: a search passes what lower ones try on its way, and knows it when they ask.
        """
        for work in works:
            if work.metric is None:
                work.planned = Planned(PruningPlan.identity(self.checkpoint.shape))
        cells = [w for w in works if w.metric is not None and not self._declared_incompatible(w)]
        missing = [w for w in cells if not self._plan_from_store(w)]
        if missing:
            pruner = self.pruners[missing[0].cell.seed]
            self._calibrate(pruner, missing)
            with self.progress.stage(f"planning {len(missing)} cells (seed {pruner.seed})", len(missing)) as advance:
                made: dict[str, Planned] = {}
                for work in sorted(missing, key=lambda w: w.cell.ratio, reverse=True):
                    with self._caught(work):
                        self._make_plan(pruner, work, made)
                    advance(1)
            pruner.calibrator.forget([])

    def _calibrate(self, pruner: Pruner, works: Sequence[Work]) -> None:
        """Take all statistics together; if that fails, every cell takes its own, and those that cannot fail alone."""
        with self._timed(works, "statistics"):
            try:
                pruner.calibrate(n for w in works for m in (w.metric, w.strategy) if m for n in m.needs)
            except Exception as error:  # a plugin may fail in any way
                self.progress.say(f"taking the statistics together failed, so each cell takes its own: {told(error)}")

    def _make_plan(self, pruner: Pruner, work: Work, made: dict[str, Planned]) -> None:
        """Make the plan of a cell; cells that differ in their recovery have one."""
        assert work.metric is not None
        assert work.strategy is not None
        key = plan_key(work.cell)
        if key not in made:
            with self._timed([work], "plan"):
                made[key] = pruner.make(work.metric, work.strategy, work.cell.ratio)
            self.store.write_plan(key, made[key].plan, made[key].attached, work.timing)
        work.planned = made[key]
        work.remember(self.store.plan_timing(key))

    def _plan_from_store(self, work: Work) -> bool:
        """Take the plan that an earlier run made; not that of a cell that failed as it is, since the plan may be the reason."""
        record = self.store.get(work.cell)
        if record is not None and record.status == "failed" and work.recovery is None:
            return False
        key = plan_key(work.cell)
        stored = self.store.read_plan(key)
        if stored is not None:
            work.planned = Planned(*stored)
            work.remember(self.store.plan_timing(key))
        return stored is not None

    # -- recovery

    def recover(self, works: Sequence[Work]) -> None:
        """Train the model of every plan, one after another; a cell that fails is recorded, the others go on."""
        for work in works:
            if work.planned is None or work.failure:
                continue
            assert work.recovery is not None
            with self._caught(work):
                reason = refusal(work.recovery, work.planned.plan, work.strategy)
                if reason:
                    self._write(work, "incompatible", reason)
                    work.planned = None
                else:
                    self._recover(work)

    def _recover(self, work: Work) -> None:
        """Train the model of a plan, or take what an earlier run trained; a run that was killed goes on where it was."""
        assert work.planned is not None
        assert work.recovery is not None
        key = recovered_key(work.cell)
        folder = self.folder / "training" / key[:12]
        stored = self.store.read_plan(key)
        if stored is None:
            made_by = (work.metric, work.strategy) if work.metric and work.strategy else None
            with self._timed([work], "recovery"):
                trained = self.pruners[work.cell.seed].recover(
                    work.planned, work.recovery, self.training, folder, made_by
                )
            self.store.keep(key, folder)
            self.store.write_plan(key, trained.plan, trained.attached, work.timing)
            stored = self.store.read_plan(key)  # from its file, so that memory does not hold what many cells trained
        if stored is None:
            raise FlexiError(
                f"the trained plan cannot be read back from {self.store.folder / 'plans'}; the checkpoints in {folder} are kept: "
                "run the study again"
            )
        shutil.rmtree(folder, ignore_errors=True)
        work.planned = Planned(*stored)
        work.remember(self.store.plan_timing(key))

    def _declared_incompatible(self, work: Work) -> bool:
        assert work.metric is not None
        assert work.strategy is not None
        reason = incompatible(work.metric, work.strategy)
        if reason:
            self._write(work, "incompatible", reason)
        return reason is not None

    # -- measurements

    def measure(self, works: Sequence[Work]) -> None:
        """Measure every planned cell, evaluator by evaluator, in shared sweeps; a record is written with its last outcome."""
        for work in works:
            if work.failure:
                self._write(work, "failed", work.failure)
        ready = [w for w in works if w.planned is not None and not w.failure]
        groups: dict[str, list[Work]] = {}
        for work in ready:
            assert work.planned is not None
            groups.setdefault(work.planned.plan.hash, []).append(work)
        if not ready:
            return
        candidates = [_candidate(g[0]) for g in groups.values()]
        planned = [g[0].planned for g in groups.values()]
        with Measurer(self.pruners[self.file.seeds[0]], self.journal, self.folder, planned) as measurer:
            for measure in self.file.evaluation:
                with self._timed(ready, measure.evaluator):
                    outcomes = measurer.run(measure, candidates, self._evaluation[EVALUATION + self._key(measure)])
                for group in groups.values():
                    with self._timed(group, measure.evaluator):
                        outcome = next(outcomes)
                    for work in group:
                        work.outcomes[self._key(measure)] = outcome
                        if measure is self.file.evaluation[-1]:
                            self._finish(work)

    def _key(self, measure: Measure) -> str:
        """Return the evaluator's name, with a digest of its options where the study has it several times."""
        alone = [m.evaluator for m in self.file.evaluation].count(measure.evaluator) == 1
        return measure.evaluator if alone else f"{measure.evaluator}-{digest(measure.model_dump())[:6]}"

    def _finish(self, work: Work) -> None:
        """Write the record of a cell whose measurements are all there."""
        failures = [f"{k}: {f}" for k, o in work.outcomes.items() if (f := _failure(o))]
        names = Counter(m.name for o in work.outcomes.values() for m in o.measurements)
        failures += [
            f"{name}: {count} evaluators give a number of this name; put one of them into a study of its own"
            for name, count in names.items()
            if count > 1
        ]
        self._write(work, "failed" if failures else "complete", "; ".join(failures))
        work.planned = None  # its tensors may be a whole model's

    # -- records

    def _write(self, work: Work, status: Status, reason: str = "") -> None:
        revision, dirty = self.code
        record = Record(
            cell=work.cell,
            status=status,
            reason=reason,
            measurements=tuple(m for o in work.outcomes.values() for m in o.measurements),
            plan=work.planned.plan if work.planned else None,
            seconds={k: round(v, 3) for k, v in work.seconds.items()},
            shared_with=work.shared_with,
            peak_memory_gib=round(peak_memory() / 2**30, 3),
            versions=environment(self.machine.gpu)
            | {k: v for o in work.outcomes.values() for k, v in o.versions.items()},
            commit=revision,
            dirty=dirty,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        self.store.write(record, {k: o.documents for k, o in work.outcomes.items()})

    @contextmanager
    def _timed(self, works: Sequence[Work], stage: str) -> Iterator[None]:
        """Add the seconds that this takes to these cells' stage; how many cells shared them, its longest part says."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            for work in works:
                if seconds > work.seconds.get(stage, 0.0):
                    work.shared_with[stage] = len(works)
                work.seconds[stage] = work.seconds.get(stage, 0.0) + seconds

    @contextmanager
    def _caught(self, work: Work) -> Iterator[None]:
        """Turn an exception into the cell's failure, as text: a kept exception would keep the model alive."""
        try:
            yield
        except Exception as error:  # a plugin may fail in any way, and the other cells go on
            known = isinstance(error, FlexiError)
            work.failure = str(error) if known else told(error)
            self.progress.say(f"{work.cell.label} failed: {work.failure}")
            if not known:
                write_traceback(self.folder, self.store.path(work.cell).stem)


def _candidate(work: Work) -> Candidate:
    assert work.planned is not None
    return Candidate(work.cell.label, work.planned.plan)


def _failure(outcome: Outcome) -> str | None:
    unfit = [m.name for m in outcome.measurements if not math.isfinite(m.value)]
    return outcome.failure or (f"{', '.join(unfit)}: not a finite number" if unfit else None)
