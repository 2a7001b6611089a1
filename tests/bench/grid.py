"""Times one sweep over a grid of pruned models against stock lm-eval run once a model, and says where the gain comes from.

Both sides: SmolLM2-135M, seven tasks, bfloat16, the same threads, every model's answers from scratch. Our sweep is timed
before and after stock's hour, and the slower time counts. What starting takes is reported apart: the process, imports,
and by stock the list of all tasks there are. What stock took is kept under runs/bench/grid, so that a run that was
stopped goes on where it was on the same day.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import stock
import torch
from common import environment, finish, table
from swept import MODEL, TASKS, Cell, Plans, grid

from flexi_plugins.data import digest
from flexi_plugins.errors import FlexiError
from flexi_plugins.evaluators import replay
from flexi_plugins.evaluators.harness import load_suite
from flexi_plugins.evaluators.outcomes import SEVEN
from flexi_plugins.evaluators.quiet import quiet
from flexi_plugins.evaluators.tasks import LmEval
from flexi_plugins.execution.packing import Request, pack
from flexi_plugins.execution.schedule import count_blocks
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.files import write_text
from flexi_plugins.progress import Progress
from flexi_plugins.pruner import Pruner

RATIOS = {12: (0.2,), 36: (0.1, 0.2, 0.3)}
TARGETS = {12: 3.0, 36: 5.0}
BATCH = 16
RUNS = Path(__file__).parents[2] / "runs" / "bench" / "grid"

Row = dict[str, Any]


# ------------------------------------------------------------------------------------------- tokens


def token_pairs(pruner: Pruner, limit: int) -> tuple[Request, ...]:
    """Return the distinct (context, continuation) token pairs that the tasks ask about."""
    with quiet(), pruner.progress.stage("loading tasks of lm-eval", len(TASKS)) as advance:
        suite = load_suite(TASKS, pruner.data, limit, None, advance)
    length = pruner.checkpoint.config.max_position_embeddings
    return replay.collect(suite.instances, pruner.tokenizer, length, lambda n: None).pairs


def stock_tokens(pairs: Iterable[Request], batch_size: int) -> dict[str, int]:
    """Return what HFLM gives its model: rows (each distinct one once), their tokens, and the same padded in batches.

    HFLM sorts rows by length, and asks once for continuations that differ in their last token only.
    """
    lengths = sorted((len(row) for row in {(*c, *t)[:-1] for c, t in pairs}), reverse=True)
    batches = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    return {"rows": len(lengths), "tokens": sum(lengths), "padded_tokens": sum(b[0] * len(b) for b in batches)}


def our_tokens(pairs: Sequence[Request]) -> dict[str, int]:
    """Return what the engine gives its blocks: tokens of the trie of all rows, the same as packed, positions read."""
    packs = pack(pairs)
    return {
        "distinct_tokens": len({row[:i] for row in ((*c, *t)[:-1] for c, t in pairs) for i in range(1, len(row) + 1)}),
        "packed_tokens": sum(p.batch.ids.numel() for p in packs),
        "read_tokens": sum(len(t) for _, t in pairs),
        "read_positions": len({(*c, *t[:i]) for c, t in pairs for i in range(len(t))}),
    }


# ------------------------------------------------------------------------------------------- our side


class Sweeps:
    """Runs the sweep over cells in a process of its own, and keeps what every run of a size gave."""

    def __init__(self, plans: Plans, asked: Any) -> None:
        """Take the plans from where they were made; ``asked`` are the bench's options."""
        self.plans, self.asked = plans, asked
        self.runs: dict[int, list[Row]] = {}

    def time(self, size: int) -> None:
        """Time one sweep over the cells of a size."""
        cells = grid(RATIOS[size])
        job = {
            "plans": {c.label: self.plans.key(c) if c.metric else "" for c in cells},
            "folder": str(RUNS),
            "data": str(self.asked.data),
            "dtype": self.asked.dtype,
            "limit": self.asked.limit,
        }
        with tempfile.TemporaryDirectory() as scratch:
            file, output = Path(scratch) / "job.json", Path(scratch) / "result.json"
            file.write_text(json.dumps(job), encoding="utf-8")
            script = Path(__file__).with_name("swept.py")
            began, spawned = time.monotonic(), time.time()
            command = [sys.executable, str(script), str(file), f"--output={output}", f"--spawned={spawned}"]
            status = subprocess.run(command, check=False).returncode
            whole = time.monotonic() - began
            if status:
                raise FlexiError(f"bench: the sweep over {len(cells)} models ended with status {status}; see above")
            result = json.loads(output.read_text(encoding="utf-8"))
        result["seconds"]["whole"] = whole
        self.runs.setdefault(size, []).append(result)

    def slower(self, size: int) -> Row:
        """Return the run of a size that took longer."""
        return max(self.runs[size], key=lambda run: working(run["seconds"]))


