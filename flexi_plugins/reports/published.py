"""Published numbers beside ours: one line for the same model, method, ratio, recovery and task, and never one ranking."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from flexi_plugins.errors import FlexiError
from flexi_plugins.reports import ranking
from flexi_plugins.reports.ranking import Row, number
from flexi_plugins.reports.table import Column, figure, markdown_table, one_line

if TYPE_CHECKING:
    import pandas as pd

Papers = Mapping[tuple[str, str], str]  # (kind, name) of a plugin -> its paper, the method's name in front of a comma

NEAR = 0.005  # papers round their ratios: LLM-Pruner's 20 % of LLaMA-7B are 19.52 % of its parameters
DENSE = ("dense", "original", "unpruned")
EXPLAINED = """\
- Published: as the source prints it, from the authors' own run: other software, calibration text and samples. It is not
  ranked with ours, and lines are in the order of the file.
- Ours: the records of this study by the metric, the strategy and the options that the file names as the counterpart of a line
  (`-`: there is none). Where it names nothing, by metric and strategy (or a strategy that goes without scores) of the method's
  paper, else by its metric alone: then compare the options first. A variant of a method has to name its counterpart.
- Ratios are as published; the true ratio is the share of our model's stored parameters that is gone. Accuracies are in
  percent."""


@dataclass(frozen=True)
class Published:
    """A line of published numbers. ratio: share of the parameters, 0 for the dense model; accuracies are in percent.

    task and metric: as in our measurements (wikitext2, ppl@2048; piqa, acc), a perplexity without window means any.
    counterpart: what of ours it is compared with, as ``METRIC x STRATEGY, option=value, ...``; "-": nothing; "": by name.
    """

    model: str
    method: str
    ratio: float
    recovery: str
    task: str
    value: float
    metric: str
    source: str
    note: str
    counterpart: str = ""


COLUMNS = tuple(field.name for field in fields(Published))
OPTIONAL = ("recovery", "note", "counterpart")
COUNTERPART = re.compile(r"-|[\w-]+ x [\w-]+(, \w+=[^,]+)*")


def read_published(path: Path) -> list[Published]:
    """Read a CSV file with the columns of ``Published``; a line that is none is named."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [c for c in COLUMNS if c not in (reader.fieldnames or ()) and c != "counterpart"]
            if missing:
                raise FlexiError(f"{path}: expected the columns {', '.join(COLUMNS)}, found no {', '.join(missing)}")
            return [_published(f"{path}, line {reader.line_num}", row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FlexiError(f"{path}: the published numbers cannot be read: {error}") from None


def _published(where: str, row: Mapping[str, str | None]) -> Published:
    values = {column: (row.get(column) or "").strip() for column in COLUMNS}
    empty = [c for c in COLUMNS if not values[c] and c not in OPTIONAL]
    if empty:
        raise FlexiError(f"{where}: expected something as {empty[0]}, found nothing")
    if values["counterpart"] and not COUNTERPART.fullmatch(values["counterpart"]):
        raise FlexiError(
            f"{where}: expected as counterpart METRIC x STRATEGY, option=value, ..., or -, found {values['counterpart']!r}"
        )
    numbers = {}
    for column in ("ratio", "value"):
        try:
            numbers[column] = float(values.pop(column))
        except ValueError:
            raise FlexiError(f"{where}: expected a number as {column}, found {row[column]!r}") from None
    if not 0 <= numbers["ratio"] < 1 or not math.isfinite(numbers["value"]):
        raise FlexiError(f"{where}: expected a ratio in [0, 1) and a finite value, found {numbers}")
    return Published(ratio=numbers["ratio"], value=numbers["value"], **values)


# ------------------------------------------------------------------------------------------- what belongs together


def side_by_side(rows: pd.DataFrame, published: Iterable[Published], papers: Papers) -> list[Row]:
    """Return the published numbers that the study has a number beside, in their order, with ours."""
    methods, names = ranking.methods(rows), ranking.measured(rows)
    return [
        _pair(line, row, name)
        for line in published
        for row in _same_method(line, [m for m in methods if _same_place(line, m)], papers)
        for name in names
        if _same_measurement(line, name) and not math.isnan(number(row, name))
    ]


def _pair(line: Published, row: Row, name: str) -> Row:
    accuracy = name in ranking.accuracies([name])
    dense = ranking.is_dense(row)
    return {
        **{column: getattr(line, column) for column in COLUMNS if column != "value"},
        "published": line.value,
        "ours": number(row, name) * (100 if accuracy else 1),
        "measurement": name,
        "our_metric": None if dense else row["metric"],
        "our_strategy": None if dense else row["strategy"],
        "variant": row["variant"],
        "options": ranking.flat_options(row["options"]),
        "seeds": row["seeds"],
        "true_ratio": number(row, "true_ratio"),
    }


def _same_place(line: Published, row: Row) -> bool:
    near = math.isclose(row["ratio"], line.ratio) or abs(number(row, "true_ratio") - line.ratio) <= NEAR
    recovery = _plain(line.recovery or "none") == _plain(row["recovery"])
    return near and recovery and _model(line.model) == _model(row["model"])


def _same_method(line: Published, rows: Sequence[Row], papers: Papers) -> list[Row]:
    """Return the rows that come closest to a published method; see EXPLAINED."""
    if _plain(line.method) in DENSE:
        return [row for row in rows if ranking.is_dense(row)]
    pruned = [row for row in rows if not ranking.is_dense(row)]
    if line.counterpart:
        return [row for row in pruned if _is_counterpart(line.counterpart, row)]
    closeness = [_closeness(line.method, row, papers) for row in pruned]
    return [row for row, close in zip(pruned, closeness, strict=True) if close and close == max(closeness)]


def _is_counterpart(told: str, row: Row) -> bool:
    method, *options = told.split(", ")
    set_ = ranking.flat_options(row["options"])
    known = {key.partition(".")[2]: value for key, value in set_.items() if key.startswith(("metric.", "strategy."))}
    wanted = [option.split("=") for option in options]
    return method == f"{row['metric']} x {row['strategy']}" and all(known.get(k) == v for k, v in wanted)


def _closeness(method: str, row: Row, papers: Papers) -> int:
    def goes_by_it(kind: str) -> bool:
        name = row[kind]
        return _plain(method) in (_plain(name), _plain(papers.get((kind, name), "").partition(",")[0]))

    if goes_by_it("strategy") and (goes_by_it("metric") or row["metric"] == "none"):
        return 2
    return int(goes_by_it("metric"))


def _same_measurement(line: Published, name: str) -> bool:
    named = name if "@" in line.metric else name.partition("@")[0]
    return _plain(f"{line.task} {line.metric}") == _plain(named)


def _model(name: str) -> str:
    """Return what names of one model have in common: owner, maker, revision and format are left out."""
    own = name.partition("@")[0].rpartition("/")[2]
    return _plain(re.sub(r"^meta-|[-_ ]hf$", "", own, flags=re.IGNORECASE))


def _plain(text: str) -> str:
    """Return a name without case, spaces and signs, of which + and & are words."""
    return re.sub(r"[^a-z0-9]", "", text.lower().replace("+", "plus").replace("&", "and"))


# ----------------------------------------------------------------------------------------------------- the page


def render(rows: pd.DataFrame, published: Sequence[Published], pairs: Sequence[Row], title: str) -> str:
    """Return the pairs as a Markdown page, a table for every model, ratio and recovery; then what has no counterpart."""
    sections = [f"# {title}: published numbers beside ours", EXPLAINED]
    for place in dict.fromkeys((p["model"], p["ratio"], p["recovery"]) for p in pairs):
        group = [p for p in pairs if (p["model"], p["ratio"], p["recovery"]) == place]
        model, ratio, recovery = place
        sections.append(f"## {model}, ratio {ratio:g}, recovery {recovery or 'none'}")
        sections.append(markdown_table(group, _columns(group)))
    return "\n\n".join([*sections, "## Without a counterpart", _alone(rows, published, pairs)]) + "\n"


def _columns(group: Sequence[Row]) -> list[Column]:
    columns: list[Column] = [
        ("method", lambda p: one_line(p["method"])),
        ("task", lambda p: one_line(f"{p['task']} {p['metric']}")),
        ("published", lambda p: figure(p["published"])),
        ("ours", lambda p: figure(p["ours"])),
        ("our method", lambda p: one_line(_our_method(p))),
        ("measured", lambda p: one_line(p["measurement"])),
        ("true ratio", lambda p: figure(p["true_ratio"])),
        ("source", lambda p: one_line(p["source"])),
    ]
    return [*columns, ("note", lambda p: one_line(p["note"]))] if any(p["note"] for p in group) else columns


def _our_method(pair: Row) -> str:
    if pair["our_strategy"] is None:
        return "dense"
    told = [pair["variant"]] if pair["variant"] else []
    if "," in pair["counterpart"]:  # it names options: beside those stand the ones of ours
        told = [
            f"{k.partition('.')[2]}={v}" for k, v in pair["options"].items() if k.startswith(("metric.", "strategy."))
        ]
    return f"{pair['our_metric']} x {pair['our_strategy']}" + f" ({', '.join(told)})" * bool(told)


def _alone(rows: pd.DataFrame, published: Sequence[Published], pairs: Sequence[Row]) -> str:
    """Say which models and methods have numbers on one side only."""
    ours = {_model(name): name for name in rows["model"]}
    known = {_model(line.model) for line in published}
    met = {(p["model"], p["method"], p["ratio"], p["recovery"]) for p in pairs}
    left = dict.fromkeys(
        (line.model, line.method, line.ratio, line.recovery) for line in published if _model(line.model) in ours
    )
    methods = [f"{m} {method} {ratio:g} ({recovery or 'none'})" for m, method, ratio, recovery in left.keys() - met]
    nowhere = [name for model, name in ours.items() if model not in known]
    said = [
        (f"published, and without a number of ours beside it: {', '.join(sorted(methods))}", methods),
        (
            f"in this study, and without a published number: {', '.join(nowhere)}; there are numbers of "
            f"{', '.join(dict.fromkeys(line.model for line in published)) or 'no model'}",
            nowhere,
        ),
    ]
    return "\n".join(f"- {text}" for text, holds in said if holds) or "- none"
