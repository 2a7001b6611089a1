"""The README's code: Python blocks run in order in one module, commands as they stand there, with a tiny default model.

A block that says ``no-run`` after its language is only compiled.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
from studies import make_model

from flexi_plugins import cli, models
from flexi_plugins.plugins import KINDS, Plugins

ROOT = Path(__file__).parents[1]
SHELL = ("bash", "console", "sh", "shell")
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```\s*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of the README."""

    language: str
    flags: tuple[str, ...]
    body: str
    line: int

    @property
    def name(self) -> str:
        return f"{self.language}-line-{self.line}"

    @property
    def runs(self) -> bool:
        return "no-run" not in self.flags


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page that name their language."""
    found = []
    for match in FENCE.finditer(text):
        language, *flags = match["info"].replace(",", " ").split() or [""]
        found.append(Block(language, tuple(flags), match["body"], text.count("\n", 0, match.start()) + 1))
    return [b for b in found if b.language]


def commands(block: Block) -> Iterator[list[str]]:
    """Yield the ``flexi`` commands of a shell block: after a prompt, if it has prompts; comments and output left out."""
    lines = block.body.replace("\\\n", " ").splitlines()
    prompted = any(line.startswith("$ ") for line in lines)
    for line in lines:
        if prompted and not line.startswith("$ "):
            continue
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words[:1] == ["flexi"]:
            yield words


README = ROOT / "README.md"
BLOCKS = blocks(README.read_text(encoding="utf-8")) if README.is_file() else []
PYTHON = [b for b in BLOCKS if b.language in ("python", "py")]
COMMANDS = [c for b in BLOCKS if b.language in SHELL and b.runs for c in commands(b)]


PAGE = """
```python
a = 1
```
```bash no-run
flexi run x
```
```
plain
```
```console
$ A=b flexi list # all
out
```
"""


def test_blocks_and_commands_are_found() -> None:
    first, second, third = blocks(PAGE)
    assert (first.language, first.body, first.line, first.runs) == ("python", "a = 1\n", 2, True)
    assert (second.language, second.runs) == ("bash", False)
    assert list(commands(third)) == [["flexi", "list"]]
    assert blocks("") == []


@pytest.mark.parametrize("block", PYTHON, ids=lambda b: b.name)
def test_python_blocks_compile(block: Block) -> None:
    compile(block.body, f"README.md:{block.line}", "exec")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the name of the default model mean a tiny one, and work in an empty folder."""
    folder = make_model(tmp_path / "model")
    monkeypatch.setattr(models, "default_model", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.skipif(not any(b.runs for b in PYTHON), reason="the README has no Python block that runs")
def test_python_blocks_run(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    for block in PYTHON:
        if block.runs:
            exec(compile(block.body, f"{README}:{block.line}", "exec", dont_inherit=True), vars(module))
    hooks = {hook for hook in KINDS.values() if hasattr(module, hook)}
    if hooks:
        Plugins.load().add(module)  # refuses what is no proper plugin


@pytest.mark.skipif(not COMMANDS, reason="the README has no command that runs")
def test_commands_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All commands, in their order and in one folder, for later ones read what earlier ones wrote."""
    (tmp_path / "baselines").symlink_to(ROOT / "baselines")
    if (ROOT / "results").is_dir():
        shutil.copytree(ROOT / "results", tmp_path / "runs")  # where published studies are
    for words in COMMANDS:
        if words[1] == "run":  # whole studies have tests of their own
            words = ["flexi", "check", *(w for w in words[2:] if w.endswith(".toml"))]
        if words[1] == "report" and not (tmp_path / words[2] / "records").is_dir():
            continue
        status, problem = run(words, monkeypatch, capsys)
        assert status == 0, f"{shlex.join(words)}: {problem}"


def run(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    monkeypatch.setattr(sys, "argv", words)
    with mock.patch.dict(os.environ, {"FLEXI_PLUGINS": ""}):
        try:
            cli.main()
        except SystemExit as end:
            return end.code or 0, capsys.readouterr().err
    return 0, ""
