"""Score and prune a LLaMA-7B of random weights in a few gigabytes: time and memory of every pass, against its bound."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import seven_b_bounds as bounds
from common import finish, table
from machine_rates import Disk, Products, disk_rates, drop_cache, product_rates
from random_llama import random_llama
from seven_b_pass import WINDOWS
from spot_check import spot_check

from flexi_plugins.checkpoint import Checkpoint
from flexi_plugins.data import PruningPlan
from flexi_plugins.rewrite import PLAN_FILE

RUNS = Path(__file__).parents[2] / "runs" / "bench"
GIB = 2**30
MOST_GIB, MOST_TIMES_BOUND, MOST_SEARCH_S = 4.0, 2.0, 600.0  # what is to be reached
BLOCKS, REPLACED, RANK, RATIO = 32, 9, 256, 0.2
BATCH = 2048  # tokens of windows that the rate of a block's products is measured on
DISK_NEEDED = 2.2  # models: the dense one, a pruned one, and what the write rate is measured with
SCORING: dict[str, tuple[str, ...]] = {
    "score-flexigpt": ("flexigpt",),
    "score-come": ("come",),
    "score-both": ("flexigpt", "come"),
    "score-saap": ("saap",),
}
# strategy -> the metric whose saved scores it is planned from, and its options. concat-merge chooses pairs and shares by
# the scores, so that no step needs a pass over the model.
WRITING: dict[str, tuple[str, dict[str, Any]]] = {
    "share-lora": ("flexigpt", {"rank": RANK}),
    "concat-merge": ("come", {"pairs": "score", "ratio": "score"}),
    "remove-blocks": ("flexigpt", {}),
    "remove-units": ("saap", {}),
}
PASSES = (*SCORING, *(f"write-{strategy}" for strategy in WRITING))
EXPLANATION = """\
score-*: opening the checkpoint, calibration and scores (flexigpt, come: 16 windows x 512 tokens; saap: 10 samples x 64).
write-*: new tensors (share-lora's adapters), the checkpoint written, and the disk made to take it (fsync). Planned
  beforehand from the scores that the scoring passes saved, without a pass over the model: concat-merge chooses pairs and
  shares by these scores, and a merged block's units keep theirs. share-lora's donor search is its planning, timed apart.
bound s: bytes read (and written) at the disk's rate + multiply-adds at the rate of one block's products, all measured in
  this run; of share-lora's factorisations the products with the matrices. No more is counted as read than came from the
  storage (from disk), since the system may have kept in memory what is read a second time.
with statistics: flexigpt's own products (stream x outgoing maps) added to the bound.
GiB: the most resident (VmHWM), and the most anonymous and shared memory, sampled every 50 ms."""


@dataclass(frozen=True)
class Bench:
    """What every pass needs: the checkpoint and its shards, the machine's rates, where files go, the memory limit."""

    checkpoint: Checkpoint
    shards: tuple[Path, ...]
    work: Path
    memory: int | None
    disk: Disk
    rates: Products

    def job(self, name: str) -> dict[str, Any]:
        """Return what the process of a pass is told."""
        metrics = [m for group in SCORING.values() for m in group]
        job = {
            "folder": str(self.checkpoint.folder),
            "memory": self.memory,
            "scores": {m: str(self.work / f"scores-{m}.json") for m in metrics},
            "result": str(self.work / f"{name}.json"),
        }
        if name in SCORING:
            return {**job, "metrics": SCORING[name]}
        strategy = name.removeprefix("write-")
        metric, options = WRITING[strategy]
        if strategy == "share-lora":
            options = {**options, "blocks": max(1, REPLACED * len(self.checkpoint.shape.blocks) // BLOCKS)}
        own = {"strategy": strategy, "options": options, "metric": metric, "ratio": RATIO}
        return {**job, **own, "output": str(self.work / strategy)}

    def run(self, name: str) -> dict[str, Any]:
        """Do one pass in a process of its own, on shards that are not in memory; return what it measured, and its bound."""
        job = self.job(name)
        if "output" in job:
            shutil.rmtree(job["output"], ignore_errors=True)  # of a run that was cut off and kept
        file = self.work / f"{name}-job.json"
        file.write_text(json.dumps(job))
        drop_cache(self.shards)
        start = time.perf_counter()
        process = subprocess.run([sys.executable, str(Path(__file__).with_name("seven_b_pass.py")), str(file)])
        if process.returncode:
            raise SystemExit(f"{name}: its process ended with status {process.returncode}")
        measured = json.loads(Path(job["result"]).read_text())
        measured["process_s"] = time.perf_counter() - start
        return self.scored(name, measured) if name in SCORING else self.written(Path(job["output"]), measured)

    def scored(self, name: str, measured: dict[str, Any]) -> dict[str, Any]:
        """Add the bound of a scoring pass."""
        shape = self.checkpoint.shape
        bound = bounds.gradients if name == "score-saap" else bounds.scoring
        parts = bound(shape, measured["from_disk"]["score"], self.disk, self.rates)
        found = judged(measured, ("score",), parts)
        if "flexigpt" in SCORING[name]:
            found["statistic_s"] = bounds.leave_one_out(shape, self.rates)
            found["times_bound_with_statistic"] = found["pass_s"] / (found["bound_s"] + found["statistic_s"])
        return found

    def written(self, output: Path, measured: dict[str, Any]) -> dict[str, Any]:
        """Add the bound of a writing pass and, for share-lora, of its donor search; check the folder and remove it."""
        plan = PruningPlan.from_json(json.loads((output / PLAN_FILE).read_text()))
        size = sum(f.stat().st_size for f in output.iterdir())
        spot_check(plan, self.checkpoint, output)
        shutil.rmtree(output)
        read, stages = measured["from_disk"], ("new tensors", "write", "flush")
        parts = bounds.writing(plan, size, sum(read[s] for s in stages), self.disk, self.rates)
        found = judged(measured, stages, parts)
        found |= {"written_bytes": size, "blocks": len(plan.blocks), "ratio": plan.ratio}
        if any(r.rank for r in plan.blocks):
            search = sum(bounds.donor_search(plan, read["plan"], self.disk, self.rates).values())
            found |= {"donor_search_s": measured["seconds"]["plan"], "donor_search_bound_s": search}
        return found


def judged(measured: dict[str, Any], stages: tuple[str, ...], parts: dict[str, float]) -> dict[str, Any]:
    """Return what a process measured with the time of these stages, its bound, and how many times the bound it took."""
    seconds, bound = sum(measured["seconds"][s] for s in stages), sum(parts.values())
    return {**measured, "pass_s": seconds, "bound_parts_s": parts, "bound_s": bound, "times_bound": seconds / bound}


@contextmanager
def work_folder(keep: bool) -> Iterator[Path]:
    """Yield runs/bench/seven_b; it and the checkpoint in it are removed at the end, whatever happens, unless kept."""
    folder = RUNS / "seven_b"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder)


def prepare(folder: Path, blocks: int, memory: int | None) -> Bench:
    """Make the checkpoint, or take the one that an earlier run kept, and measure the machine."""
    model = folder / f"llama-7b-random-{blocks}"
    free, needed = shutil.disk_usage(folder).free, DISK_NEEDED * 13.5e9 * blocks / BLOCKS
    if not model.exists() and free < needed:
        raise SystemExit(f"{folder}: needs {needed / 1e9:.0f} GB of free disk, there are {free / 1e9:.0f} GB")
    start = time.perf_counter()
    checkpoint = random_llama(model, blocks)
    shards = tuple(sorted(model.glob("*.safetensors")))
    size = sum(f.stat().st_size for f in shards)
    print(f"{model}: {size / 1e9:.1f} GB in {len(shards)} shards, {time.perf_counter() - start:.0f} s", flush=True)
    disk = disk_rates(shards)
    print(disk, flush=True)
    columns = bounds.sketch_columns(RANK)
    rates = product_rates(checkpoint.shape, BATCH, WINDOWS.gradient_samples, WINDOWS.gradient_length, columns)
    print(rates, flush=True)
    return Bench(checkpoint, shards, folder, memory, disk, rates)


def line(name: str, found: dict[str, Any]) -> str:
    """Say how long a pass took, by stages, and what its bound is made of."""
    stages, parts = (", ".join(f"{n} {s:.1f}" for n, s in found[key].items()) for key in ("seconds", "bound_parts_s"))
    return f"{name}: {found['pass_s']:.1f} s ({stages}), {found['times_bound']:.2f} x bound ({parts})"


def row(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return one line of the table."""
    return {
        "pass": name,
        "s": found["pass_s"],
        "bound s": found["bound_s"],
        "times bound": found["times_bound"],
        "with statistics": found.get("times_bound_with_statistic"),
        "donor search s": found.get("donor_search_s"),
        "resident GiB": found["resident_peak"] / GIB,
        "anonymous + shared GiB": max(found["anonymous_and_shared"].values(), default=0) / GIB,
        "from disk GB": sum(found["from_disk"].values()) / 1e9,
        "written GB": found.get("written_bytes", 0) / 1e9,
    }


def misses(found: dict[str, dict[str, Any]]) -> list[str]:
    """Say by how much each target is missed; nothing where all are met."""
    lines = []
    for name, values in found.items():
        for what, value, most in (
            ("times its bound", values["times_bound"], MOST_TIMES_BOUND),
            ("GiB resident", values["resident_peak"] / GIB, MOST_GIB),
            ("s of donor search", values.get("donor_search_s", 0.0), MOST_SEARCH_S),
        ):
            if value > most:
                lines.append(f"{name}: {value:.2f} {what}, to reach {most:g}: {value / most:.2f} times that")
    return lines


def report(bench: Bench, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Print the table and return the figures of the bench."""
    print(table([row(name, values) for name, values in found.items()]))
    print(EXPLANATION)
    print(bench.disk)
    print("\n".join([f"missed: {text}" for text in misses(found)] or ["all targets are met"]))
    return {
        "missed": misses(found),
        "peak_gib": max(f["resident_peak"] for f in found.values()) / GIB,
        "anonymous_and_shared_gib": max(max(f["anonymous_and_shared"].values()) for f in found.values()) / GIB,
        "times_bound": {name: f["times_bound"] for name, f in found.items()},
        "times_bound_with_statistic": {
            n: f["times_bound_with_statistic"] for n, f in found.items() if "statistic_s" in f
        },
        "donor_search_s": next((f["donor_search_s"] for f in found.values() if "donor_search_s" in f), None),
        "blocks": len(bench.checkpoint.shape.blocks),
        "memory_limit_gib": None if bench.memory is None else bench.memory / GIB,
        "cache_drop_works": bench.disk.drop_works,
        "disk": vars(bench.disk),
        "products": vars(bench.rates),
        "passes": found,
    }


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="of the checkpoint, at least 3; 32 is LLaMA-7B")
    parser.add_argument("--memory", type=float, default=4.0, metavar="GIB", help="for a pass's process; 0: its default")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES, metavar="PASS", help=", ".join(PASSES))
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint and the scores, and use kept ones")
    given = parser.parse_args()
    if given.blocks < 3:
        parser.error(
            f"--blocks: expected at least 3, since remove-units spares the first and last, found {given.blocks}"
        )
    return given


def check_scores(passes: Sequence[str], folder: Path) -> None:
    """Raise if a strategy is to be planned from scores that no pass makes and no earlier run has kept."""
    made = {metric for name in passes for metric in SCORING.get(name, ())}
    for name in passes:
        metric = None if name in SCORING else WRITING[name.removeprefix("write-")][0]
        if metric and metric not in made and not (folder / f"scores-{metric}.json").is_file():
            raise SystemExit(f"{name}: no scores of {metric} in {folder}; add score-{metric} to --passes")


def main() -> None:
    """Run the bench; only the whole of it is written to results/bench."""
    given = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    passes = [p for p in PASSES if p in given.passes]
    with work_folder(given.keep) as folder:
        check_scores(passes, folder)
        bench = prepare(folder, given.blocks, int(given.memory * GIB) or None)
        found = {}
        for name in passes:
            found[name] = bench.run(name)
            print(line(name, found[name]), flush=True)
        figures = report(bench, found)
    if given.blocks == BLOCKS and len(passes) == len(PASSES):
        finish("seven_b", figures)
    else:
        print(json.dumps({"trial": figures}))


if __name__ == "__main__":
    main()
