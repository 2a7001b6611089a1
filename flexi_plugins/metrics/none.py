"""No scores at all: the metric of strategies that choose by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flexi_plugins.data import Scores
from flexi_plugins.hookspecs import ImportanceMetric, PruningRequest, hookimpl


@dataclass(frozen=True)
class NoMetric:
    """Gives nothing."""

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = ""
    gives: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset()
    excused: ClassVar[dict[str, str]] = {"gives-what-it-declares": "that it gives nothing is what it is for"}

    def score(self, request: PruningRequest) -> Scores:
        """Return empty scores."""
        return Scores()


@hookimpl
def importance_metrics() -> list[ImportanceMetric]:
    """Return the metric none."""
    return [NoMetric()]
