"""Bench ``distill_7b``: distil one merged block of a LLaMA-7B of random weights, block by block; the most memory it takes."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import finish, table
from random_llama import random_llama
from seven_b_pass import Watch, memory

from flexi_plugins.data import BlockRecipe, ModelShape, Part, PruningPlan
from flexi_plugins.hookspecs import TrainingText
from flexi_plugins.pruner import Pruner, Training
from flexi_plugins.recovery.distill import Distill

RUNS = Path(__file__).parents[2] / "runs" / "bench" / "distill_7b"
GIB = 2**30
MOST_GIB = 6.0  # what is to be reached
BLOCKS, MERGED = 32, 15  # blocks of the model; this one and the next are merged
LENGTH, WINDOWS, HELD_OUT = 512, 16, 2
STEP = 2048  # tokens
EXPLANATION = f"""\
Blocks {MERGED} and {MERGED + 1} as one of the same width, half of the heads and channels of each; all its weights trained by
distill on {WINDOWS} windows of {LENGTH} random tokens, {STEP} a step, bfloat16 with float32 weights and moments. The original's
states come from a sweep of its blocks, read from the shards. resident GiB: VmHWM of the process."""


def merged(shape: ModelShape, first: int) -> PruningPlan:
    """Return the plan that concatenates two neighbouring blocks, half of the units of each."""
    recipes = list(PruningPlan.identity(shape).blocks)
    block = shape.blocks[first]
    heads, channels = range(block.kv_heads), range(block.channels)
    half = len(heads) // 2, len(channels) // 2
    parts = (
        Part(first, tuple(heads[: half[0]]), tuple(channels[: half[1]])),
        Part(first + 1, tuple(heads[half[0] :]), tuple(channels[half[1] :])),
    )
    recipes[first : first + 2] = [BlockRecipe(parts=parts, norms=((first, 0.5), (first + 1, 0.5)))]
    return PruningPlan(shape, tuple(recipes))


def train(folder: Path, result: Path, limit: int | None) -> None:
    """Distil in this process, and write what it took as JSON."""
    setting = Training(length=LENGTH, tokens=WINDOWS * LENGTH, held_out=HELD_OUT)
    with Watch() as watch, watch.stage("distil"):
        pruner = Pruner(str(folder), dtype="bfloat16", device="cpu", **({} if limit is None else {"memory": limit}))
        shape = pruner.checkpoint.shape
        ids = torch.randint(shape.vocabulary, (WINDOWS + HELD_OUT, LENGTH), generator=torch.Generator().manual_seed(0))
        texts = [TrainingText(part, part.clone()) for part in (ids[:WINDOWS], ids[WINDOWS:])]
        pruner._texts[setting] = (*texts, "random")  # there is no tokenizer
        method = Distill(batch_tokens=STEP, micro_batch_tokens=STEP, evaluate_every=WINDOWS * LENGTH, keep="last")
        plan = merged(shape, MERGED if len(shape.blocks) == BLOCKS else 0)
        planned = pruner.recover(plan, method, setting, result.with_name("training"))
    said = planned.plan.origin["recovery"]
    measured = {
        "seconds": watch.seconds["distil"],
        "from_disk": watch.from_disk["distil"],
        "anonymous_and_shared": watch.peaks["distil"],
        "resident_peak": memory("VmHWM"),
        "curve": said["curve"],
        "facts": said["facts"],
    }
    result.write_text(json.dumps(measured))


def row(found: dict[str, Any]) -> dict[str, Any]:
    """Return the line of the table."""
    return {
        "trained parameters": int(found["facts"]["trained_parameters"]),
        "tokens": int(found["facts"]["trained_tokens"]),
        "s": found["seconds"],
        "resident GiB": found["resident_peak"] / GIB,
        "anonymous + shared GiB": found["anonymous_and_shared"] / GIB,
        "from disk GB": found["from_disk"] / 1e9,
        "block loss before": found["curve"][0]["held_out_block_loss"],
        "after": found["curve"][-1]["held_out_block_loss"],
    }


def main() -> None:
    """Make the checkpoint, distil in a process of its own, print and write the figures; the checkpoint is deleted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="of the checkpoint; 32 is LLaMA-7B")
    parser.add_argument("--memory", type=float, default=5.0, metavar="GIB", help="for sweeps; 0: their default")
    parser.add_argument("--process", type=Path, help=argparse.SUPPRESS)  # the checkpoint, in the measured process
    given = parser.parse_args()
    limit = int(given.memory * GIB) or None
    if given.process:
        train(given.process, RUNS / "result.json", limit)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    RUNS.mkdir(parents=True, exist_ok=True)
    try:
        start = time.perf_counter()
        model = RUNS / f"llama-7b-random-{given.blocks}"
        random_llama(model, given.blocks)
        print(f"{model.name} written in {time.perf_counter() - start:.0f} s", flush=True)
        command = [sys.executable, __file__, "--process", str(model), "--memory", str(given.memory)]
        subprocess.run(command, check=True)
        found = json.loads((RUNS / "result.json").read_text())
    finally:
        shutil.rmtree(RUNS)
    print(table([row(found)]))
    print(EXPLANATION)
    peak = found["resident_peak"] / GIB
    print(f"{peak:.2f} GiB resident, to reach {MOST_GIB:g}: {'met' if peak <= MOST_GIB else 'missed'}")
    setting = {"blocks": given.blocks, "tokens_a_step": STEP, "sweeps_gib": given.memory}
    figures = {"peak_gib": peak, "most_gib": MOST_GIB, **setting, **found}
    if given.blocks == BLOCKS:
        finish("distill_7b", figures)
    else:
        print(json.dumps({"trial": figures}))


if __name__ == "__main__":
    main()
