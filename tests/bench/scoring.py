"""Bench ``scoring``: the calibration of all three metrics together against the slowest of them alone, on the same tokens.

Each metric alone takes its own passes: flexigpt and come forward over the windows, saap forward and backward over the
gradient samples. "On the same tokens" therefore means windows that are the gradient samples as well. The default
protocol, whose windows are other and more tokens than its samples, is measured for information.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from common import finish, table

from flexi_plugins.pruner import Calibration, Pruner

MODEL, TARGET, ROUNDS = "smollm2-135m", 1.2, 5
METRICS = ("flexigpt", "come", "saap")
TOGETHER = "together"
SAME = Calibration(windows=32, length=64, gradient_samples=32, gradient_length=64)
DEFAULT = Calibration()


def calibrate(calibration: Calibration, metrics: Sequence[str]) -> float:
    """Return the seconds that the statistics of these metrics take a pruner that remembers nothing; text is made before."""
    pruner = Pruner(MODEL, calibration, dtype="auto")
    needs = set().union(*(pruner.plugins.get("metric", name).needs for name in metrics))
    assert len(pruner.texts[0]) == calibration.windows
    start = time.perf_counter()
    pruner.calibrate(needs)
    return time.perf_counter() - start


def measure(calibration: Calibration) -> dict[str, Any]:
    """Return medians over interleaved rounds, one warm-up before; the ratio is taken within each round."""
    cells = {**{name: (name,) for name in METRICS}, TOGETHER: METRICS}
    calibrate(calibration, METRICS)
    rounds = [{label: calibrate(calibration, metrics) for label, metrics in cells.items()} for _ in range(ROUNDS)]
    seconds = {label: statistics.median(r[label] for r in rounds) for label in cells}
    slowest = max(METRICS, key=lambda name: seconds[name])
    ratios = [r[TOGETHER] / r[slowest] for r in rounds]
    return {
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "slowest": slowest,
        "seconds": seconds,
        "forward_tokens": calibration.windows * calibration.length,
        "backward_tokens": calibration.gradient_samples * calibration.gradient_length,
    }


def row(protocol: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of the table."""
    tokens = f"{found['forward_tokens']} + {found['backward_tokens']}"
    seconds = {f"{label}, s": value for label, value in found["seconds"].items()}
    spread = f"{found['lowest']:.2f} to {found['highest']:.2f}"
    return {"protocol": protocol, "tokens": tokens, **seconds, "ratio": found["ratio"], "rounds": spread}


def main() -> None:
    """Measure both protocols, print them and write the figures."""
    same, default = measure(SAME), measure(DEFAULT)
    print(f"Calibration of {MODEL}: forward + backward tokens, medians of {ROUNDS} rounds.\n")
    print(table([row("same tokens", same), row("default", default)]))
    ratio = same["ratio"]
    verdict = "reached" if ratio <= TARGET else f"missed by {ratio - TARGET:.2f}"
    print(
        f"\nTogether / slowest alone ({same['slowest']}) on the same tokens: {ratio:.2f}; at most {TARGET}: {verdict}.\n"
    )
    finish("scoring", {"target": TARGET, "rounds": ROUNDS, "model": MODEL, **same, "default_protocol": default})


if __name__ == "__main__":
    main()
