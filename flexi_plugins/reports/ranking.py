"""From rows to a ranking: the seeds of one method together, the methods of one ratio against each other."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

Row = dict[Any, Any]
METHOD = ("model", "metric", "strategy", "ratio", "recovery")
SIZES = ("true_ratio", "stored_parameters", "runtime_parameters", "macs_per_token", "bits_per_weight", "packed_mib")
SPEED = ("checkpoint_mib", "peak_memory_mib", "tokens_per_second")
UNRANKED = (
    "label",
    "seed",
    "options",
    "record",
    "records",
    "recovery_reason",
)  # columns that are not in the leaderboard's rows
OF_A_SEED = ("seed", "training.text")  # options in which the seeds of one method differ: theirs, and what they draw


def ranked(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row a method: dense first, then ratio by ratio by rank; cells without a result last, without a rank.

    Several ``seeds`` become their mean, with ``NAME_sd``. ``variant`` says which options tell two rows of one
    metric and strategy apart, and which are not what this metric or strategy mostly has (see ``option_values``).
    """
    import pandas as pd

    frame = pd.DataFrame([*methods(rows), *without_result(rows)])
    fixed = ["rank", "variant", "seeds", *(c for c in rows.columns if c not in UNRANKED)]
    rest = [c for c in frame.columns if c not in (*fixed, *UNRANKED)]
    frame = frame.reindex(columns=[*fixed, *rest])
    frame.attrs.update(rows.attrs)
    return frame


def methods(rows: pd.DataFrame) -> list[Row]:
    """Return one row a method that has a result, as in ``ranked``, with its options as in a record (JSON text).

    ``records`` are the names of its seeds' records.
    """
    names = measured(rows)
    complete = (r for r in rows.to_dict("records") if r["status"] == "complete")
    found = [_together(group, names) for group in _groups(complete)]
    _rank(found, quality_order(names), rows.attrs.get("higher_is_better", {}))
    _tell_apart(found, option_values(rows))
    return found


def without_result(rows: pd.DataFrame) -> list[Row]:
    """Return the cells that have no result, a row a seed; ``variant`` tells them apart from all other cells too."""
    cells = [{**r, "variant": "", "seeds": str(r["seed"])} for r in rows.to_dict("records")]
    _tell_apart(cells, option_values(rows))
    return [r for r in cells if r["status"] != "complete"]


def measured(rows: pd.DataFrame) -> list[str]:
    """Return the names of the measurements in the rows, sizes apart."""
    return [n for n in rows.attrs.get("higher_is_better", {}) if n in rows.columns and n not in SIZES]


def perplexities(names: Iterable[str]) -> list[str]:
    """Return the measurements that are perplexities."""
    return [n for n in names if re.search(r"(^|_)(ppl|perplexity)(?![a-z])", n)]


def choices(names: Iterable[str]) -> list[str]:
    """Return the measurements that are log-probabilities of the right choice."""
    return [n for n in names if "choice_logprob" in n]


def accuracies(names: Iterable[str]) -> list[str]:
    """Return the measurements that are accuracies, in [0, 1]."""
    return [n for n in names if {"acc", "accuracy"} & set(n.replace("/", "_").replace("@", "_").split("_"))]


def averages(names: Iterable[str]) -> list[str]:
    """Return the accuracies that are the average over several tasks."""
    return [n for n in accuracies(names) if n.startswith("average_")]


def speeds(names: Iterable[str]) -> list[str]:
    """Return the measurements of size on disk, memory and speed."""
    return [n for n in names if any(part in n for part in SPEED)]


def quality_order(names: Sequence[str]) -> list[str]:
    """Return what methods are ranked by: the first perplexity, then the choice log-probabilities (their mean).

    Without either it is an average of accuracies, else the accuracies (their mean), else the first number that is no speed.
    """
    others = [averages(names)[:1], accuracies(names), [n for n in names if n not in speeds(names)][:1]]
    return [*perplexities(names)[:1], *choices(names)] or next((found for found in others if found), [])


def rank_group(row: Mapping[Any, Any]) -> tuple[float, float]:
    """Return what methods that are ranked together have in common: the ratio; without one, to a tenth, what is gone."""
    gone = number(row, "true_ratio")
    return row["ratio"], 0.0 if row["ratio"] or is_dense(row) or math.isnan(gone) else round(gone, 1) + 0.0


def is_dense(row: Mapping[Any, Any]) -> bool:
    """Whether a row is the unpruned model."""
    return not isinstance(row["strategy"], str)


def at_chance(row: Mapping[Any, Any], name: str) -> bool:
    """Whether an accuracy is not above guessing by more than two standard errors."""
    value, error, chance = (number(row, n) for n in (name, f"{name}_stderr", f"{name}_chance"))
    return value - chance <= 2 * error  # False where one of them is not there


def number(row: Mapping[Any, Any], name: str) -> float:
    """Return a number of a row, NaN if it is not there."""
    value = row.get(name)
    return math.nan if value is None else float(value)


def flat_options(text: Any) -> dict[str, str]:
    """Return the options of a cell (JSON text) as dotted names and readable values, without those of its seed."""
    found: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        elif not f".{prefix}".endswith(tuple(f".{name}" for name in OF_A_SEED)):
            found[prefix] = value if isinstance(value, str) else json.dumps(value)

    walk("", json.loads(text) if isinstance(text, str) and text else {})
    return found