def working(seconds: Mapping[str, float]) -> float:
    """Return the seconds of a process without those of starting it."""
    return seconds["whole"] - starting(seconds)


def starting(seconds: Mapping[str, float]) -> float:
    """Return the seconds until everything is imported and, by stock, all of lm-eval's tasks are listed."""
    return seconds["start"] + seconds.get("index", 0.0)


# ------------------------------------------------------------------------------------------- stock's side


class Stock:
    """Runs stock lm-eval on the exported folder of every cell, or finds that it ran here today."""

    def __init__(self, pruner: Pruner, asked: Any) -> None:
        """Write the task definitions; ``asked`` are the bench's options."""
        self.pruner, self.asked = pruner, asked
        here = environment()
        data = LmEval(tasks=TASKS).inputs(asked.data, {})
        options = [asked.dtype, BATCH, asked.limit, asked.threads]
        self.setting = [here["machine"], here["versions"], here["date"][:10], data, options]
        definitions = stock.write_definitions(RUNS / "definitions", asked.data)
        self.how = stock.Setting(definitions, asked.dtype, BATCH, asked.limit)
        self.reused = 0

    def time(self, planned: Mapping[Cell, Planned]) -> dict[str, Row]:
        """Return what ``stock.run`` gave of every cell, by label."""
        found: dict[str, Row] = {}
        with self.pruner.progress.stage(f"stock lm-eval, {len(planned)} models", len(planned)) as advance:
            for cell, plan in planned.items():
                file = RUNS / "stock" / f"{cell.label}-{digest([plan.plan.hash, *self.setting])[:12]}.json"
                if file.is_file():
                    self.reused += 1
                else:
                    self._run(plan, file)
                found[cell.label] = json.loads(file.read_text(encoding="utf-8"))
                seconds = found[cell.label]["seconds"]
                self.pruner.progress.say(f"stock lm-eval on {cell.label}: {seconds['whole']:.1f} s")
                advance(1)
        return found

    def _run(self, planned: Planned, file: Path) -> None:
        with tempfile.TemporaryDirectory(dir=RUNS) as scratch:
            folder = Path(scratch) / "model"
            self.pruner.write(planned, folder)
            result = stock.run(folder, self.how)
        write_text(file, json.dumps({**result, "setting": self.setting}))


# ------------------------------------------------------------------------------------------- what came out


def average(documents: Iterable[Mapping[str, Any]]) -> float:
    """Return LLM-Pruner's average over the seven tasks."""
    found = stock.accuracies(documents)
    return sum(found[f"{task}_{metric}"] for task, metric in SEVEN.items()) / len(SEVEN)


def cell_rows(theirs: Mapping[str, Row], ours: Row) -> list[Row]:
    """Return one row a model: stock's seconds, both sides' accuracy, and how many answers differ."""
    rows = []
    for label, run in theirs.items():
        documents = ours["documents"][label]
        differing = stock.changed(documents, run["documents"])
        rows.append(
            {
                "model": label,
                "stock s": round(working(run["seconds"]), 1),
                "its start s": round(starting(run["seconds"]), 1),
                "average stock": round(100 * average(run["documents"]), 2),
                "average swept": round(100 * average(documents), 2),
                **{f"{metric} changed": len(places) for metric, places in differing.items()},
            }
        )
    return rows


