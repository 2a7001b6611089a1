"""The engine answers as stock lm-eval does on the exported folders, and the command that verifies it misses nothing."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent / "bench"
DOCUMENTS = 5


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The module of the command; it finds the others of its folder as it does when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield importlib.import_module("verify_engine")


# ------------------------------------------------------------------------------------------- what it compares


def document(number: int, *logprobs: float, task: str = "piqa", right: int = 0) -> dict[str, Any]:
    """A document whose choices are 4, 8, ... characters long, as lm-eval judges it."""
    lengths = [4 * (i + 1) for i in range(len(logprobs))]
    by_length = [p / n for p, n in zip(logprobs, lengths, strict=True)]
    judged = {"acc": float(logprobs.index(max(logprobs)) == right)}
    if task not in ("boolq", "winogrande"):
        judged["acc_norm"] = float(by_length.index(max(by_length)) == right)
    return {"task": task, "doc_id": number, "logprobs": list(logprobs), "lengths": lengths, **judged}


STOCK = [document(0, -3.0, -7.0), document(1, -9.0, -8.0), document(2, -2.0, -1.0, task="boolq")]
FAR = [document(0, -3.0, -7.0011), *STOCK[1:]]


def test_equal_answers_break_no_bound(bench: Any) -> None:
    row, problems = bench.compare_float32("dense", STOCK, STOCK)
    assert not problems
    assert (row["documents"], row["choices"], row["largest difference"]) == (3, 6, 0.0)
    assert not bench.compare_bfloat16("dense", STOCK, STOCK, STOCK)[1]


def test_a_choice_too_far_from_stock_is_named(bench: Any) -> None:
    close = [document(0, -3.0009, -7.0), *STOCK[1:]]
    assert not bench.compare_float32("dense", close, STOCK)[1]
    row, problems = bench.compare_float32("dense", FAR, STOCK)
    assert row["largest difference"] == pytest.approx(0.0011)
    assert len(problems) == 1
    assert "dense in float32: piqa document 0, choice 1: log-probability -7.001100 by the engine" in problems[0]


def test_a_log_probability_that_is_no_number_breaks_the_bound(bench: Any) -> None:
    broken = [{**STOCK[0], "logprobs": [float("nan"), -7.0]}, *STOCK[1:]]
    assert any("piqa document 0, choice 0" in p for p in bench.compare_float32("dense", broken, STOCK)[1])


def test_another_accuracy_is_named_with_its_documents(bench: Any) -> None:
    """Two choices so close that rounding decides: within the bound, and yet another accuracy."""
    stock = [document(0, -3.0, -3.0004), *STOCK[1:]]
    swapped = [document(0, -3.0008, -3.0004), *STOCK[1:]]
    row, problems = bench.compare_float32("dense", swapped, stock)
    assert row["accuracies"] == "differ"
    assert problems == [
        "dense in float32: piqa_acc is 0.0000 by the engine, 0.5000 by stock; other choices in piqa document 0"
    ]


def test_in_bfloat16_stock_against_itself_says_how_many_answers_may_change(bench: Any) -> None:
    expected = [document(i, -3.0, -3.1) for i in range(100)]
    changed = {n: [document(i, -3.2, -3.1) if i < n else expected[i] for i in range(100)] for n in (1, 2, 3, 4)}
    assert not bench.compare_bfloat16("dense", changed[1], expected, expected)[1], "one in a hundred may change"
    assert not bench.compare_bfloat16("dense", changed[3], expected, changed[2])[1]
    row, problems = bench.compare_bfloat16("dense", changed[4], expected, changed[2])
    assert (row["acc: engine"], row["acc: stock itself"], row["acc: allowed"]) == (4, 2, 3)
    assert len(problems) == 1, "by length the choice stays the same"
    assert "4 answers by acc are other than stock's, allowed are 3: in piqa document 0, piqa document 1" in problems[0]


# ------------------------------------------------------------------------------------------- the command


def test_the_command_ends_with_status_1_and_says_which_choice_broke_a_bound(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Answers:
        def __init__(self, asked: Any, scratch: Path) -> None:
            assert asked.limit == 3

        def by_engine(self, dtype: str, softmax: str) -> dict[Any, Any]:
            return {cell: FAR if "share" in cell.strategy else STOCK for cell in bench.CELLS}

        def by_stock(self, dtype: str, batch_size: int, softmax: str | None) -> dict[Any, Any]:
            return dict.fromkeys(bench.CELLS, STOCK)

    monkeypatch.setattr(bench, "Answers", Answers)
    options = ["--limit=3", "--data=nowhere", f"--runs={tmp_path}", "--no-results"]
    monkeypatch.setattr(sys, "argv", ["verify_engine.py", *options])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "flexigpt-share-lora-0.2 in float32: piqa document 0, choice 1: log-probability" in said.err
    figures = json.loads(said.out.splitlines()[-1])
    assert not figures["passed"]
    assert len(figures["problems"]) == 1
    assert set(figures["rows"]) == {"float32", "bfloat16", "distances", "softmax"}


def test_the_engine_s_default_is_held_to_stock_s_default_too(bench: Any) -> None:
    """That stock rounds log-probabilities and the engine does not is no excuse."""
    other = [document(0, -7.0, -3.0), *STOCK[1:]]

    class Answers:
        def by_engine(self, dtype: str, softmax: str) -> dict[Any, Any]:
            return dict.fromkeys(bench.CELLS, other if (dtype, softmax) == ("bfloat16", "float32") else STOCK)

        def by_stock(self, dtype: str, batch_size: int, softmax: str | None) -> dict[Any, Any]:
            return dict.fromkeys(bench.CELLS, other if softmax == "float32" else STOCK)

    rows, problems = bench.verify(Answers(), ("bfloat16",))
    assert [row["acc: engine by default"] for row in rows["bfloat16"]] == [1] * len(bench.CELLS)
    assert len(problems) == 2 * len(bench.CELLS), "acc and acc_norm"
    assert "dense, the engine's softmax in float32 and stock's not, in bfloat16: 1 answers by acc" in problems[0]


@pytest.mark.real
@pytest.mark.data
@pytest.mark.skipif(
    not os.environ.get("FLEXI_DATA"), reason="FLEXI_DATA is not set: it names the folder with local tasks/"
)
def test_in_float32_the_engine_answers_as_stock_lm_eval_does(tmp_path: Path) -> None:
    options = [f"--limit={DOCUMENTS}", "--dtypes=float32", f"--runs={tmp_path}", "--no-results"]
    command = [sys.executable, str(BENCH / "verify_engine.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["passed"]
    rows = figures["rows"]["float32"]
    strategies = ("share-lora", "concat-merge", "remove-blocks", "remove-units")
    assert [row["model"] for row in rows] == ["dense", *(f"flexigpt-{s}-0.2" for s in strategies)]
    assert {row["documents"] for row in rows} == {7 * DOCUMENTS}
    assert all(0 < row["largest difference"] <= 1e-3 and row["accuracies"] == "equal" for row in rows)
