"""A pytest plugin for authors of plugins: ``flexi_check`` runs the conformance kit, one test an object and check.

    def test_conformance(flexi_check):
        flexi_check()

checks everything that installed distributions contribute. ``@pytest.mark.flexi(...)`` names the plugins instead, as
modules, objects with hooks, or module names; they need not be installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from flexi_plugins.plugins import Plugins

FIXTURE = "flexi_check"


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line(
        "markers", "flexi(plugin, ...): which plugins flexi_check checks (modules, objects, or module names)"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of every object and check."""
    if FIXTURE not in metafunc.fixturenames:
        return
    from flexi_plugins.errors import FlexiError
    from flexi_plugins.plugins import Plugins

    marker = metafunc.definition.get_closest_marker("flexi")
    plugins = Plugins.load()
    try:
        chosen = list(_named(plugins, marker.args) if marker else _installed(plugins))
    except FlexiError as error:
        raise pytest.UsageError(f"{FIXTURE}: {error}") from None

    from flexi_plugins.testing.conformance import checks_for, contributed

    objects = [pair for plugin in chosen for pair in contributed(plugins, plugin)]
    if not objects:
        named = ", ".join(getattr(plugin, "__name__", str(plugin)) for plugin in chosen)
        raise pytest.UsageError(
            f"{FIXTURE}: {named} has nothing to check: no metric, strategy, recovery, evaluator, statistic, corpus or report "
            "format (a model family is shown by a checkpoint of its own)"
        )
    found = [check for kind, value in objects for check in checks_for(kind, value, plugins)]
    metafunc.parametrize(FIXTURE, [run for _, run in found], ids=[name for name, _ in found])


def _named(plugins: Plugins, wanted: tuple[Any, ...]) -> Iterator[Any]:
    for plugin in wanted:
        module = importlib.import_module(plugin) if isinstance(plugin, str) else plugin
        if not plugins.manager.is_registered(module):
            plugins.add(module)
        yield module


def _installed(plugins: Plugins) -> Iterator[Any]:
    """Yield what installed distributions registered; that nothing is there, or something is wrong, is an error."""
    from flexi_plugins.errors import FlexiError
    from flexi_plugins.plugins import BUILT_IN

    if plugins.problems:
        raise FlexiError("; ".join(plugins.problems))
    found = [p for n, p in plugins.manager.list_name_plugin() if n not in BUILT_IN and p is not None]
    if not found:
        raise FlexiError(
            "no distribution with an entry point flexi_plugins is installed; install yours, or name its module with "
            "@pytest.mark.flexi(MODULE)"
        )
    yield from found
