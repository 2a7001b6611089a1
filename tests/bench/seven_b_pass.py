"""One pass of the 7B bench in a process of its own: reads a job, does it by the public interface, notes time and memory."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from flexi_plugins.data import BlockRecipe, Scores
from flexi_plugins.hookspecs import PruningRequest
from flexi_plugins.pruner import Calibration, Pruner

WINDOWS = Calibration(windows=16, length=512, gradient_samples=10, gradient_length=64)
SECONDS_BETWEEN_SAMPLES = 0.05


# ------------------------------------------------------------------------------------------- watching


class Watch:
    """Seconds of each stage, what it had read from the storage, and its most anonymous and shared memory, in bytes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.from_disk: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self._stage = ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what is done inside, under this name."""
        self._stage = name
        start, read = time.perf_counter(), storage_read()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.from_disk[name] = storage_read() - read

    def _sample(self) -> None:
        while not self._stopped.wait(SECONDS_BETWEEN_SAMPLES):
            now = memory("RssAnon") + memory("RssShmem")
            self.peaks[self._stage] = max(now, self.peaks.get(self._stage, 0))


def memory(name: str) -> int:
    """Return a line of /proc/self/status in bytes: VmHWM (the most resident ever), RssAnon, RssShmem and so on."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def storage_read() -> int:
    """Return how many bytes the process has had read from the storage itself: what was in memory does not count."""
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return next(int(value) for name, value in lines if name == "read_bytes")


# -------------------------------------------------------------------------------------------- scoring


def opened(job: dict[str, Any]) -> Pruner:
    """Return the pruner of the job's checkpoint, calibrated on random token ids, since there is no tokenizer."""
    limit = {} if job["memory"] is None else {"memory": job["memory"]}
    pruner = Pruner(job["folder"], WINDOWS, dtype="bfloat16", **limit)
    vocabulary = pruner.checkpoint.shape.vocabulary
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(vocabulary, (WINDOWS.windows, WINDOWS.length), generator=generator)
    samples = torch.randint(vocabulary, (WINDOWS.gradient_samples, WINDOWS.gradient_length), generator=generator)
    pruner.__dict__["texts"] = (windows, samples, "random")
    return pruner


def score(job: dict[str, Any], watch: Watch) -> None:
    """Calibrate for the job's metrics together, score the model with each, and save the scores."""
    with watch.stage("score"):
        pruner = opened(job)
        pruner.calibrate({need for m in job["metrics"] for need in pruner.plugins.get("metric", m).needs})
        found = {m: pruner.score(m) for m in job["metrics"]}
    for metric, scores in found.items():
        save_scores(scores, Path(job["scores"][metric]))


def save_scores(scores: Scores, file: Path) -> None:
    """Write block, attention and mlp scores as JSON."""
    assert scores.block is not None
    assert scores.attention is not None
    assert scores.mlp is not None
    units = {"attention": [s.tolist() for s in scores.attention], "mlp": [s.tolist() for s in scores.mlp]}
    file.write_text(json.dumps({"block": scores.block.tolist(), **units, "comparable": scores.comparable}))


@dataclass(frozen=True)
class SavedScores:
    """The scores of a file: a unit of the original model keeps its own wherever a plan puts it, so no pass is needed."""

    file: str

    name: ClassVar[str] = "saved-scores"
    paper: ClassVar[str] = ""
    gives: ClassVar[frozenset[str]] = frozenset({"block", "attention", "mlp"})
    needs: ClassVar[frozenset[str]] = frozenset()

    @cached_property
    def saved(self) -> dict[str, Any]:
        """What the file holds."""
        return json.loads(Path(self.file).read_text())

    def score(self, request: PruningRequest) -> Scores:
        """Return the scores of the units that the current model is made of; a block's is the mean of its sources'."""
        recipes, block = request.plan.blocks, self.saved["block"]
        return Scores(
            block=torch.tensor([sum(block[s] for s in r.sources) / len(r.sources) for r in recipes]),
            attention=tuple(self._units(r, "attention", "kv_heads") for r in recipes),
            mlp=tuple(self._units(r, "mlp", "channels") for r in recipes),
            comparable=self.saved["comparable"],
        )

    def _units(self, recipe: BlockRecipe, kind: str, field: str) -> Tensor:
        every = [(torch.tensor(self.saved[kind][p.source]), getattr(p, field)) for p in recipe.parts]
        return torch.cat([scores if units is None else scores[list(units)] for scores, units in every])


# -------------------------------------------------------------------------------------------- writing


def write(job: dict[str, Any], watch: Watch) -> None:
    """Plan from saved scores, make the plan's new tensors, write the checkpoint, and have the disk take it."""
    with watch.stage("open"):
        pruner = opened(job)
        strategy = pruner.plugins.get("strategy", job["strategy"], job["options"])
    with watch.stage("plan"):
        plan = pruner.plan(SavedScores(job["scores"][job["metric"]]), strategy, job["ratio"])
    with watch.stage("new tensors"):
        planned = pruner.attach(plan)
    with watch.stage("write"):
        pruner.write(planned, job["output"])
    with watch.stage("flush"):
        for file in Path(job["output"]).iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def main() -> None:
    """Do the job of the file named on the command line; its ``result`` names the file for what was measured."""
    job = json.loads(Path(sys.argv[1]).read_text())
    with Watch() as watch:
        (score if "metrics" in job else write)(job, watch)
    measured = {
        "seconds": watch.seconds,
        "anonymous_and_shared": watch.peaks,
        "from_disk": watch.from_disk,
        "resident_peak": memory("VmHWM"),
    }
    Path(job["result"]).write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
