"""Plugin manager and catalogue: who contributes what, from which distribution and version."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import inspect
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import pluggy

from flexi_plugins import hookspecs
from flexi_plugins.data import Family, PluginVersion
from flexi_plugins.errors import FlexiError, unknown

SETS = frozenset({"gives", "wants", "needs"})  # attributes of plugins that are sets of names
BUILT_IN = (
    "flexi_plugins.families.llama",
    "flexi_plugins.metrics.flexigpt",
    "flexi_plugins.metrics.come",
    "flexi_plugins.metrics.saap",
    "flexi_plugins.metrics.greedy",
    "flexi_plugins.metrics.none",
    "flexi_plugins.strategies.share_lora",
    "flexi_plugins.strategies.concat_merge",
    "flexi_plugins.strategies.least_squares_merge",
    "flexi_plugins.strategies.remove_blocks",
    "flexi_plugins.strategies.remove_units",
    "flexi_plugins.strategies.extend",
    "flexi_plugins.recovery.none",
    "flexi_plugins.recovery.lora",
    "flexi_plugins.recovery.adapters",
    "flexi_plugins.recovery.full",
    "flexi_plugins.recovery.group_quant",
    "flexi_plugins.recovery.distill",
    "flexi_plugins.evaluators.perplexity",
    "flexi_plugins.evaluators.tasks",
    "flexi_plugins.evaluators.efficiency",
    "flexi_plugins.corpora.python_docs",
    "flexi_plugins.corpora.hub",
    "flexi_plugins.reports.table",
    "flexi_plugins.reports.methods",
    "flexi_plugins.reports.pareto",
    "flexi_plugins.reports.curves",
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

WITH_OPTIONS = ("metric", "strategy", "recovery", "evaluator")  # the kinds whose options are set and recorded
CONTRACTS: dict[str, type] = {
    "metric": hookspecs.ImportanceMetric,
    "strategy": hookspecs.ReplacementStrategy,
    "recovery": hookspecs.RecoveryMethod,
    "evaluator": hookspecs.Evaluator,
    "statistic": hookspecs.Statistic,
    "corpus": hookspecs.Corpus,
    "report": hookspecs.ReportFormat,
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
        self._sources: dict[str, tuple[str, str]] = {}  # plugin name -> its distribution and version

    @classmethod
    def load(cls, built_in: tuple[str, ...] = BUILT_IN) -> Plugins:
        """Load the built-in plugins and the installed ones that ``FLEXI_PLUGINS`` allows.

        ``FLEXI_PLUGINS`` unset: all installed entry points; empty: none; else the comma-separated ones. An entry point
        that fails to import, or is no proper plugin (see ``add``), is reported in ``problems`` and left out; the others
        go on.
        """
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        plugins = cls(manager)
        own = ("flexi-plugins", importlib.metadata.version("flexi-plugins"))
        for module in built_in:
            manager.register(importlib.import_module(module), name=module)
            plugins._sources[module] = own
        manager.check_pending()
        plugins.problems = tuple(plugins._load_installed(os.environ.get("FLEXI_PLUGINS")))
        return plugins

    def add(self, plugin: Any, name: str | None = None, source: tuple[str, str] | None = None) -> None:
        """Register one more plugin, a module or object with hooks; source: its distribution and version.

        Raise a FlexiError, and leave it out, if it has a misspelt hook or none, a hook that fails, objects that are not
        what the contract says, or a name that is taken.
        """
        name = name or str(getattr(plugin, "__name__", None) or type(plugin).__name__)
        if plugin is None or self.manager.has_plugin(name) or self.manager.is_registered(plugin):
            raise FlexiError(f"plugin {name!r}: " + ("it is None" if plugin is None else "it is there already"))
        try:
            self.manager.register(plugin, name)
            problem = self._problem_of(plugin)
        except pluggy.PluginValidationError as error:
            problem = told(error)
        if problem:
            if self.manager.has_plugin(name):
                self.manager.unregister(name=name)
            raise FlexiError(f"plugin {name!r}: {problem}")
        self._sources[name] = source or (name, "unknown")

    def _load_installed(self, allowed: str | None) -> Iterator[str]:
        points: dict[str, list[importlib.metadata.EntryPoint]] = {}
        for point in importlib.metadata.entry_points(group=hookspecs.PROJECT):
            points.setdefault(point.name, []).append(point)
        names = sorted(points) if allowed is None else [n.strip() for n in allowed.split(",") if n.strip()]
        for name in dict.fromkeys(names):
            if name not in points:
                yield f"FLEXI_PLUGINS: {unknown('installed plugin', name, points)}"
                continue
            first, *others = points[name]
            yield from self._load_point(first)
            for other in others:
                taken = _source(first)[0]
                yield f"{_described(other)} is left out: {taken} has an entry point of the same name; uninstall one"

    def _load_point(self, point: importlib.metadata.EntryPoint) -> Iterator[str]:
        try:
            plugin = point.load()
        except (Exception, SystemExit) as error:  # a third party's import may fail in any way; the others go on
            yield f"{_described(point)} failed to import and is left out: {told(error)}"
            return
        try:
            self.add(plugin, point.name, _source(point))
        except FlexiError as error:
            yield f"{_described(point)} is left out: {str(error).removeprefix(f'plugin {point.name!r}: ')}"

    def _problem_of(self, plugin: Any) -> str | None:
        """Say what is wrong with a registered plugin; None if nothing is."""
        hooks = {n for n, v in vars(hookspecs).items() if hasattr(v, f"{hookspecs.PROJECT}_spec")}
        implemented = [caller.name for caller in self.manager.get_hookcallers(plugin) or ()]
        for name in implemented:
            if name not in hooks:
                return unknown("hook", name, hooks)
        for name in sorted(hooks.difference(implemented)):
            function = getattr(plugin, name, None)
            if inspect.isfunction(function) and function.__module__ == getattr(plugin, "__name__", None):
                return f"its function {name} is not marked with @flexi_plugins.hookimpl"
        if not implemented:
            return f"it has no hook; there is {', '.join(sorted(hooks))}, each marked with @flexi_plugins.hookimpl"
        problems = (self._problem_of_kind(plugin, kind) for kind, hook in KINDS.items() if hook in implemented)
        return next((p for p in problems if p), None)

    def _problem_of_kind(self, plugin: Any, kind: str) -> str | None:
        implementations = getattr(self.manager.hook, KINDS[kind]).get_hookimpls()
        [own] = [i for i in implementations if i.plugin is plugin]
        try:
            objects = own.function()
        except Exception as error:  # as at import
            return f"its hook {KINDS[kind]} failed: {told(error)}"
        if not isinstance(objects, list | tuple):
            return f"its hook {KINDS[kind]} returned {objects!r}, expected a list"
        taken = {v.name: (v, i.plugin_name) for i in implementations if i is not own for v in i.function()}
        for value in objects:
            problem = shape_problem(kind, value)
            if problem:
                return f"{KINDS[kind]} returned {value!r}: {problem}"
            if value.name in taken:
                other, owner = taken[value.name]
                return (
                    f"its {kind} {_where(value)} is called {value.name!r}, and so is {_where(other)} "
                    f"from {self._distribution(owner)[0]}"
                )
            taken[value.name] = (value, own.plugin_name)
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
            raise FlexiError("; ".join([unknown(kind, name, entries), *self.problems]))
        entry = entries[name]
        return dataclasses.replace(entry, object=with_options(kind, entry.object, options or {}))

    def families(self) -> dict[str, tuple[str, str]]:
        """Return the plugins that know model families, by the last part of their name: distribution and version."""
        known = self.manager.hook.model_family.get_hookimpls()
        return {i.plugin_name.rpartition(".")[2]: self._distribution(i.plugin_name) for i in known}

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
        return self._sources.get(plugin_name, (plugin_name, "unknown"))


def shape_problem(kind: str, value: Any) -> str | None:
    """Say why an object that a hook returned is not of its kind (see the Protocols of hookspecs); None if it is."""
    if isinstance(value, type):
        return f"it is a class, expected an instance: {value.__name__}()"
    parameters = getattr(type(value), "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        return f"a {kind} is an instance of a frozen dataclass, whose fields are its options"
    if not isinstance(getattr(value, "name", None), str) or not value.name.strip():
        return f"a {kind} needs a `name`"
    contract, promised = CONTRACTS[kind], _promised(kind)
    missing = sorted(n for n in promised if inspect.getattr_static(value, n, contract) is contract)
    if missing:
        return f"it has no {', '.join(missing)} (see hookspecs.{contract.__name__})"
    for attribute in sorted(promised & SETS):
        found = inspect.getattr_static(value, attribute, None)
        if isinstance(found, list | tuple | str):
            return f"its {attribute} is a {type(found).__name__}, expected a frozenset: {found!r}"
    return None


def _promised(kind: str) -> set[str]:
    """Return the names of what an object of a kind has."""
    contract = CONTRACTS[kind]
    return {n for n in (*vars(contract), *contract.__annotations__) if not n.startswith("_")}


def told(error: BaseException) -> str:
    """Return an exception as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextlib.contextmanager
