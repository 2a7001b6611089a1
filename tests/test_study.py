"""Studies: the whole grid is right, whatever stops it is survived, nothing finished is redone and nothing stale reused."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from studies import METRICS, STRATEGIES, make_model, make_study, make_text, plugins_with, run_study, values
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexi_plugins import evaluation, store
from flexi_plugins.calibration import Calibrator
from flexi_plugins.corpora.files import file_corpus
from flexi_plugins.data import BlockRecipe, Measurement, PruningPlan, Record, Scores
from flexi_plugins.errors import FlexiError
from flexi_plugins.execution.sweep import Sweeper
from flexi_plugins.files import alone
from flexi_plugins.hookspecs import Outcome
from flexi_plugins.plugins import Plugins
from flexi_plugins.progress import Progress
from flexi_plugins.pruner import Calibration, Pruner
from flexi_plugins.store import Journal, Store
from flexi_plugins.strategies.remove_blocks import RemoveBlocks
from flexi_plugins.study import Study
from flexi_plugins.studyfile import read_study


@dataclass
class Grid:
    """A study that ran from beginning to end."""

    file: Path
    folder: Path
    records: list[Record]


@pytest.fixture(scope="module")
def grid(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Grid:
    folder = tmp_path_factory.mktemp("grid")
    file = make_study(folder / "study.toml", model, text, METRICS, STRATEGIES)
    return Grid(file, folder / "run", run_study(file, folder / "run"))


def fails(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was done before")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What studies plan and run from here on: labels of planned cells, numbers of plans of the sweeps that measure."""
    seen: dict[str, list[Any]] = {"plans": [], "sweeps": []}
    make, run = Pruner.make, evaluation.likelihoods

    def planning(self: Pruner, metric: Any, strategy: Any, *rest: Any) -> Any:
        seen["plans"].append(f"{metric.name}-{strategy.name}")
        return make(self, metric, strategy, *rest)

    def sweeping(sweeper: Sweeper, planned: Any, *rest: Any) -> Any:
        seen["sweeps"].append(len(planned))
        return run(sweeper, planned, *rest)

    monkeypatch.setattr(Pruner, "make", planning)
    monkeypatch.setattr(evaluation, "likelihoods", sweeping)
    return seen


def temporary(folder: Path) -> list[Path]:
    return [*folder.rglob("*.tmp"), *folder.rglob("exports*")]


# ------------------------------------------------------------------------------------------- the grid is right


def test_a_study_measures_the_dense_model_and_every_pair(grid: Grid) -> None:
    pairs = {(r.cell.metric, r.cell.strategy) for r in grid.records}
    assert pairs == {(None, None), *((m, s) for m in METRICS for s in STRATEGIES)}
    assert len(grid.records) == 13
    assert {r.status for r in grid.records} == {"complete"}
    assert all(r.plan and r.plan.ratio >= 0.2 for r in grid.records[1:])


def test_measured_in_the_study_is_measured_with_transformers_on_exported_folders(
    grid: Grid, model: Path, text: Path, tmp_path: Path
) -> None:
    calibration = Calibration(f"file:{text}", windows=4, length=64, gradient_samples=3, gradient_length=16)
    pruner = Pruner(str(model), calibration, dtype="float32")
    ids = AutoTokenizer.from_pretrained(model)("".join(file_corpus(text).texts("held-out", None)))["input_ids"]
    windows = torch.tensor(ids[: 4 * 128]).view(4, 128)
    for number, record in enumerate(grid.records):
        assert record.plan is not None
        pruner.write(record.plan, tmp_path / str(number))
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / str(number), dtype=torch.float32)
        with torch.no_grad():
            losses = [float(exported(row[None], labels=row[None]).loss) for row in windows]
        [measured] = record.measurements
        assert measured.name == f"file:{text}_ppl@128"
        assert measured.value == pytest.approx(math.exp(sum(losses) / 4), rel=1e-4), record.cell.label


def test_equal_plans_are_measured_once(model: Path, text: Path, tmp_path: Path, counted: Any) -> None:
    """Block scores rank three of six blocks alike more often than not: the cells of one plan share its measurement."""
    file = make_study(tmp_path / "s.toml", model, text, METRICS, ["remove-blocks", "share-lora"], "[0.6]")
    records = run_study(file, tmp_path / "run", plugins_with(importance_metrics=[OnlyBlocks()]))
    distinct = {r.plan.hash for r in records if r.plan}
    assert len(distinct) < len(records)
    assert counted["sweeps"] == [len(distinct)]
    by_plan = {(r.plan.hash, r.measurements) for r in records if r.plan}
    assert len(by_plan) == len(distinct)


def test_a_record_holds_what_it_promises(grid: Grid, text: Path) -> None:
    by_label = {r.cell.label: r for r in grid.records}
    record = by_label["saap-share-lora-0.2-s0"]
    assert record.versions.keys() >= {
        "python",
        "torch",
        "transformers",
        "lm_eval",
        "flexi-plugins",
        "system",
        "machine",
    }
    assert (record.commit, record.dirty) == store.commit()
    assert record.date[:2] == "20"
    assert record.peak_memory_gib is not None
    assert 0.05 < record.peak_memory_gib < 64
    assert record.seconds.keys() == {"statistics", "plan", "perplexity"}
    assert record.shared_with == {"statistics": 12, "plan": 1, "perplexity": 13}
    assert all(r.seconds["perplexity"] > 0 for r in grid.records), (
        "the sweep's seconds are in every record that shared them"
    )
    assert record.plan is not None
    assert record.plan.origin["metric"] == "saap"
    options = json.loads(record.cell.options)
    assert options["strategy"].keys() >= {"rank", "output_gain"}
    assert options["calibration"]["corpus"] == f"file:{text}"
    assert options["evaluation perplexity"]["window"] == 128
    assert options["dtype"] == "torch.float32"
    used = {(p.kind, p.name, p.distribution) for p in record.cell.plugins}
    assert used >= {(k, n, "flexi-plugins") for k, n in (("metric", "saap"), ("strategy", "share-lora"))}
    assert {p.kind for p in record.cell.plugins} == {"metric", "strategy", "evaluator", "statistic"}
    assert record.cell.corpus_hash
    assert len(record.cell.fingerprint) == 64


