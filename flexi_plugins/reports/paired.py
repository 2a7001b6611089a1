"""The page PAIRED.md: every method beside one other on the same windows and documents, so that what both find hard cancels out.

The standard error of a score says how much it would change on other documents. Two models find the same documents hard, and
the difference of their scores changes much less: it is taken document by document, with the standard error of its
mean, and a paired t-test.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flexi_plugins.errors import FlexiError
from flexi_plugins.evaluators.outcomes import SEVEN
from flexi_plugins.reports import ranking
from flexi_plugins.reports.ranking import Row, is_dense
from flexi_plugins.reports.table import Column, figure, identity, method, size, tables

if TYPE_CHECKING:
    import pandas as pd

    Scores = Mapping[str, pd.Series]  # measurement -> a number a document

Documents = Callable[[str], "pd.DataFrame"]
"""Name of a record -> per-document outcomes, as in ``Store.documents``."""

BEST, DENSE = "best", "dense"  # what to compare with; anything else is a method, METRIC-STRATEGY
LEVEL = 0.05
AVERAGE = "average_acc"
ALL = "tasks_"  # the mean over all tasks of a metric that several have
POOLED = ("choice_logprob", "acc")

EXPLAINED = f"""\
- Each method minus the reference on the same windows and documents, mean ± standard error of the differences. Perplexity:
  ×1.05 is 5 % higher. choice_logprob: nats. Accuracies: percentage points.
- `=` marks what these documents do not tell apart: paired t-test, two-sided, {LEVEL:.0%} false discoveries among the methods
  of a table (Benjamini and Hochberg). "same": no document differs.
- {ALL}NAME: the mean over tasks, each of which weighs the same, as in {AVERAGE}.
- Several calibration seeds of a method are their mean on each document. The error is that of the documents, not of the seeds:
  the leaderboard has their deviation. The best of many is best partly by luck, on these documents."""


@dataclass(frozen=True)
class Difference:
    """A method minus the reference: mean over documents, its standard error, two-sided p-value, number of documents."""

    mean: float
    error: float
    p: float
    documents: int


@dataclass(frozen=True)
class Pair:
    """A method beside its reference, among those that are ranked together (see ``ranking.rank_group``).

    differences: by measurement. apart: those that are told apart.
    """

    rank_group: tuple[float, float]
    row: Row
    reference: Row
    differences: Mapping[str, Difference]
    apart: frozenset[str] = frozenset()

    def to_json(self) -> dict[str, Any]:
        """Return the pair as JSON values."""
        named = {"method": self.row, "reference": self.reference}
        keys = ("model", "metric", "strategy", "variant", "ratio", "recovery", "seeds")
        return {
            **{name: {k: None if row[k] != row[k] else row[k] for k in keys} for name, row in named.items()},
            "differences": {
                name: {
                    "mean": found.mean,
                    "standard_error": found.error,
                    "p": found.p,
                    "documents": found.documents,
                    "apart": name in self.apart,
                }
                for name, found in self.differences.items()
            },
        }


# ------------------------------------------------------------------------------------------- what is compared


def pairs_of(rows: pd.DataFrame, documents: Documents, reference: str = BEST) -> list[Pair]:
    """Return every method that has outcomes of documents beside the reference of its model and ratio, in their ranking.

    reference: "best" (of the same ratio), "dense", or a method of the same ratio as METRIC-STRATEGY, of several the first.
    Raise a FlexiError for a method that the study has not.
    """
    names, methods = ranking.measured(rows), ranking.methods(rows)
    known = {name_of(row) for row in methods if not is_dense(row)}
    if reference not in (BEST, DENSE, *known):
        raise FlexiError(
            f"report: nothing here is called {reference!r}; expected {BEST!r}, {DENSE!r} or one of {', '.join(sorted(known))}"
        )
    scores = {id(row): method_scores(row, documents, names) for row in methods}
    pairs = []
    for model, alike in dict.fromkeys((row["model"], ranking.rank_group(row)) for row in methods if not is_dense(row)):
        here = [
            r
            for r in methods
            if r["model"] == model and (is_dense(r) or ranking.rank_group(r) == alike) and scores[id(r)]
        ]
        beside = next((row for row in here if _is(row, reference)), None)
        if beside is not None:
            others = [row for row in here if row is not beside]
            found = [Pair(alike, r, beside, _differences(scores[id(r)], scores[id(beside)])) for r in others]
            pairs += _told_apart(found)
    return pairs


def name_of(row: Row) -> str:
    """Return what a method is called on the command line."""
    return f"{row['metric']}-{row['strategy']}"


def _is(row: Row, reference: str) -> bool:
    if is_dense(row):
        return reference == DENSE and row["recovery"] == "none"
    return reference in (BEST, name_of(row))


def method_scores(row: Row, documents: Documents, names: Sequence[str]) -> Scores:
    """Return a method's number on every window and document, the mean over its seeds; none if a seed has no documents."""
    import pandas as pd

    seeds = [scores_of(documents(record), names) for record in row["records"]]
    common = [name for name in seeds[0] if all(name in seed for seed in seeds)]
    return {name: pd.concat([seed[name] for seed in seeds], axis=1, join="inner").mean(axis=1) for name in common}


