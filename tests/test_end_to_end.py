"""The main job on the real default model: a small study on standard data, killed in the middle and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexi_plugins.models import default_model

STUDY = """
name = "small"
model = "smollm2-135m"
metrics = ["flexigpt", "come"]
strategies = ["concat-merge", "remove-units"]
ratios = [0.1]

[calibration]
corpus = "{corpus}"
windows = 4
length = 128

[[evaluation]]
evaluator = "lm-eval"
tasks = {tasks}
limit = 8

[[evaluation]]
evaluator = "perplexity"
corpus = "{corpus}"
window = 256
tokens = 1024
"""
LOCAL = {"corpus": "wikitext2", "tasks": '["piqa", "arc_easy", "winogrande"]'}
EMBEDDED = {"corpus": "python-docs", "tasks": '["docs_cloze"]'}
RUN = [sys.executable, "-m", "flexi_plugins.cli", "run"]

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model() -> Path:
    return default_model()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A study on standard data where FLEXI_DATA names it, else on the text that comes with Python."""
    path = tmp_path_factory.mktemp("study") / "small.toml"
    path.write_text(STUDY.format(**(LOCAL if os.environ.get("FLEXI_DATA") else EMBEDDED)))
    return path


@pytest.fixture(scope="module")
def whole(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "small"
    done = subprocess.run([*RUN, str(study), "--out", str(folder)], capture_output=True, text=True, check=True)
    assert "flexigpt" in done.stdout, "the leaderboard is printed"
    assert all(str(folder / name) in done.stdout for name in ("LEADERBOARD.md", "PAIRED.md")), "the files are named"
    return folder


def records(folder: Path) -> dict[str, dict[str, float]]:
    """Return label -> measurement -> value of every record in a study's folder."""
    found = [json.loads(p.read_text()) for p in (folder / "records").glob("*.json")]
    assert all(r["status"] == "complete" for r in found), [r["reason"] for r in found]
    return {
        f"{r['cell']['metric']}-{r['cell']['strategy']}": {m["name"]: m["value"] for m in r["measurements"]}
        for r in found
    }


def test_a_killed_study_resumes_and_equals_an_uninterrupted_one(study: Path, whole: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [*RUN, str(study), "--out", str(killed)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 400
    while len(list((killed / "journal").rglob("*.json"))) < 4 and time.monotonic() < deadline:
        assert process.poll() is None, "the study ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((killed / "records").glob("*.json")), "nothing was finished yet"
    plans = {p: p.stat().st_mtime_ns for p in (killed / "plans").iterdir()}
    assert len(plans) == 4

    subprocess.run([*RUN, str(study), "--out", str(killed)], capture_output=True, text=True, check=True)
    assert {p: p.stat().st_mtime_ns for p in plans} == plans, "finished plans are not made again"
    assert records(killed) == records(whole)
    again = subprocess.run([*RUN, str(study), "--out", str(killed)], capture_output=True, text=True, check=True)
    assert "5 of them done before" in again.stderr


def test_the_study_leaves_what_it_promises(whole: Path) -> None:
    names = {p.name for p in whole.iterdir()}
    assert names >= {"LEADERBOARD.md", "LEADERBOARD.csv", "methods.svg", "pareto.svg", "records", "documents", "plans"}
    assert "journal" not in names, "the journal goes when every record is written"


def test_pruning_hurts_but_leaves_a_language_model(whole: Path) -> None:
    """Every pruned model is worse than the dense one, and far better than guessing among 49,152 tokens."""
    perplexity = {k: next(v for n, v in m.items() if "ppl" in n) for k, m in records(whole).items()}
    dense = perplexity.pop("None-None")
    assert dense < 60
    assert all(dense < p < 5000 for p in perplexity.values()), perplexity
