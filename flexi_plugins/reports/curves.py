"""Report format ``curves``: how the loss fell while models were trained, as an SVG; nothing where none was."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from flexi_plugins import hookimpl
from flexi_plugins.hookspecs import ReportFormat
from flexi_plugins.reports import figures, ranking
from flexi_plugins.reports.table import method

if TYPE_CHECKING:
    import pandas as pd

Curve = Sequence[Mapping[str, float]]
DASHES = ("-", "--", ":", "-.")
WIDE = 2.0  # times the lowest loss: from there on the scale is logarithmic
KINDS = (
    ("held_out_loss", "held-out loss (nats a token)"),
    ("held_out_block_loss", "held-out loss of blocks trained apart (sum; of each method's own kind)"),
    ("loss", "training loss (of each method's own kind)"),
)


@hookimpl
def report_formats() -> list[ReportFormat]:
    """Return the format of this file."""
    return [Curves()]


@dataclass(frozen=True)
class Curves:
    """Held-out and training loss against tokens, a line a cell, which the legend names."""

    name: ClassVar[str] = "curves"
    filename: ClassVar[str] = "curves.svg"

    def render(self, rows: pd.DataFrame, title: str) -> str:
        """Render the curves in ``rows.attrs`` (label -> method and points) as SVG text; empty without any."""
        curves = _named(rows, rows.attrs.get("curves", {}))
        there = {name for curve in curves.values() for point in curve["points"] for name in point}
        kinds = [(kind, label) for kind, label in KINDS if kind in there]
        if not kinds:
            return ""
        with figures.settings():
            return figures.svg(_figure(curves, kinds, title))


def _named(rows: pd.DataFrame, curves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the curves by what their models are, with the seed where there are several."""
    together = ranking.methods(rows)
    of_record = {r: (row, s) for row in together for r, s in zip(row["records"], row["seeds"].split(), strict=True)}
    ratios = {row["ratio"] for row, _ in of_record.values() if not ranking.is_dense(row)}

    def name(record: str) -> str:
        row, seed = of_record[record]
        told = "dense x " + row["recovery"] if ranking.is_dense(row) else method(row)
        told += f" at {row['ratio']:g}" * (len(ratios) > 1 and not ranking.is_dense(row))
        return told + f", seed {seed}" * (" " in row["seeds"])

    names = {record: name(record) for record in curves if record in of_record}
    repeated = Counter(names.values())
    return {n + f" ({r[-12:]})" * (repeated[n] > 1): curves[r] for r, n in names.items()}


def _figure(curves: Mapping[str, Mapping[str, Any]], kinds: Sequence[tuple[str, str]], title: str) -> Any:
    """Draw the curves, a colour and a dash for each; the legend stands below, in the order of their last points."""
    from matplotlib.figure import Figure

    ways = [(colour, dash) for dash in DASHES for colour in figures.COLOURS]
    styles = {name: ways[index % len(ways)] for index, name in enumerate(sorted(curves))}
    height = 3.2 * len(kinds) + figures.LINE_HEIGHT * len(curves)
    figure = Figure(figsize=(8.5, height), layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    for axes, (kind, label) in zip(figure.subplots(len(kinds), sharex=True, squeeze=False)[:, 0], kinds, strict=True):
        axes.set_ylabel(label, fontsize=9)
        figures.plain(axes)
        for name, curve in curves.items():
            points = [(p["tokens"], p[kind]) for p in curve["points"] if kind in p]
            if points:
                colour, dash = styles[name]
                axes.plot(*zip(*points, strict=True), color=colour, linestyle=dash, linewidth=1.1, label=name)
        losses = [float(loss) for line in axes.lines for loss in line.get_ydata()]
        if losses and min(losses) > 0 and max(losses) > WIDE * min(losses):
            figures.logarithmic(axes, "y", losses)
    axes.set_xlabel("tokens")
    handles = {str(line.get_label()): line for axes in figure.axes for line in axes.lines}
    highest = sorted(handles, key=lambda name: -curves[name]["points"][-1].get(kinds[0][0], math.inf))
    figure.legend([handles[n] for n in highest], highest, loc="outside lower left", frameon=False, fontsize=8)
    return figure