def scores_of(documents: pd.DataFrame, names: Sequence[str]) -> Scores:
    """Return the numbers of single windows and documents that make up these measurements.

    A window's is its loss, nats a token, and makes CORPUS_ppl@TOKENS; that of a task's document is in a column of its own, and
    makes TASK_COLUMN, or TASK_COLUMN_FILTER. What makes a task's perplexity is, with lm-eval, a log-likelihood, and a loss in
    nats with all other evaluators.
    """
    import pandas as pd

    scores = {}
    if {"corpus", "window", "tokens", "nll"} <= {*documents}:
        windows = documents[documents["nll"].notna()]
        for (corpus, tokens), group in windows.groupby(["corpus", "tokens"]):
            scores[f"{corpus}_ppl@{tokens:g}"] = group.set_index("window")["nll"]
    if {"task", "doc_id"} <= {*documents}:
        rows = documents[documents["task"].notna()]
        rules = rows["filter"].fillna("") if "filter" in rows else rows["task"].map(lambda _: "")
        for (task, rule), group in rows.groupby([rows["task"], rules]):
            for column in group:
                name = f"{task}_{column}" + (f"_{rule}" if rule else "")
                if name in names:
                    found = pd.to_numeric(group.set_index("doc_id")[column], errors="coerce").dropna()
                    of_harness = "evaluator" not in group or group["evaluator"].str.startswith("lm-eval").all()
                    scores[name] = -found if of_harness and ranking.perplexities([name]) else found
    return {name: found for name, found in scores.items() if name in names and len(found) and found.index.is_unique}


def _differences(scores: Scores, reference: Scores) -> dict[str, Difference]:
    """Return the differences of all measurements that both have, and those of tasks together, by name."""
    found = {name: difference(scores[name], reference[name]) for name in scores if name in reference}
    pools = {AVERAGE: [f"{task}_{metric}" for task, metric in SEVEN.items()]}
    for metric in POOLED:
        own = ranking.choices(found) if metric == "choice_logprob" else [n for n in found if n.endswith(f"_{metric}")]
        pools[ALL + metric] = own
    complete = all(name in found for name in pools[AVERAGE])
    del pools[ALL + "acc" if complete else AVERAGE]
    return {name: pooled([found[n] for n in own]) for name, own in pools.items() if len(own) > 1} | found


