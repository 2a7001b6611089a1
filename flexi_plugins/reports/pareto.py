"""Report format ``pareto``: quality against stored parameters as an SVG, a mark a method; equal records, equal bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from flexi_plugins import hookimpl
from flexi_plugins.hookspecs import ReportFormat
from flexi_plugins.reports import figures, ranking
from flexi_plugins.reports.figures import GREY, handle
from flexi_plugins.reports.ranking import Row, number

if TYPE_CHECKING:
    import pandas as pd


@hookimpl
def report_formats() -> list[ReportFormat]:
    """Return the format of this file."""
    return [Pareto()]


@dataclass(frozen=True)
class Pareto:
    """Perplexity (log scale; else a score of tasks) against stored parameters: colour is metric, marker is strategy."""

    name: ClassVar[str] = "pareto"
    filename: ClassVar[str] = "pareto.svg"

    def render(self, rows: pd.DataFrame, title: str) -> str:
        """Render the finished rows as SVG text."""
        names = ranking.measured(rows)
        known = {*ranking.perplexities(names), *ranking.choices(names), *ranking.accuracies(names)}
        order = [name for name in ranking.quality_order(names) if name in known]
        with figures.settings():
            return figures.svg(_figure(_points(rows, order[0]) if order else [], order[0] if order else "", title))


def _points(rows: pd.DataFrame, quality: str) -> list[Row]:
    """Return the methods that have both coordinates, as ``x`` (millions) and ``y``; several seeds are one method."""
    points = []
    for row in ranking.methods(rows):
        x, y = number(row, "stored_parameters") / 1e6, number(row, quality)
        if math.isfinite(x) and math.isfinite(y):
            points.append({**row, "x": x, "y": y})
    return points


def _figure(points: Sequence[Row], quality: str, title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("stored parameters (millions)")
    if not points:
        axes.text(
            0.5,
            0.5,
            "no finished cell with a perplexity or a score of tasks yet",
            ha="center",
            transform=axes.transAxes,
            color=GREY,
        )
        return figure
    shown = _on_scale(points, quality)
    _draw_axes(axes, shown, quality)
    _draw_frontier(axes, [p for p in shown if not p["beyond"]], quality)
    _draw_points(axes, shown)
    return figure


def _on_scale(points: Sequence[Row], quality: str) -> list[Row]:
    """Return the points, with perplexities ``beyond`` the scale put on its edge."""
    edge = figures.SCALE * min(p["y"] for p in points) if _low(quality) else math.inf
    return [{**p, "y": min(p["y"], edge), "beyond": p["y"] > edge} for p in points]


def _draw_axes(axes: Any, points: Sequence[Row], quality: str) -> None:
    axes.set_ylabel(f"{quality}, {'lower' if _low(quality) else 'higher'} is better")
    axes.margins(0.08)
    figures.plain(axes)
    if _low(quality):
        figures.logarithmic(axes, "y", [p["y"] for p in points])
        _draw_edge(axes, [p["y"] for p in points if p["beyond"]])


def _draw_edge(axes: Any, beyond: Sequence[float]) -> None:
    """Say of the points on the edge of the scale that they belong above it."""
    if beyond:
        edge = beyond[0]
        axes.axhline(edge, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
        text = f"above {edge:,.4g}: {len(beyond)} of the models"
        axes.annotate(text, (0.01, edge), (0, 7), ("axes fraction", "data"), "offset points", fontsize=9, color=GREY)


def _draw_frontier(axes: Any, points: Sequence[Row], quality: str) -> None:
    """Join the points that no other one beats in both size and quality."""
    best = frontier([(p["x"], p["y"] if _low(quality) else -p["y"]) for p in points])
    if len(best) > 1:
        ys = [y if _low(quality) else -y for _, y in best]
        axes.plot([x for x, _ in best], ys, color="#bbbbbb", linewidth=1.2, linestyle="--", zorder=1, label="frontier")


def _draw_points(axes: Any, points: Sequence[Row]) -> None:
    recovered = any(map(figures.was_recovered, points))
    pruned = [p for p in points if not ranking.is_dense(p)]
    dense = [p for p in points if ranking.is_dense(p)]
    colours = figures.assigned([p["metric"] for p in pruned], figures.COLOURS)
    markers = figures.assigned([p["strategy"] for p in pruned], figures.MARKERS)
    for point in dense:
        axes.scatter(
            point["x"],
            point["y"],
            marker="*",
            s=190,
            zorder=3,
            **figures.fill("black", recovered and not figures.was_recovered(point)),
        )
    for index, (metric, colour) in enumerate(colours.items()):
        size = 110 - 55 * index / max(len(colours) - 1, 1)  # nested: equal plans of several metrics all stay visible
        for row in (p for p in pruned if p["metric"] == metric):
            marker = markers[row["strategy"]]
            look = figures.fill(colour, recovered and not figures.was_recovered(row))
            axes.scatter(row["x"], row["y"], s=size, marker=marker, zorder=4 + index, **look)
    _draw_legend(axes, colours, markers, bool(dense), recovered)


def _draw_legend(axes: Any, colours: dict[str, str], markers: dict[str, str], dense: bool, recovered: bool) -> None:
    metrics = [handle("metric", "", GREY), *(handle(n, "o", c) for n, c in colours.items())] if colours else []
    strategies = [handle("strategy", "", GREY), *(handle(n, m, GREY) for n, m in markers.items())] if markers else []
    lines = [line for line in axes.get_lines() if line.get_label() == "frontier"]
    fills = [handle("recovered", "o", GREY), figures.as_pruned()] if recovered else []
    handles = [*([handle("dense", "*", "black", 12)] if dense else []), *lines, *fills, *metrics, *strategies]
    width, height = axes.figure.get_size_inches()
    axes.figure.set_size_inches(width, max(height, figures.LINE_HEIGHT * (len(handles) + 2)))
    legend = axes.figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_fontweight("bold" if text.get_text() in ("metric", "strategy") else "normal")


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other one is at most as high as in both coordinates, from left to right."""
    found: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


def _low(quality: str) -> bool:
    return bool(ranking.perplexities([quality]))