def named(kind: str, name: str) -> Iterator[None]:
    """Say which plugin it was that raised anything but a FlexiError."""
    try:
        yield
    except FlexiError:
        raise
    except Exception as error:
        raise FlexiError(f"{kind} {name!r} failed before anything ran: {told(error)}") from error


def _source(point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("an unknown distribution", "unknown")


def _described(point: importlib.metadata.EntryPoint) -> str:
    return f"plugin {point.name!r} ({point.value}, from {_source(point)[0]})"


def _where(value: Any) -> str:
    owner = value if isinstance(value, type) else type(value)
    return f"{owner.__module__}.{owner.__qualname__}"


def options_of(value: Any) -> dict[str, Any]:
    """Return the options of a plugin object with their current values."""
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}


def options_json(value: Any) -> Mapping[str, Any]:
    """Return a plugin's options as JSON values."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in options_of(value).items()}


def own_knob(strategy: hookspecs.ReplacementStrategy) -> bool:
    """Whether an option of the strategy (a paper's own knob) takes the place of the ratio."""
    return any(getattr(strategy, name) is not None for name in getattr(strategy, "knobs", ()))


def check_compatible(metric: hookspecs.ImportanceMetric, strategy: hookspecs.ReplacementStrategy) -> None:
    """Raise unless the metric gives what the strategy wants."""
    reason = incompatible(metric, strategy)
    if reason:
        raise FlexiError(reason)


def incompatible(metric: hookspecs.ImportanceMetric, strategy: hookspecs.ReplacementStrategy) -> str | None:
    """Say why a metric and a strategy cannot work together; None if they can."""
    if not strategy.wants and metric.gives:
        return f"{strategy.name} chooses without scores; it goes with the metric none"
    missing = strategy.wants - metric.gives
    if not missing:
        return None
    if not metric.gives:
        return f"{strategy.name} wants {', '.join(sorted(strategy.wants))} scores, {metric.name} gives none"
    return (
        f"{strategy.name} wants {', '.join(sorted(strategy.wants))} scores, "
        f"{metric.name} gives {', '.join(sorted(metric.gives))} only"
    )


def with_options(kind: str, value: Any, options: Mapping[str, Any]) -> Any:
    """Return the plugin object with options set; errors list the options, and the choices of a Literal."""
    known = options_of(value)
    changes = {}
    for key, given in options.items():
        if key not in known:
            raise FlexiError(f"{kind} {value.name!r}: {unknown('option', key, known)}")
        where = f"{kind} {value.name!r}: option {key!r}"
        changes[key] = _convert(where, _hint(where, type(value), key), given)
    try:
        made = dataclasses.replace(value, **changes)
    except FlexiError:
        raise
    except Exception as error:  # a plugin's own check of its options may raise anything
        raise FlexiError(f"{kind} {value.name!r}: it refuses {changes}: {told(error)}") from error
    _check_sets(kind, made)
    return made


def _check_sets(kind: str, value: Any) -> None:
    """Raise where what a plugin says by properties, which may depend on its options, are no sets of names."""
    for attribute in sorted(_promised(kind) & SETS):
        with named(kind, value.name):
            found: Any = getattr(value, attribute, frozenset())
        if not isinstance(found, Set):
            raise FlexiError(
                f"{kind} {value.name!r}: its {attribute} is a {type(found).__name__}, expected a frozenset: {found!r}"
            )


def _hint(where: str, owner: type, key: str) -> Any:
    try:
        return typing.get_type_hints(owner)[key]
    except NameError as error:
        raise FlexiError(f"{where}: a type of {_where(owner)} is imported for the type checker only: {error}") from None


def _convert(where: str, hint: Any, given: Any) -> Any:
    """Check a value from TOML or the command line against a field's type; strings are parsed, lists become tuples."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        for choice in arguments:
            if (type(choice) is type(given) and choice == given) or str(choice) == given:
                return choice
        raise FlexiError(f"{where}: {unknown('choice', str(given), map(str, arguments))}")
    if origin in (typing.Union, types.UnionType):
        return _convert_union(where, hint, given)
    if origin is tuple:
        return _convert_tuple(where, arguments, given)
    if hint is bool and isinstance(given, bool):
        return given
    if hint is bool and isinstance(given, str) and given.lower() in ("true", "false"):
        return given.lower() == "true"
    if hint is str and isinstance(given, str):
        return given
    if hint in (int, float) and isinstance(given, int | float | str) and not isinstance(given, bool):
        with contextlib.suppress(ValueError, OverflowError):
            converted = hint(given)
            if math.isfinite(converted) and (hint is float or float(given) == converted):
                return converted
    raise FlexiError(f"{where}: expected {_spelt(hint)}, found {given!r}")


def _convert_union(where: str, hint: Any, given: Any) -> Any:
    choices = typing.get_args(hint)
    if type(None) in choices and given in (None, "none"):
        return None
    errors = []
    for choice in choices:
        if choice is not type(None):
            try:
                return _convert(where, choice, given)
            except FlexiError as error:
                errors.append(error)
    if len(errors) == 1 and given is not None:
        raise errors[0]
    raise FlexiError(f"{where}: expected {_spelt(hint)}, found {given!r}")


def _convert_tuple(where: str, arguments: tuple[Any, ...], given: Any) -> Any:
    if isinstance(given, str):
        given = [item.strip() for item in given.split(",") if item.strip()]
    if not isinstance(given, list | tuple):
        raise FlexiError(f"{where}: expected a list, found {given!r}")
    types_ = [arguments[0]] * len(given) if arguments[1:] == (...,) else list(arguments)
    if len(types_) != len(given):
        raise FlexiError(f"{where}: expected {len(types_)} values, found {len(given)}")
    return tuple(_convert(where, t, item) for t, item in zip(types_, given, strict=True))


def _spelt(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("NoneType", "None")
