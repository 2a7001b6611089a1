"""Checks of report formats: finished, failed and missing cells all become text, the same text each time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexi_plugins.data import BlockShape, Cell, Measurement, ModelShape, PluginVersion, PruningPlan, Record
from flexi_plugins.hookspecs import ReportFormat
from flexi_plugins.store import rows
from flexi_plugins.testing.bench import Bench, expect

SHAPE = ModelShape((BlockShape(4, 2, 16, 64),) * 6, hidden=48, vocabulary=256, tied=True)


def made_records() -> list[Record]:
    """Return records of a made-up study: dense, two methods, before and after training, one that failed, one incompatible."""
    return [
        _record(None, None, 0.0, 30.0),
        _record("first", "cut", 0.2, 55.5),
        _record("second", "cut", 0.2, 44.0),
        _record("second", "cut", 0.3, 99.0),
        _trained(_record("first", "cut", 0.2, 41.0, recovery="mend"), 3.5),
        _trained(_record("second", "cut", 0.2, 48.0, recovery="mend"), 3.25),
        _record("first", "merge", 0.2, math.nan, "failed", "the loss is NaN |\nblock 3"),
        _record("second", "merge", 0.2, math.nan, "incompatible", "merge wants mlp scores"),
    ]


def _record(
    metric: str | None,
    strategy: str | None,
    ratio: float,
    perplexity: float,
    status: Any = "complete",
    reason: str = "",
    recovery: str = "none",
) -> Record:
    plugins = (PluginVersion("metric", metric, "made-up", "1.0"),) if metric else ()
    cell = Cell("tiny", "f" * 64, "c" * 64, metric, strategy, ratio, recovery, 0, json.dumps({}), plugins)
    if status != "complete":
        return Record(cell, status, reason)
    measurements = (
        Measurement("text_ppl@128", perplexity, False, 0.5),
        Measurement("task_acc", 0.4, True, 0.02, 0.25),
        Measurement("task_choice_logprob", -1.25, True),
    )
    plan = PruningPlan.keep(SHAPE, range(round(6 * (1 - ratio))))
    return Record(cell, "complete", "", measurements, plan, versions={"torch": "2"}, date="2025-01-02T03:04:05")


def _trained(record: Record, loss: float) -> Record:
    """Return a record of a model whose held-out loss went from 4 nats a token to this."""
    assert record.plan
    said = {
        "method": record.cell.recovery,
        "options": {},
        "training": {"tokens": 64},
        "curve": [{"tokens": 0, "held_out_loss": 4.0}, {"tokens": 64, "loss": 3.75, "held_out_loss": loss}],
        "facts": {"trained_tokens": 64, "kept_tokens": 64},
        "notes": [],
    }
    return replace(record, plan=replace(record.plan, origin={"recovery": said}))


def _frames() -> Iterator[tuple[str, Any]]:
    every = made_records()
    yield "a whole study", rows(every)
    yield "a study without a finished cell", rows(every[-2:])
    yield "an empty study", rows([])


def names_one_file(bench: Bench, report: ReportFormat) -> None:
    """``filename`` is a file's own name, which no other format writes to."""
    name = report.filename
    expect(isinstance(name, str) and name and Path(name).name == name, f"expected a file name, found {name!r}")
    others = [e.object for e in bench.plugins.entries("report").values() if e.object.name != report.name]
    taken = [o.name for o in others if o.filename == name]
    expect(not taken, f"{name!r} is the file of the format {', '.join(taken)} too")


def renders_every_study(bench: Bench, report: ReportFormat) -> None:
    """A study's rows become text, whatever became of its cells; the same rows the same text.

    Where no cell is finished it may be empty: there is nothing to show, and no file.
    """
    for what, frame in _frames():
        texts = [report.render(frame, "A title") for _ in range(2)]
        unfinished = "complete" not in set(frame["status"])
        shown = isinstance(texts[0], str) and (bool(texts[0].strip()) or (unfinished and not texts[0]))
        expect(shown, f"{what}: expected text, found {texts[0]!r}")
        expect(texts[0] == texts[1], f"{what}: rendered twice, the text differs")


def shows_every_method(bench: Bench, report: ReportFormat) -> None:
    """The text of a whole study names every metric and strategy with a result."""
    text = report.render(rows(made_records()), "A title")
    missing = [name for name in ("first", "second", "cut") if name not in text]
    expect(not missing, f"expected the text to name {', '.join(missing)}")


def changes_no_rows(bench: Bench, report: ReportFormat) -> None:
    """Rendering leaves the rows as they are, for the next format."""
    frame = rows(made_records())
    copy, attributes = frame.copy(deep=True), json.dumps(frame.attrs)
    report.render(frame, "A title")
    same = frame.equals(copy) and list(frame.columns) == list(copy.columns) and json.dumps(frame.attrs) == attributes
    expect(same, "expected unchanged rows, found changed ones")


CHECKS = (names_one_file, renders_every_study, shows_every_method, changes_no_rows)
