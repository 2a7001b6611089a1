"""Bench ``search``: a step-by-step search with the states of its candidates kept, and with every candidate run anew.

The blocks without which the loss is least go one by one (greedy importance, remove-blocks with progressive). Both ways
take turns in one process, with fresh pruners, and have to find the same plan.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from common import finish, table
from swept import MODEL

from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.execution.sweep import Planned, Sweeper
from flexi_plugins.pruner import Calibration, Pruner

METRIC, STRATEGY, OPTIONS, RATIO = "greedy", "remove-blocks", {"progressive": True}, 0.1
LENGTH, WINDOWS, ROUNDS = 128, 4, 2
WAYS = {"anew": False, "kept": True}


def search(keep: bool) -> tuple[float, int, Planned]:
    """Return the seconds of a search, how many blocks it ran, and what it made. keep: where memory allows."""
    pruner = Pruner(MODEL, Calibration(windows=WINDOWS, length=LENGTH))
    strategy = pruner.plugins.get("strategy", STRATEGY, OPTIONS)
    runs, run = [0], Blocks.run

    def counted(*arguments: Any) -> Any:
        runs[0] += 1
        return run(*arguments)

    with ExitStack() as patches:
        patches.enter_context(patch.object(Blocks, "run", counted))
        if not keep:
            patches.enter_context(patch.object(Sweeper, "can_keep", lambda *_: False))
        begun = time.perf_counter()
        planned = pruner.make(METRIC, strategy, RATIO)
        return time.perf_counter() - begun, runs[0], planned


def main() -> None:
    """Take turns, print and write the figures."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    runs: dict[str, int] = {}
    plans = set()
    for _ in range(ROUNDS):
        for way, keep in WAYS.items():
            taken, runs[way], planned = search(keep)
            seconds[way].append(taken)
            plans.add(planned.plan.hash)
            print(f"{way}: {taken:.1f} s, {runs[way]} blocks run", flush=True)
    if len(plans) > 1:
        raise SystemExit("search: both ways should find one plan, and they found several")
    ratios = [own / anew for own, anew in zip(seconds["kept"], seconds["anew"], strict=True)]
    rows = [
        {"states of candidates": way, "blocks run": runs[way], "seconds": statistics.median(seconds[way])}
        for way in WAYS
    ]
    print(table(rows))
    figures = {
        "model": MODEL,
        "ratio removed": RATIO,
        "steps": planned.plan.origin["steps"],
        "tokens": WINDOWS * LENGTH,
        "rounds": ROUNDS,
        "rows": rows,
        "share of the seconds": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }
    finish("search", figures)


if __name__ == "__main__":
    main()
