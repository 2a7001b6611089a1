"""Plugins: whatever is wrong with one is said in a line, and the others go on; names, options and provenance."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pluggy
import pytest

from flexi_plugins import hookimpl
from flexi_plugins.errors import FlexiError
from flexi_plugins.metrics.come import CoMe
from flexi_plugins.plugins import BUILT_IN, KINDS, Plugins, options_of, with_options

SMALL = ("flexi_plugins.families.llama", "flexi_plugins.metrics.come")

GOOD = """
from dataclasses import dataclass
from typing import ClassVar
import flexi_plugins
from flexi_plugins.metrics.come import CoMe

@dataclass(frozen=True)
class {Class}(CoMe):
    name: ClassVar[str] = "{name}"

@flexi_plugins.hookimpl
def importance_metrics():
    return [{Class}()]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that installs a distribution with one module and its entry points."""
    monkeypatch.delenv("FLEXI_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(module: str, source: str, version: str = "1.0", **points: str) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: {version}\n")
        lines = [f"{name} = {target}" for name, target in (points or {module: module}).items()]
        (info / "entry_points.txt").write_text("\n".join(["[flexi_plugins]", *lines, ""]))
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install


def good(name: str) -> str:
    return GOOD.format(Class=name.title().replace("-", ""), name=name)


def problem(plugins: Plugins) -> str:
    """Return the one problem, on one line."""
    [found] = plugins.problems
    assert "\n" not in found
    return found


# --------------------------------------------------------------------------------- what is wrong with a plugin


def test_installed_plugins_are_in_the_catalogue_with_distribution_and_version(install: Callable[..., None]) -> None:
    install("fine_one", good("fine"), version="2.5")
    plugins = Plugins.load(SMALL)
    assert plugins.problems == ()
    entry = plugins.entries("metric")["fine"]
    assert (entry.distribution, entry.version) == ("fine-one", "2.5")
    assert entry.provenance.kind == "metric"
    assert plugins.entries("metric")["come"].distribution == "flexi-plugins"


BAD_IMPORTS = {
    "missing_module": (
        "import no_such_module_anywhere",
        "ModuleNotFoundError: No module named 'no_such_module_anywhere'",
    ),
    "bad_syntax": ("def broken(:", "SyntaxError"),
    "many_lines": ("raise RuntimeError('first line\\nsecond line')", "RuntimeError: first line second line"),
    "exits": ("import sys\nsys.exit('this needs a GPU')", "SystemExit: this needs a GPU"),
}


@pytest.mark.parametrize("module", BAD_IMPORTS)
def test_a_plugin_that_fails_to_import_is_named_and_the_others_go_on(module: str, install: Callable[..., None]) -> None:
    source, said = BAD_IMPORTS[module]
    install(module, source)
    install("z_fine", good("fine"))
    plugins = Plugins.load(SMALL)
    found = problem(plugins)
    assert found.startswith(
        f"plugin '{module}' ({module}, from {module.replace('_', '-')}) failed to import and is left"
    )
    assert said in found
    assert set(plugins.entries("metric")) == {"come", "fine"}


def test_who_asks_for_a_plugin_that_is_left_out_is_told_why(install: Callable[..., None]) -> None:
    install("gone", "import no_such_module_anywhere")
    with pytest.raises(FlexiError, match=r"unknown metric 'gone'.*; plugin 'gone' .*No module named 'no_such_module"):
        Plugins.load(SMALL).get("metric", "gone")


def test_options_that_a_plugin_itself_refuses_are_an_error_that_names_it(install: Callable[..., None]) -> None:
    source = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Own(CoMe):
    power: int = 1
    name = 'own'

    def __post_init__(self):
        if self.power < 1:
            raise ValueError('power must be positive')

@flexi_plugins.hookimpl
def importance_metrics():
    return [Own()]
"""
    install("own", HEAD + source)
    with pytest.raises(FlexiError, match=r"metric 'own': it refuses {'power': 0}: ValueError: power must be positive"):
        Plugins.load(SMALL).get("metric", "own", {"power": "0"})


