"""What the benches share: where a figure was measured and with what, its file in results/bench, and tables to read."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexi_plugins.files import write_text
from flexi_plugins.store import commit
from flexi_plugins.store import environment as software

RESULTS = Path(__file__).parents[2] / "results" / "bench"

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded: import this module before it


def environment() -> dict[str, Any]:
    """Return what a measured figure depends on: machine, versions, commit of this package, date (UTC).

    instruction_set is the highest that torch's kernels use here; native_bfloat16 whether the CPU multiplies it itself;
    threads are torch's; uncommitted_changes says that the package differs from its commit.
    """
    import torch

    from flexi_plugins.precision import native_bfloat16

    versions = software()
    revision, dirty = commit()
    return {
        "machine": versions.pop("machine"),
        "system": versions.pop("system"),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "native_bfloat16": native_bfloat16(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
        "commit": revision,
        "uncommitted_changes": dirty,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def finish(name: str, values: Mapping[str, Any]) -> None:
    """Write a bench's figures with their environment to results/bench/NAME.json, and print them as one line of JSON.

    Print nothing afterwards: the line is the last. Figures are finite JSON values; anything else is a ValueError.
    """
    figures = {"bench": name, **values, **environment()}
    write_text(RESULTS / f"{name}.json", json.dumps(figures, indent=2, allow_nan=False) + "\n")
    print(json.dumps(figures, allow_nan=False), flush=True)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a markdown table; the first row's keys are its columns, numbers stand at the right."""
    columns = list(rows[0])
    cells = [columns] + [[_text(row.get(c)) for c in columns] for row in rows]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(columns))]
    right = [all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns]

    def line(row: Sequence[str]) -> str:
        padded = (t.rjust(w) if r else t.ljust(w) for t, w, r in zip(row, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "|".join(f" {'-' * (w - 1)}{':' if r else '-'} " for w, r in zip(widths, right, strict=True))
    return "\n".join([line(cells[0]), f"|{rule}|", *map(line, cells[1:])])


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