def test_documents_lie_beside_their_record(grid: Grid) -> None:
    opened = Store(grid.folder)
    for record in grid.records:
        documents = opened.documents(record.cell)
        assert list(documents["window"]) == [0, 1, 2, 3]
        assert math.exp(documents["nll"].mean()) == pytest.approx(record.measurements[0].value)


def test_a_study_leaves_reports_and_nothing_temporary(grid: Grid) -> None:
    names = {p.name for p in grid.folder.iterdir()}
    assert names == {
        "LEADERBOARD.md",
        "LEADERBOARD.csv",
        "methods.svg",
        "pareto.svg",
        "PAIRED.md",
        "records",
        "documents",
        "plans",
        "study.json",
    }
    assert not temporary(grid.folder)


def test_two_seeds_are_two_calibrations_and_one_row(model: Path, text: Path, tmp_path: Path) -> None:
    import pandas as pd

    file = make_study(
        tmp_path / "s.toml", model, text, ["saap"], ["remove-units"], more="seeds = [3, 4]\ndense = false"
    )
    first, second = run_study(file, tmp_path / "run")
    assert (first.cell.seed, second.cell.seed) == (3, 4)
    assert first.cell.corpus_hash != second.cell.corpus_hash
    [row] = pd.read_csv(tmp_path / "run" / "LEADERBOARD.csv").to_dict("records")
    name = first.measurements[0].name
    assert row[name] == pytest.approx((first.measurements[0].value + second.measurements[0].value) / 2)
    assert "3" in str(row["seeds"])
    assert "4" in str(row["seeds"])


def test_methods_are_tables_with_options_and_ratios_of_their_own(model: Path, text: Path, tmp_path: Path) -> None:
    strategies = [
        '{ name = "remove-blocks", protect_last = 2, ratios = [0.3, 0.5] }',
        '{ name = "remove-blocks", blocks = 4 }',
        "remove-units",
    ]
    metrics = ["come", '{ name = "flexigpt", ratios = [0.2, 0.5] }']
    records = run_study(make_study(tmp_path / "s.toml", model, text, metrics, strategies), tmp_path / "run")
    cells = [(r.cell.metric, r.cell.strategy, r.cell.ratio) for r in records[1:]]
    assert cells == [
        ("come", "remove-blocks", 0.3),
        ("come", "remove-blocks", 0.5),
        ("come", "remove-blocks", 0.0),
        ("come", "remove-units", 0.2),
        ("flexigpt", "remove-blocks", 0.5),
        ("flexigpt", "remove-blocks", 0.0),
        ("flexigpt", "remove-units", 0.2),
    ], "a paper's own knob takes the place of the ratios: one cell"
    kept = [[r.sources[0] for r in record.plan.blocks] for record in records[1:4] if record.plan]
    assert all(blocks[-2:] == [4, 5] for blocks in kept[:2])
    assert len(kept[2]) == 2


# ---------------------------------------------------------------------------------- nothing finished is redone


