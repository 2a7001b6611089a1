"""Methods on the same documents: differences, which of them are told apart, and the page."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_reports import PERPLEXITY, dense, record, table

from flexi_plugins import store
from flexi_plugins.data import Measurement
from flexi_plugins.errors import FlexiError
from flexi_plugins.report import write_paired
from flexi_plugins.reports import paired
from flexi_plugins.reports.ranking import is_dense
from flexi_plugins.store import Store

WINDOWS, DOCUMENTS = 60, 40
HARD = np.random.default_rng(0).normal(3.5, 0.8, WINDOWS)  # what all models find hard
TASKS = ("boolq", "piqa")


def losses(shift, seed=1):
    return HARD + shift + np.random.default_rng(seed).normal(0, 0.02, WINDOWS)


def documents(nll=(), right=()):
    windows = [
        {"evaluator": "perplexity", "corpus": "wikitext2", "window": i, "tokens": 2048, "nll": v}
        for i, v in enumerate(nll)
    ]
    answers = [
        {"evaluator": "lm-eval", "task": task, "doc_id": i, "acc": float(v), "choice_logprob": v - 1.0}
        for task in TASKS[: 1 + (len(right) > 1)]
        for i, v in enumerate(right)
    ]
    return pd.DataFrame([*windows, *answers])


def metrics(found):
    return [None if is_dense(p.row) else p.row["metric"] for p in found]


def measured(made, nll):
    numbers = [Measurement(f"{t}_{m}", 0.5, True) for t in TASKS for m in ("acc", "choice_logprob")]
    return replace(made, measurements=(Measurement(PERPLEXITY, math.exp(np.mean(nll)), False), *numbers))


def pairs(*made, reference=paired.BEST):
    """Return the pairs of (record, nll a window, right a document)."""
    records = [measured(r, nll) for r, nll, _ in made]
    outcomes = {Store(".").path(r.cell).stem: documents(nll, right) for r, nll, right in made}
    return paired.pairs_of(store.rows(records), outcomes.__getitem__, reference)


RIGHT = np.arange(DOCUMENTS) % 2
BETTER = np.where(np.arange(DOCUMENTS) < 8, 1, RIGHT)
MADE = [
    (dense(), losses(-0.5), BETTER),
    (record("come", "remove-blocks"), losses(0.03, 2), RIGHT),
    (record("saap", "remove-blocks"), losses(0.0, 3), RIGHT),
]


def test_the_difference_is_taken_document_by_document():
    unpruned, come = pairs(*MADE)
    assert metrics([unpruned, come]) == [None, "come"]
    assert come.reference["metric"] == "saap"
    found, values = come.differences[PERPLEXITY], MADE[1][1] - MADE[2][1]
    assert found.mean == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std(ddof=1) / math.sqrt(WINDOWS))
    assert found.p == pytest.approx(stats.ttest_rel(MADE[1][1], MADE[2][1]).pvalue)
    assert found.documents == WINDOWS
    assert PERPLEXITY in come.apart, "although the windows differ twenty times as much from each other"
    assert stats.ttest_ind(MADE[1][1], MADE[2][1]).pvalue > 0.5
    assert unpruned.differences["boolq_acc"].mean == pytest.approx((BETTER - RIGHT).mean())


def test_perplexities_stand_as_their_ratio():
    row = table(paired.render(pairs(*MADE), "demo"), "At ratio 0.2, beside saap x remove-blocks")[1]
    times = math.exp(MADE[1][1].mean() - MADE[2][1].mean())
    assert row[PERPLEXITY].startswith(f"×{times:.3f} ± ")
    assert row["boolq_acc %"] == "same"


def test_the_perplexity_of_a_task_is_made_of_log_likelihoods():
    """lm-eval's lambada: a document's number is a log-likelihood, and perplexity falls where it rises."""
    name = "lambada_openai_perplexity"
    rows = pd.DataFrame(
        [{"task": "lambada_openai", "doc_id": i, "perplexity": -v} for i, v in enumerate((1.0, 2.0, 4.0))]
    )
    assert paired.scores_of(rows, [name])[name].tolist() == [1.0, 2.0, 4.0]
    for evaluator, expected in (("lm-eval-0a1b2c", [1.0, 2.0, 4.0]), ("mine", [-1.0, -2.0, -4.0])):
        assert paired.scores_of(rows.assign(evaluator=evaluator), [name])[name].tolist() == expected


def test_what_is_not_told_apart_is_marked():
    near = (record("flexigpt", "remove-blocks"), losses(0.0, 4), 1 - RIGHT)
    page = paired.render(pairs(MADE[2], near), "demo")
    [row] = table(
        page,
        "At ratio 0.2, beside " + ("flexigpt" if near[1].mean() < MADE[2][1].mean() else "saap") + " x remove-blocks",
    )
    assert row[PERPLEXITY].startswith("=×1.00") or row[PERPLEXITY].startswith("=×0.99")
    assert row["boolq_acc %"].startswith("=+0.0 ± ")


def test_of_many_equal_methods_none_is_told_apart():
    """Of sixty, single tests would tell three apart."""
    many = [
        (record("come", "remove-blocks", options={"metric": {"n": n}}), losses(0.0, n), RIGHT) for n in range(2, 62)
    ]
    found = pairs(*many, (record("saap", "remove-blocks"), losses(-0.001, 99), RIGHT), reference="saap-remove-blocks")
    assert len(found) == 60
    assert sum(p.differences[PERPLEXITY].p < 0.05 for p in found) > 0
    assert not any(p.apart for p in found)


def test_tasks_together_weigh_the_same():
    unpruned, _ = pairs(*MADE)
    single = [unpruned.differences[f"{task}_choice_logprob"] for task in TASKS]
    both = unpruned.differences["tasks_choice_logprob"]
    assert both.mean == pytest.approx(np.mean([d.mean for d in single]))
    assert both.error == pytest.approx(math.sqrt(sum(d.error**2 for d in single)) / 2)
    assert both.p == pytest.approx(2 * stats.norm.sf(both.mean / both.error))
    assert both.documents == 2 * DOCUMENTS


def test_seeds_are_their_mean_on_each_document():
    seeds = [(record("come", "remove-blocks", seed=s), losses(0.03, 2 + s), RIGHT) for s in range(3)]
    (found,) = pairs(*seeds, MADE[2])
    mean = np.mean([nll for _, nll, _ in seeds], axis=0)
    assert found.row["seeds"] == "0 1 2"
    assert found.differences[PERPLEXITY].mean == pytest.approx((mean - MADE[2][1]).mean())
    assert found.differences[PERPLEXITY].p == pytest.approx(stats.ttest_rel(mean, MADE[2][1]).pvalue)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [("dense", ["saap", "come"]), ("come-remove-blocks", [None, "saap"]), ("best", [None, "come"])],
)
def test_the_reference_can_be_chosen(reference, expected):
    assert metrics(pairs(*MADE, reference=reference)) == expected


def test_an_unknown_reference_names_what_there_is():
    with pytest.raises(
        FlexiError, match="called 'x'; expected 'best', 'dense' or one of come-remove-blocks, saap-remove"
    ):
        pairs(*MADE, reference="x")


def test_each_ratio_has_its_own_reference():
    more = [
        (record("come", "remove-blocks", ratio=0.3), losses(0.5, 5), RIGHT),
        (record("saap", "remove-blocks", ratio=0.3), losses(0.6, 6), RIGHT),
    ]
    found = pairs(*MADE, *more)
    assert metrics(found) == [None, "come", None, "saap"]
    assert [(p.row["ratio"], p.reference["metric"]) for p in found] == [
        (0.0, "saap"),
        (0.2, "saap"),
        (0.0, "come"),
        (0.3, "come"),
    ]
    page = paired.render(pairs(*MADE, *more), "demo")
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## At ratio 0.2, beside saap x remove-blocks",
        "## At ratio 0.3, beside come x remove-blocks",
    ]


def test_sizes_that_options_set_have_one_table_whatever_the_reference():
    extended = [
        (record("none", "extend", ratio=0.0, options={"strategy": {"order": order}}), losses(0.1, n), RIGHT)
        for n, order in enumerate(("block", "sequential"))
    ]
    trained = (replace(dense(), cell=replace(dense().cell, recovery="lora")), losses(-0.6, 8), RIGHT)
    for reference, count in (("best", 3), ("dense", 3)):
        page = paired.render(pairs(MADE[0], trained, *extended, reference=reference), "demo")
        [heading] = [line for line in page.splitlines() if line.startswith("## ")]
        assert heading.startswith("## At sizes that options set, beside ")
        assert len(table(page, heading.removeprefix("## "))) == count


def test_a_trained_dense_model_stands_in_the_table_of_each_ratio():
    trained = (replace(dense(), cell=replace(dense().cell, recovery="lora")), losses(-0.6, 8), RIGHT)
    more = (record("come", "remove-blocks", ratio=0.3), losses(0.5, 5), RIGHT)
    page = paired.render(pairs(*MADE, trained, more, reference="dense"), "demo")
    counts = [len(table(page, f"At ratio {ratio}, beside the dense model")) for ratio in (0.2, 0.3)]
    assert counts == [3, 2]


def test_documents_of_other_shapes_are_left_alone():
    foreign = pd.DataFrame([{"nll": 1.0, "task": "boolq", "acc": 1.0}])
    assert paired.scores_of(foreign, ["boolq_acc"]) == {}
    rolling = pd.DataFrame([{"task": "wikitext", "doc_id": i, "word_perplexity": [-9.0, 4]} for i in range(3)])
    assert paired.scores_of(rolling, ["wikitext_word_perplexity"]) == {}
    words = pd.DataFrame([{"task": "boolq", "doc_id": i, "acc": v} for i, v in enumerate(("yes", "1", "0"))])
    assert list(paired.scores_of(words, ["boolq_acc"])["boolq_acc"]) == [1.0, 0.0]


def test_filters_of_a_task_are_measurements_of_their_own():
    rows = [
        {"task": "gsm8k", "doc_id": i, "filter": f, "exact_match": v}
        for i in range(3)
        for f, v in (("strict", 0.0), ("flexible", 1.0))
    ]
    found = paired.scores_of(pd.DataFrame(rows), ["gsm8k_exact_match_strict", "gsm8k_exact_match_flexible"])
    assert {name: list(values) for name, values in found.items()} == {
        "gsm8k_exact_match_flexible": [1.0] * 3,
        "gsm8k_exact_match_strict": [0.0] * 3,
    }


def test_a_difference_of_one_document_has_no_error():
    found = paired.difference(pd.Series([2.0], index=[7]), pd.Series([1.5, 9.0], index=[7, 8]))
    assert (found.mean, found.documents) == (0.5, 1)
    assert math.isnan(found.p)
    assert math.isnan(found.error)


def test_without_documents_there_is_no_page(tmp_path):
    store_, records = Store(tmp_path), [r for r, _, _ in MADE]
    for made in records:
        store_.write(made)
    assert write_paired(store_, records, tmp_path, "demo") == (None, [])
    assert not (tmp_path / "PAIRED.md").exists()
    made = [measured(r, nll) for r, nll, _ in MADE]
    for one, (_, nll, right) in zip(made, MADE, strict=True):
        store_.write(one, {"all": documents(nll, right).drop(columns="evaluator").to_dict("records")})
    with pytest.raises(FlexiError, match="no outcomes of documents of 'dense' and another method"):
        write_paired(Store(tmp_path / "empty"), made, tmp_path, "demo", "dense")
    path, found = write_paired(store_, made, tmp_path, "demo", "dense")
    assert path == tmp_path / "PAIRED.md"
    assert [(p["method"]["metric"], p["reference"]["metric"]) for p in found] == [("saap", None), ("come", None)]
    assert found[0]["differences"][PERPLEXITY]["apart"]