def training_texts(rows: pd.DataFrame) -> dict[tuple[str, int], set[str]]:
    """Return the digests of the text that models and seeds were trained on, where they say it."""
    found: dict[tuple[str, int], set[str]] = {}
    for row in rows.to_dict("records"):
        options = json.loads(row["options"]) if isinstance(row["options"], str) and row["options"] else {}
        if text := options.get("training", {}).get("text"):
            found.setdefault((row["model"], row["seed"]), set()).add(text)
    return found


def option_values(rows: pd.DataFrame) -> dict[str, dict[str, Counter[str]]]:
    """Return how many cells have each value of an option, by what it belongs to: ``strategy NAME``, ``calibration``, ..."""
    values: dict[str, dict[str, Counter[str]]] = {}
    for row in rows.to_dict("records"):
        for name, value in flat_options(row["options"]).items():
            group, key = _owner(row, name)
            values.setdefault(group, {}).setdefault(key, Counter())[value] += 1
    return values


def usual(values: Counter[str]) -> str:
    """Return the value that most cells have, the first by name of several."""
    return min(values, key=lambda value: (-values[value], value))


def _owner(row: Mapping[Any, Any], option: str) -> tuple[str, str]:
    group, _, key = option.partition(".")
    return (f"{group} {row[group]}" if group in ("metric", "strategy", "recovery") else group), key


def _groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Put the seeds of a method together. What one seed gave twice (by another version, of another file) is not two seeds."""
    groups: dict[Any, list[Row]] = {}
    seen: Counter[Any] = Counter()
    for row in rows:
        method = tuple(str(row[name]) for name in METHOD), tuple(sorted(flat_options(row["options"]).items()))
        groups.setdefault((method, seen[method, row["seed"]]), []).append(row)
        seen[method, row["seed"]] += 1
    return list(groups.values())


def _together(group: Sequence[Row], names: Sequence[str]) -> Row:
    """Return the mean of one method's seeds, with standard deviations where there are several."""
    row: Row = {name: group[0][name] for name in (*METHOD, "status", "reason", "options")}
    row |= {"variant": "", "seeds": " ".join(str(r["seed"]) for r in group), "records": [r["record"] for r in group]}
    for said in ("recovery_note", "recovery_reason", "recovery_shortfall"):
        notes = [r[said] for r in group if isinstance(r.get(said), str)]
        row |= {said: "; ".join(dict.fromkeys(notes))} if notes else {}
    for name in (*SIZES, *names, *(f"{n}_stderr" for n in names), *(f"{n}_chance" for n in names)):
        values = [v for v in (number(r, name) for r in group) if not math.isnan(v)]
        if values:
            row[name] = statistics.fmean(values)
        if len(values) > 1 and name in names:
            row[f"{name}_sd"] = statistics.stdev(values)
    return row


def _rank(methods: list[Row], order: Sequence[str], higher_is_better: Mapping[str, bool]) -> None:
    """Sort by model, ratio and quality, and number the methods of each model and ratio; dense has no number.

    Where there is nothing to rank by, no method has one.
    """
    first = perplexities(order)
    signs = {n: -1 if higher_is_better.get(n, True) else 1 for n in order if n not in first}

    def key(row: Row) -> tuple[Any, ...]:
        quality = [number(row, n) for n in first] + [sum(sign * number(row, n) for n, sign in signs.items())]
        known = (math.inf if math.isnan(q) else q for q in quality)
        equal = (
            str(row[name]) for name in ("metric", "strategy", "recovery", "options")
        )  # have one order all the same
        return row["model"], not is_dense(row), rank_group(row), *known, *equal

    methods.sort(key=key)
    counts: dict[Any, int] = {}
    for row in methods:
        if order and not is_dense(row):
            group = (row["model"], rank_group(row))
            row["rank"] = counts[group] = counts.get(group, 0) + 1


def _tell_apart(methods: Sequence[Row], values: Mapping[str, Mapping[str, Counter[str]]]) -> None:
    """Set ``variant`` to the options in which methods of one metric and strategy differ, and to what is unusual."""

    def unusual(row: Row, option: str, value: str) -> bool:
        group, key = _owner(row, option)
        return option.startswith(("metric.", "strategy.")) and value != usual(values[group][key])

    families: dict[Any, list[Row]] = {}
    for row in methods:
        families.setdefault((row["model"], str(row["metric"]), str(row["strategy"])), []).append(row)
    for family in families.values():
        options = [flat_options(row["options"]) for row in family]
        for row, own in zip(family, options, strict=True):
            alike = [o for r, o in zip(family, options, strict=True) if r["recovery"] == row["recovery"]]
            differing = {n for n in own if len({o.get(n) for o in (alike if _of_training(n) else options)}) > 1}
            said = [n for n in own if n in differing or unusual(row, n, own[n])]
            row["variant"] = ", ".join(f"{n.rpartition('.')[2]}={own[n]}" for n in said)


def before_and_after(methods: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return every method that was trained behind the same one before it was, where both have a result."""
    before = {_untrained(row): row for row in methods if row["recovery"] == "none"}
    return [
        (before[_untrained(row)], row) for row in methods if row["recovery"] != "none" and _untrained(row) in before
    ]


def _untrained(row: Row) -> tuple[Any, ...]:
    method = (str(row[name]) for name in METHOD if name != "recovery")
    return *method, *sorted((n, v) for n, v in flat_options(row["options"]).items() if not _of_training(n))


def _of_training(option: str) -> bool:
    return option.startswith(("recovery.", "training."))