def total_seconds(theirs: Mapping[str, Row], cells: Iterable[Cell]) -> dict[str, float]:
    """Return stock's seconds by part, over cells; ``rest`` is what no part has (ending a process)."""
    runs = [theirs[cell.label]["seconds"] for cell in cells]
    total = {part: math.fsum(seconds[part] for seconds in runs) for part in runs[0]}
    return total | {"rest": working(total) - sum(total[part] for part in ("tasks", "model", "answers", "judging"))}


def part_rows(
    size: int, plans: Mapping[Cell, Planned], theirs: Mapping[str, float], ours: Row, tokens: Mapping[str, int]
) -> list[Row]:
    """Return one row a part of the gain: what stock does, what the sweep does, and the least that is possible."""
    chosen = [plans[cell].plan for cell in grid(RATIOS[size])]
    swept, alone = count_blocks(chosen)
    distinct = len({plan.key(i) for plan in chosen for i in range(len(plan.blocks))})
    models, seconds, engine = len(chosen), ours["seconds"], ours["engine"]
    share = tokens["distinct_tokens"] / tokens["padded_tokens"]
    read = tokens["read_positions"] / tokens["padded_tokens"]
    blocks = theirs["forward"] - theirs["head"]
    reading = theirs["likelihoods"] - blocks
    inside = sum(engine.values())

    def row(part: str, stock_value: float, our_value: float, bound: float | None = None) -> Row:
        figures = {"stock": stock_value, "sweep": our_value, "bound": bound}
        rounded = {k: None if v is None else round(v, 2) for k, v in figures.items()}
        times = {"stock / sweep": _ratio(stock_value, our_value), "sweep / bound": _ratio(our_value, bound)}
        return {"part": part, **rounded, **times}

    return [
        row("tokens of a model", tokens["padded_tokens"], tokens["packed_tokens"], tokens["distinct_tokens"]),
        row("tokens of a model, not padded", tokens["tokens"], tokens["distinct_tokens"]),
        row("block runs", alone, swept, distinct),
        row("rows of the head of a model", tokens["padded_tokens"], tokens["read_positions"], tokens["read_positions"]),
        row("seconds in blocks", blocks, engine["blocks"], blocks * share * swept / alone),
        row("seconds in head and softmax", reading, engine["head"], reading * read),
        row("seconds tokenising", theirs["answers"] - theirs["likelihoods"], seconds["tokenising"]),
        row("seconds building tasks", theirs["tasks"], seconds["tasks"], theirs["tasks"] / models),
        row("seconds judging", theirs["judging"], seconds["judging"]),
        row("seconds loading models", theirs["model"], seconds["model"] + engine["reading"] + engine["building"]),
        row("seconds remaining", theirs["rest"], _remaining(seconds, inside)),
        row("seconds", working(theirs), working(seconds)),
        row("seconds of starting", starting(theirs), starting(seconds)),
    ]


def _ratio(value: float, other: float | None) -> float | None:
    return round(value / other, 2) if other else None


def _remaining(seconds: Mapping[str, float], inside: float) -> float:
    """Return our seconds that no row has: what the sweep does outside of its parts, and what is outside of the stages."""
    return working(seconds) - sum(seconds[p] for p in ("model", "tasks", "tokenising", "judging")) - inside


