"""Plugin manager and catalogue: who contributes what, from which distribution and version."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pluggy

from flexi_plugins import hookspecs
from flexi_plugins.data import Family, PluginVersion
from flexi_plugins.errors import FlexiError, unknown

BUILT_IN = (
    "flexi_plugins.families.llama",
    "flexi_plugins.metrics.flexigpt",
    "flexi_plugins.metrics.come",
    "flexi_plugins.metrics.saap",
    "flexi_plugins.strategies.share_lora",
    "flexi_plugins.strategies.concat_merge",
    "flexi_plugins.strategies.remove_blocks",
    "flexi_plugins.strategies.remove_units",
    "flexi_plugins.recovery.none",
    "flexi_plugins.evaluators.perplexity",
    "flexi_plugins.evaluators.tasks",
    "flexi_plugins.evaluators.efficiency",
    "flexi_plugins.corpora.python_docs",
    "flexi_plugins.corpora.hub",
    "flexi_plugins.reports.table",
    "flexi_plugins.reports.pareto",
)

KINDS = {
    "metric": "importance_metrics",
    "strategy": "replacement_strategies",
    "recovery": "recovery_methods",
    "evaluator": "evaluators",
    "statistic": "statistics",
    "corpus": "corpora",
    "report": "report_formats",
}


@dataclass(frozen=True)
class Entry:
    """One plugin object in the catalogue and where it came from."""

    kind: str
    object: Any
    distribution: str
    version: str

    @property
    def provenance(self) -> PluginVersion:
        """The part of it that goes into a cell."""
        return PluginVersion(self.kind, self.object.name, self.distribution, self.version)


class Plugins:
    """All loaded plugins. The catalogue is derived from the hooks at each look-up; nothing is cached or global."""

    def __init__(self, manager: pluggy.PluginManager, problems: tuple[str, ...] = ()) -> None:
        self.manager = manager
        self.problems = problems

    @classmethod
    def load(cls, built_in: tuple[str, ...] = BUILT_IN) -> Plugins:
        """Load the built-in plugins and the installed ones that ``FLEXI_PLUGINS`` allows.

        ``FLEXI_PLUGINS`` unset: all installed entry points; empty: none; else the comma-separated ones. An entry point
        that fails to import, or has a misspelt hook, is reported in ``problems`` and left out; the others go on.
        """
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        for module in built_in:
            manager.register(importlib.import_module(module), name=module)
        manager.check_pending()
        plugins = cls(manager)
        return cls(manager, tuple(plugins._load_installed(os.environ.get("FLEXI_PLUGINS"))))

    def _load_installed(self, allowed: str | None) -> Iterator[str]:
        points = {e.name: e for e in importlib.metadata.entry_points(group=hookspecs.PROJECT)}
        wanted = list(points) if allowed is None else [n.strip() for n in allowed.split(",") if n.strip()]
        for name in wanted:
            if name not in points:
                yield f"FLEXI_PLUGINS: {unknown('installed plugin', name, points)}"
                continue
            point = points[name]
            source = (
                f"plugin {name!r} ({point.value}, from {point.dist.name if point.dist else 'an unknown distribution'})"
            )
            try:
                plugin = point.load()
            except Exception as error:  # a third party's import may fail in any way; it must not take the others along
                yield f"{source} failed to import and is left out: {type(error).__name__}: {error}"
                continue
            self.manager.register(plugin, name=name)
            problem = self._problem_of(plugin)
            if problem:
                self.manager.unregister(name=name)
                yield f"{source} is left out: {problem}"

    def _problem_of(self, plugin: Any) -> str | None:
        """Say what is wrong with a registered plugin: a misspelt hook, or a hook that raises."""
        hooks = {n for n, v in vars(hookspecs).items() if hasattr(v, f"{hookspecs.PROJECT}_spec")}
        for caller in self.manager.get_hookcallers(plugin) or ():
            if caller.name not in hooks:
                return unknown("hook", caller.name, hooks)
        for kind, hook in KINDS.items():
            for implementation in getattr(self.manager.hook, hook).get_hookimpls():
                if implementation.plugin is not plugin:
                    continue
                try:
                    objects = implementation.function()
                except Exception as error:  # see above
                    return f"its hook {hook} failed: {type(error).__name__}: {error}"
                for value in objects:
                    problem = _shape_problem(kind, value)
                    if problem:
                        return f"{hook} returned {value!r}: {problem}"
        return None

    # -- look-ups

    def entries(self, kind: str) -> dict[str, Entry]:
        """Return the catalogue of one kind by name; a duplicate name is an error that names both sides."""
        found: dict[str, Entry] = {}
        caller = getattr(self.manager.hook, KINDS[kind])
        for implementation in caller.get_hookimpls():
            distribution, version = self._distribution(implementation.plugin_name)
            for value in implementation.function():
                if value.name in found:
                    other = found[value.name]
                    raise FlexiError(
                        f"two {kind} plugins are called {value.name!r}: {_where(other.object)} from {other.distribution} and "
                        f"{_where(value)} from {distribution}; disable one with FLEXI_PLUGINS"
                    )
                found[value.name] = Entry(kind, value, distribution, version)
        return dict(sorted(found.items()))

    def get(self, kind: str, name: str, options: Mapping[str, Any] | None = None) -> Any:
        """Return the plugin of this name with these options set; an unknown name or option lists the near ones."""
        return self.entry(kind, name, options).object

    def entry(self, kind: str, name: str, options: Mapping[str, Any] | None = None) -> Entry:
        """Return the catalogue entry of this name, its object with these options set."""
        entries = self.entries(kind)
        if name not in entries:
            raise FlexiError(unknown(kind, name, entries))
        entry = entries[name]
        return dataclasses.replace(entry, object=with_options(kind, entry.object, options or {}))

    def family(self, config: Any) -> Family:
        """Return the family of a transformers configuration."""
        family = self.manager.hook.model_family(config=config)
        if family is None:
            raise FlexiError(
                f"model type {getattr(config, 'model_type', '?')!r} is not of the Llama shape and no installed plugin knows it "
                "(hook model_family); there is llama, mistral, qwen2, qwen3"
            )
        return family

    def _distribution(self, plugin_name: str) -> tuple[str, str]:
        if plugin_name.startswith("flexi_plugins."):
            return "flexi-plugins", importlib.metadata.version("flexi-plugins")
        for point in importlib.metadata.entry_points(group=hookspecs.PROJECT, name=plugin_name):
            if point.dist:
                return point.dist.name, point.dist.version
        return plugin_name, "unknown"


def _shape_problem(kind: str, value: Any) -> str | None:
    if not isinstance(getattr(value, "name", None), str):
        return f"a {kind} needs a `name`"
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return f"a {kind} is an instance of a frozen dataclass (its fields are its options)"
    return None


def _where(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def options_of(value: Any) -> dict[str, Any]:
    """Return the options of a plugin object with their current values."""
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}


def with_options(kind: str, value: Any, options: Mapping[str, Any]) -> Any:
    """Return the plugin object with options set; errors list the options, and the choices of a Literal."""
    known = options_of(value)
    hints = typing.get_type_hints(type(value))
    changes = {}
    for key, given in options.items():
        if key not in known:
            raise FlexiError(f"{kind} {value.name!r}: {unknown('option', key, known)}")
        changes[key] = _convert(f"{kind} {value.name!r}: option {key!r}", hints[key], given)
    return dataclasses.replace(value, **changes)


def _convert(where: str, hint: Any, given: Any) -> Any:
    """Check a value from TOML or the command line against a field's type; strings are parsed, lists become tuples."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if given not in arguments:
            raise FlexiError(f"{where}: {unknown('choice', str(given), map(str, arguments))}")
        return given
    if origin in (typing.Union, types.UnionType):
        if given is None or given == "none":
            return None
        return _convert(where, next(a for a in arguments if a is not type(None)), given)
    if origin is tuple:
        items = given.split(",") if isinstance(given, str) else list(given)
        return tuple(_convert(where, arguments[0], item) for item in items)
    if hint is bool and isinstance(given, str):
        if given.lower() in ("true", "false"):
            return given.lower() == "true"
    elif hint is bool and isinstance(given, bool):
        return given
    elif hint in (int, float, str) and not isinstance(given, bool):
        try:
            converted = hint(given)
            if hint is not int or float(given) == converted:
                return converted
        except (TypeError, ValueError):
            pass
    raise FlexiError(f"{where}: expected {getattr(hint, '__name__', hint)}, found {given!r}")
