"""Writes the reports of a study from its records, and publishes finished studies."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexi_plugins.data import Record
from flexi_plugins.errors import FlexiError
from flexi_plugins.files import write_text
from flexi_plugins.plugins import Plugins, told
from flexi_plugins.reports import paired
from flexi_plugins.reports.published import COLUMNS, read_published, render, side_by_side
from flexi_plugins.store import Store, rows

PAIRED = "PAIRED.md"


def board_of(plugins: Plugins, folder: Path) -> Path:
    """Return where the leaderboard to read is, in a study's folder."""
    return folder / plugins.entry("report", "markdown").object.filename


def write_reports(
    plugins: Plugins, records: Sequence[Record], folder: Path, title: str, unfinished: int = 0
) -> list[Path]:
    """Render every report format into the study's folder; return the files. unfinished: cells without a finished record."""
    if not records:
        raise FlexiError(f"report: {folder} holds no record of this study; run it first")
    frame = rows(records)
    frame.attrs["unfinished"] = unfinished
    files, problems = [], []
    for name, entry in plugins.entries("report").items():
        path = folder / entry.object.filename
        try:
            text = entry.object.render(frame, title)
        except Exception as error:  # a plugin may fail in any way, and the other reports are written
            problems.append(f"report {name!r} from {entry.distribution} failed: {told(error)}")
            continue
        if not text:
            path.unlink(missing_ok=True)
            continue
        write_text(path, text)
        files.append(path)
    if problems:
        raise FlexiError("\n".join(problems))
    return files


def write_again(plugins: Plugins, store: Store, records: Sequence[Record], target: Path | None) -> list[Path]:
    """Write a study's reports again from its records, or publish them to another folder; return the files."""
    if target:
        return publish(plugins, store.folder, target)
    return write_reports(plugins, records, store.folder, store.folder.resolve().name, len(store.unfinished()))


def publish(plugins: Plugins, source: Path, target: Path) -> list[Path]:
    """Copy a study's finished records and the reports generated from them to ``target``; return the reports.

    Outcomes of single documents are not copied, so a study cannot be published to its own folder.
    """
    if source.resolve() == target.resolve():
        raise FlexiError(
            f"publish: expected another folder than that of the study, found {target}, which is {source.resolve()}: what "
            "became of every document is not published and would be lost; name a new folder, such as "
            f"results/{source.resolve().name}"
        )
    if (target / "study.json").exists():
        raise FlexiError(
            f"publish: {target} is the folder of a study that ran there, whose records would be lost; name a new folder, or one "
            "that was published to before"
        )
    opened = Store(source)
    found = opened.records()
    records = [r for r in found if r.status != "failed"]
    if not records:
        raise FlexiError(
            f"publish: {source} holds no finished record of the study that ran there last (its study.json names them); run that "
            "study to its end, or another one"
        )
    if (target / "records").exists():
        shutil.rmtree(target / "records")
    (target / PAIRED).unlink(missing_ok=True)
    store = Store(target)
    for record in records:
        store.write(record)
    missing = len(opened.unfinished()) + len(found) - len(records)
    return write_reports(plugins, records, target, source.resolve().name, missing)


def write_paired(
    store: Store, records: Sequence[Record], folder: Path, title: str, reference: str = paired.BEST
) -> tuple[Path | None, list[dict[str, Any]]]:
    """Write PAIRED.md into a folder: every method beside one other on the same documents; return the file and the pairs.

    reference: the best of each ratio, the dense model, or METRIC-STRATEGY (see ``reports.paired.pairs_of``). Where the
    store has no outcomes of two methods' documents there is no file, and a FlexiError if another than the best is asked for.
    """
    cells = {store.path(record.cell).stem: record.cell for record in records}
    pairs = paired.pairs_of(rows(records), lambda name: store.documents(cells[name]), reference)
    if not pairs and reference != paired.BEST:
        raise FlexiError(
            f"report: {store.folder} has no outcomes of documents of {reference!r} and another method; expected "
            "documents/*.parquet, which a study writes where it runs and which are not published"
        )
    if not pairs:
        return None, []
    path = folder / PAIRED
    write_text(path, paired.render(pairs, title))
    return path, [pair.to_json() for pair in pairs]


PUBLISHED = Path(__file__).parents[1] / "baselines" / "published.csv"
"""Published numbers, where the package is used from its repository."""


def write_published(
    plugins: Plugins, records: Sequence[Record], folder: Path, title: str, numbers: Path | None = None
) -> tuple[Path, list[dict[str, Any]]]:
    """Write PUBLISHED.md into a folder: published numbers beside the study's own; return the file and the pairs.

    numbers: a file with the columns of ``reports.published.Published``; by default the repository's.
    """
    file = numbers or PUBLISHED
    if not file.is_file():
        raise FlexiError(
            f"report: no published numbers in {str(file)!r}; give a file with the columns {', '.join(COLUMNS)}: "
            "--published-file FILE"
        )
    published, frame = read_published(file), rows(records)
    papers = {(kind, n): e.object.paper for kind in ("metric", "strategy") for n, e in plugins.entries(kind).items()}
    pairs = side_by_side(frame, published, papers)
    path = folder / "PUBLISHED.md"
    write_text(path, render(frame, published, pairs, title))
    return path, pairs


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
    if not tables:
        raise FlexiError(f"report: {board} has no quality table to put into {page}; run the study to its first results")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    body = "\n\n".join(tables)
    write_text(page, f"{before}{MARKS[0]}\n{body}\n{MARKS[1]}{after}")