def figures_of(
    size: int, cells: Iterable[Cell], theirs: Mapping[str, float], sweeps: Sweeps, rows: Sequence[Row]
) -> Row:
    """Return the figures of one size of the grid, for JSON."""
    ours = sweeps.slower(size)["seconds"]
    labels = {cell.label for cell in cells}
    return {
        "models": len(labels),
        "stock_seconds": round(working(theirs), 2),
        "stock_start_seconds": round(starting(theirs), 2),
        "sweep_seconds": [round(working(run["seconds"]), 2) for run in sweeps.runs[size]],
        "sweep_start_seconds": round(starting(ours), 2),
        "ratio": round(working(theirs) / working(ours), 3),
        "ratio_with_start": round(theirs["whole"] / ours["whole"], 3),
        "target": TARGETS[size],
        "changed_answers": {
            metric: sum(r[f"{metric} changed"] for r in rows if r["model"] in labels) for metric in stock.METRICS
        },
        "stock_parts": {part: round(value, 2) for part, value in theirs.items()},
        "sweep_parts": {part: round(value, 2) for part, value in ours.items()},
        "engine_parts": {part: round(value, 2) for part, value in sweeps.slower(size)["engine"].items()},
    }


# ------------------------------------------------------------------------------------------- the bench


def main() -> None:
    """Make the plans, time both sides, print the tables and the line of JSON."""
    asked = _arguments()
    _set_threads(asked.threads)
    if asked.fresh:
        shutil.rmtree(RUNS, ignore_errors=True)
    pruner = Pruner(MODEL, dtype=asked.dtype, device="cpu", data=asked.data, progress=Progress())
    plans = Plans(pruner, RUNS)
    planned = plans.get(grid(RATIOS[asked.cells]))
    pairs = token_pairs(pruner, asked.limit)
    tokens = stock_tokens(pairs, BATCH) | our_tokens(pairs)

    sizes = [size for size in RATIOS if size <= asked.cells]
    sweeps, plain = Sweeps(plans, asked), Stock(pruner, asked)
    for size in sizes:
        sweeps.time(size)
    theirs = plain.time(planned)
    for size in reversed(sizes):
        sweeps.time(size)

    _check_tokens(tokens, theirs)
    rows = cell_rows(theirs, sweeps.slower(asked.cells))
    print(table(rows))
    figures: Row = {"limit": asked.limit, "dtype": asked.dtype, "batch_size": BATCH, "tokens": tokens}
    for size in sizes:
        cells = grid(RATIOS[size])
        total = total_seconds(theirs, cells)
        parts = part_rows(size, planned, total, sweeps.slower(size), tokens)
        print(f"\n{len(cells)} models\n\n{table(parts)}")
        figures[f"grid_{size}"] = figures_of(size, cells, total, sweeps, rows) | {"parts": parts}
        figures[f"ratio_{size}"] = figures[f"grid_{size}"]["ratio"]
        print(f"\n{len(cells)} models: {figures[f'ratio_{size}']} times less than stock; to reach: {TARGETS[size]}")
    figures |= {"models": rows, "stock_models_from_earlier_calls": plain.reused}
    if asked.results:
        finish("grid", figures)
    else:
        print(json.dumps(figures))


def _check_tokens(tokens: Mapping[str, int], theirs: Mapping[str, Row]) -> None:
    """Raise if HFLM ran other rows than ``stock_tokens`` says."""
    for label, run in theirs.items():
        expected = {name: tokens[name] for name in run["counts"]}
        if run["counts"] != expected:
            raise FlexiError(f"bench: expected stock to run {expected} on {label}, found {run['counts']}")


def _set_threads(threads: int) -> None:
    """Give both sides, and what is said of this process, the same threads."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(threads)


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--cells", type=int, choices=tuple(RATIOS), default=36, help="pruned models (36 include the 12)"
    )
    parser.add_argument("--limit", type=int, default=100, help="documents a task")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--data", type=Path, default=os.environ.get("FLEXI_DATA"), help="folder with tasks/*.jsonl")
    parser.add_argument("--fresh", action="store_true", help="use nothing of earlier calls")
    parser.add_argument("--no-results", dest="results", action="store_false", help="leave results/bench as it is")
    asked = parser.parse_args()
    if not asked.data:
        parser.error("name the folder with tasks/*.jsonl: --data DIR, or the variable FLEXI_DATA")
    return asked


if __name__ == "__main__":
    main()
