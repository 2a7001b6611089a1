"""Published numbers beside ours: what counts as the same method, and that nothing is ranked across."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexi_plugins import store
from flexi_plugins.data import BlockShape, Cell, Measurement, ModelShape, PluginVersion, PruningPlan, Record
from flexi_plugins.errors import FlexiError
from flexi_plugins.plugins import Plugins
from flexi_plugins.report import PUBLISHED, write_published
from flexi_plugins.reports.published import COLUMNS, Published, read_published, render, side_by_side

SHAPE = ModelShape((BlockShape(4, 4, 8, 64),) * 40, hidden=32, vocabulary=32, tied=True)
PLUGIN = PluginVersion("metric", "come", "flexi-plugins", "0.1.0")
PAPERS = {
    ("metric", "come"): "CoMe, arXiv 2510.15304",
    ("metric", "taylor"): "Shortened LLaMA, arXiv 2402.02834",
    ("metric", "shortgpt"): "ShortGPT, arXiv 2403.03853",
    ("metric", "llm-pruner"): "LLM-Pruner, arXiv 2305.11627",
    ("metric", "none"): "",
    ("strategy", "concat-merge"): "CoMe, arXiv 2510.15304",
    ("strategy", "remove-blocks"): "ShortGPT, arXiv 2403.03853",
    ("strategy", "remove-units"): "LLM-Pruner, arXiv 2305.11627",
    ("strategy", "mka"): "MKA, arXiv 2406.16330",
}
LINE = Published("Llama-2-7B", "CoMe", 0.2, "none", "wikitext2", 9.5, "ppl@2048", "CoMe, table 2", "")


def record(metric: str | None, strategy: str | None, ratio: float = 0.2, kept: int = 32, **changes: Any) -> Record:
    values = {"wikitext2_ppl@2048": 12.5, "piqa_acc": 0.75, "hellaswag_acc_norm": 0.5, **changes.pop("values", {})}
    cell = Cell("meta-llama/Llama-2-7b-hf", "f" * 64, "c" * 64, metric, strategy, ratio, "none", 0, "{}", (PLUGIN,))
    measurements = tuple(Measurement(n, v, "ppl" not in n) for n, v in values.items())
    plan = PruningPlan.keep(SHAPE, range(kept))
    return Record(replace(cell, **changes), "complete", measurements=measurements, plan=plan)


def dense() -> Record:
    return record(None, None, 0.0, kept=40)


def paired(lines: list[Published], *records: Record) -> list[tuple[str, str, float, float]]:
    """Return (published method, our method, published, ours) of every pair."""
    pairs = side_by_side(store.rows([dense(), *records]), lines, PAPERS)
    return [(p["method"], f"{p['our_metric']} x {p['our_strategy']}", p["published"], p["ours"]) for p in pairs]


# --------------------------------------------------------------------------------------- what is the same method


def test_metric_and_strategy_of_the_paper_come_before_the_metric_alone() -> None:
    grid = [record("come", s) for s in ("concat-merge", "remove-blocks", "remove-units")]
    assert paired([LINE], *grid) == [("CoMe", "come x concat-merge", 9.5, 12.5)]
    alone = paired([LINE], *grid[1:])
    assert [ours for _, ours, _, _ in alone] == ["come x remove-blocks", "come x remove-units"]


def test_a_strategy_of_the_paper_is_not_enough_unless_it_chooses_by_itself() -> None:
    shortgpt = replace(LINE, method="ShortGPT")
    assert paired([shortgpt], record("come", "remove-blocks")) == []
    assert paired([shortgpt], record("shortgpt", "remove-blocks")) == [
        ("ShortGPT", "shortgpt x remove-blocks", 9.5, 12.5)
    ]
    assert paired([replace(LINE, method="MKA")], record("none", "mka")) == [("MKA", "none x mka", 9.5, 12.5)]


def test_another_version_of_a_model_is_another_model() -> None:
    ours = [record("come", "concat-merge", model=f"lmsys/vicuna-7b-v1.{n}") for n in (3, 5)]
    found = side_by_side(store.rows(ours), [replace(LINE, model="vicuna-7b-v1.5")], PAPERS)
    assert len(found) == 1
    assert len(side_by_side(store.rows(ours[:1]), [replace(LINE, model="vicuna-7b-v1.5")], PAPERS)) == 0
    renamed = record("come", "concat-merge", model="NousResearch/Llama-2-7b-hf@main")
    assert len(side_by_side(store.rows([renamed]), [LINE], PAPERS)) == 1


def test_a_variant_that_names_no_counterpart_is_not_its_method() -> None:
    names = ("LLM-Pruner Element1", "LLM-Pruner Random", "LLM-Pruner", "Taylor+", "Taylor", "Taylor (Taylor+)")
    variants = [replace(LINE, method=m) for m in names]
    found = paired(variants, record("llm-pruner", "remove-units"), record("taylor", "remove-blocks"))
    assert [method for method, *_ in found] == ["LLM-Pruner", "Taylor"]


def test_beside_a_line_that_names_options_stand_those_of_ours() -> None:
    line = replace(LINE, method="LLM-Pruner Element1", counterpart="llm-pruner x remove-units, taylor=param_first")
    others = [
        replace(LINE, method="LLM-Pruner"),
        replace(LINE, method="LLM-Pruner Channel", counterpart="-"),
        replace(LINE, method="LLM-Pruner Element2", counterpart="llm-pruner x remove-units, taylor=param_second"),
    ]
    options = '{"metric": {"taylor": "param_first"}, "strategy": {"multiple": 8}, "evaluation": {"window": 2048}}'
    text = page([line, *others], record("llm-pruner", "remove-units", options=options))
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| LLM-Pruner")]
    assert [(cells[0], cells[4]) for cells in table] == [
        ("| LLM-Pruner Element1", "llm-pruner x remove-units (taylor=param_first, multiple=8)"),
        ("| LLM-Pruner", "llm-pruner x remove-units"),
    ]


def test_a_line_that_names_its_counterpart_has_no_other_beside_it() -> None:
    """A variant is a metric, a strategy and options; what is not implemented has nothing beside it."""
    told = {"compensate": True, "blocks": 7}
    ours = [
        record("taylor", "remove-blocks", options=json.dumps({"metric": {"plus": plus}, "strategy": {**told, **more}}))
        for plus, more in ((True, {}), (False, {}), (True, {"compensate": False}))
    ]
    line = replace(LINE, method="Prune&Comp (Taylor+)")
    counterpart = "taylor x remove-blocks, plus=true, compensate=true"
    [pair] = side_by_side(store.rows([dense(), *ours]), [replace(line, counterpart=counterpart)], PAPERS)
    assert (pair["options"]["metric.plus"], pair["options"]["strategy.compensate"]) == ("true", "true")
    for other in ("-", "come x remove-blocks", "taylor x remove-units", counterpart + ", multiple=8"):
        assert paired([replace(line, counterpart=other)], *ours) == []
    assert paired([replace(LINE, method="Taylor (Taylor+)", counterpart="-")], *ours) == []


def test_only_the_same_model_ratio_recovery_and_task_stand_side_by_side() -> None:
    ours = record("come", "concat-merge")
    others: list[dict[str, Any]] = [
        {"model": "LLaMA-7B"},
        {"model": "Llama-2-13B"},
        {"ratio": 0.3},
        {"ratio": 0.21},
        {"recovery": "LoRA"},
        {"task": "ptb"},
        {"metric": "ppl@128"},
        {"method": "CoMe-P"},
    ]
    assert paired([replace(LINE, **change) for change in others], ours) == []
    same: list[dict[str, Any]] = [
        {"model": "meta-llama/Llama-2-7b-hf"},
        {"model": "meta-llama/Llama-2-7b-hf@main"},
        {"model": "Meta-Llama-2-7B"},
        {"recovery": ""},
        {"task": "WikiText-2"},
        {"metric": "ppl"},
        {"ratio": 0.2005},
    ]
    assert len(paired([replace(LINE, **change) for change in same], ours)) == len(same)


def test_a_ratio_that_an_option_set_is_compared_by_what_is_gone() -> None:
    ours = record("come", "concat-merge", 0.0, kept=28)
    gone = PruningPlan.keep(SHAPE, range(28)).ratio
    assert len(paired([replace(LINE, ratio=round(gone, 2))], ours)) == 1
    assert paired([replace(LINE, ratio=0.2)], ours) == []


def test_accuracies_are_compared_in_percent_and_dense_with_dense() -> None:
    lines = [
        replace(LINE, task="piqa", metric="acc", value=74.1),
        replace(LINE, task="hellaswag", metric="acc_norm", value=51.0),
        replace(LINE, method="Dense", ratio=0.0, task="piqa", metric="acc", value=79.1),
    ]
    assert paired(lines, record("come", "concat-merge")) == [
        ("CoMe", "come x concat-merge", 74.1, 75.0),
        ("CoMe", "come x concat-merge", 51.0, 50.0),
        ("Dense", "None x None", 79.1, 75.0),
    ]


def test_failed_cells_and_tasks_that_were_not_run_have_no_line() -> None:
    failed = replace(record("come", "concat-merge"), status="failed", measurements=(), plan=None)
    assert paired([LINE], failed) == []
    assert paired([replace(LINE, task="boolq", metric="acc")], record("come", "concat-merge")) == []


# ----------------------------------------------------------------------------------------------------- the page


def page(lines: list[Published], *records: Record) -> str:
    rows = store.rows([dense(), *records])
    return render(rows, lines, side_by_side(rows, lines, PAPERS), "a-study")


def test_the_page_has_both_numbers_in_one_line_in_the_order_of_the_file_and_no_rank() -> None:
    lines = [
        replace(LINE, method="LLM-Pruner", value=30.0, source="LLM-Pruner, table 1", note="window differs"),
        LINE,
        replace(LINE, ratio=0.3),
        replace(LINE, method="SLEB"),
        replace(LINE, model="OPT-6.7B"),
    ]
    text = page(lines, record("come", "concat-merge"), record("llm-pruner", "remove-units", values={"piqa_acc": 0.9}))
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [line[0] for line in table] == ["| method", "| :--", "| LLM-Pruner", "| CoMe"]
    true_ratio = f"{PruningPlan.keep(SHAPE, range(32)).ratio:.3f}"
    assert table[3][1:] == [
        "wikitext2 ppl@2048",
        "9.500",
        "12.50",
        "come x concat-merge",
        "wikitext2_ppl@2048",
        true_ratio,
        "CoMe, table 2",
        " |",
    ]
    assert table[2][-1] == "window differs |"
    assert "rank" not in text.lower().replace("not\n  ranked", "")
    assert "## Llama-2-7B, ratio 0.2, recovery none" in text
    assert (
        "- published, and without a number of ours beside it: Llama-2-7B CoMe 0.3 (none), Llama-2-7B SLEB 0.2 (none)"
        in text
    )
    assert "OPT" not in text, "models that the study has not are left out"


def test_a_model_without_published_numbers_is_named_with_those_that_have_some() -> None:
    text = page([LINE], record("come", "concat-merge", model="smollm2-135m"))
    assert "without a published number: smollm2-135m; there are numbers of Llama-2-7B" in text
    assert "- none" in page([LINE], record("come", "concat-merge"))


# ----------------------------------------------------------------------------------------------------- the file

HEADER = ",".join(COLUMNS)


def test_a_file_is_read_with_quotes_and_empty_notes(tmp_path: Path) -> None:
    file = tmp_path / "published.csv"
    for header in (HEADER, HEADER.removesuffix(",counterpart")):
        file.write_text(f'{header}\nLlama-2-7B,CoMe,0.2,none,wikitext2,9.5,ppl@2048,"CoMe, table 2",\n')
        assert read_published(file) == [LINE]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("model,method\na,b\n", "expected the columns model, method, ratio, .* found no ratio, recovery"),
        (f"{HEADER}\nm,a,20%,none,piqa,70,acc,s,\n", "line 2: expected a number as ratio, found '20%'"),
        (f"{HEADER}\nm,a,0.2,none,piqa,,acc,s,\n", "line 2: expected something as value, found nothing"),
        (f"{HEADER}\nm,a,20,none,piqa,70,acc,s,\n", r"line 2: expected a ratio in \[0, 1\)"),
        (f"{HEADER}\nm,,0.2,none,piqa,70,acc,s,\n", "line 2: expected something as method, found nothing"),
        (
            f"{HEADER}\nm,a,0.2,none,piqa,70,acc,s,,taylor\n",
            "line 2: expected as counterpart METRIC x STRATEGY, .* 'taylor'",
        ),
        ("", "found no model, method"),
    ],
)
def test_a_line_that_is_none_is_named(content: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "published.csv"
    file.write_text(content)
    with pytest.raises(FlexiError, match=problem) as found:
        read_published(file)
    assert str(file) in str(found.value)


def test_the_page_is_written_into_the_studys_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "numbers.csv"
    file.write_text(f"{HEADER}\nLlama-2-7B,CoMe,0.2,none,wikitext2,9.5,ppl@2048,table 2,\n")
    records = [dense(), record("come", "concat-merge")]
    path, pairs = write_published(Plugins.load(), records, tmp_path, "a-study", file)
    assert path == tmp_path / "PUBLISHED.md"
    assert "| CoMe | wikitext2 ppl@2048 | 9.500 | 12.50 | come x concat-merge |" in path.read_text()
    assert [(p["published"], p["ours"]) for p in pairs] == [(9.5, 12.5)]
    monkeypatch.setattr("flexi_plugins.report.PUBLISHED", tmp_path / "none.csv")
    with pytest.raises(FlexiError, match=r"no published numbers in '.*none.csv'; give a file with the columns"):
        write_published(Plugins.load(), records, tmp_path, "a-study")


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the package is not used from its repository")
def test_the_projects_own_numbers_can_be_read() -> None:
    lines = read_published(PUBLISHED)
    assert lines
    assert len(set(lines)) == len(lines), "no number stands there twice"
    assert all(line.source for line in lines)
    accuracies = [line.value for line in lines if line.metric in ("acc", "acc_norm")]
    assert all(1 < value <= 100 for value in accuracies), "accuracies are in percent"
