"""Writes the reports of a study from its records, and publishes finished studies."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from flexi_plugins.data import Record
from flexi_plugins.errors import FlexiError
from flexi_plugins.plugins import Plugins, told
from flexi_plugins.store import Store, replacing, rows


def write_reports(plugins: Plugins, records: Sequence[Record], folder: Path, title: str) -> list[Path]:
    """Render every report format into the study's folder; return the files."""
    if not records:
        raise FlexiError(f"report: {folder} holds no record of this study; run it first")
    frame = rows(records)
    files, problems = [], []
    for name, entry in plugins.entries("report").items():
        path = folder / entry.object.filename
        try:
            text = entry.object.render(frame, title)
        except Exception as error:  # a plugin may fail in any way, and the other reports are written
            problems.append(f"report {name!r} from {entry.distribution} failed: {told(error)}")
            continue
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        files.append(path)
    if problems:
        raise FlexiError("\n".join(problems))
    return files


def publish(plugins: Plugins, source: Path, target: Path) -> list[Path]:
    """Copy a study's finished records and the reports generated from them to ``target``; return the reports."""
    records = [r for r in Store(source).records() if r.status != "failed"]
    if not records:
        raise FlexiError(f"publish: {source} holds no finished record; run the study first")
    if (target / "records").exists():
        shutil.rmtree(target / "records")
    store = Store(target)
    for record in records:
        store.write(record)
    return write_reports(plugins, records, target, source.name)


MARKS = ("<!-- leaderboard -->", "<!-- /leaderboard -->")


def insert_leaderboard(board: Path, page: Path) -> None:
    """Put the quality tables of a LEADERBOARD.md between the marks of another Markdown page."""
    text = page.read_text(encoding="utf-8")
    if not all(text.count(mark) == 1 for mark in MARKS):
        raise FlexiError(
            f"report: {page} needs the marks {MARKS[0]} and {MARKS[1]}, each once, to take the leaderboard"
        )
    sections = board.read_text(encoding="utf-8").split("\n## ")
    tables = [
        f"**{s.partition(chr(10))[0]}**\n{s.partition(chr(10))[2]}".strip() for s in sections if s.startswith("Quality")
    ]
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    body = "\n\n".join(tables)
    with replacing(page) as temporary:
        temporary.write_text(f"{before}{MARKS[0]}\n{body}\n{MARKS[1]}{after}", encoding="utf-8")
