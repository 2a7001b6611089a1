"""Checks of what any plugin object says of itself: its contract, its name, and options that a record can hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from flexi_plugins.plugins import WITH_OPTIONS, options_json, options_of, shape_problem, with_options
from flexi_plugins.testing.bench import Bench, expect

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]*")
WITH_PAPER = ("metric", "strategy", "recovery")


def declaration_checks(kind: str) -> tuple[Callable[[Bench, Any], None], ...]:
    """Return the checks of declarations that apply to a kind."""

    def is_what_its_contract_says(bench: Bench, plugin: Any) -> None:
        """It is an instance of a frozen dataclass with all that its Protocol in hookspecs promises."""
        problem = shape_problem(kind, plugin)
        expect(problem is None, str(problem))

    chosen: list[Callable[[Bench, Any], None]] = [is_what_its_contract_says, has_a_name]
    chosen += [cites_its_paper] if kind in WITH_PAPER else []

    def options_survive_a_record(bench: Bench, plugin: Any) -> None:
        """Options written into a record as JSON and read back make an equal object."""
        text = json.dumps(options_json(plugin), allow_nan=False)
        again = with_options(kind, plugin, json.loads(text))
        expect(again == plugin, f"expected options {options_of(plugin)}, read back {options_of(again)}")

    return (*chosen, options_survive_a_record) if kind in WITH_OPTIONS else tuple(chosen)


def has_a_name(bench: Bench, plugin: Any) -> None:
    """Its name fits into file names, lists on the command line and tables."""
    expect(
        isinstance(plugin.name, str) and NAME.fullmatch(plugin.name),
        f"expected a name of letters, digits and . _ @ + -, found {plugin.name!r}",
    )


def cites_its_paper(bench: Bench, plugin: Any) -> None:
    """``paper`` is text; empty if there is none."""
    expect(isinstance(plugin.paper, str), f"expected paper to be text, found {plugin.paper!r}")