def difference(scores: pd.Series, reference: pd.Series) -> Difference:
    """Return the difference of two methods' numbers on the documents that both have: NaN error of fewer than two."""
    import pandas as pd
    from scipy import stats

    both = pd.concat([scores, reference], axis=1, join="inner").to_numpy()
    values = both[:, 0] - both[:, 1]
    if len(values) < 2:
        return Difference(float(values.mean()) if len(values) else math.nan, math.nan, math.nan, len(values))
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    if error == 0:
        return Difference(float(values[0]), 0.0, float(values[0] == 0), len(values))
    mean = float(values.mean())
    return Difference(mean, error, 2 * float(stats.t.sf(abs(mean) / error, len(values) - 1)), len(values))


def pooled(differences: Sequence[Difference]) -> Difference:
    """Return the mean of differences on several tasks, each of the same weight; its p-value is that of the normal law."""
    from scipy import stats

    mean = statistics.fmean(d.mean for d in differences)
    error = math.hypot(*(d.error for d in differences)) / len(differences)
    p = 2 * float(stats.norm.sf(abs(mean) / error)) if error else float(mean == 0)
    return Difference(mean, error, p, sum(d.documents for d in differences))


def _told_apart(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs of one table with what is told apart; see LEVEL."""
    from scipy import stats

    apart: dict[int, set[str]] = {id(pair): set() for pair in pairs}
    for name in dict.fromkeys(n for pair in pairs for n in pair.differences):
        tested = [p for p in pairs if name in p.differences and not math.isnan(p.differences[name].p)]
        if tested:
            adjusted = stats.false_discovery_control([pair.differences[name].p for pair in tested])
            for pair, p in zip(tested, adjusted, strict=True):
                if p <= LEVEL:
                    apart[id(pair)].add(name)
    return [replace(pair, apart=frozenset(apart[id(pair)])) for pair in pairs]


# ----------------------------------------------------------------------------------------------------- the page


def render(pairs: Sequence[Pair], title: str) -> str:
    """Return the pairs as a Markdown page, a table for every model and ratio."""
    sections = [f"# {title}: methods on the same documents", EXPLAINED]
    several = len({pair.row["model"] for pair in pairs}) > 1
    for model, alike in dict.fromkeys((pair.row["model"], pair.rank_group) for pair in pairs):
        group = {id(p.row): p for p in pairs if (p.row["model"], p.rank_group) == (model, alike)}
        reference = next(iter(group.values())).reference
        beside = "the dense model" if is_dense(reference) else method(reference)
        sections.append(f"## At {size(*alike)}" + f" of {model}" * several + f", beside {beside}")
        sections += tables([pair.row for pair in group.values()], *_columns(group))
    return "\n\n".join(sections) + "\n"


def _columns(group: Mapping[int, Pair]) -> tuple[list[Column], list[Column]]:
    """Return the columns that say which method a row is, and those of the differences, pooled ones first."""
    found = list(dict.fromkeys(name for pair in group.values() for name in pair.differences))
    first = [*ranking.perplexities(found), *(n for n in found if n == AVERAGE or n.startswith(ALL))]
    order = [*first, *ranking.choices(found), *ranking.accuracies(found), *found]

    def cell(name: str) -> Callable[[Row], str]:
        return lambda row: _cell(group[id(row)], name)

    heads = {name: f"{name} %" if name in ranking.accuracies(found) else name for name in order}
    return identity([pair.row for pair in group.values()]), [(heads[name], cell(name)) for name in heads]


def _cell(pair: Pair, name: str) -> str:
    """Return a difference such as ``×1.052 ± 0.004`` or ``=-1.2 ± 1.1``."""
    found = pair.differences.get(name)
    if found is None:
        return "–"
    if found.mean == 0 and found.error == 0:
        return "same"
    if ranking.perplexities([name]):
        times = math.exp(found.mean)
        text = f"×{figure(times, 3 if times < 100 else 0)} ± {figure(times * found.error)}"
    elif ranking.accuracies([name]):
        text = f"{100 * found.mean:+.1f} ± {figure(100 * found.error, 1)}"
    else:
        text = f"{found.mean:+.3f} ± {figure(found.error, 3)}"
    return "=" * (name not in pair.apart) + text
