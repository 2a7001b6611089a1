"""Leaderboard and pictures: what they say follows from the records alone."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import tomllib
import warnings
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from flexi_plugins import store
from flexi_plugins.data import BlockShape, Cell, Measurement, ModelShape, PluginVersion, PruningPlan, Record
from flexi_plugins.errors import FlexiError
from flexi_plugins.plugins import Plugins
from flexi_plugins.recovery.course import STOPPED
from flexi_plugins.report import publish, write_reports
from flexi_plugins.reports import curves, figures, methods, pareto, ranking
from flexi_plugins.reports.methods import Methods
from flexi_plugins.reports.pareto import Pareto
from flexi_plugins.reports.table import Csv, Markdown

SHAPE = ModelShape((BlockShape(9, 3, 64, 1536),) * 10, hidden=576, vocabulary=4096, tied=True)
PLUGIN = PluginVersion("metric", "come", "flexi-plugins", "0.1.0")
PERPLEXITY = "wikitext2_ppl@2048"


def record(
    metric, strategy, ratio=0.2, seed=0, perplexity=50.0, accuracy=0.4, options=None, recovery="none", **changes
):
    everywhere = {"calibration": {"windows": 64}, "evaluation": {"window": 2048}}
    text = json.dumps({**everywhere, **(options or {})}, sort_keys=True)
    cell = Cell("tiny", "f" * 64, "c" * 64, metric, strategy, ratio, recovery, seed, text, (PLUGIN,))
    measurements = (
        Measurement(PERPLEXITY, perplexity, False, 0.5),
        Measurement("boolq_choice_logprob", -0.6, True),
        Measurement("boolq_acc", accuracy, True, 0.02, 0.25),
        Measurement("stored_parameters", 1.0, False),
        Measurement("decode_tokens_per_second@b8", 123.4, True),
        Measurement("peak_memory_mib", 1500.0, False),
    )
    made = {
        "measurements": measurements,
        "plan": PruningPlan.keep(SHAPE, range(round(10 * (1 - ratio)))),
        "versions": {"torch": "2.13.0", "machine": "a CPU, 2 cores", "system": "Linux 6"},
        "commit": "0123456789abcdef",
        "date": "2025-01-02T03:04:05",
    }
    return Record(cell, **{"status": "complete", **made, **changes})


def dense(**changes):
    return record(None, None, 0.0, perplexity=31.8, accuracy=0.6, **changes)


RECORDS = [
    record("come", "remove-blocks", perplexity=60.0),
    record("saap", "remove-blocks", perplexity=44.25, accuracy=0.28),
    record("flexigpt", "remove-units", ratio=0.3, perplexity=90.0),
    record("come", "remove-units", status="failed", reason="perplexity is NaN |\nblock 7", measurements=(), plan=None),
    record(
        "saap", "share-lora", status="incompatible", reason="share-lora wants block scores", measurements=(), plan=None
    ),
    dense(),
]


def markdown(records):
    return Markdown().render(store.rows(records), "demo")


def table(page, heading):
    """Return the first table under a heading: one dictionary a row."""
    part = page.split(f"## {heading}\n", 1)[1].split("\n## ")[0]
    lines = [[c.strip() for c in line.strip("|").split(" | ")] for line in part.splitlines() if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


# ------------------------------------------------------------------------------------------- markdown


def test_each_ratio_is_ranked_by_itself_below_the_dense_model():
    page = markdown(RECORDS)
    first, second = table(page, "Quality at ratio 0.2"), table(page, "Quality at ratio 0.3")
    assert [(r["#"], r["metric"], r[PERPLEXITY]) for r in first] == [
        ("", "**dense**", "31.80 ± 0.500"),
        ("1", "saap", "44.25 ± 0.500"),
        ("2", "come", "60.00 ± 0.500"),
    ]
    assert [(r["#"], r["metric"]) for r in second] == [("", "**dense**"), ("1", "flexigpt")]


def test_accuracies_stand_beside_error_and_chance_and_are_marked_at_chance():
    rows = table(markdown(RECORDS), "Quality at ratio 0.2")
    assert [r["boolq_acc %"] for r in rows] == ["60.0 ± 2.0 (25)", "~28.0 ± 2.0 (25)", "40.0 ± 2.0 (25)"]
    assert "1 of 4 accuracies are not two standard errors above guessing" in markdown(RECORDS)


def test_cells_without_a_result_stand_at_the_end_with_their_reason():
    rows = table(markdown(RECORDS), "Without a result")
    assert [(r["metric"], r["strategy"], r["status"]) for r in rows] == [
        ("come", "remove-units", "failed"),
        ("saap", "share-lora", "incompatible"),
    ]
    assert rows[0]["reason"] == r"perplexity is NaN \| block 7"
    assert "2 of 6 cells have no result" in markdown(RECORDS)


def test_a_cell_without_a_result_says_what_it_is_of():
    """The unpruned model by its name, and two cells that differ in an option by that option."""
    without = {"status": "incompatible", "reason": "nothing to train", "measurements": (), "plan": None}
    unpruned = record(None, None, ratio=0.0, recovery="adapters", **without)
    merges = [record("come", "merge", options={"strategy": {"mode": m}}, **without) for m in "ab"]
    (first, *rest) = table(markdown([dense(), unpruned, *merges]), "Without a result")
    assert (first["metric"], first["strategy"], first["recovery"]) == ("**dense**", "", "adapters")
    assert [r["variant"] for r in rest] == ["mode=a", "mode=b"]


def test_several_seeds_become_mean_and_deviation():
    values = (50.0, 54.0, 61.0)
    seeds = [record("come", "remove-blocks", seed=s, perplexity=v) for s, v in enumerate(values)]
    lost = record("come", "remove-blocks", seed=3, status="failed", reason="killed", measurements=(), plan=None)
    page = markdown([dense(), *seeds, lost])
    (_, row) = table(page, "Quality at ratio 0.2")
    assert (row["seeds"], row[PERPLEXITY], row["boolq_acc %"]) == ("3", "55.00 ± 5.568", "40.0 ± 0.0 (25)")
    assert table(page, "Without a result")[0]["seed"] == "3"
    assert "one seed" not in page
    assert "one seed" in markdown(RECORDS)


def test_models_that_are_equal_stand_in_one_order():
    equal = [record("come", s, options={"strategy": {"mode": m}}) for s in ("remove-units", "merge") for m in "ba"]
    orders = [
        ranking.ranked(store.rows(given))[["strategy", "variant"]].values.tolist() for given in (equal, equal[::-1])
    ]
    assert orders[0] == orders[1] == [[s, f"mode={m}"] for s in ("merge", "remove-units") for m in "ab"]


def test_what_one_seed_gave_twice_is_not_taken_for_two_seeds():
    one = record("come", "remove-blocks", perplexity=50.0)
    other = replace(
        one, cell=replace(one.cell, fingerprint="e" * 64), measurements=(Measurement(PERPLEXITY, 60.0, False),)
    )
    second = record("come", "remove-blocks", perplexity=52.0, seed=1)
    frame = ranking.ranked(store.rows([one, other, second]))
    assert list(zip(frame["seeds"], frame[PERPLEXITY], strict=True)) == [("0 1", 51.0), ("0", 60.0)]


def test_options_tell_rows_apart_and_are_not_taken_for_seeds():
    def merged(**options):
        return record("come", "concat-merge", options={"strategy": options})

    page = markdown([dense(), merged(repeat=True, pairs="own"), merged(repeat=False, pairs="own")])
    rows = table(page, "Quality at ratio 0.2")[1:]
    assert sorted(r["variant"] for r in rows) == ["repeat=false", "repeat=true"]
    assert "- strategy concat-merge: pairs own" in page


def test_what_is_unusual_among_the_rows_of_a_strategy_is_said():
    """By whichever metric: a reader would else take what an option does for what the metric does."""
    made = [
        record(metric, "remove-blocks", options={"strategy": {"progressive": value, "blocks": None}})
        for metric, value in (("come", False), ("saap", False), ("greedy", True))
    ]
    page = markdown([dense(), *made])
    rows = {r["metric"]: r["variant"] for r in table(page, "Quality at ratio 0.2")[1:]}
    assert rows == {"come": "", "saap": "", "greedy": "progressive=true"}
    assert "- strategy remove-blocks: blocks null; where nothing else is said progressive false\n" in page


def test_methods_whose_options_set_the_size_stand_with_those_of_about_their_size():
    def sized(metric, blocks, perplexity):
        made = record(metric, "remove-blocks", ratio=0.0, perplexity=perplexity)
        return replace(made, plan=PruningPlan.keep(SHAPE, range(blocks)))

    page = markdown([dense(), sized("come", 8, 60.0), sized("saap", 8, 50.0), sized("come", 5, 900.0)])
    whole = SHAPE.parameters
    small, large = (round(1 - PruningPlan.keep(SHAPE, range(n)).stored_parameters / whole, 1) for n in (8, 5))
    rows = table(page, f"Quality at sizes that options set, about {small:g} gone")
    assert [(r["#"], r["metric"], r["ratio"]) for r in rows] == [
        ("", "**dense**", ""),
        ("1", "saap", ""),
        ("2", "come", ""),
    ]
    assert [r["#"] for r in table(page, f"Quality at sizes that options set, about {large:g} gone")] == ["", "1"]


def test_perplexities_are_known_by_a_word_of_their_names():
    names = [
        "wikitext2_ppl@2048",
        "ppl",
        "lambada_word_perplexity",
        "include_base_44_applied_science_acc",
        "supplies_acc",
    ]
    assert ranking.perplexities(names) == names[:3]


def trained(metric, strategy, perplexity, notes=(), facts=None, **options):
    curve = [{"tokens": 0, "held_out_loss": 3.0}, {"tokens": 64, "held_out_loss": 2.0}]
    said = {"method": "lora", "training": {"tokens": 64}, "notes": list(notes), "curve": curve, "facts": facts or {}}
    plan = replace(PruningPlan.keep(SHAPE, range(8)), origin={"recovery": said})
    text = {"recovery": {"rank": 8, **options}, "training": {"tokens": 64}}
    return record(metric, strategy, perplexity=perplexity, recovery="lora", options=text, plan=plan)


def test_training_stands_beside_what_was_there_before_it():
    plain = [record("come", "remove-units", perplexity=50.0), record("saap", "remove-blocks", perplexity=40.0)]
    page = markdown(
        [
            dense(),
            *plain,
            trained("come", "remove-units", 25.0),
            trained("saap", "remove-blocks", 42.0),
            trained("come", "concat-merge", 30.0),  # nothing to compare it with
        ]
    )
    rows = table(page, "Before and after recovery")
    assert [(r["metric"], r["recovery"], r["after / before"]) for r in rows] == [
        ("come", "lora", "0.500"),
        ("saap", "lora", "1.050"),
    ]
    assert rows[0][f"{PERPLEXITY} before"] == "50.00 ± 0.500"
    assert rows[0][f"{PERPLEXITY} after"] == "25.00 ± 0.500"
    assert "- Recovery lowers wikitext2_ppl@2048 in 1 of 2 cells." in page
    assert (
        "- Not in saap x remove-blocks x lora at 0.2: the training lowered the held-out loss on its own text, and what is "
        "measured is other text; trained by lora on 64 tokens: held-out loss 3.0000 -> 2.0000 nats a token." in page
    )
    assert "Before and after" not in markdown(RECORDS)


BEGUN = [{"tokens": 0, "held_out_loss": 3.0}]
REASONS = {  # case -> facts, notes, what the curve goes on with, reason
    "kept its start": (
        {"kept_tokens": 0},
        [],
        [{"tokens": 64, "held_out_loss": 3.5}],
        "the held-out loss of the training did",
    ),
    "kept the last": (
        {},
        [],
        [{"tokens": 64, "held_out_loss": 3.5}],
        "the held-out loss of the training did not fall either; ",
    ),
    "the last of two kept its start": (
        {"kept_tokens": 64, "tokens_before_last": 64, "trainings": 2},
        [],
        [{"tokens": 64, "held_out_loss": 2.0}, {"tokens": 96, "held_out_loss": 2.5}],
        "the held-out loss of the training did not fall either; ",
    ),
    "stopped": (
        {},
        [f"lora: {STOPPED} 32 of 64 tokens"],
        [{"tokens": 64, "held_out_loss": 2.0}],
        "the training was stopped; ",
    ),
    "fell": (
        {},
        [],
        [{"tokens": 64, "held_out_loss": 2.0}],
        "the training lowered the held-out loss on its own text, and ",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_recovery_that_helps_nothing_says_what_it_knows_of_why(case):
    facts, notes, more, reason = REASONS[case]
    plain, after = record("come", "remove-units", perplexity=40.0), trained("come", "remove-units", 42.0, notes, facts)
    after.plan.origin["recovery"]["curve"] = [*BEGUN, *more]
    assert f"- Not in come x remove-units x lora at 0.2: {reason}" in markdown([dense(), plain, after])


def test_of_what_was_not_trained_or_trained_apart_it_says_that():
    plain, after = record("come", "remove-units", perplexity=40.0), trained("come", "remove-units", 42.0)
    said = after.plan.origin["recovery"]
    said["curve"] = [{"tokens": 0, "held_out_block_loss": 2.0}, {"tokens": 64, "held_out_block_loss": 1.5}]
    said["facts"] = {"kept_tokens": 0, "kept_held_out_block_loss": 1.0}  # one of several groups kept its start
    assert "lora at 0.2: the training lowered the loss that it has, between blocks' states" in markdown([plain, after])
    said["facts"] = {"kept_tokens": 0, "kept_held_out_block_loss": 2.0}
    assert "lora at 0.2: the held-out loss of the training did not fall either" in markdown([plain, after])
    said["curve"] = []
    assert (
        "lora at 0.2: the method notes no training, so that all that differs is what it did to the weights"
        in markdown([plain, after])
    )


@pytest.mark.parametrize(("trained_tokens", "named"), [(64, False), (60, False), (48, True), (32, True)])
def test_a_budget_that_was_not_used_is_named_but_for_what_fills_no_window(trained_tokens, named):
    after = trained("come", "remove-units", 45.0, facts={"trained_tokens": trained_tokens})
    after.plan.origin["recovery"]["training"] = {"tokens": 70, "length": 16}
    page = markdown([dense(), record("come", "remove-units", perplexity=50.0), after])
    told = f"was not trained as it was to be: {trained_tokens} of 64 tokens"
    assert (told in page) == named


def test_why_a_training_helped_nothing_is_in_no_row_of_one_that_helped():
    rows = store.rows([dense(), record("come", "remove-units", perplexity=50.0), trained("come", "remove-units", 25.0)])
    assert "recovery_reason" not in Csv().render(rows, "demo").splitlines()[0]


def test_a_training_that_was_stopped_is_named_although_it_helped():
    plain = record("come", "remove-units", perplexity=50.0)
    note = f"lora: {STOPPED} 32 of 64 tokens, where the training loss was not finite"
    page = markdown([dense(), plain, trained("come", "remove-units", 45.0, [note], {"trained_tokens": 32})])
    assert f"- **Note:** come x remove-units x lora at 0.2 was not trained as it was to be: {note}" in page
    assert "fewer tokens" not in markdown([dense(), plain, trained("come", "remove-units", 45.0)])


def test_a_curve_is_drawn_point_by_point_and_named_by_its_cell(monkeypatch):
    made = [
        record("come", "remove-units"),
        trained("come", "remove-units", 25.0),
        trained("saap", "remove-blocks", 42.0),
    ]
    made[2].plan.origin["recovery"]["curve"][1]["held_out_loss"] = 2.5
    drawn = []
    monkeypatch.setattr(figures, "svg", lambda figure: drawn.append(figure) or "")
    curves.Curves().render(store.rows([dense(), *made]), "demo")
    [figure] = drawn
    [axes] = figure.axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines == {
        "come x remove-units x lora": ([0, 64], [3.0, 2.0]),
        "saap x remove-blocks x lora": ([0, 64], [3.0, 2.5]),
    }
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 2
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["saap x remove-blocks x lora", "come x remove-units x lora"], "in the order of the lines' ends"
    ranks = [trained("come", "remove-units", 25.0, rank=rank) for rank in (4, 8)]
    again = replace(ranks[0], cell=replace(ranks[0].cell, seed=1))
    curves.Curves().render(store.rows([dense(), *ranks, again]), "demo")
    names = {line.get_label() for line in drawn[1].axes[0].lines}
    expected = ("rank=4 x lora, seed 0", "rank=4 x lora, seed 1", "rank=8 x lora")
    assert names == {f"come x remove-units x {told}" for told in expected}


def test_seeds_that_were_not_all_trained_are_named():
    seeds = [record("come", "remove-units", perplexity=50.0, seed=s) for s in (0, 1)]
    page = markdown([*seeds, trained("come", "remove-units", 25.0)])
    assert "- come x remove-units x lora at 0.2: before is the mean of seeds 0 1, after of 0." in page


def test_what_quantised_weights_take_stands_beside_them():
    quantised = trained("come", "remove-units", 25.0, facts={"bits_per_weight": 4.5, "stored_bytes": 3 * 2**20})
    rows = table(markdown([record("come", "remove-units"), quantised]), "Quality at ratio 0.2")
    assert [(r["bits a weight"], r["packed MiB"]) for r in rows] == [("4.500", "3.000"), ("–", "–")]


def test_where_models_were_recovered_the_others_are_hollow():
    points = [ranked_row(30.0), {**ranked_row(20.0), "recovery": "lora"}]
    figure = pareto._figure([{**p, "x": 1.0, "y": 1.0 + i} for i, p in enumerate(points)], PERPLEXITY, "demo")
    (axes,) = figure.axes
    assert sorted(len(marks.get_facecolor()) for marks in axes.collections) == [0, 1]
    assert {"recovered", "as pruned"} <= {text.get_text() for text in figure.legends[0].get_texts()}


def test_what_belongs_to_training_tells_no_untrained_method_apart():
    one, other = trained("come", "remove-units", 25.0, rank=4), trained("come", "remove-units", 26.0, rank=16)
    page = markdown([record("come", "remove-units"), one, other])
    rows = table(page, "Quality at ratio 0.2")
    assert [(r["recovery"], r["variant"]) for r in rows] == [("lora", "rank=4"), ("lora", "rank=16"), ("none", "")]


def test_the_head_says_where_the_numbers_come_from():
    page = markdown(RECORDS)
    for line in (
        "- model: tiny (ffffffffffff)",
        "- date: 2025-01-02",
        "- machine: a CPU, 2 cores; Linux 6",
        "- versions: torch 2.13.0",
        "- code: commit 0123456789ab",
        "- corpus: cccccccccccc",
        "- seeds: 0",
        "- calibration: windows 64",
        "- evaluation: window 2048",
    ):
        assert f"\n{line}\n" in page
    assert "differ in" not in page


def test_records_of_different_origin_are_pointed_out():
    page = markdown([dense(), record("come", "remove-blocks", versions={"torch": "2.14"}, commit="fed", dirty=True)])
    assert "the records differ in torch, commit" in page
    assert "changes that are not committed" in page


def test_sizes_come_from_the_plan_and_speeds_from_measurements():
    rows = table(markdown(RECORDS), "Size and speed")
    assert RECORDS[0].plan is not None
    assert rows[1]["stored M"] == f"{RECORDS[0].plan.stored_parameters / 1e6:.2f}"
    assert (rows[1]["decode tok/s b8"], rows[1]["peak memory MiB"]) == ("123.4", "1,500")


def test_many_measurements_go_into_several_tables():
    many = tuple(Measurement(f"task{i}_acc", 0.5, True, 0.01, 0.25) for i in range(14))
    page = markdown([dense(), replace(RECORDS[0], measurements=(*RECORDS[0].measurements, *many))])
    part = page.split("## Quality at ratio 0.2")[1].split("\n## ")[0]
    headers = [line for line in part.splitlines() if line.startswith("| #")]
    assert len(headers) == 3
    assert sum(line.count("task") for line in headers) == 14
    assert "–" in part, "what was not measured is a dash"


def test_the_average_stands_beside_the_perplexity():
    average = Measurement("average_acc", 0.41, True, 0.01, 0.3)
    page = markdown([replace(r, measurements=(*r.measurements, average)) for r in (dense(), RECORDS[0])])
    row = table(page, "Quality at ratio 0.2")[1]
    assert row["average_acc %"] == "41.0 ± 1.0 (30)"
    names = list(row)
    assert names.index("average_acc %") == names.index(PERPLEXITY) + 1


@pytest.mark.parametrize("records", [[], [RECORDS[3]], [dense()]])
def test_little_is_rendered_without_complaint(records):
    rows = store.rows(records)
    assert Markdown().render(rows, "demo").startswith("# demo\n")
    assert Csv().render(rows, "demo").startswith("rank,")
    for picture in (Pareto(), Methods()):
        ElementTree.fromstring(picture.render(rows, "demo"))


def test_without_perplexity_the_choice_decides():
    def chosen(made, *values):
        tasks = tuple(Measurement(f"t{i}_choice_logprob", v, True) for i, v in enumerate(values))
        return replace(made, measurements=tasks)

    come, saap = record("come", "remove-blocks"), record("saap", "remove-blocks")
    records = [chosen(dense(), -0.1, -0.1), chosen(come, -1.0, -0.9), chosen(saap, -1.2, -0.2)]
    rows = table(markdown(records), "Quality at ratio 0.2")
    assert [r["metric"] for r in rows[1:]] == ["saap", "come"]


# ------------------------------------------------------------------------------------------------ csv


def test_csv_holds_every_number_in_full():
    seeds = [record("come", "remove-units", seed=s, perplexity=100 / 3 + s) for s in range(2)]
    rows = list(csv.DictReader(io.StringIO(Csv().render(store.rows([*RECORDS, *seeds]), "demo"))))
    (row,) = (r for r in rows if r["seeds"] == "0 1")
    assert (row["rank"], float(row[PERPLEXITY])) == ("1", 100 / 3 + 0.5)
    assert math.isclose(float(row[f"{PERPLEXITY}_sd"]), math.sqrt(0.5))
    assert float(row["boolq_acc_chance"]) == 0.25
    assert [r["status"] for r in rows[-2:]] == ["failed", "incompatible"]


# -------------------------------------------------------------------------------------------- picture


@pytest.mark.parametrize("picture", [Pareto(), Methods()], ids=["pareto", "methods"])
def test_the_picture_is_deterministic(picture):
    rows, reverse = store.rows(RECORDS), store.rows(RECORDS[::-1])
    assert picture.render(rows, "demo") == picture.render(reverse, "demo")


def test_the_picture_has_a_mark_for_each_finished_cell_and_names_for_all():
    svg = Pareto().render(store.rows(RECORDS), "demo")
    root = ElementTree.fromstring(svg)
    marks = [g for g in root.iter("{http://www.w3.org/2000/svg}g") if g.get("id", "").startswith("PathCollection")]
    assert len(marks) == 4
    for text in ("demo", "dense", "come", "saap", "flexigpt", "remove-blocks", "remove-units", "frontier"):
        assert f"<!-- {text} -->" in svg
    assert "share-lora" not in svg
    assert "dc:date" not in svg


def test_no_two_methods_of_the_largest_recipe_look_alike():
    recipe = Path(__file__).parents[1] / "baselines" / "recipes" / "smollm2-135m.toml"
    study = tomllib.loads(recipe.read_text(encoding="utf-8"))
    pairs = [*study["pairs"], *({"metric": m, "strategy": s} for m in study["metrics"] for s in study["strategies"])]
    rows = [{k: v["name"] if isinstance(v, dict) else v for k, v in pair.items()} for pair in pairs]
    for axis, choices in (("metric", figures.COLOURS), ("strategy", figures.MARKERS)):
        look = figures.assigned([row[axis] for row in rows], choices)
        assert len(set(look.values())) == len(look)


def test_the_picture_leaves_global_settings_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for picture in (Pareto(), Methods()):
            picture.render(store.rows(RECORDS), "demo")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("values", [(30.0, 31.0), (30.0, 400.0), (30.0, 9e5), (30.0, 30.0), (5.0, 1e12)])
def test_the_perplexity_axis_has_readable_ticks(values):
    points = [{**ranked_row(v), "x": 1.0 + i, "y": v} for i, v in enumerate(values)]
    figure = pareto._figure(points, PERPLEXITY, "demo")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert 1 <= sum(low <= t <= high for t in axes.get_yticks()) <= 14


@pytest.mark.parametrize(("values", "beyond"), [((30.0, 2900.0), 0), ((30.0, 3100.0, 1e9), 2)])
def test_models_that_broke_down_stand_on_the_edge_of_the_scale_and_the_picture_says_so(values, beyond):
    points = [{**ranked_row(v), "x": 1.0 + i, "y": v} for i, v in enumerate(values)]
    figure = pareto._figure(points, PERPLEXITY, "demo")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_ylim()[1] < 10_000
    assert [text.get_text() for text in axes.texts] == ([f"above 3,000: {beyond} of the models"] if beyond else [])
    marks = [float(y) for collection in axes.collections for _, y in collection.get_offsets()]
    assert sorted(marks) == [min(v, 3000.0) for v in values]


def test_several_seeds_are_one_mark_of_the_picture():
    rows = store.rows([record("come", "remove-units", seed=s, perplexity=40.0 + 20 * s) for s in (0, 1)])
    (point,) = pareto._points(rows, PERPLEXITY)
    assert point["y"] == 50.0


def test_the_legend_of_many_methods_is_not_cut_off():
    made = [record(f"metric-{i}", f"strategy-{i % 13}", perplexity=40.0 + i) for i in range(40)]
    figure = pareto._figure(pareto._points(store.rows(made), PERPLEXITY), PERPLEXITY, "demo")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_window_extent().y0 >= 0
    assert len(legend.get_texts()) == 40 + 13 + 2, "every metric and strategy, and two headings"


def dots(records):
    """Return the picture of methods: its axes, and the labels of its lines from top to bottom."""
    rows = store.rows(records)
    figure = methods._figure(ranking.methods(rows), methods._panels(ranking.measured(rows)), "demo")
    figure.draw_without_rendering()
    first = figure.axes[0]
    assert first.get_ylim()[0] > first.get_ylim()[1], "the first line is on top"
    return figure, [label.get_text() for label in first.get_yticklabels()]


def places(axes):
    """Return the marks of a panel from left to right: value, line."""
    return sorted((float(x), int(y)) for marks in axes.collections for x, y in marks.get_offsets())


def test_every_method_has_a_line_and_every_ratio_a_mark():
    figure, labels = dots([*RECORDS, record("come", "remove-blocks", ratio=0.3, perplexity=120.0)])
    assert labels == ["dense", "flexigpt × remove-units", "saap × remove-blocks", "come × remove-blocks"]
    perplexity, choice = figure.axes
    assert places(perplexity) == [(31.8, 0), (44.25, 2), (60.0, 3), (90.0, 1), (120.0, 3)]
    assert [x for x, _ in places(choice)] == [0.6] * 5
    texts = {text.get_text() for text in figure.legends[0].get_texts()}
    assert texts == {"dense", "ratio 0.2", "ratio 0.3"}


def test_methods_stand_by_their_mean_rank():
    perplexities = {"a": (40.0, 80.0, 900.0), "b": (41.0, 60.0, 100.0), "c": (50.0, 70.0, 200.0)}
    ratios = (0.1, 0.2, 0.3)
    made = [
        record(m, "cut", r, perplexity=p) for m, ps in perplexities.items() for r, p in zip(ratios, ps, strict=True)
    ]
    _, labels = dots(made)
    assert labels == ["b × cut", "a × cut", "c × cut"], "mean ranks 4/3, 7/3 and 7/3"


def test_a_line_says_what_tells_it_from_others_and_no_more():
    options = [{"strategy": {"bias": bias}} for bias in (True, False)]
    made = [record("flap", "flap", options=o, perplexity=40.0 + i) for i, o in enumerate(options)]
    _, labels = dots([*made, record("none", "laco", perplexity=50.0), record("come", "laco", perplexity=60.0)])
    assert labels == ["flap, bias=true", "flap, bias=false", "laco", "come × laco"]


def test_before_and_after_recovery_stand_on_one_line():
    before = [record("come", "remove-units", perplexity=50.0), dense()]
    figure, labels = dots([*before, trained("come", "remove-units", 25.0)])
    assert labels == ["dense", "come × remove-units"]
    assert places(figure.axes[0]) == [(25.0, 1), (31.8, 0), (50.0, 1)]
    hollow = {float(m.get_offsets()[0][0]): not len(m.get_facecolor()) for m in figure.axes[0].collections}
    assert hollow == {25.0: False, 31.8: True, 50.0: True}
    assert {"as pruned", "lora"} <= {text.get_text() for text in figure.legends[0].get_texts()}


def test_broken_models_stand_on_the_edge_of_the_picture_of_methods():
    figure, _ = dots([dense(), record("a", "cut", perplexity=1e9), record("b", "cut", perplexity=math.inf)])
    assert [x for x, _ in places(figure.axes[0])] == [31.8, 3180.0, 3180.0]
    assert [text.get_text() for text in figure.axes[0].texts] == ["above 3,180: 2"]


def test_a_study_whose_models_all_broke_down_is_drawn_by_its_tasks():
    figure, _ = dots([record("a", "cut", perplexity=math.inf), record("b", "cut", perplexity=math.inf)])
    (axes,) = figure.axes
    assert axes.get_xlabel().startswith("−boolq_choice_logprob")


def test_a_study_without_perplexity_is_drawn_by_its_tasks_alone():
    tasks = (Measurement("t1_choice_logprob", -0.5, True), Measurement("t2_choice_logprob", -1.5, True))
    figure, _ = dots([replace(record("come", "cut"), measurements=tasks)])
    (axes,) = figure.axes
    assert places(axes) == [(1.0, 0)]
    assert axes.get_xlabel().startswith("−choice_logprob of 2 tasks")


def ranked_row(value):
    return store.rows([record("come", "remove-blocks", perplexity=value)]).iloc[0].to_dict()


def test_the_frontier_is_what_nothing_else_beats():
    points = [(1.0, 9.0), (2.0, 5.0), (2.0, 4.0), (3.0, 4.0), (3.5, 7.0), (4.0, 1.0), (1.0, 9.0)]
    assert pareto.frontier(points) == [(1.0, 9.0), (2.0, 4.0), (4.0, 1.0)]


# ------------------------------------------------------------------------------------------- contract


def test_the_formats_are_plugins():
    loaded = Plugins.load(tuple(f"flexi_plugins.reports.{name}" for name in ("table", "methods", "pareto")))
    files = {name: entry.object.filename for name, entry in loaded.entries("report").items()}
    assert files == {
        "csv": "LEADERBOARD.csv",
        "markdown": "LEADERBOARD.md",
        "methods": "methods.svg",
        "pareto": "pareto.svg",
    }


def with_measurements(metric, *measurements):
    return record(metric, "remove-blocks", measurements=measurements) if metric else dense(measurements=measurements)


@pytest.mark.parametrize(
    ("name", "higher", "values", "order", "by"),
    [
        ("gsm8k_exact_match", True, (0.05, 0.45, 0.25), ["saap", "come", "greedy"], "gsm8k_exact_match"),
        ("my_loss", False, (0.45, 0.05, 0.25), ["saap", "come", "greedy"], "my_loss"),
        ("rte_acc", True, (0.05, 0.45, 0.25), ["saap", "come", "greedy"], "rte_acc"),
        ("tokens_per_second@b8", True, (1.0, 3.0, 2.0), ["come", "greedy", "saap"], None),
    ],
)
def test_without_perplexity_and_choices_methods_are_ranked_by_what_there_is(name, higher, values, order, by):
    made = [
        with_measurements(metric, Measurement(name, value, higher))
        for metric, value in zip(("greedy", "saap", "come"), values, strict=True)
    ]
    rows = store.rows([with_measurements(None, Measurement(name, 1.0, higher)), *made])
    found = [r for r in ranking.ranked(rows).to_dict("records") if r["strategy"] == "remove-blocks"]
    assert [r["metric"] for r in found] == order
    assert [number for r in found if not math.isnan(number := r["rank"])] == ([1, 2, 3] if by else [])
    assert (f"Rank: within one ratio, by {by}." in Markdown().render(rows, "demo")) == (by is not None)


def test_several_accuracies_rank_by_their_mean():
    made = [
        with_measurements(metric, Measurement("rte_acc", a, True), Measurement("wic_acc", b, True))
        for metric, a, b in (("saap", 0.5, 0.5), ("come", 0.4, 0.9))
    ]
    page = markdown([dense(), *made])
    assert [r["metric"] for r in table(page, "Quality at ratio 0.2")][1:] == ["come", "saap"]
    alone = markdown(made)
    assert "Rank: within one ratio, by the mean of all accuracies." in alone


def test_models_of_one_seed_that_were_trained_on_other_texts_are_noted():
    def trained(metric, text, seed=0):
        return record(metric, "remove-blocks", seed=seed, recovery="lora", options={"training": {"text": text}})

    note = "models of one seed were trained on 2 different texts or selections of text"
    assert note in markdown([dense(), trained("come", "a"), trained("saap", "b")])
    assert "different texts" not in markdown([dense(), trained("come", "a"), trained("come", "b", seed=1)])


def test_a_gpu_that_some_records_name_makes_them_differ():
    here, there = record("come", "remove-blocks"), record("saap", "remove-blocks")
    there = replace(there, versions={**there.versions, "gpu": "H200"})
    page = markdown([dense(), here, there])
    assert re.search(r"^- machine: .*no GPU; H200", page, re.MULTILINE)
    assert "the records differ in gpu" in page
    assert "differ in" not in markdown([dense(), here])


def test_names_are_sorted_into_kinds():
    names = ["python-docs_ppl@512", "boolq_acc", "arc_acc_norm", "average_acc", "arc_choice_logprob", "peak_memory_mib"]
    assert ranking.perplexities(names) == names[:1]
    assert ranking.accuracies(names) == names[1:4]
    assert ranking.averages(names) == names[3:4]
    assert ranking.choices(names) == names[4:5]
    assert ranking.speeds(names) == names[5:]


# ---------------------------------------------------------------------------------------- publishing


def test_a_study_is_not_published_to_its_own_folder(tmp_path):
    folder, link = tmp_path / "study", tmp_path / "link"
    opened = store.Store(folder)
    for one in (dense(), record("come", "remove-blocks")):
        opened.write(one, {"tasks": [{"document": "a", "right": True, "task": "boolq"}]})
    link.symlink_to(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert len(list((folder / "documents").iterdir())) == 2
    for target in (folder, link, folder / ".." / "study"):
        with pytest.raises(FlexiError, match=r"publish: expected another folder than .* name a new folder") as error:
            publish(Plugins.load(), folder, target)
        assert f"found {target}, which is {folder}" in str(error.value)
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    other = tmp_path / "other"
    store.Store(other).select([])
    with pytest.raises(FlexiError, match=r"other is the folder of a study that ran there, whose records would be lost"):
        publish(Plugins.load(), folder, other)
    assert publish(Plugins.load(), folder, tmp_path / "published")
    assert len(list((tmp_path / "published" / "records").iterdir())) == 2


def test_a_page_of_an_unfinished_study_says_so(tmp_path):
    opened = store.Store(tmp_path / "run")
    made = [dense(), record("come", "remove-blocks"), record("saap", "remove-blocks", status="failed", reason="x")]
    later = record("flexigpt", "remove-blocks")
    opened.select(r.cell for r in (*made, later))
    for one in made:
        opened.write(one)
    assert opened.unfinished() == [opened.path(later.cell).stem]
    pages = [
        write_reports(Plugins.load(), opened.records(), tmp_path / "run", "run", len(opened.unfinished())),
        publish(Plugins.load(), tmp_path / "run", tmp_path / "published"),
    ]
    for missing, files in zip((1, 2), pages, strict=True):  # what failed is not published
        text = next(f for f in files if f.name == "LEADERBOARD.md").read_text()
        assert f"**Note:** {missing} cells of the study have no finished record yet, and do not stand here" in text
    opened.write(later)
    assert "no finished record yet" not in markdown(opened.records())