def test_an_entry_point_without_its_object_is_named(install: Callable[..., None]) -> None:
    install("renamed", good("fine"), point="renamed:old_name")
    assert "failed to import and is left out: AttributeError" in problem(Plugins.load(SMALL))


HEAD = "import flexi_plugins\nfrom flexi_plugins.metrics.come import CoMe\n"
BAD_PLUGINS = {
    "misspelt": (
        "@flexi_plugins.hookimpl\ndef importance_metric():\n    return [CoMe()]",
        "unknown hook 'importance_metric': did you mean 'importance_metrics'",
    ),
    "misspelt_beside_a_good_one": (
        "@flexi_plugins.hookimpl\ndef statistics():\n    return []\n"
        "@flexi_plugins.hookimpl\ndef replacement_strategy():\n    return []",
        "unknown hook 'replacement_strategy': did you mean 'replacement_strategies'",
    ),
    "arguments": (
        "@flexi_plugins.hookimpl\ndef importance_metrics(request):\n    return [CoMe()]",
        "Argument(s) {'request'} are declared in the hookimpl but can not be found in the hookspec",
    ),
    "raises": (
        "@flexi_plugins.hookimpl\ndef importance_metrics():\n    raise KeyError('weights')",
        "its hook importance_metrics failed: KeyError: 'weights'",
    ),
    "returns_none": (
        "@flexi_plugins.hookimpl\ndef importance_metrics():\n    [CoMe()]",
        "its hook importance_metrics returned None, expected a list",
    ),
    "returns_one": (
        "@flexi_plugins.hookimpl\ndef importance_metrics():\n    return CoMe()",
        "its hook importance_metrics returned CoMe(), expected a list",
    ),
    "returns_a_class": (
        "@flexi_plugins.hookimpl\ndef importance_metrics():\n    return [CoMe]",
        "it is a class, expected an instance: CoMe()",
    ),
    "no_dataclass": (
        "class Plain:\n    name = 'plain'\n@flexi_plugins.hookimpl\ndef importance_metrics():\n    return [Plain()]",
        "a metric is an instance of a frozen dataclass, whose fields are its options",
    ),
    "no_name": (
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Anonymous:\n    pass\n"
        "@flexi_plugins.hookimpl\ndef importance_metrics():\n    return [Anonymous()]",
        "a metric needs a `name`",
    ),
    "incomplete": (
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Bare:\n    name = 'bare'\n    gives = ()\n"
        "@flexi_plugins.hookimpl\ndef importance_metrics():\n    return [Bare()]",
        "it has no needs, paper, score (see hookspecs.ImportanceMetric)",
    ),
    "unmarked": (
        "def importance_metrics():\n    return [CoMe()]",
        "its function importance_metrics is not marked with @flexi_plugins.hookimpl",
    ),
    "no_hook": ("METRIC = CoMe()", "it has no hook; there is corpora, evaluators, importance_metrics"),
    "nothing": ("plugin = None", "it has no hook"),
    "taken": (
        "@flexi_plugins.hookimpl\ndef importance_metrics():\n    return [CoMe()]",
        "its metric flexi_plugins.metrics.come.CoMe is called 'come', and so is flexi_plugins.metrics.come.CoMe "
        "from flexi-plugins",
    ),
    "tupled": (
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Own(CoMe):\n    name = 'own'\n    gives = ('block',)\n"
        "@flexi_plugins.hookimpl\ndef importance_metrics():\n    return [Own()]",
        "its gives is a tuple, expected a frozenset: ('block',)",
    ),
    "twice": (
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Own(CoMe):\n    name = 'own'\n"
        "@flexi_plugins.hookimpl\ndef importance_metrics():\n    return [Own(), Own()]",
        "its metric twice.Own is called 'own', and so is twice.Own from",
    ),
}


