"""Report format ``curves``: how the loss fell while models were trained, as an SVG; nothing where none was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from flexi_plugins import hookimpl
from flexi_plugins.hookspecs import ReportFormat
from flexi_plugins.reports import figures

if TYPE_CHECKING:
    import pandas as pd

Curve = Sequence[Mapping[str, float]]
KINDS = (
    ("held_out_loss", "held-out loss (nats a token)"),
    ("held_out_block_loss", "held-out loss of blocks trained apart (sum)"),
    ("loss", "training loss (of each method's own kind)"),
)


@hookimpl
def report_formats() -> list[ReportFormat]:
    """Return the format of this file."""
    return [Curves()]


@dataclass(frozen=True)
class Curves:
    """Held-out and training loss against tokens, a line a cell, a colour a recovery method."""

    name: ClassVar[str] = "curves"
    filename: ClassVar[str] = "curves.svg"
    excused: ClassVar[dict[str, str]] = {
        "renders-every-study": "a study that trains nothing has no curve",
        "shows-every-method": "only what was trained has a curve",
    }

    def render(self, rows: pd.DataFrame, title: str) -> str:
        """Render the curves in ``rows.attrs`` (label -> method and points) as SVG text; empty without any."""
        curves = rows.attrs.get("curves", {})
        there = {name for curve in curves.values() for point in curve["points"] for name in point}
        kinds = [(kind, label) for kind, label in KINDS if kind in there]
        if not kinds:
            return ""
        with figures.settings():
            return figures.svg(_figure(curves, kinds, title))


def _figure(curves: Mapping[str, Mapping[str, Any]], kinds: Sequence[tuple[str, str]], title: str) -> Any:
    from matplotlib.figure import Figure

    colours = figures.assigned([curve["method"] for curve in curves.values()], figures.COLOURS)
    figure = Figure(figsize=(8.5, 7.0), layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    for axes, (kind, label) in zip(figure.subplots(len(kinds), sharex=True, squeeze=False)[:, 0], kinds, strict=True):
        axes.set_ylabel(label)
        figures.plain(axes)
        for curve in curves.values():
            points = [(p["tokens"], p[kind]) for p in curve["points"] if kind in p]
            if points:
                axes.plot(*zip(*points, strict=True), color=colours[curve["method"]], linewidth=1.1)
    axes.set_xlabel("tokens")
    for method, colour in colours.items():
        axes.plot([], [], color=colour, label=method)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure
