"""The shape of the house: imports point one way, rooms stay small, nothing runs code that comes with a model."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flexi_plugins"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lowest first. A module may import its own layer and those below it.
LAYERS: list[tuple[str, set[str]]] = [
    (
        "values and the contract",
        {"data", "hookspecs", "errors", "numerics", "precision", "digests", "progress", "files", "_auto", ""},
    ),
    ("weights and models", {"budget", "checkpoint", "machine", "modeling", "rewrite"}),
    ("engine", {"execution", "calibration", "trials"}),
    ("built-in plugins", {"families", "metrics", "strategies", "recovery", "corpora", "evaluators", "reports"}),
    ("catalogue, results, models by name", {"plugins", "store", "models"}),
    (
        "harness",
        {"generation", "recovered", "pruner", "studyfile", "grid", "evaluation", "report", "study", "planfiles"},
    ),
    ("conformance kit, other harnesses", {"testing", "integrations"}),
    ("command line", {"show", "cli"}),
]
UPWARD = {("_auto", "modeling")}  # transformers' Auto classes load our model class when they are loaded themselves
PUBLIC = {
    "",
    "data",
    "hookspecs",
    "budget",
    "errors",
    "files",
    "numerics",
    "precision",
    "testing",
}  # what a third party may import
METHODS = {"metrics", "strategies", "recovery"}
HEAVY = {
    "torch",
    "transformers",
    "lm_eval",
    "datasets",
    "pandas",
    "pyarrow",
    "safetensors",
    "accelerate",
    "matplotlib",
    "scipy",
}
LIGHT = {
    "",
    "_auto",
    "cli",
    "show",
    "data",
    "hookspecs",
    "errors",
    "files",
    "digests",
    "plugins",
    "studyfile",
    "store",
    "report",
    "progress",
    "machine",
}
"""Modules that are loaded before it is known what is wanted: heavy libraries are imported inside their functions."""

Import = tuple[str, int, bool]  # module, line, at module level and not for the type checker only


def name_of(path: Path) -> str:
    """Return a module's name below the package; the package itself is ``""``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[Import]:
    """Yield every import of a module: at its head, inside functions, and for the type checker."""

    def walk(node: ast.AST, loaded: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, loaded) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: imports are absolute"
                assert child.module
                for alias in child.names:
                    submodule = PACKAGE.parent / Path(*child.module.split("."), alias.name)
                    both = submodule.with_suffix(".py").is_file() or submodule.is_dir()
                    yield f"{child.module}.{alias.name}" if both else child.module, child.lineno, loaded
            else:
                typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, loaded and not typing and not inside)

    yield from walk(tree(path), True)


def own_imports(path: Path) -> Iterator[tuple[str, int]]:
    for module, line, _ in imports(path):
        head, _, rest = module.partition(".")
        if head == PACKAGE.name:
            yield rest, line


def layer(module: str) -> int:
    room = module.split(".")[0]
    found = [number for number, (_, rooms) in enumerate(LAYERS) if room in rooms]
    assert len(found) == 1, f"module {module!r} has no layer: add {room!r} to LAYERS where it belongs"
    return found[0]


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(PACKAGE.parent)}:{line}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    own = name_of(path)
    upward = [
        f"{where(path, line)}: {own or 'the package'} ({LAYERS[layer(own)][0]}) imports {module} ({LAYERS[layer(module)][0]})"
        for module, line in own_imports(path)
        if layer(module) > layer(own) and (own, module) not in UPWARD
    ]
    assert not upward, "\n".join(upward)


def test_no_two_modules_import_each_other() -> None:
    graph = {name_of(p): {m for m, _ in own_imports(p)} - {name_of(p)} for p in MODULES}

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        stack = list(graph[start])
        while stack:
            module = stack.pop()
            if module not in seen:
                seen.add(module)
                stack += graph.get(module, ())
        return seen

    circles = {m for m in graph if m in reachable(m)}
    assert not circles, f"these import each other in a circle: {sorted(circles)}"


@pytest.mark.parametrize("path", [p for p in MODULES if name_of(p).split(".")[0] in METHODS], ids=name_of)
def test_methods_are_written_as_a_third_party_would(path: Path) -> None:
    """Built-in methods import the public modules and each other, so that whatever they can do, a plugin can."""
    private = [
        f"{where(path, line)} imports {module}"
        for module, line in own_imports(path)
        if module.split(".")[0] not in PUBLIC | METHODS
    ]
    assert not private, "\n".join(private)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    room = name_of(path).split(".")[0]
    plugin = layer(room) == layer("metrics")
    if room not in LIGHT and not plugin:
        return
    found = [
        where(path, line) + f" imports {module}"
        for module, line, loaded in imports(path)
        if loaded and module.split(".")[0] in HEAVY
    ]
    assert not found or name_of(path) == "evaluators.replay", "\n".join(found)  # it is only imported inside functions


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_runs_code_that_comes_with_a_model(path: Path) -> None:
    others = name_of(path) == "integrations.llm_pruner"  # other people's pickles, for who says so (allow_pickle)
    pickles = {"cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} | (set() if others else {"pickle"})
    found = [where(path, line) + f" imports {m}" for m, line, _ in imports(path) if m.split(".")[0] in pickles]
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called == "torch.load" and others:
            continue
        if called in ("torch.load", "eval", "exec") or called.endswith("read_pickle"):
            found.append(f"{where(path, node.lineno)} calls {called}")
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg == "trust_remote_code" and value is not False:
                found.append(f"{where(path, node.lineno)} does not switch trust_remote_code off")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_file_says_what_it_is_for_in_one_sentence(path: Path) -> None:
    content = path.read_text(encoding="utf-8")
    if not content.strip():
        assert path.name == "__init__.py"
        return
    said = ast.get_docstring(tree(path))
    assert said, f"{path} has no docstring"
    first = said.split("\n\n")[0]
    assert first.rstrip()[-1] in ".?:", f"{path}: the docstring begins with no sentence: {first!r}"
    assert len(first) <= 600


def test_there_are_at_most_two_levels_of_folders() -> None:
    deep = [p for p in MODULES if len(p.relative_to(PACKAGE.parent).parts) > 3]
    assert not deep


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_and_functions_stay_small(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    allowed = 900 if name_of(path) == "data" else 700  # all values in one file, to be read from top to bottom
    assert lines <= allowed, f"{path} has {lines} lines"
    functions = (n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    long = {f"{name_of(path)}.{f.name}": (f.end_lineno or 0) - f.lineno + 1 for f in functions}
    assert not {k: v for k, v in long.items() if v > 60}


def test_every_module_is_in_the_distribution_and_has_a_layer() -> None:
    for path in MODULES:
        layer(name_of(path))
    folders = {p.parent for p in MODULES}
    assert not [f for f in folders if not (f / "__init__.py").is_file()]
