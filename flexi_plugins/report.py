"""Writes the reports of a study from its records, and publishes finished studies."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from flexi_plugins.data import Record
from flexi_plugins.errors import FlexiError
from flexi_plugins.plugins import Plugins
from flexi_plugins.store import Store, replacing, rows


def write_reports(plugins: Plugins, records: Sequence[Record], folder: Path, title: str) -> list[Path]:
    """Render every report format into the study's folder; return the files."""
    if not records:
        raise FlexiError(f"report: {folder} holds no record of this study; run it first")
    frame = rows(records)
    files = []
    for entry in plugins.entries("report").values():
        path = folder / entry.object.filename
        with replacing(path) as temporary:
            temporary.write_text(entry.object.render(frame, title), encoding="utf-8")
        files.append(path)
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
