"""What the pictures of reports share: colours, marks, scales that broken models do not squeeze, equal bytes for equal rows."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from flexi_plugins.reports.ranking import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by everybody; then, where there are more methods, the muted ones of Paul Tol
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#444444"),
    *("#332288", "#DDCC77", "#882255", "#88CCEE", "#117733", "#AA4499", "#999933", "#44AA99"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "8", "d")
GREY = "#777777"
LINE_HEIGHT = 0.2  # inches that a line of text takes
SCALE = 100.0  # times the best value: models that broke down, beyond it, do not squeeze the others together
STEPS = ((0.4, (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)), (1.5, (1, 2, 3, 5)), (3.0, (1, 3)), (math.inf, (1,)))


def settings() -> Any:
    """Return the settings under which a figure is made and written, for a ``with`` statement; global ones stay as they are."""
    import matplotlib

    return matplotlib.rc_context({"svg.hashsalt": "flexi_plugins"})


def svg(figure: Figure) -> str:
    """Return a figure as SVG text, the same text for the same figure."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def assigned(values: Sequence[str], choices: Sequence[str]) -> dict[str, str]:
    """Return a colour or mark for each distinct value, in alphabetical order."""
    return {value: choices[i % len(choices)] for i, value in enumerate(sorted(set(values)))}


def was_recovered(row: Row) -> bool:
    """Whether a row is of a model that was trained."""
    return str(row.get("recovery") or "none") != "none"


def fill(colour: str, hollow: bool) -> dict[str, str]:
    """Return the colours of a mark; where some models were recovered, those that were not are hollow."""
    return {"facecolor": "none", "edgecolor": colour} if hollow else {"facecolor": colour, "edgecolor": "white"}


def handle(label: str, marker: str, colour: str, size: int = 8) -> Any:
    """Return an entry of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="", marker=marker, color=colour, markersize=size, label=label)


def as_pruned() -> Any:
    """Return the entry of what is hollow where other models were recovered."""
    found = handle("as pruned", "o", GREY)
    found.set_markerfacecolor("none")
    return found


def plain(axes: Any) -> None:
    """Give axes a light grid behind what is drawn, and no frame."""
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def logarithmic(axes: Any, which: Literal["x", "y"], values: Sequence[float]) -> None:
    """Make an axis logarithmic, with ticks at readable numbers. values: (marks,), above 0."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    decades = math.log10(max(values) / min(values))
    steps = next(steps for most, steps in STEPS if decades <= most)
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
