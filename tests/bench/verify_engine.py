"""Verifies the engine against stock lm-eval on exported folders: every choice in float32, chosen answers in bfloat16.

For the dense model and one plan of every strategy, on the seven tasks. float32: summed log-probabilities within 1e-3 and
the same accuracies. bfloat16: no more changed answers than stock has against itself at another batch size, plus one in a
hundred documents: as both sides are by default, where stock rounds log-probabilities and the engine does not, with both
softmaxes in bfloat16, and with both in float32; and how far from the answers in float32 both sides are. What was answered
is kept under runs/bench/verify: a call that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import stock
from common import RESULTS, environment, finish, table
from grid import stock_tokens, token_pairs
from swept import MODEL, TASKS, Cell, Plans, grid, measure

import flexi_plugins
from flexi_plugins import modeling
from flexi_plugins.data import digest
from flexi_plugins.evaluators.tasks import LmEval
from flexi_plugins.execution.packing import Request
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.files import write_text
from flexi_plugins.modeling import FlexiConfig
from flexi_plugins.progress import Progress
from flexi_plugins.pruner import Calibration, Pruner

CELLS = grid((0.2,), ("flexigpt",))
CALIBRATION, OPTIONS = (
    Calibration(windows=4, length=128),
    {"share-lora": {"svd": "randomised"}},
)  # quick, not good, plans
LARGEST = 1e-3  # nats, of a choice's summed log-probability in float32
IN_A_HUNDRED = 1
BATCHES = {"float32": (4,), "bfloat16": (16, 4)}  # of stock; the first is what the engine is compared with
# torch's float32 log_softmax on a CPU is some 1e-5 a token too high (4.5e-4 over 49 tokens, measured), so in float32 stock
# is asked for an exact softmax of its logits by HFLM's own option. In bfloat16 it runs as it is.
SOFTMAX = {"float32": "float64", "bfloat16": None}
EXACTER = "float32"  # the engine's softmax whatever the dtype; stock's by option, or else it rounds log-probabilities
TOKENS_PER_SECOND = {"float32": 370, "bfloat16": 800}  # of stock on two server cores, for the estimate beforehand
RUNS = Path(__file__).parents[2] / "runs" / "bench" / "verify"

Documents = Sequence[stock.Document]
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------- answers of both sides


class Answers:
    """Answers of models by the engine and by stock, each asked for once and kept as JSON in a folder."""

    def __init__(self, asked: Any, scratch: Path) -> None:
        """Make the plans. asked: the options of the command; scratch: a folder for exported models."""
        self.asked, self.scratch = asked, scratch
        self.folder: Path = asked.runs
        self.progress = Progress()
        self.planner = self._pruner("bfloat16")
        self.planned = Plans(self.planner, self.folder, OPTIONS).get(CELLS)
        versions = environment()["versions"]
        self.setting = [LmEval(tasks=TASKS).inputs(asked.data, {}), asked.limit, versions]

    def _pruner(self, dtype: str) -> Pruner:
        return Pruner(MODEL, CALIBRATION, dtype=dtype, device="cpu", data=self.asked.data, progress=self.progress)

    def _file(self, cell: Cell, dtype: str, side: str, *depends: str) -> Path:
        key = digest([self.planned[cell].plan.hash, dtype, side, *self.setting, *depends])
        return self.folder / "answers" / f"{cell.label}-{dtype}-{side}-{key[:12]}.json"

    def by_engine(self, dtype: str, softmax: str) -> dict[Cell, Documents]:
        """Return what the engine answers for every model; those that this code did not answer yet in one sweep."""
        files = {cell: self._file(cell, dtype, "engine", softmax, _digest_of_code()) for cell in CELLS}
        missing = {cell.label: cell for cell, file in files.items() if not file.is_file()}
        if missing:
            plans: dict[str, Planned] = {label: self.planned[cell] for label, cell in missing.items()}
            for label, documents in measure(self._pruner(dtype), plans, self.asked.limit, softmax).documents.items():
                _write(files[missing[label]], documents)
        return {cell: _read(file) for cell, file in files.items()}

    def by_stock(self, dtype: str, batch_size: int, softmax: str | None) -> dict[Cell, Documents]:
        """Return what stock answers for the exported folder of every model; what is kept is not asked again.

        softmax: the dtype of its softmax; None: its default.
        """
        side = f"stock{batch_size}"
        exports = self.exports
        files = {c: self._file(c, dtype, side, str(softmax), content) for c, (_, content) in exports.items()}
        missing = [cell for cell, file in files.items() if not file.is_file()]
        if missing:
            definitions = stock.write_definitions(self.scratch / "tasks", self.asked.data)
            setting = stock.Setting(definitions, dtype, batch_size, self.asked.limit, softmax, whole_index=False)
            self._say_cost(setting, len(missing))
            results = stock.run_each([exports[cell][0] for cell in missing], setting)
            title = f"stock lm-eval in {dtype}, batch size {batch_size}, softmax in {softmax or dtype}"
            with self.progress.stage(title, len(missing)) as advance:
                for cell, result in zip(missing, results, strict=True):
                    _write(files[cell], result["documents"])
                    advance(1)
        return {cell: _read(file) for cell, file in files.items()}

    @cached_property
    def exports(self) -> dict[Cell, tuple[Path, str]]:
        """The exported folder of every model, and the digest of what it holds."""
        folders = {cell: self.scratch / cell.label for cell in CELLS}
        for cell, folder in folders.items():
            self.planner.write(self.planned[cell], folder)
        return {cell: (folder, _digest_of_export(folder)) for cell, folder in folders.items()}

    def _say_cost(self, setting: stock.Setting, models: int) -> None:
        tokens = stock_tokens(self.pairs, setting.batch_size)["padded_tokens"]
        minutes = models * tokens / TOKENS_PER_SECOND[setting.dtype] / 60
        self.progress.say(
            f"stock lm-eval in {setting.dtype} runs {models} models on {tokens:,} tokens each, padding included: about "
            f"{minutes:.0f} minutes on two cores"
        )

    @cached_property
    def pairs(self) -> tuple[Request, ...]:
        """The token pairs that the tasks ask about."""
        return token_pairs(self.planner, self.asked.limit)


def _digest_of_code() -> str:
    """Return the digest of this package's source: what the engine answers depends on all of it."""
    files = sorted(Path(flexi_plugins.__file__).parent.rglob("*.py"))
    return digest([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


def _digest_of_export(folder: Path) -> str:
    """Return the digest of what stock runs: weights, configuration, and our model class where the folder needs it."""
    config = folder / "config.json"
    files = [*sorted(folder.glob("model*.safetensors")), config]
    if FlexiConfig.model_type == json.loads(config.read_text(encoding="utf-8"))["model_type"]:
        files.append(Path(modeling.__file__))
    return digest([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


def _write(file: Path, documents: Documents) -> None:
    write_text(file, json.dumps(documents))


def _read(file: Path) -> Documents:
    return json.loads(file.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------- comparing


def compare_float32(model: str, engine: Documents, expected: Documents) -> tuple[Row, list[str]]:
    """Return a row of the table, and what is wrong: choices too far apart, accuracies that differ."""
    problems, differences = [], []
    for place, choice, ours, theirs in _choices(engine, expected):
        differences.append(abs(ours - theirs))
        if not differences[-1] <= LARGEST:
            problems.append(
                f"{model} in float32: {_name(place)}, choice {choice}: log-probability {ours:.6f} by the engine, "
                f"{theirs:.6f} by stock: {differences[-1]:.2g} apart, allowed is {LARGEST:g}"
            )
    ours_by_task, theirs_by_task = stock.accuracies(engine), stock.accuracies(expected)
    differing = stock.changed(engine, expected)
    for name, theirs in theirs_by_task.items():
        if ours_by_task[name] != theirs:
            task, metric = name.split("_acc")[0], "acc_norm" if name.endswith("_norm") else "acc"
            places = [place for place in differing[metric] if place[0] == task]
            problems.append(
                f"{model} in float32: {name} is {ours_by_task[name]:.4f} by the engine, {theirs:.4f} by stock; other "
                f"choices in {_names(places)}"
            )
    row = {
        "model": model,
        "documents": len(expected),
        "choices": len(differences),
        "largest difference": max(differences),
        "allowed": LARGEST,
        **{f"{metric} changed": len(places) for metric, places in differing.items()},
        "accuracies": "equal" if ours_by_task == theirs_by_task else "differ",
    }
    return row, problems


def compare_bfloat16(model: str, engine: Documents, expected: Documents, again: Documents) -> tuple[Row, list[str]]:
    """Return a row of the table, and what is wrong: more changed answers than ``again`` has, stock at another batch size."""
    row: Row = {"model": model, "documents": len(expected)}
    problems = []
    ours, theirs = stock.changed(engine, expected), stock.changed(again, expected)
    for metric in stock.METRICS:
        allowed = len(theirs[metric]) + IN_A_HUNDRED * sum(metric in d for d in expected) // 100
        row |= {
            f"{metric}: engine": len(ours[metric]),
            f"{metric}: stock itself": len(theirs[metric]),
            f"{metric}: allowed": allowed,
        }
        if len(ours[metric]) > allowed:
            problems.append(
                f"{model} in bfloat16: {len(ours[metric])} answers by {metric} are other than stock's, allowed are "
                f"{allowed}: in {_names(ours[metric])}"
            )
    row["largest difference: engine"] = max(abs(a - b) for _, _, a, b in _choices(engine, expected))
    row["stock itself"] = max(abs(a - b) for _, _, a, b in _choices(again, expected))
    return row, problems


def distances(model: str, reference: Documents, sides: Mapping[str, Documents]) -> Row:
    """Return a row of how far each side is from other answers of stock.

    Documents with another answer; choices whose log-probability is the same (within ``LARGEST``); mean difference in nats.
    """
    row: Row = {"model": model, "documents": len(reference), "choices": sum(len(d["logprobs"]) for d in reference)}
    for metric in stock.METRICS:
        row |= {f"{metric}: {name}": len(stock.changed(side, reference)[metric]) for name, side in sides.items()}
    for name, side in sides.items():
        differences = [abs(a - b) for _, _, a, b in _choices(side, reference)]
        row |= {f"same: {name}": sum(d <= LARGEST for d in differences), f"nats: {name}": statistics.fmean(differences)}
    return row


def _choices(one: Documents, other: Documents) -> Iterator[tuple[tuple[str, int], int, float, float]]:
    """Yield document, number of the choice, and its log-probability on both sides, which have the same documents."""
    ours, theirs = stock.by_document(one), stock.by_document(other)
    assert ours.keys() == theirs.keys(), f"asked about other documents: {sorted(ours.keys() ^ theirs.keys())[:5]}"
    for place in sorted(theirs):
        pairs = zip(ours[place]["logprobs"], theirs[place]["logprobs"], strict=True)
        for choice, (a, b) in enumerate(pairs):
            yield place, choice, a, b


def _name(place: tuple[str, int]) -> str:
    return f"{place[0]} document {place[1]}"


def _names(places: Sequence[tuple[str, int]]) -> str:
    shown = ", ".join(map(_name, places[:10]))
    return f"{shown} and {len(places) - 10} more" if len(places) > 10 else shown


# ------------------------------------------------------------------------------------------- the command


def verify(answers: Answers, dtypes: Sequence[str]) -> tuple[dict[str, list[Row]], list[str]]:
    """Return the rows of the tables by dtype, and everything that is wrong."""
    engine = {dtype: answers.by_engine(dtype, dtype) for dtype in dtypes}
    plain = {dtype: [answers.by_stock(dtype, size, SOFTMAX[dtype]) for size in BATCHES[dtype]] for dtype in dtypes}
    compare: dict[str, Callable[..., tuple[Row, list[str]]]]
    compare = {"float32": compare_float32, "bfloat16": compare_bfloat16}
    rows: dict[str, list[Row]] = {dtype: [] for dtype in dtypes}
    problems: list[str] = []
    for dtype in dtypes:
        for cell in CELLS:
            row, wrong = compare[dtype](cell.label, engine[dtype][cell], *(found[cell] for found in plain[dtype]))
            rows[dtype].append(row)
            problems += wrong
    if "bfloat16" in dtypes:
        ours = answers.by_engine("bfloat16", EXACTER)
        theirs = answers.by_stock("bfloat16", BATCHES["bfloat16"][0], EXACTER)
        for cell, row in zip(CELLS, rows["bfloat16"], strict=True):
            by_default, wrong = compare_bfloat16(
                f"{cell.label}, the engine's softmax in {EXACTER} and stock's not,",
                ours[cell],
                *(found[cell] for found in plain["bfloat16"]),
            )
            row |= {f"{m}: engine by default": by_default[f"{m}: engine"] for m in stock.METRICS}
            problems += wrong
            problems += compare_bfloat16(f"{cell.label}, {EXACTER} softmax,", ours[cell], theirs[cell], theirs[cell])[1]
        references = {"softmax": theirs} | ({"distances": plain["float32"][0]} if "float32" in dtypes else {})
        named = {"engine": ours, "stock": plain["bfloat16"][0], f"stock, {EXACTER} softmax": theirs}
        for name, reference in references.items():
            sides = {n: side for n, side in named.items() if side is not reference}
            rows[name] = [
                distances(cell.label, reference[cell], {n: side[cell] for n, side in sides.items()}) for cell in CELLS
            ]
    return rows, problems


def text_of(rows: Mapping[str, Sequence[Row]], problems: Sequence[str], limit: int) -> str:
    """Return the tables as markdown, with what they show."""
    here = environment()
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    heads = {
        "float32": "float32: summed log-probability of every choice, in nats",
        "bfloat16": f"bfloat16: documents with another answer than stock at batch size {BATCHES['bfloat16'][0]}, both "
        f"softmaxes in bfloat16; stock itself at batch size {BATCHES['bfloat16'][1]}",
        "softmax": "bfloat16: documents with another answer where stock's softmax is in float32, as the engine's is",
        "distances": "bfloat16: documents with another answer than stock in float32, and the mean difference",
    }
    return "\n\n".join(
        [
            "# The engine against stock lm-eval",
            f"{MODEL}, {', '.join(TASKS)}; {limit} documents each. One sweep over all models, and lm-eval's HFLM on the "
            "exported folder of each.",
            *(f"## {heads[dtype]}\n\n{table(found)}" for dtype, found in rows.items()),
            "Every bound holds." if not problems else "\n".join(["Broken:", "", *(f"- {p}" for p in problems)]),
            f"{here['date'][:10]}, {here['machine']}; {versions}.",
        ]
    )


def main() -> None:
    """Compare, print and keep the tables; end with status 1 if a bound is broken."""
    asked = _arguments()
    asked.runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=asked.runs) as scratch:
        rows, problems = verify(Answers(asked, Path(scratch)), asked.dtypes)
    text = text_of(rows, problems, asked.limit)
    print(text, flush=True)
    for problem in problems:
        print(problem, file=sys.stderr)
    figures = {"limit": asked.limit, "passed": not problems, "rows": rows, "problems": problems}
    if asked.results:
        write_text(RESULTS / "verify-engine.md", text + "\n")
        finish("verify-engine", figures)
    else:
        print(json.dumps(figures))
    sys.exit(1 if problems else 0)


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=int, default=200, help="documents a task")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(BATCHES), default=tuple(BATCHES))
    parser.add_argument("--data", type=Path, default=os.environ.get("FLEXI_DATA"), help="folder with tasks/*.jsonl")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where answers are kept between calls")
    parser.add_argument("--no-results", dest="results", action="store_false", help="leave results/bench as it is")
    asked = parser.parse_args()
    if not asked.data:
        parser.error("name the folder with tasks/*.jsonl: --data DIR, or the variable FLEXI_DATA")
    return asked


if __name__ == "__main__":
    main()