@pytest.mark.parametrize("module", BAD_PLUGINS)
def test_a_plugin_that_is_no_proper_one_is_named_and_the_others_go_on(
    module: str, install: Callable[..., None]
) -> None:
    source, said = BAD_PLUGINS[module]
    install(module, HEAD + source)
    install("z_fine", good("fine"))
    plugins = Plugins.load(SMALL)
    found = problem(plugins)
    assert found.startswith(f"plugin '{module}' ({module}, from {module.replace('_', '-')}) is left out: ")
    assert said in found
    assert set(plugins.entries("metric")) == {"come", "fine"}


PROPERTIES = """
from dataclasses import dataclass
@dataclass(frozen=True)
class Own(CoMe):
    name = 'own'
    how: str = 'list'
    @property
    def needs(self):
        return {'list': ['x'], 'set': {'x'}, 'none': None}.get(self.how) if self.how != 'raises' else 1 / 0
@flexi_plugins.hookimpl
def importance_metrics():
    return [Own()]
"""


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("list", r"metric 'own': its needs is a list, expected a frozenset: \['x'\]"),
        ("none", "metric 'own': its needs is a NoneType, expected a frozenset: None"),
        ("raises", "metric 'own' failed before anything ran: ZeroDivisionError"),
    ],
)
def test_sets_that_depend_on_options_are_looked_at_with_them(
    install: Callable[..., None], how: str, message: str
) -> None:
    install("own_metric", HEAD + PROPERTIES)
    plugins = Plugins.load(SMALL)
    with pytest.raises(FlexiError, match=message):
        plugins.get("metric", "own", {"how": how})
    assert plugins.get("metric", "own", {"how": "set"}).needs == {"x"}


def test_names_from_the_standard_library_are_not_taken_for_unmarked_hooks(install: Callable[..., None]) -> None:
    install("borrows", "import statistics\n" + good("fine"))
    assert Plugins.load(SMALL).problems == ()


def test_two_distributions_with_one_entry_point_name_are_both_named(install: Callable[..., None]) -> None:
    install("first", good("one"), metric="first")
    install("second", good("two"), metric="second")
    plugins = Plugins.load(SMALL)
    found = problem(plugins)
    assert "has an entry point of the same name" in found
    assert "first" in found
    assert "second" in found
    assert len(plugins.entries("metric")) == 2


def test_one_module_under_two_names_is_loaded_once(install: Callable[..., None]) -> None:
    install("double", good("fine"), one="double", two="double")
    plugins = Plugins.load(SMALL)
    assert problem(plugins) == "plugin 'two' (double, from double) is left out: it is there already"
    assert "fine" in plugins.entries("metric")


