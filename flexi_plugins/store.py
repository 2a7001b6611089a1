"""Where results live: one JSON a cell, documents and plans beside it, a journal for sweeps that are not finished.

Every file is written under a temporary name in its own folder, synced and renamed, so that a file under its real name
is whole. What cannot be read all the same is reported in ``problems`` and treated as absent: it is then made again.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexi_plugins.data import Cell, PruningPlan, Record
from flexi_plugins.digests import tensor_digest
from flexi_plugins.errors import FlexiError
from flexi_plugins.files import remove_leftovers, replacing, write_tensor_file, write_text
from flexi_plugins.recovery.course import course_of, reason_of, shortfall_of

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what reading a foreign file raises
DISTRIBUTIONS = (
    "flexi-plugins",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "lm_eval",
    "safetensors",
    "datasets",
    "numpy",
)
COLUMNS = ("label", "model", "metric", "strategy", "ratio", "true_ratio", "recovery", "seed", "status", "reason")
SIZES = ("stored_parameters", "runtime_parameters", "macs_per_token")
# A list of numbers, an element a line. Text is never taken for one: within a string JSON has no line break.
NUMBERS = re.compile(r'\[\n\s*([^\[\]{}"]+?)\n\s*\]')


# ---------------------------------------------------------------------------------------------- files


def to_text(value: Any, indent: int | None = None) -> str:
    """Return strict JSON; NaN and infinities become ``{"float": "nan"}`` and the like, which ``from_text`` reads.

    indent: as in ``json.dumps``, but a list of numbers (the heads and channels of a plan) stands on one line.
    """
    text = json.dumps(_spelt_out(value), indent=indent, allow_nan=False)
    return NUMBERS.sub(lambda numbers: f"[{' '.join(numbers[1].split())}]", text)


def from_text(text: str) -> Any:
    """Read what ``to_text`` wrote; tuples come back as lists."""
    return json.loads(text, object_hook=lambda v: float(v["float"]) if v.keys() == {"float"} else v)


def _spelt_out(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(float(value))}
    if isinstance(value, Mapping):
        return {k: _spelt_out(v) for k, v in value.items()}
    return [_spelt_out(v) for v in value] if isinstance(value, list | tuple) else value


def _write_json(path: Path, value: Any, indent: int | None = None) -> None:
    write_text(path, to_text(value, indent) + "\n")


def write_traceback(folder: Path, name: str) -> Path:
    """Keep the traceback of the exception that is being handled, for whoever looks into it; return the file."""
    path = folder / "failures" / f"{_file_name(name)}.txt"
    write_text(path, traceback.format_exc())
    return path


# ---------------------------------------------------------------------------------------------- store


class Store:
    """The records, documents and plans of one study in its folder. ``problems`` says which files could not be used.

    say: is told of each of them when it is found.
    """

    def __init__(self, folder: Path | str, say: Callable[[str], None] = lambda problem: None) -> None:
        self.folder, self._say = Path(folder), say
        self.problems: list[str] = []

    # -- records and documents

    def path(self, cell: Cell) -> Path:
        """Return where the record of a cell lives."""
        return self.folder / "records" / f"{_name(cell)}.json"

    def write(self, record: Record, documents: Mapping[str, Iterable[Mapping[str, Any]]] | None = None) -> None:
        """Write a record after its per-document outcomes (evaluator -> flat mappings); an earlier try is replaced."""
        self._write_documents(record.cell, documents or {})
        _write_json(self.path(record.cell), record.to_json(), indent=1)

    def get(self, cell: Cell) -> Record | None:
        """Return the record of exactly this cell, or None if it is still to be made."""
        return self._read(self.path(cell))

    def select(self, cells: Iterable[Cell]) -> None:
        """Note which cells the study has now; records of others, of an earlier plugin version say, stay but count no more."""
        _write_json(self.folder / "study.json", {"records": sorted(_name(c) for c in cells)}, indent=1)

    def records(self) -> list[Record]:
        """Return the study's records by file name (all in the folder where it does not say which they are).

        What is not a whole record goes to ``problems``.
        """
        chosen = self._chosen()
        paths = sorted((self.folder / "records").glob("*.json"))
        found = (self._read(path) for path in paths if chosen is None or path.stem in chosen)
        return [record for record in found if record is not None]

    def unfinished(self) -> list[str]:
        """Return the names of the study's cells that have no record yet."""
        return sorted(name for name in self._chosen() or () if not (self.folder / "records" / f"{name}.json").exists())

    def _chosen(self) -> set[str] | None:
        """Return the names of the study's records; None where the folder does not say them."""
        return self._parsed(self.folder / "study.json", lambda value: set(value["records"]), "list of records")

    def documents(self, cell: Cell) -> pd.DataFrame:
        """Return the per-document outcomes of a cell, one row a document and evaluator; empty if there are none."""
        import pandas as pd

        path = self._documents_path(cell)
        try:
            return pd.read_parquet(path)
        except FileNotFoundError:
            pass
        except UNREADABLE as error:
            self._note(f"{path}: not a whole table of documents ({type(error).__name__}: {error})")
        return pd.DataFrame({"evaluator": []})

    def _read(self, path: Path) -> Record | None:
        def parse(value: Any) -> Record:
            record = Record.from_json(value)
            if self.path(record.cell).name != path.name:
                raise ValueError(f"it holds the cell {_name(record.cell)}")
            return record

        return self._parsed(path, parse, "record")

    def _parsed(self, path: Path, parse: Callable[[Any], Any], what: str) -> Any:
        """Parse a JSON file; None if it is not there, or is not what it should be (which is noted as a problem)."""
        try:
            return parse(from_text(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except UNREADABLE as error:
            self._note(f"{path}: not a whole {what}, made again ({type(error).__name__}: {error})")
            return None

    def _note(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)
            self._say(problem)

    def _documents_path(self, cell: Cell) -> Path:
        return self.folder / "documents" / f"{_name(cell)}.parquet"

    def _write_documents(self, cell: Cell, documents: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
        from pyarrow import parquet

        path = self._documents_path(cell)
        rows = [{"evaluator": evaluator, **document} for evaluator, found in documents.items() for document in found]
        if rows:
            with replacing(path) as temporary:
                parquet.write_table(_table(rows), temporary)
        elif path.exists():
            path.unlink()

    # -- plans

    def write_plan(
        self, key: str, plan: PruningPlan, tensors: Mapping[str, Tensor], timing: Mapping[str, Any] | None = None
    ) -> None:
        """Write a plan and its attached tensors, tensors first, under a key (a digest of what the plan depends on).

        timing: what there is to remember about how long it took to make.
        """
        wrong = _differing(plan, tensors)
        if wrong:
            raise FlexiError(f"plan {key[:12]}: its digests do not fit the attached tensors {', '.join(wrong)}")
        if tensors:
            write_tensor_file(self._plan_path(key, ".safetensors"), tensors)
        _write_json(self._plan_path(key, ".json"), {"key": key, "timing": dict(timing or {}), **plan.to_json()})

    def plan(
        self, key: str, make: Callable[[], tuple[PruningPlan, Mapping[str, Tensor]]]
    ) -> tuple[PruningPlan, Mapping[str, Tensor]]:
        """Return the plan of a key and its attached tensors; where none is written it is made, and written."""
        stored = self.read_plan(key)
        if stored is not None:
            return stored
        plan, tensors = make()
        self.write_plan(key, plan, tensors)
        return plan, tensors

    def keep(self, key: str, folder: Path) -> None:
        """Move the files directly in a folder beside the plan of a key, under its name."""
        (self.folder / "plans").mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        for file in sorted(p for p in folder.glob("*") if p.is_file()):
            shutil.move(file, self._plan_path(key, f".{file.name}"))

    def read_plan(self, key: str) -> tuple[PruningPlan, dict[str, Tensor]] | None:
        """Return the plan written under a key and its attached tensors, verified; None if it is still to be made."""

        def parse(value: Any) -> tuple[PruningPlan, dict[str, Tensor]]:
            if value["key"] != key:
                raise ValueError(f"it belongs to the key {value['key']}")
            plan = PruningPlan.from_json(value)
            return plan, self._read_tensors(key, plan)

        return self._parsed(self._plan_path(key, ".json"), parse, "plan")

    def plan_timing(self, key: str) -> Mapping[str, Any]:
        """Return what was remembered about how long the plan of a key took to make."""
        return self._parsed(self._plan_path(key, ".json"), lambda value: value.get("timing", {}), "plan") or {}

    def _read_tensors(self, key: str, plan: PruningPlan) -> dict[str, Tensor]:
        if not plan.tensors:
            return {}
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(self._plan_path(key, ".safetensors"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"its tensors: {error}") from None
        wrong = _differing(plan, tensors)
        if wrong:
            raise ValueError(f"its tensors changed: {', '.join(wrong)}")
        return tensors

    def _plan_path(self, key: str, ending: str) -> Path:
        return self.folder / "plans" / f"{key[:12]}{ending}"


def _name(cell: Cell) -> str:
    return f"{_file_name(cell.label)}-{cell.hash[:12]}"


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return flat mappings as a table; a column whose kinds do not fit together becomes text."""
    import pyarrow as pa

    def column(values: list[Any]) -> Any:
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            return pa.array([None if v is None else str(v) for v in values], pa.string())

    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: column([row.get(name) for row in rows]) for name in names})


def _differing(plan: PruningPlan, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names on which a plan and its attached tensors disagree."""
    found = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    wanted = dict(plan.tensors)
    return sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))


# -------------------------------------------------------------------------------------------- journal


class Journal:
    """What is known of plans while a study is not finished, one file a plan and group, so that one that was killed goes on.

    Groups are batches of a sweep (their answers), measures of a search (what a model is worth, see ``Trials``) and
    evaluators (their outcomes, see ``Measurer``). A group hash covers all that these depend on beside the plan.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder) / "journal"

    def get(self, plan_hash: str, group_hash: str) -> list | None:
        """Return what is known of a plan in a group, or None. Tuples come back as lists."""
        path = self._path(plan_hash, group_hash)
        try:
            value = from_text(path.read_text(encoding="utf-8"))
            return value["answers"] if (value["plan"], value["group"]) == (plan_hash, group_hash) else None
        except UNREADABLE:
            return None

    def put(self, plan_hash: str, group_hash: str, answers: Sequence[Any]) -> None:
        """Keep what is known of a plan in a group; numbers, NaN included, come back as they are."""
        value = {"plan": plan_hash, "group": group_hash, "answers": answers}
        _write_json(self._path(plan_hash, group_hash), value)

    def clear(self) -> None:
        """Remove the journal: every record that it was kept for is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, plan_hash: str, group_hash: str) -> Path:
        return self.folder / plan_hash[:16] / f"{group_hash[:16]}.json"


# ----------------------------------------------------------------------------------------------- rows


def rows(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row a record, dense first; a column a measurement, with ``NAME_stderr`` and ``NAME_chance``.

    ``record`` is the name of its file, without ending. ``attrs`` holds what reports put at their head: model, corpus,
    dates, versions, commits, and which way is better.
    """
    import pandas as pd

    ordered = sorted(records, key=_order)
    frame = pd.DataFrame([_row(r) for r in ordered])
    fixed = (*COLUMNS, *SIZES, "options", "record")
    frame = frame.reindex(columns=[*fixed, *(c for c in frame.columns if c not in fixed)])
    frame.attrs.update(_context(ordered))
    return frame


def _order(record: Record) -> tuple[Any, ...]:
    cell = record.cell
    method = (str(cell.metric), str(cell.strategy), cell.recovery)
    return cell.model, cell.strategy is not None, cell.ratio, *method, cell.seed


def _row(record: Record) -> dict[str, Any]:
    cell = record.cell
    row: dict[str, Any] = {name: getattr(cell, name) for name in COLUMNS if hasattr(cell, name)}
    row |= {"status": record.status, "reason": record.reason, "options": cell.options, "record": _name(cell)}
    if record.plan:
        row |= {name: getattr(record.plan, name) for name in SIZES} | {"true_ratio": record.plan.ratio}
        row |= _of_recovery(record.plan.origin.get("recovery"))
    for measurement in record.measurements:
        if measurement.name in row:
            continue  # of sizes, which the plan says, and of what two evaluators give by one name
        row[measurement.name] = measurement.value
        extra = {"stderr": measurement.standard_error, "chance": measurement.chance}
        row |= {f"{measurement.name}_{k}": v for k, v in extra.items() if v is not None}
    return row


def _of_recovery(recovery: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return how a training went, in words, and what quantised weights take, where there was one and where there are any."""
    if not recovery:
        return {}
    facts = recovery["facts"]
    row: dict[str, Any] = {
        "recovery_note": "; ".join((course_of(recovery), *recovery["notes"])),
        "recovery_reason": reason_of(recovery),
    }
    if shortfall := shortfall_of(recovery):
        row["recovery_shortfall"] = shortfall
    if "stored_bytes" in facts:
        row |= {"bits_per_weight": facts["bits_per_weight"], "packed_mib": facts["stored_bytes"] / 2**20}
    return row


def _context(records: Sequence[Record]) -> dict[str, Any]:
    def distinct(values: Iterable[Any]) -> list[Any]:
        return list(dict.fromkeys(v for v in values if v))

    names = distinct(n for r in records for n in r.versions)
    return {
        "models": distinct(f"{r.cell.model} ({r.cell.fingerprint[:12]})" for r in records),
        "corpora": distinct(r.cell.corpus_hash[:12] for r in records),
        "dates": sorted(distinct(r.date[:10] for r in records)),
        "commits": distinct(r.commit[:12] + (" with changes" if r.dirty else "") for r in records),
        "versions": {n: distinct(_version(r, n) for r in records) for n in names},
        "higher_is_better": {m.name: m.higher_is_better for r in records for m in r.measurements},
        "curves": {_name(r.cell): curve for r in records if (curve := _curve(r))},
    }


def _version(record: Record, name: str) -> str | None:
    """Return a version that a record names; what was measured without a GPU says so beside what was measured on one."""
    return record.versions.get(name, "no GPU" if name == "gpu" and record.measurements else None)


def _curve(record: Record) -> dict[str, Any] | None:
    """Return the loss curve of a trained model: method and points; None if it was not trained."""
    said = record.plan.origin.get("recovery") if record.plan else None
    return {"method": said["method"], "points": said["curve"]} if said and said["curve"] else None


# ----------------------------------------------------------------------------------------- provenance


def environment(gpu: str = "") -> dict[str, str]:
    """Return what results depend on beside the code: versions of Python and libraries, system, machine, the GPU if any.

    The machine is its processor, with the instruction set that torch uses and whether it multiplies bfloat16, cores, memory.
    """
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found |= {"system": f"{platform.system()} {platform.release()}", "machine": _machine()}
    return found | ({"gpu": gpu} if gpu else {})


def _machine() -> str:
    import psutil
    import torch

    from flexi_plugins.precision import native_bfloat16

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    products = f"{torch.backends.cpu.get_cpu_capability()}, {'bfloat16' if native_bfloat16() else 'no bfloat16'}"
    return f"{_processor()} ({products}), {cores} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def _processor() -> str:
    with suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def commit() -> tuple[str, bool]:
    """Return the commit that this package is checked out at and whether its files differ; ("", False) if it is not."""
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return "", False
    head = _git(here.parent, "rev-parse", "--verify", "HEAD")
    return (head, bool(_git(here.parent, "status", "--porcelain", "--", "."))) if head else ("", False)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
