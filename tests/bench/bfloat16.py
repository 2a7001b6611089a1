"""Bench ``bfloat16``: the engine in bfloat16 by torch's own products, by float32 products that are rounded, and in float32.

Each sweeps the same windows of the same model, in turns in one process, and reads the log-probability of every token; the
first round warms up. Torch's own products are slow on processors that have none of bfloat16, fast on those that have.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from common import finish, table
from swept import MODEL

from flexi_plugins.corpora.python_docs import PythonDocs
from flexi_plugins.corpora.windows import token_windows
from flexi_plugins.data import PruningPlan
from flexi_plugins.execution import blocks
from flexi_plugins.execution.readout import Batch
from flexi_plugins.execution.sweep import Planned, Sweeper
from flexi_plugins.precision import WideProducts
from flexi_plugins.pruner import Pruner

LENGTH, WINDOWS, ROUNDS = 256, 4, 5
WAYS = {
    "bfloat16, torch's products": ("bfloat16", lambda dtype, device: nullcontext()),
    "bfloat16, wide products": ("bfloat16", lambda dtype, device: WideProducts()),
    "float32": ("float32", lambda dtype, device: nullcontext()),
}


def main() -> None:
    """Take turns, print and write the figures."""
    pruners = {dtype: Pruner(MODEL, dtype=dtype, device="cpu") for dtype in ("bfloat16", "float32")}
    any_pruner = pruners["float32"]
    windows, _ = token_windows(PythonDocs(), "held-out", None, any_pruner.tokenizer, LENGTH, WINDOWS)
    ids = torch.tensor(windows)
    reads = [(row, tuple(range(LENGTH - 1)), tuple(ids[row, 1:].tolist())) for row in range(WINDOWS)]
    planned = [Planned(PruningPlan.identity(any_pruner.checkpoint.shape))]
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, float] = {}
    for _ in range(ROUNDS + 1):
        for way, (dtype, products) in WAYS.items():
            begun = time.perf_counter()
            with patch.object(blocks, "products", products):
                ((_, answers),) = Sweeper(pruners[dtype].blocks).sweep(planned, [Batch(ids, reads)])
            seconds[way].append(time.perf_counter() - begun)
            losses[way] = -sum(score for score, _ in answers[0]) / (WINDOWS * (LENGTH - 1))
    first, *_ = WAYS
    rows: list[dict[str, Any]] = []
    for way, (_, *counted) in seconds.items():
        ratios = [own / other for own, other in zip(seconds[first][1:], counted, strict=True)]
        rows.append(
            {
                "computed in": way,
                "tokens/s": ids.numel() / statistics.median(counted),
                "times torch's": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "loss": f"{losses[way]:.4f}",
            }
        )
    print(table(rows))
    finish("bfloat16", {"model": MODEL, "tokens": ids.numel(), "rounds": ROUNDS, "rows": rows})


if __name__ == "__main__":
    main()
