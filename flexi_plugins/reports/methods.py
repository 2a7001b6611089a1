"""Report format ``methods``: every method on a line of its own, a mark a ratio, the better the further left; an SVG."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from flexi_plugins import hookimpl
from flexi_plugins.hookspecs import ReportFormat
from flexi_plugins.reports import figures, ranking
from flexi_plugins.reports.figures import GREY, LINE_HEIGHT, handle
from flexi_plugins.reports.ranking import Row, number

if TYPE_CHECKING:
    import pandas as pd

DENSE = "dense"
LEAST = 1e-3  # nats: the logarithm of a log-probability of 0 has no place on a scale


@hookimpl
def report_formats() -> list[ReportFormat]:
    """Return the format of this file."""
    return [Methods()]


@dataclass(frozen=True)
class Panel:
    """One measure of quality: a number above 0, lower is better, and half the length of its error bar (NaN: none)."""

    label: str
    value: Callable[[Row], float]
    error: Callable[[Row], float]


@dataclass(frozen=True)
class Methods:
    """Perplexity, and -choice_logprob (the mean of all tasks), of every method: colour is ratio, mark is recovery.

    The methods stand by their mean rank over ratios, the dense model on top; several seeds are their mean.
    """

    name: ClassVar[str] = "methods"
    filename: ClassVar[str] = "methods.svg"

    def render(self, rows: pd.DataFrame, title: str) -> str:
        """Render the finished rows as SVG text."""
        with figures.settings():
            return figures.svg(_figure(ranking.methods(rows), _panels(ranking.measured(rows)), title))


def _panels(names: Sequence[str]) -> list[Panel]:
    perplexities, choices = ranking.perplexities(names)[:1], ranking.choices(names)
    panels = [_perplexity(name) for name in perplexities]
    return [*panels, _choice(choices)] if choices else panels


def _perplexity(name: str) -> Panel:
    def error(row: Row) -> float:
        return number(row, f"{name}_sd" if " " in row["seeds"] else f"{name}_stderr")

    return Panel(name, lambda row: number(row, name), error)


def _choice(names: Sequence[str]) -> Panel:
    def value(row: Row) -> float:
        return max(-statistics.fmean(number(row, name) for name in names), LEAST)

    tasks = names[0] if len(names) == 1 else f"choice_logprob of {len(names)} tasks"
    return Panel(f"−{tasks}", value, lambda row: math.nan)


def _figure(rows: Sequence[Row], panels: Sequence[Panel], title: str) -> Any:
    from matplotlib.figure import Figure

    lines = _lines(rows)
    shown = [p for p in panels if any(math.isfinite(p.value(r)) for r in rows)]
    size = 3.4 + 3.4 * max(len(shown), 1), 1.6 + LINE_HEIGHT * max(len(lines), 8)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    every = figure.subplots(1, max(len(shown), 1), sharey=True, squeeze=False)[0]
    if not shown:
        every[0].text(0.5, 0.5, "no finished cell with a perplexity yet", ha="center", transform=every[0].transAxes)
        return figure
    colours = figures.assigned([_ratio(r) for r in rows if not ranking.is_dense(r)], figures.COLOURS)
    marks = figures.assigned([str(r["recovery"]) for r in rows if figures.was_recovered(r)], figures.MARKERS)
    for axes, panel in zip(every, shown, strict=True):
        _draw(axes, panel, lines, colours, marks)
    several = len({line[0] for line in lines}) > 1
    every[0].set_yticks(range(len(lines)), [_name(line, several) for line in lines], fontsize=8)
    every[0].set_ylim(len(lines) - 0.4, -0.6)  # the first line on top
    _draw_legend(figure, colours, marks)
    return figure


Line = tuple[str, ...]


def _line(row: Row) -> Line:
    """Return what a line is of: model, metric, strategy and variant; the dense model's is its own name alone."""
    if ranking.is_dense(row):
        return (str(row["model"]),)
    return str(row["model"]), str(row["metric"]), str(row["strategy"]), str(row["variant"])


def _lines(rows: Sequence[Row]) -> dict[Line, list[Row]]:
    """Return the rows of every line, in the order of the lines: dense first, then by mean rank."""
    found: dict[Line, list[Row]] = {}
    for row in rows:
        found.setdefault(_line(row), []).append(row)

    def place(line: Line) -> tuple[Any, ...]:
        ranks = [number(row, "rank") for row in found[line] if not ranking.is_dense(row)]
        return line[0], statistics.fmean(ranks) if ranks else 0.0, line

    return {line: found[line] for line in sorted(found, key=place)}


def _name(line: Line, several: bool) -> str:
    """Return a line's label; the metric ``none``, or one that has the strategy's name, is not said."""
    if len(line) == 1:
        pair, variant = DENSE, ""
    else:
        _, metric, strategy, variant = line
        pair = strategy if metric in ("none", strategy) else f"{metric} × {strategy}"
    return ", ".join(part for part in (pair, variant, line[0] if several else "") if part)


def _ratio(row: Row) -> str:
    return f"ratio {row['ratio']:g}" if row["ratio"] else "sizes that options set"


def _draw(
    axes: Any, panel: Panel, lines: Mapping[Line, list[Row]], colours: dict[str, str], marks: dict[str, str]
) -> None:
    values = [v for line in lines.values() for v in map(panel.value, line) if not math.isnan(v)]
    edge = figures.SCALE * min(v for v in values if math.isfinite(v))
    figures.plain(axes)
    figures.logarithmic(axes, "x", [min(v, edge) for v in values])
    axes.set_xlabel(f"{panel.label}\nlower is better", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    for y, line in enumerate(lines.values()):
        there = [row for row in line if not math.isnan(panel.value(row))]
        places = [min(panel.value(row), edge) for row in there]
        axes.plot(places, [y] * len(places), color="#cccccc", linewidth=1.0, zorder=1)
        for row, x in zip(there, places, strict=True):
            _draw_mark(axes, row, x, y, colours, marks)
            error = panel.error(row)
            if x < edge and not math.isnan(error):
                ends = max(x - error, x / figures.SCALE), min(x + error, edge)
                axes.plot(ends, [y, y], color="#444444", linewidth=0.8, zorder=2)
            if ranking.is_dense(row) and not figures.was_recovered(row):
                axes.axvline(x, color="black", linewidth=0.8, linestyle="--", zorder=0)
    beyond = sum(v > edge for v in values)
    if beyond:
        axes.axvline(edge, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
        text = f"above {edge:,.4g}: {beyond}"
        axes.annotate(text, (edge, 1), (0, 3), ("data", "axes fraction"), "offset points", ha="right", fontsize=8)


def _draw_mark(axes: Any, row: Row, x: float, y: int, colours: dict[str, str], marks: dict[str, str]) -> None:
    """Draw one model; where some were recovered, those that were not are hollow."""
    dense = ranking.is_dense(row)
    look = figures.fill("black" if dense else colours[_ratio(row)], bool(marks) and not figures.was_recovered(row))
    marker = "*" if dense else marks.get(str(row["recovery"]), "o")
    axes.scatter(x, y, s=90 if dense else 38, marker=marker, zorder=3, **look)


def _draw_legend(figure: Any, colours: dict[str, str], marks: dict[str, str]) -> None:
    handles = [handle(DENSE, "*", "black", 10), *(handle(ratio, "o", colour) for ratio, colour in colours.items())]
    if marks:
        handles += [figures.as_pruned(), *(handle(recovery, marker, GREY) for recovery, marker in marks.items())]
    figure.legend(handles=handles, loc="outside lower center", frameon=False, fontsize=9, ncols=4)
