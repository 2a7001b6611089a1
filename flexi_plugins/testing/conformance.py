"""The conformance kit: named checks for every kind of plugin object but model families, built-in or of third parties.

A check raises an AssertionError or a FlexiError that says what was expected and what was found. A method that has a good
reason not to pass one (a control that scores at random, say) names it in a class variable ``excused``, a mapping of
check name to reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from flexi_plugins.errors import FlexiError
from flexi_plugins.plugins import KINDS, Entry, Plugins, told
from flexi_plugins.progress import Progress
from flexi_plugins.testing import (
    corpus_checks,
    evaluator_checks,
    metric_checks,
    recovery_checks,
    report_checks,
    statistic_checks,
    strategy_checks,
)
from flexi_plugins.testing.bench import Bench, expect
from flexi_plugins.testing.declaration_checks import declaration_checks

Check = Callable[[Bench, Any], None]
OWN: Mapping[str, tuple[Any, ...]] = {
    "metric": metric_checks.CHECKS,
    "strategy": strategy_checks.CHECKS,
    "recovery": recovery_checks.CHECKS,
    "evaluator": evaluator_checks.CHECKS,
    "statistic": statistic_checks.CHECKS,
    "corpus": corpus_checks.CHECKS,
    "report": report_checks.CHECKS,
}


def checks_of(kind: str) -> dict[str, Check]:
    """Return the checks of a kind by name, in the order in which they are run."""
    every = (*declaration_checks(kind), excuses_name_checks(kind), *OWN[kind])
    return {check.__name__.replace("_", "-"): check for check in every}


def excuses_name_checks(kind: str) -> Check:
    """Return the check that what an object is excused from exists, and has a reason."""

    def excuses_are_known(bench: Bench, plugin: Any) -> None:
        """``excused`` maps names of checks to reasons."""
        known = checks_of(kind)
        for name, reason in getattr(plugin, "excused", {}).items():
            expect(name in known, f"it is excused from {name!r}; there is {', '.join(known)}")
            expect(isinstance(reason, str) and reason.strip(), f"it is excused from {name!r} without a reason")

    return excuses_are_known


def checks_for(kind: str, plugin: Any, plugins: Plugins) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield (id, check to call) for every check of one object; ``plugins`` offers the statistics that it needs.

    The checks of an object share tiny models; no other object sees them, whatever it does to them.
    """
    bench = Bench(plugins)
    name = getattr(plugin, "name", None) or type(plugin).__name__
    for check_name, check in checks_of(kind).items():
        if check_name not in getattr(plugin, "excused", {}):
            yield f"{kind}-{name}-{check_name}", partial(_run, check, bench, plugin)


def _run(check: Check, bench: Bench, plugin: Any) -> None:
    """Run a check on one thread: on tiny tensors more of them cost several times what they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        check(bench, plugin)
    finally:
        torch.set_num_threads(threads)


def contributed(plugins: Plugins, plugin: Any) -> Iterator[tuple[str, Any]]:
    """Yield (kind, object) for everything that one registered plugin contributes."""
    for kind, hook in KINDS.items():
        for implementation in getattr(plugins.manager.hook, hook).get_hookimpls():
            if implementation.plugin is plugin:
                for value in implementation.function():
                    yield kind, value


def check_all(plugins: Plugins, progress: Progress | None = None) -> list[str]:
    """Run every check on every object in the catalogue; return problems, a line each."""
    problems: list[str] = []
    entries: list[tuple[str, Entry]] = []
    for kind in KINDS:
        try:
            entries += ((kind, entry) for entry in plugins.entries(kind).values())
        except FlexiError as error:  # two of one name
            problems.append(str(error))
    progress = progress or Progress(quiet=True)
    with progress.stage(f"checking {len(entries)} plugins on tiny models", len(entries)) as advance:
        for kind, entry in entries:
            where = f"{kind} {entry.object.name!r} ({entry.distribution} {entry.version})"
            for name, run in checks_for(kind, entry.object, plugins):
                problem = problem_of(run)
                if problem:
                    problems.append(f"{where}: {name.removeprefix(f'{kind}-{entry.object.name}-')}: {problem}")
            advance(1, f"{kind} {entry.object.name}")
    return problems


def problem_of(run: Callable[[], None]) -> str | None:
    """Run a check and return what it found wrong, on one line; None if nothing."""
    try:
        run()
    except (AssertionError, FlexiError) as error:
        return " ".join(str(error).split()) or f"it failed with {told(error)}"
    except Exception as error:  # a third party's method may fail in any way; the other checks go on
        return f"it failed with {told(error)}"
    return None