def test_flexi_plugins_names_what_is_loaded(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    install("first", good("one"))
    install("second", good("two"))
    monkeypatch.setenv("FLEXI_PLUGINS", " second ,")
    assert set(Plugins.load(SMALL).entries("metric")) == {"come", "two"}
    monkeypatch.setenv("FLEXI_PLUGINS", "")
    assert set(Plugins.load(SMALL).entries("metric")) == {"come"}
    monkeypatch.setenv("FLEXI_PLUGINS", "frist")
    assert "unknown installed plugin 'frist': did you mean 'first'? there is first, second" in problem(
        Plugins.load(SMALL)
    )


def test_a_misspelt_hook_of_our_own_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("own_module")
    vars(module)["importance_metric"] = hookimpl(lambda: [CoMe()])
    monkeypatch.setitem(sys.modules, "own_module", module)
    with pytest.raises(pluggy.PluginValidationError, match="unknown hook 'importance_metric'"):
        Plugins.load(("own_module",))


def test_a_plugin_can_be_added_by_hand() -> None:
    @dataclass(frozen=True)
    class Mine(CoMe):
        name: ClassVar[str] = "mine"

    class Contribution:
        @hookimpl
        def importance_metrics(self) -> list[Any]:
            return [Mine()]

    plugins = Plugins.load(SMALL)
    contribution = Contribution()
    plugins.add(contribution)
    assert plugins.entries("metric")["mine"].distribution == "Contribution"
    with pytest.raises(FlexiError, match="plugin 'Contribution': it is there already"):
        plugins.add(contribution)
    with pytest.raises(FlexiError, match=r"plugin 'again': its metric .*Mine is called 'mine', and so is"):
        plugins.add(Contribution(), "again")
    assert list(plugins.entries("metric")) == ["come", "mine"]
    with pytest.raises(FlexiError, match="it is None"):
        plugins.add(None)


def test_two_plugins_of_one_name_are_an_error_that_names_both_sides() -> None:
    @dataclass(frozen=True)
    class Rival(CoMe):
        pass

    module = types.ModuleType("rival")
    vars(module)["importance_metrics"] = hookimpl(specname="importance_metrics")(lambda: [Rival()])
    plugins = Plugins.load(SMALL)
    plugins.manager.register(module, "rival")
    with pytest.raises(FlexiError) as caught:
        plugins.entries("metric")
    text = str(caught.value)
    assert "two metric plugins are called 'come'" in text
    assert "flexi_plugins.metrics.come.CoMe from flexi-plugins" in text
    assert "Rival from rival" in text


# ------------------------------------------------------------------------------------------- names and options


def test_an_unknown_name_lists_near_ones() -> None:
    plugins = Plugins.load()
    with pytest.raises(
        FlexiError, match=r"unknown metric 'flexgpt': did you mean 'flexigpt'.* there is come, flexigpt"
    ):
        plugins.get("metric", "flexgpt")
    with pytest.raises(FlexiError, match="unknown strategy 'remove-block': did you mean 'remove-blocks'"):
        plugins.get("strategy", "remove-block")


def test_an_unknown_option_or_choice_lists_near_ones() -> None:
    plugins = Plugins.load()
    with pytest.raises(FlexiError, match="strategy 'concat-merge': unknown option 'repeats': did you mean 'repeat'"):
        plugins.get("strategy", "concat-merge", {"repeats": True})
    with pytest.raises(
        FlexiError, match=r"'pairs': unknown choice 'scores': did you mean 'score'. there is mka, own, score, sleb"
    ):
        plugins.get("strategy", "concat-merge", {"pairs": "scores"})


def test_options_are_set_on_a_copy() -> None:
    plugins = Plugins.load()
    changed = plugins.get("strategy", "remove-units", {"multiple": 16, "rule": "undivided"})
    assert (changed.multiple, changed.rule) == (16, "undivided")
    assert plugins.get("strategy", "remove-units").multiple == 8


def test_an_unknown_architecture_says_which_ones_there_are() -> None:
    with pytest.raises(FlexiError, match=r"model type 'gpt2' is not of the Llama shape.*llama, mistral, qwen2, qwen3"):
        Plugins.load().family(types.SimpleNamespace(model_type="gpt2"))


@dataclass(frozen=True)
class Everything:
    """One option of every type."""

    whole: int = 1
    number: float = 1.0
    text: str = "a"
    flag: bool = False
    mode: Literal["fast", "slow"] = "fast"
    level: Literal[1, 2] = 1
    maybe: int | None = None
    label: str | None = None
    several: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    pair: tuple[int, str] = (0, "")
    either: int | str = 0
    listed: list[int] | None = None

    name: ClassVar[str] = "everything"


FROM_TOML: list[tuple[str, Any, Any]] = [
    ("whole", 3, 3),
    ("whole", 3.0, 3),
    ("number", 2, 2.0),
    ("text", "b", "b"),
    ("flag", True, True),
    ("mode", "slow", "slow"),
    ("level", 2, 2),
    ("maybe", 7, 7),
    ("maybe", None, None),
    ("label", "x", "x"),
    ("several", [1, 2], (1, 2)),
    ("several", [], ()),
    ("names", ["a", "b c"], ("a", "b c")),
    ("pair", [3, "x"], (3, "x")),
    ("either", "x", "x"),
    ("either", 5, 5),
]
FROM_COMMAND_LINE: list[tuple[str, str, Any]] = [
    ("whole", "3", 3),
    ("whole", "-3", -3),
    ("number", "0.25", 0.25),
    ("number", "1e-3", 0.001),
    ("flag", "true", True),
    ("flag", "False", False),
    ("mode", "slow", "slow"),
    ("level", "2", 2),
    ("maybe", "7", 7),
    ("maybe", "none", None),
    ("label", "none", None),
    ("several", "1, 8", (1, 8)),
    ("several", "", ()),
    ("names", "piqa, boolq", ("piqa", "boolq")),
    ("pair", "3,x", (3, "x")),
    ("either", "5", 5),
]
WRONG: list[tuple[str, Any, str]] = [
    ("whole", 2.5, "expected int, found 2.5"),
    ("whole", "three", "expected int, found 'three'"),
    ("whole", True, "expected int, found True"),
    ("whole", float("inf"), "expected int, found inf"),
    ("whole", None, "expected int, found None"),
    ("number", float("nan"), "expected float, found nan"),
    ("number", "inf", "expected float, found 'inf'"),
    ("number", False, "expected float, found False"),
    ("text", 5, "expected str, found 5"),
    ("flag", "yes", "expected bool, found 'yes'"),
    ("flag", 1, "expected bool, found 1"),
    ("mode", "slwo", "unknown choice 'slwo': did you mean 'slow'? there is fast, slow"),
    ("level", True, "unknown choice 'True'"),
    ("level", 3, "unknown choice '3'"),
    ("maybe", "few", "expected int, found 'few'"),
    ("several", 5, "expected a list, found 5"),
    ("several", [1, "x"], "expected int, found 'x'"),
    ("pair", [1], "expected 2 values, found 1"),
    ("pair", ["x", 1], "expected int, found 'x'"),
    ("either", [1], "expected int | str, found [1]"),
    ("listed", [1], "expected list[int], found [1]"),
]


@pytest.mark.parametrize(("key", "given", "wanted"), [*FROM_TOML, *FROM_COMMAND_LINE])
def test_options_are_converted(key: str, given: Any, wanted: Any) -> None:
    found = getattr(with_options("metric", Everything(), {key: given}), key)
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(("key", "given", "said"), WRONG)
def test_options_of_a_wrong_type_are_errors(key: str, given: Any, said: str) -> None:
    with pytest.raises(FlexiError) as caught:
        with_options("metric", Everything(), {key: given})
    assert str(caught.value).startswith(f"metric 'everything': option {key!r}: ")
    assert said in str(caught.value)


def test_options_of_every_configurable_built_in_can_be_set_to_what_they_are() -> None:
    plugins = Plugins.load()
    for kind in ("metric", "strategy", "recovery", "evaluator"):
        for name, entry in plugins.entries(kind).items():
            assert plugins.get(kind, name, options_of(entry.object)) == entry.object


# ------------------------------------------------------------------------------------------------------- loading


def imported_by(statement: str, tmp_path: Path) -> set[str]:
    """Return the top-level modules that are there after a statement in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint('modules:', *sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("modules:")[2].split())


HELP = "import flexi_plugins.cli, sys\nsys.argv = ['flexi', '--help']\ntry: flexi_plugins.cli.main()\nexcept SystemExit: pass"


@pytest.mark.parametrize(
    "statement",
    [
        "import flexi_plugins",
        "from flexi_plugins.plugins import Plugins; [Plugins.load().entries(k) for k in ('metric', 'report')]",
        "import flexi_plugins.testing.pytest_plugin",
        HELP,
    ],
    ids=["package", "plugins", "pytest plugin", "help"],
)
def test_nothing_heavy_is_imported_before_it_is_needed(statement: str, tmp_path: Path) -> None:
    heavy = {"torch", "transformers", "lm_eval", "datasets", "pandas", "matplotlib"}
    assert not imported_by(statement, tmp_path) & heavy


def test_every_kind_has_a_built_in() -> None:
    plugins = Plugins.load(BUILT_IN)
    assert all(plugins.entries(kind) for kind in KINDS)