def test_a_second_run_does_nothing(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {p: p.stat().st_mtime_ns for p in (grid.folder / "records").iterdir()}
    monkeypatch.setattr(Sweeper, "sweep", fails)
    monkeypatch.setattr(Pruner, "make", fails)
    assert run_study(grid.file, grid.folder) == grid.records
    assert {p: p.stat().st_mtime_ns for p in (grid.folder / "records").iterdir()} == files


def test_a_lost_record_is_made_again_alone(grid: Grid, counted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Store(grid.folder)
    lost = next(r for r in grid.records if r.cell.label == "come-concat-merge-0.2-s0")
    opened.path(lost.cell).unlink()
    monkeypatch.setattr(Calibrator, "statistics", fails)
    records = run_study(grid.file, grid.folder)
    assert counted == {"plans": [], "sweeps": [1]}, "its plan is still there"
    assert values(records) == values(grid.records)
    assert [r for r in records if r.cell != lost.cell] == [r for r in grid.records if r.cell != lost.cell]


def test_a_half_written_record_is_named_and_made_again(
    model: Path, text: Path, tmp_path: Path, counted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from flexi_plugins.progress import Progress
    from flexi_plugins.study import Study
    from flexi_plugins.studyfile import read_study

    file = make_study(tmp_path / "s.toml", model, text)
    before = run_study(file, tmp_path / "run")
    path = Store(tmp_path / "run").path(before[0].cell)
    path.write_text(path.read_text()[:100])
    plugins = Plugins.load()
    after = Study(read_study(file, plugins), tmp_path / "run", None, plugins, Progress()).run()
    assert values(after) == values(before)
    assert counted["sweeps"] == [2, 1]
    said = capsys.readouterr().err
    assert "not a whole record, made again" in said
    assert "1 of them done before" in said


# --------------------------------------------------------------------------------------- what stops it is survived

RUN = [sys.executable, "-m", "flexi_plugins.cli", "run"]


def stop(file: Path, folder: Path, when: Callable[[], bool], number: signal.Signals) -> tuple[int, str]:
    """Run a study in a process of its own and send it a signal; return its exit status and what it said."""
    quiet = {**os.environ, "FLEXI_PLUGINS": "", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        [*RUN, str(file), "--out", str(folder)], env=quiet, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not when() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    return process.returncode, said


def count(folder: Path) -> int:
    return sum(1 for p in folder.rglob("*.json"))


@pytest.fixture(scope="module")
def long_study(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose sweep takes some seconds: 14 batches for each of 4 models."""
    folder = tmp_path_factory.mktemp("long")
    text = make_text(folder / "long.txt", 10_500)
    strategies = ["share-lora", "concat-merge", "remove-units"]
    return make_study(folder / "s.toml", model, text, ["flexigpt"], strategies, tokens=7 * 4096, more="seeds = [1]")


@pytest.fixture(scope="module")
def uninterrupted(long_study: Path) -> Grid:
    folder = long_study.parent / "whole"
    return Grid(long_study, folder, run_study(long_study, folder))


def test_a_study_killed_in_the_sweep_goes_on_and_equals_an_uninterrupted_one(
    long_study: Path, uninterrupted: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    status, _ = stop(long_study, folder, lambda: count(folder / "journal") >= 6, signal.SIGKILL)
    assert status == -signal.SIGKILL
    kept = {p.relative_to(folder / "journal") for p in (folder / "journal").rglob("*.json")}
    assert 6 <= len(kept) < 56, "it was killed in the middle"
    assert not (folder / "records").exists()

    put: list[Path] = []
    original = Journal.put

    def putting(self: Journal, plan: str, group: str, answers: Any) -> None:
        put.append(self._path(plan, group).relative_to(self.folder))
        original(self, plan, group, answers)

    monkeypatch.setattr(Journal, "put", putting)
    monkeypatch.setattr(Pruner, "make", fails)
    records = run_study(long_study, folder)
    assert not set(put) & kept, "finished batch groups are not run again"
    assert len(put) + len(kept) == 56 + 4, "the answers of all groups, and the outcome of each plan"
    assert [r.cell for r in records] == [r.cell for r in uninterrupted.records]
    assert [r.measurements for r in records] == [r.measurements for r in uninterrupted.records]
    for record in records:
        documents = [Store(f).documents(record.cell) for f in (folder, uninterrupted.folder)]
        assert documents[0].equals(documents[1])
    assert not temporary(folder)


def test_a_study_killed_while_planning_keeps_the_finished_plans(
    grid: Grid, tmp_path: Path, counted: dict[str, list[str]]
) -> None:
    folder = tmp_path / "run"
    file = tmp_path / "s.toml"
    file.write_text(grid.file.read_text().replace("ratios = [0.2]", "ratios = [0.2, 0.3, 0.4]"))
    stop(file, folder, lambda: count(folder / "plans") >= 3, signal.SIGKILL)
    finished = [p for p in (folder / "plans").glob("*.json") if json.loads(p.read_text())]
    assert len(finished) >= 3
    records = run_study(file, folder)
    assert len(counted["plans"]) == 36 - len(finished)
    again = values(records)
    assert {k: again[k] for k in values(grid.records)} == values(grid.records)
    assert not temporary(folder)


def test_a_study_killed_in_a_search_tries_no_model_again(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progressive = ['{ name = "remove-blocks", progressive = true }']
    file = make_study(tmp_path / "s.toml", model, text, ["greedy"], progressive, ratios="[0.4]")
    whole = run_study(file, tmp_path / "whole")
    tried: list[str] = []
    original, allowed = Calibrator._measured_losses, [6]

    def measured(self: Calibrator, searching: bool, planned: Any, advance: Any) -> list[float]:
        if len(tried) >= allowed[0]:
            raise KeyboardInterrupt
        tried.extend(p.plan.hash for p in planned)
        return original(self, searching, planned, advance)

    monkeypatch.setattr(Calibrator, "_measured_losses", measured)
    with pytest.raises(KeyboardInterrupt):
        run_study(file, tmp_path / "run")
    first = list(tried)
    assert len(first) == 6, "one step of the search: each of the six blocks away"
    tried.clear()
    allowed[0] = 100
    records = run_study(file, tmp_path / "run")
    assert tried
    assert not set(tried) & set(first)
    assert [r.plan for r in records] == [r.plan for r in whole]
    assert values(records) == values(whole)
    assert not (tmp_path / "run" / "journal").exists()


def test_what_a_search_for_a_high_ratio_tried_is_known_to_those_for_lower_ones(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are planned behind it, whatever the order in the file."""
    file = make_study(tmp_path / "s.toml", model, text, ["greedy"], ["remove-blocks"], ratios="[0.2, 0.5]")
    tried: list[tuple[float, int]] = []
    make, original = Pruner.make, Calibrator._measured_losses

    def planning(self: Pruner, metric: Any, strategy: Any, ratio: float) -> Any:
        tried.append((ratio, 0))
        return make(self, metric, strategy, ratio)

    def measured(self: Calibrator, searching: bool, planned: Any, advance: Any) -> list[float]:
        tried.append((tried[-1][0], len(planned)))
        return original(self, searching, planned, advance)

    monkeypatch.setattr(Pruner, "make", planning)
    monkeypatch.setattr(Calibrator, "_measured_losses", measured)
    low, high = (r.plan for r in run_study(file, tmp_path / "run") if r.plan and r.cell.metric)
    assert low.ratio < high.ratio, "records are in the order of the file"
    assert [(ratio, count) for ratio, count in tried if not count] == [(0.5, 0), (0.2, 0)]
    assert {ratio for ratio, count in tried if count} == {0.5}


def test_an_interrupt_says_so_and_leaves_whole_files(long_study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    status, said = stop(long_study, folder, lambda: count(folder / "journal") >= 3, signal.SIGINT)
    assert status == 130
    assert said.rstrip().endswith("run the same command again")
    assert "Traceback" not in said
    assert not temporary(folder)
    assert all(json.loads(p.read_text()) for p in folder.rglob("*.json"))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within: no file can be longer than this, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [200, 3000])
def test_a_full_disk_is_named_and_leaves_nothing_half_written(
    model: Path, text: Path, tmp_path: Path, size: int
) -> None:
    folder = tmp_path / "run"
    before = run_study(make_study(tmp_path / "s.toml", model, text, ["come"]), folder)
    records = {p: p.read_bytes() for p in (folder / "records").iterdir()}
    more = make_study(tmp_path / "more.toml", model, text, ["come", "flexigpt"], ["remove-blocks", "share-lora"])
    with largest_file(size), pytest.raises(FlexiError, match=r"cannot be written \(.*\); free space on that disk"):
        run_study(more, folder)
    assert not temporary(folder)
    assert {p: p.read_bytes() for p in records} == records
    assert all(json.loads(p.read_text()) for p in folder.rglob("*.json"))
    after = run_study(more, folder)
    assert len(after) == 5
    assert values(after).items() >= values(before).items()


def test_a_study_where_no_folder_can_be_made_says_so(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(FlexiError, match=r"taken.*cannot be written"):
        run_study(make_study(tmp_path / "s.toml", model, text), tmp_path / "taken" / "run")


def test_folders_that_a_killed_process_exported_are_removed(model: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    left = folder / "exports.999999999.tmp" / "somewhere"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    run_study(make_study(tmp_path / "s.toml", model, text), folder)
    assert not temporary(folder)


# -------------------------------------------------------------------------------------- what fails, fails alone


@dataclass(frozen=True)
class OnlyBlocks:
    """A third party's metric that scores blocks only."""

    name: ClassVar[str] = "only-blocks"
    paper: ClassVar[str] = ""
    gives: ClassVar[frozenset[str]] = frozenset({"block"})
    needs: ClassVar[frozenset[str]] = frozenset()

    def score(self, request: Any) -> Scores:
        return Scores(block=torch.arange(len(request.shape.blocks), dtype=torch.float32))


@dataclass(frozen=True)
class Moody(OnlyBlocks):
    """One that fails as long as it is told to."""

    name: ClassVar[str] = "moody"
    mood: ClassVar[str] = ""

    def score(self, request: Any) -> Scores:
        if self.mood == "raises":
            raise RuntimeError("no idea")
        fine = super().score(request)
        return Scores(block=fine.block * math.nan) if self.mood == "nan" and fine.block is not None else fine


@dataclass(frozen=True)
class Explosive(RemoveBlocks):
    """A strategy that blows its model up, or whose new tensors are not finite."""

    name: ClassVar[str] = "explosive"

    def plan(self, request: Any) -> PruningPlan:
        made = super().plan(request)
        first = made.blocks[0]
        return PruningPlan(made.shape, (BlockRecipe(first.parts, gain=1e39), *made.blocks[1:]))


@dataclass(frozen=True)
class Jumpy:
    """A statistic that raises."""

    name: ClassVar[str] = "jumpy"
    span: ClassVar[int] = 1
    backward: ClassVar[bool] = False

    def observe(self, trace: Any) -> dict[str, torch.Tensor]:
        raise ZeroDivisionError("nothing to divide by")

    def finish(self, totals: Any, tokens: int) -> dict[str, torch.Tensor]:
        return {}


@dataclass(frozen=True)
class Needy(OnlyBlocks):
    """A metric that needs that statistic."""

    name: ClassVar[str] = "needy"
    needs: ClassVar[frozenset[str]] = frozenset({"jumpy"})


def test_what_fails_has_its_reason_and_is_retried_alone(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Any
) -> None:
    plugins = plugins_with(
        importance_metrics=[Moody(), OnlyBlocks(), Needy()],
        replacement_strategies=[Explosive()],
        statistics=[Jumpy()],
    )
    file = make_study(
        tmp_path / "s.toml", model, text, ["come", "moody", "needy"], ["remove-blocks", "explosive", "share-lora"]
    )
    monkeypatch.setattr(Moody, "mood", "raises")
    first = {r.cell.label: r for r in run_study(file, tmp_path / "run", plugins)}
    assert {k: v.status for k, v in first.items() if v.status == "complete"} == {
        "dense-s0": "complete",
        "come-remove-blocks-0.2-s0": "complete",
        "come-share-lora-0.2-s0": "complete",
    }
    for strategy in ("remove-blocks", "explosive", "share-lora"):
        assert first[f"moody-{strategy}-0.2-s0"].reason == "RuntimeError: no idea"
        assert first[f"needy-{strategy}-0.2-s0"].reason == "ZeroDivisionError: nothing to divide by"
    exploded = first["come-explosive-0.2-s0"]
    assert exploded.status == "failed"
    assert re.search("perplexity: .*its loss on .* is nan, the model broke down", exploded.reason)
    [told] = [p.read_text() for p in (tmp_path / "run" / "failures").glob("moody-remove-blocks-0.2-s0-*.txt")]
    assert "in score" in told, "the traceback is kept for whoever looks into it"

    counted["plans"].clear()
    counted["sweeps"].clear()
    monkeypatch.setattr(Moody, "mood", "nan")
    second = {r.cell.label: r for r in run_study(file, tmp_path / "run", plugins)}
    failed = [f"{m}-{s}" for m in ("moody", "needy") for s in ("remove-blocks", "explosive", "share-lora")]
    assert counted["plans"] == ["come-explosive", *failed], "a failed cell's plan is made again: it may be the reason"
    assert "metric 'moody': block scores: not finite (NaN or infinity)" in second["moody-remove-blocks-0.2-s0"].reason
    assert counted["sweeps"] == [1], "the model that broke down is measured again"

    monkeypatch.setattr(Moody, "mood", "")
    third = {r.cell.label: r for r in run_study(file, tmp_path / "run", plugins)}
    assert third["moody-remove-blocks-0.2-s0"].status == "complete"
    assert third["come-remove-blocks-0.2-s0"] == first["come-remove-blocks-0.2-s0"]
    assert {k for k, v in third.items() if v.status == "failed"} == {
        "come-explosive-0.2-s0",
        "moody-explosive-0.2-s0",
        *(f"needy-{s}-0.2-s0" for s in ("remove-blocks", "explosive", "share-lora")),
    }


@dataclass(frozen=True)
class Weak(RemoveBlocks):
    """A strategy whose adapters are not finite."""

    name: ClassVar[str] = "weak"

    def plan(self, request: Any) -> PruningPlan:
        made = PruningPlan.identity(request.shape)
        shared = (BlockRecipe(made.blocks[i].parts, shares=0, rank=1) for i in (1, 2, 3))
        return PruningPlan(made.shape, (made.blocks[0], *shared, *made.blocks[4:]))

    def tensors(self, request: Any) -> dict[str, torch.Tensor]:
        from flexi_plugins.strategies.share_lora import ShareLora

        made = ShareLora().tensors(request)
        return {n: t * math.inf for n, t in made.items() if "lora" in n}


def test_tensors_that_are_not_finite_are_named(model: Path, text: Path, tmp_path: Path) -> None:
    file = make_study(tmp_path / "s.toml", model, text, ["come"], ["weak"])
    dense, weak = run_study(file, tmp_path / "run", plugins_with(replacement_strategies=[Weak()]))
    assert dense.status == "complete"
    assert weak.reason.startswith("strategy 'weak': its tensor 'blocks.1.")
    assert weak.reason.endswith("is not finite (NaN or infinity)")


@dataclass(frozen=True)
class Stuck(RemoveBlocks):
    """A progressive strategy that never changes anything and never ends."""

    name: ClassVar[str] = "stuck"
    progressive: bool = True

    def plan(self, request: Any) -> PruningPlan:
        return PruningPlan.identity(request.shape)


def test_a_strategy_that_would_go_on_for_ever_is_stopped(model: Path, text: Path, tmp_path: Path) -> None:
    file = make_study(tmp_path / "s.toml", model, text, ["come"], ["stuck"])
    _, stuck = run_study(file, tmp_path / "run", plugins_with(replacement_strategies=[Stuck()]))
    assert stuck.status == "failed"
    assert "strategy 'stuck': a step at ratio 0.0000 changed nothing" in stuck.reason


@dataclass(frozen=True)
class Judge:
    """A third party's evaluator: one outcome at a time, until it breaks."""

    name: ClassVar[str] = "judge"
    stops: ClassVar[int | None] = None
    how: ClassVar[str] = ""

    def check(self) -> None:
        pass

    def inputs(self, data: Any, corpora: Any) -> str:
        return ""

    def evaluate(self, request: Any) -> Iterator[Outcome]:
        for index, _ in enumerate(request.candidates):
            if index == self.stops and self.how == "raises":
                raise RuntimeError("the judge is tired")
            if index == self.stops and self.how == "ends":
                return
            broken = index == self.stops and self.how == "nan"
            time.sleep(0.1)  # longer than what the study does around it
            try:
                name = "verdict" if self.name == "judge" else f"{self.name}_verdict"
                yield Outcome((Measurement(name, math.nan if broken else 1.0, True),))
            finally:
                if index == self.stops and self.how == "cleanup":
                    raise RuntimeError("the judge does not leave")


JUDGE = '\n[[evaluation]]\nevaluator = "judge"\n'


@dataclass(frozen=True)
class Showing(Judge):
    """One that shows how far it is, and holds something meanwhile."""

    name: ClassVar[str] = "showing"
    log: ClassVar[list[str]] = []

    def evaluate(self, request: Any) -> Iterator[Outcome]:
        with request.progress("showing", len(request.candidates)) as advance:
            self.log.append("begins")
            try:
                for outcome in super().evaluate(request):
                    yield outcome
                    advance(1)
            finally:
                self.log.append("ends")


def test_an_evaluator_ends_before_the_next_begins(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Showing, "log", [])
    end = JUDGE.replace("judge", "showing") + JUDGE
    file = make_study(tmp_path / "s.toml", model, text, ["come"], ["remove-blocks"], end=end)
    plain = Judge.evaluate
    monkeypatch.setattr(Judge, "evaluate", lambda self, r: (Showing.log.append(self.name), plain(self, r))[1])
    run_study(file, tmp_path / "run", plugins_with(evaluators=[Showing(), Judge()]))
    assert Showing.log == ["begins", "showing", "ends", "judge"]


@pytest.mark.parametrize(
    ("how", "reason", "failed"),
    [
        ("raises", "judge: RuntimeError: the judge is tired", [False, True, True]),
        ("ends", "judge: it gave fewer outcomes than candidates", [False, True, True]),
        ("nan", "judge: verdict: not a finite number", [False, True, False]),
        ("cleanup", "judge: RuntimeError: the judge does not leave", [False, False, True]),
    ],
)
def test_an_evaluator_that_breaks_spoils_what_it_did_not_measure(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, reason: str, failed: list[bool]
) -> None:
    monkeypatch.setattr(Judge, "how", how)
    monkeypatch.setattr(Judge, "stops", 2 if how == "cleanup" else 1)
    plugins = plugins_with(evaluators=[Judge()])
    file = make_study(tmp_path / "s.toml", model, text, ["come"], ["remove-blocks", "remove-units"], end=JUDGE)
    records = run_study(file, tmp_path / "run", plugins)
    assert [r.status == "failed" for r in records] == failed
    assert {r.reason for r in records if r.status == "failed"} == {reason}
    assert all(any("ppl" in m.name for m in r.measurements) for r in records), "the other evaluator went on"
    assert records[0].shared_with == {"perplexity": 3, "judge": 1}

    monkeypatch.setattr(Judge, "stops", None)
    again = run_study(file, tmp_path / "run", plugins)
    assert {r.status for r in again} == {"complete"}
    assert again[0] == records[0]


@dataclass(frozen=True)
class Handing(Judge):
    """One that hands over whatever it is told to."""

    name: ClassVar[str] = "handing"
    gives: ClassVar[Any] = None

    def evaluate(self, request: Any) -> Any:
        return [self.gives] * len(request.candidates)


@pytest.mark.parametrize(
    ("gives", "reason"),
    [
        ([Measurement("verdict", 1.0, True)], 'expected an Outcome of Measurements for every candidate, found "[Meas'),
        (Outcome((1.0,)), "expected an Outcome of Measurements for every candidate, found 'Outcome("),  # type: ignore[arg-type]
        (Outcome(documents=("said",)), "expected documents that are mappings, found"),  # type: ignore[arg-type]
        (Outcome(versions={"task": Path("v1")}), "Object of type PosixPath is not JSON serializable"),  # type: ignore[dict-item]
    ],
)
def test_an_evaluator_that_gives_something_else_fails_its_cells_by_name(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gives: Any, reason: str
) -> None:
    monkeypatch.setattr(Handing, "gives", gives)
    file = make_study(tmp_path / "s.toml", model, text, end=JUDGE.replace("judge", "handing"))
    records = run_study(file, tmp_path / "run", plugins_with(evaluators=[Handing()]))
    assert all(r.reason.startswith(f"handing: TypeError: {reason}") for r in records)
    assert all(r.measurements for r in records), "the other evaluator went on"


def test_numbers_of_numpy_and_torch_are_numbers(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Measurement("verdict", np.float32(0.5), np.bool_(True), torch.tensor(0.25))  # type: ignore[arg-type]
    monkeypatch.setattr(Handing, "gives", Outcome((given,)))
    file = make_study(tmp_path / "s.toml", model, text, end=JUDGE.replace("judge", "handing"))
    records = run_study(file, tmp_path / "run", plugins_with(evaluators=[Handing()]))
    assert {r.measurements[-1] for r in records} == {Measurement("verdict", 0.5, True, 0.25)}


def test_a_name_that_two_evaluators_use_is_an_error(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handing, "gives", Outcome((Measurement("verdict", 0.5, True),)))
    file = make_study(tmp_path / "s.toml", model, text, end=JUDGE.replace("judge", "handing") + JUDGE)
    records = run_study(file, tmp_path / "run", plugins_with(evaluators=[Handing(), Judge()]))
    reason = "verdict: 2 evaluators give a number of this name; put one of them into a study of its own"
    assert {r.reason for r in records} == {reason}


@dataclass(frozen=True)
class Idle(RemoveBlocks):
    """A strategy that leaves everything as it is."""

    name: ClassVar[str] = "idle"

    def plan(self, request: Any) -> PruningPlan:
        return PruningPlan.identity(request.shape)


def test_a_plan_above_its_budget_is_not_ranked_with_those_that_meet_it(model: Path, text: Path, tmp_path: Path) -> None:
    file = make_study(tmp_path / "s.toml", model, text, ["come"], ["idle"])
    dense, idle = run_study(file, tmp_path / "run", plugins_with(replacement_strategies=[Idle()]))
    assert (dense.status, idle.status) == ("complete", "failed")
    said = r"strategy 'idle' at ratio 0\.2: expected at most [\d,]+ stored parameters, found [\d,]+"
    assert re.fullmatch(said, idle.reason)


@dataclass(frozen=True)
class Slow(Judge):
    """One whose every outcome took long, and which is stopped."""

    name: ClassVar[str] = "slow"
    asked: ClassVar[list[int]] = []
    allowed: ClassVar[int] = 1

    def evaluate(self, request: Any) -> Iterator[Outcome]:
        self.asked.append(len(request.candidates))
        for index, outcome in enumerate(super().evaluate(request)):
            if index == self.allowed:
                raise KeyboardInterrupt
            yield replace(outcome, documents=({"task": "t", "doc_id": index, "acc": 0.5, "said": None},))


def test_what_an_evaluator_gave_is_kept_after_a_kill(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every evaluator, not of the last one alone, and with its documents."""
    monkeypatch.setattr(Slow, "asked", [])
    file = make_study(
        tmp_path / "s.toml",
        model,
        text,
        ["come"],
        ["remove-blocks", "remove-units"],
        end=JUDGE.replace("judge", "slow") + JUDGE,
    )
    plugins = plugins_with(evaluators=[Slow(), Judge()])
    with pytest.raises(KeyboardInterrupt):
        run_study(file, tmp_path / "run", plugins)
    monkeypatch.setattr(Slow, "allowed", 3)
    records = run_study(file, tmp_path / "run", plugins)
    assert Slow.asked == [3, 2]
    assert {r.status for r in records} == {"complete"}
    assert all({"verdict", "slow_verdict"} < {m.name for m in r.measurements} for r in records)
    documents = Store(tmp_path / "run").documents(records[0].cell)
    assert len(documents[documents["evaluator"] == "slow"]) == 1
    assert not (tmp_path / "run" / "journal").exists()


def test_what_is_known_beside_a_failed_cell_is_kept_for_its_next_try(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Judge, "how", "raises")
    monkeypatch.setattr(Judge, "stops", 1)
    plugins = plugins_with(evaluators=[Judge()])
    progressive = ['{ name = "remove-blocks", progressive = true }']
    file = make_study(tmp_path / "s.toml", model, text, ["greedy"], progressive, end=JUDGE)
    first = run_study(file, tmp_path / "run", plugins)
    assert [r.status for r in first] == ["complete", "failed"]
    monkeypatch.setattr(Judge, "stops", None)
    monkeypatch.setattr(Calibrator, "_measured_losses", fails)
    monkeypatch.setattr(Sweeper, "sweep", lambda *a, **k: iter(()))
    again = run_study(file, tmp_path / "run", plugins)
    assert {r.status for r in again} == {"complete"}
    assert not (tmp_path / "run" / "journal").exists()


@dataclass(frozen=True)
class Unread(Judge):
    """One that cannot say what it reads."""

    name: ClassVar[str] = "unread"

    def inputs(self, data: Any, corpora: Any) -> str:
        raise KeyError("which file?")


def test_a_plugin_that_breaks_before_anything_runs_is_named(model: Path, text: Path, tmp_path: Path) -> None:
    file = make_study(tmp_path / "s.toml", model, text, end=JUDGE.replace("judge", "unread"))
    with pytest.raises(FlexiError, match="evaluator 'unread' failed before anything ran: KeyError: 'which file\\?'"):
        run_study(file, tmp_path / "run", plugins_with(evaluators=[Unread()]))


def test_a_cell_that_is_asked_for_twice_runs_once(model: Path, text: Path, tmp_path: Path) -> None:
    said: list[str] = []
    strategies = ["remove-blocks", '{ name = "remove-blocks", progressive = false }']
    file = make_study(tmp_path / "s.toml", model, text, ["come"], strategies)
    plugins, progress = Plugins.load(), Progress(quiet=True)
    progress.say = said.append  # type: ignore[method-assign]
    records = Study(read_study(file, plugins), tmp_path / "run", None, plugins, progress).run()
    assert [r.cell.label for r in records] == ["dense-s0", "come-remove-blocks-0.2-s0"]
    assert "come-remove-blocks-0.2-s0 is asked for twice with the same options, and runs once" in said


def test_one_process_at_a_time_runs_in_a_folder(model: Path, text: Path, tmp_path: Path) -> None:
    file = make_study(tmp_path / "s.toml", model, text)
    with (
        alone(tmp_path / "run"),
        pytest.raises(FlexiError, match=rf"run is in use by process {os.getpid()}; wait for its end"),
    ):
        run_study(file, tmp_path / "run")
    assert run_study(file, tmp_path / "run")


def test_all_seeds_share_the_blocks_in_memory(model: Path, text: Path, tmp_path: Path) -> None:
    plugins = Plugins.load()
    file = make_study(tmp_path / "s.toml", model, text, more="seeds = [0, 1]")
    pruners = Study(read_study(file, plugins), tmp_path / "run", None, plugins).pruners
    assert pruners[0].blocks is pruners[1].blocks
    assert not torch.equal(pruners[0].texts[0], pruners[1].texts[0])


@dataclass(frozen=True)
class Mute(Judge):
    """One that gives nothing at all."""

    name: ClassVar[str] = "mute"

    def evaluate(self, request: Any) -> Any:
        return None


def test_an_evaluator_that_gives_nothing_fails_all_cells_and_no_more(model: Path, text: Path, tmp_path: Path) -> None:
    file = make_study(tmp_path / "s.toml", model, text, end=JUDGE.replace("judge", "mute"))
    records = run_study(file, tmp_path / "run", plugins_with(evaluators=[Mute()]))
    assert {r.reason for r in records} == {"mute: TypeError: 'NoneType' object is not iterable"}
    assert all(r.measurements for r in records)


def test_an_evaluator_may_come_twice_with_other_options(model: Path, text: Path, tmp_path: Path) -> None:
    end = f'[[evaluation]]\nevaluator = "perplexity"\ncorpus = "file:{text}"\nwindow = 32\ntokens = 64\n'
    [record, _] = run_study(make_study(tmp_path / "s.toml", model, text, end=end), tmp_path / "run")
    assert [m.name.partition("@")[2] for m in record.measurements] == ["128", "32"]
    documents = Store(tmp_path / "run").documents(record.cell)
    assert list(documents.groupby("evaluator", sort=False).size()) == [4, 2]


def test_a_pair_that_cannot_work_is_declared_so(model: Path, text: Path, tmp_path: Path, counted: Any) -> None:
    plugins = plugins_with(importance_metrics=[OnlyBlocks()])
    file = make_study(tmp_path / "s.toml", model, text, ["only-blocks"], ["remove-blocks", "remove-units"])
    _, fine, pair = run_study(file, tmp_path / "run", plugins)
    assert fine.status == "complete"
    assert pair.status == "incompatible"
    assert pair.reason == "remove-units wants attention, mlp scores, only-blocks gives block only"
    assert pair.reason in (tmp_path / "run" / "LEADERBOARD.md").read_text()
    assert counted["plans"] == ["only-blocks-remove-blocks"]
    assert run_study(file, tmp_path / "run", plugins)[2] == pair, "it is not tried again"


# ------------------------------------------------------------------------------------------ nothing stale is reused


@dataclass
class Small:
    """A finished study of two cells, and the files that it depends on."""

    file: Path
    folder: Path
    model: Path
    text: Path
    records: list[Record]

    def rerun(self, plugins: Plugins | None = None) -> list[Record]:
        return run_study(self.file, self.folder, plugins)

    def edit(self, before: str, after: str) -> None:
        content = self.file.read_text()
        assert before in content
        self.file.write_text(content.replace(before, after))


@pytest.fixture
def small(tmp_path: Path) -> Small:
    model, text = make_model(tmp_path / "model"), make_text(tmp_path / "text.txt")
    file = make_study(tmp_path / "s.toml", model, text, ["come"], ["remove-units"])
    return Small(file, tmp_path / "run", model, text, run_study(file, tmp_path / "run"))


def test_other_weights_are_another_model(small: Small) -> None:
    make_model(small.model, seed=1)
    again = small.rerun()
    assert [r.cell.label for r in again] == [r.cell.label for r in small.records]
    assert all(a.cell.fingerprint != b.cell.fingerprint for a, b in zip(again, small.records, strict=True))
    assert all(a.measurements != b.measurements for a, b in zip(again, small.records, strict=True))


def test_a_model_that_moved_is_the_same_model(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = small.model.rename(small.model.with_name("moved"))
    small.edit(str(small.model), str(moved))
    monkeypatch.setattr(Sweeper, "sweep", fails)
    assert small.rerun() == small.records


def test_a_changed_text_is_another_corpus(small: Small) -> None:
    halves = small.text.read_text().split("\n")
    middle = len(halves) // 2
    small.text.write_text("\n".join([*halves[:middle], *reversed(halves[middle:])]))
    dense, pruned = small.rerun()
    assert dense.measurements != small.records[0].measurements, "it is measured on the held-out half"
    small.text.write_text("\n".join([*reversed(halves[:middle]), *reversed(halves[middle:])]))
    again, other = small.rerun()
    assert again == dense, "the dense model is not calibrated"
    assert other.cell.corpus_hash != pruned.cell.corpus_hash


@pytest.mark.parametrize(
    ("before", "after", "remade"),
    [
        ('"remove-units"', '{ name = "remove-units", protect_first = 2 }', [False, True]),
        ("ratios = [0.2]", "ratios = [0.25]", [False, True]),
        ("window = 128", "window = 64", [True, True]),
        ("gradient_samples = 3", "gradient_samples = 2", [False, True]),
        ('dtype = "float32"', 'dtype = "bfloat16"', [True, True]),
    ],
)
def test_other_options_are_another_cell(small: Small, before: str, after: str, remade: list[bool]) -> None:
    small.edit(before, after)
    again = small.rerun()
    assert [a != b for a, b in zip(again, small.records, strict=True)] == remade
    assert [a.cell != b.cell for a, b in zip(again, small.records, strict=True)] == remade
    small.edit(after, before)
    assert small.rerun() == small.records, "what was there before is still there"


def test_another_version_of_a_plugin_is_another_cell(model: Path, text: Path, tmp_path: Path, counted: Any) -> None:
    file = make_study(tmp_path / "s.toml", model, text, ["come", "only-blocks"], ["remove-blocks"])
    old, new = (run_study(file, tmp_path / "run", plugins_with(v, importance_metrics=[OnlyBlocks()])) for v in "12")
    assert old[:2] == new[:2]
    assert old[2].cell != new[2].cell
    assert counted["plans"] == ["come-remove-blocks", "only-blocks-remove-blocks", "only-blocks-remove-blocks"]
    assert old[2].plan == new[2].plan


def test_reports_leave_out_records_that_are_not_the_studys_any_more(small: Small) -> None:
    from flexi_plugins.report import publish

    small.edit("ratios = [0.2]", "ratios = [0.25]")
    now = small.rerun()
    assert len(list((small.folder / "records").iterdir())) == 3
    assert Store(small.folder).records() == sorted(now, key=lambda r: r.cell.label)
    publish(Plugins.load(), small.folder, small.folder.with_name("published"))
    assert len(Store(small.folder.with_name("published")).records()) == 2
    (small.folder / "study.json").write_text('{"records": ["of-another-study"]}')
    with pytest.raises(FlexiError, match="no finished record of the study that ran there last"):
        publish(Plugins.load(), small.folder, small.folder.with_name("nothing"))
    assert not small.folder.with_name("nothing").exists()


def test_records_name_the_code_that_ran(model: Path, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A checkout that changes while a study runs does not change what is running."""
    revisions = iter([("a" * 40, False), ("b" * 40, True)])
    monkeypatch.setattr("flexi_plugins.study.commit", lambda: next(revisions))
    file = make_study(tmp_path / "s.toml", model, text, ["flexigpt"], ["remove-blocks"], "[0.3]")
    records = run_study(file, tmp_path / "run")
    assert {(r.commit, r.dirty) for r in records} == {("a" * 40, False)}
