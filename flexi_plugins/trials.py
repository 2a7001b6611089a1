"""What the models are worth that a search tries: each is measured once, and what a killed run measured is known again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from flexi_plugins.data import digest
from flexi_plugins.execution.likelihoods import AnswerJournal
from flexi_plugins.execution.sweep import Planned


class Trials:
    """One number a measure and plan, remembered; with a journal, in it too.

    setting: returns whatever else a number depends on (model, text, dtype), as JSON; only a journal needs to know.
    """

    def __init__(self, journal: AnswerJournal | None = None, setting: Callable[[], Any] = lambda: None) -> None:
        self.journal = journal
        self._setting = setting
        self._known: dict[tuple[str, str], float] = {}  # (measure, plan hash) -> number

    def of(
        self, measure: str, planned: Sequence[Planned], measured: Callable[[list[Planned]], list[float]]
    ) -> list[float]:
        """Return a number of each plan: what is known of its hash, or what ``measured`` gives for those that are not.

        measured: takes distinct plans, at least one, and returns a number each.
        """
        missing = {p.plan.hash: p for p in planned if not self._knows(measure, p.plan.hash)}
        if missing:
            found = measured(list(missing.values()))
            for plan_hash, number in zip(missing, found, strict=True):
                self._known[measure, plan_hash] = number
                if self.journal is not None:
                    self.journal.put(plan_hash, self._key(measure), [number])
        return [self._known[measure, p.plan.hash] for p in planned]

    def _knows(self, measure: str, plan_hash: str) -> bool:
        if (measure, plan_hash) not in self._known and self.journal is not None:
            kept = self.journal.get(plan_hash, self._key(measure))
            if kept is not None:
                (self._known[measure, plan_hash],) = map(float, kept)
        return (measure, plan_hash) in self._known

    def _key(self, measure: str) -> str:
        return digest(["trial", measure, self._found_setting])

    @cached_property
    def _found_setting(self) -> Any:
        return self._setting()
