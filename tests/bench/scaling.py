"""How the time of a sweep grows with the number of plans and of blocks, against the cost of the distinct blocks alone."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, finish, table

from flexi_plugins.corpora.python_docs import PythonDocs
from flexi_plugins.corpora.windows import token_windows
from flexi_plugins.data import BlockRecipe, ModelShape, Part, PruningPlan
from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.execution.readout import Batch
from flexi_plugins.execution.schedule import count_blocks
from flexi_plugins.execution.sweep import Planned, Sweeper
from flexi_plugins.models import open_model
from flexi_plugins.plugins import Plugins
from flexi_plugins.reports.figures import COLOURS, MARKERS, settings, svg

MODEL, WINDOW = "smollm2-135m", 512
TOKENS, COUNTS, ROUNDS = 2048, (1, 2, 4, 8, 16, 32), 2
STEP = 8  # channels by which a block is narrowed to make a plan differ from there on
GRANULARITY = 20  # CoMe-P tries the shares 0, 1/20, ..., 1
REFERENCES = 3  # sweeps of the references a round
HEADS = 9  # plans of one common block, which differ in the gain of the final norm only
TRIALS = Path(__file__).parents[2] / "runs" / "bench"


# ---------------------------------------------------------------------------------------------- plans


def narrowed(shape: ModelShape, block: int, channels: int) -> PruningPlan:
    """Return the plan that takes this many channels off one block: it differs from the dense model from there on."""
    kept = tuple(range(shape.blocks[block].channels - channels))
    recipes = list(PruningPlan.identity(shape).blocks)
    recipes[block] = BlockRecipe(parts=(Part(block, None, kept),))
    return PruningPlan(shape, tuple(recipes))


def nested(shape: ModelShape, count: int) -> list[PruningPlan]:
    """Return plans of which each leaves the dense model one block earlier than the one before, from the last block on."""
    depth = len(shape.blocks)
    return [narrowed(shape, depth - 1 - i % depth, STEP * (1 + i // depth)) for i in range(count)]


def unrelated(shape: ModelShape, count: int) -> list[PruningPlan]:
    """Return plans that differ from the first block on, so that they share nothing."""
    return [narrowed(shape, 0, STEP * (1 + i)) for i in range(count)]


def drop_one(shape: ModelShape) -> list[PruningPlan]:
    """Return the plans that leave out one block each."""
    every = range(len(shape.blocks))
    return [PruningPlan.keep(shape, (i for i in every if i != gone)) for gone in every]


def shares(shape: ModelShape) -> list[PruningPlan]:
    """Return CoMe-P's candidates for the middle pair of blocks: merged with a share of 0, 1/20, ..., 1 of the first."""
    first = len(shape.blocks) // 2 - 1
    return [_merged(shape, first, part / GRANULARITY) for part in range(GRANULARITY + 1)]


def _merged(shape: ModelShape, first: int, share: float) -> PruningPlan:
    heads, channels = (round(share * n) for n in (shape.blocks[first].kv_heads, shape.blocks[first].channels))
    parts = (
        Part(first, tuple(range(heads)), tuple(range(channels))),
        Part(
            first + 1,
            tuple(range(heads, shape.blocks[first].kv_heads)),
            tuple(range(channels, shape.blocks[first].channels)),
        ),
    )
    kept = tuple(p for p in parts if p.kv_heads or p.channels)
    recipes = list(PruningPlan.identity(shape).blocks)
    recipes[first : first + 2] = [BlockRecipe(parts=kept, norms=((first, 0.5), (first + 1, 0.5)))]
    return PruningPlan(shape, tuple(recipes))


# ------------------------------------------------------------------------------------------ measuring


@dataclass
class Point:
    """Plans that are swept together. seconds: the shortest sweep so far; distinct, alone: blocks run, shared and not."""

    kind: str
    plans: Sequence[PruningPlan]
    seconds: float = float("inf")

    def __post_init__(self) -> None:
        self.distinct, self.alone = count_blocks(self.plans)

    def sweep(self, sweeper: Sweeper, batches: Sequence[Batch]) -> None:
        """Time one sweep of the plans."""
        planned = [Planned(p) for p in self.plans]
        start = time.perf_counter()
        for _ in sweeper.sweep(planned, batches):
            pass
        self.seconds = min(self.seconds, time.perf_counter() - start)

    def figures(self, block: float, head: float) -> dict[str, Any]:
        """Return what the point says, with the seconds of one block and of one head."""
        cost = self.distinct * block + len(self.plans) * head
        return {
            "kind": self.kind,
            "plans": len(self.plans),
            "blocks alone": self.alone,
            "distinct blocks": self.distinct,
            "s": self.seconds,
            "cost of distinct s": cost,
            "over distinct": self.seconds / cost,
        }


@dataclass
class Promise:
    """Plans swept together against each of them swept alone."""

    together: Point
    alone: Sequence[Point]

    def figures(self) -> dict[str, float]:
        """Return seconds of both ways, and what is left of the alone way: in seconds, and in blocks run."""
        alone = sum(p.seconds for p in self.alone)
        return {
            "plans": len(self.alone),
            "together_s": self.together.seconds,
            "alone_s": alone,
            "of_alone": self.together.seconds / alone,
            "blocks_of_alone": self.together.distinct / self.together.alone,
        }


def opened(tokens: int) -> tuple[Sweeper, list[Batch]]:
    """Return a sweeper over the model in bfloat16, and the first held-out windows with every token read but the first."""
    checkpoint = open_model(MODEL, Plugins.load().family)
    windows, _ = token_windows(PythonDocs(), "held-out", None, checkpoint.tokenizer(), WINDOW, tokens // WINDOW)
    batches = [Batch(torch.tensor([w]), ((0, range(WINDOW - 1), w[1:]),)) for w in windows]
    return Sweeper(Blocks(checkpoint, torch.bfloat16)), batches


def points(shape: ModelShape, counts: Sequence[int]) -> list[Point]:
    """Return what is swept to see how time grows with blocks and with plans."""
    depth = len(shape.blocks)
    lengths = [round(depth * part / 6) for part in range(1, 7)]
    return [
        *(Point("first blocks", [PruningPlan.keep(shape, range(n))]) for n in lengths),
        *(Point("nested", nested(shape, n)) for n in counts),
        *(Point("unrelated", unrelated(shape, n)) for n in counts),
    ]


def promise(kind: str, plans: Sequence[PruningPlan]) -> Promise:
    """Return plans to be swept together and alone."""
    return Promise(Point(kind, plans), [Point(kind, [p]) for p in plans])


def measure(tokens: int, counts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Return the figures of the bench; what is compared is measured in turns, ``rounds`` times, and the shortest counts."""
    sweeper, batches = opened(tokens)
    shape = sweeper.blocks.checkpoint.shape
    one, dense = (Point("reference", [PruningPlan.keep(shape, range(n))]) for n in (1, len(shape.blocks)))
    heads = Point("reference", [replace(one.plans[0], final_norm_gain=1.0 + i / 100) for i in range(HEADS)])
    swept = points(shape, counts)
    promises = {"drop_one": promise("drop-one", drop_one(shape)), "come_p": promise("CoMe-P", shares(shape))}
    groups = [point for p in promises.values() for point in (p.together, *p.alone)]
    dense.sweep(sweeper, batches)  # reads and builds the blocks
    for turn in range(rounds):
        for point in [*[one, heads, dense] * REFERENCES, *swept, *groups]:
            point.sweep(sweeper, batches)
        print(f"round {turn + 1} of {rounds}", flush=True)
    block = (dense.seconds - one.seconds) / (dense.distinct - one.distinct)
    head = (heads.seconds - one.seconds) / (HEADS - 1)
    found = [p.figures(block, head) for p in [*swept, *(p.together for p in promises.values())]]
    over = [f["over distinct"] for f in found]
    return {
        "cost_over_distinct": {"worst": max(over), "median": statistics.median(over)},
        **{name: p.figures() for name, p in promises.items()},
        "block_s": block,
        "head_s": head,
        "tokens": len(batches) * WINDOW,
        "model": MODEL,
        "dtype": "bfloat16",
        "points": found,
    }


# ------------------------------------------------------------------------------------------ reporting


def markdown(figures: dict[str, Any]) -> str:
    """Return the tables and the two promises as text."""
    head = (
        f"# Sweep time against plans and blocks\n\n{MODEL}, {figures['tokens']} tokens in windows of {WINDOW}, "
        f"{figures['dtype']}: one block {1000 * figures['block_s']:.1f} ms (from sweeps of 1 and of "
        f"all blocks), the head of one plan {1000 * figures['head_s']:.0f} ms (from sweeps of 1 block with 1 and {HEADS} "
        "heads). The cost of the distinct blocks is their number x the one + plans x the other. Nested plans leave the "
        "dense model one block earlier each, unrelated ones at the first block.\n"
    )
    cost = figures["cost_over_distinct"]
    tail = [
        f"Over the cost of the distinct blocks: at worst {cost['worst']:.3f}, median {cost['median']:.3f}.",
        f"A drop-one probe of all blocks: {sentence(figures['drop_one'])}",
        f"CoMe-P's shares of one pair, in the middle of the model: {sentence(figures['come_p'])}",
    ]
    return "\n".join([head, table(figures["points"]), "", *(f"- {line}" for line in tail), ""])


def sentence(found: dict[str, float]) -> str:
    """Say what sweeping together saved."""
    return (
        f"{found['plans']:.0f} plans in one sweep take {found['together_s']:.1f} s, each alone {found['alone_s']:.1f} s: "
        f"{found['of_alone']:.2f} of it, with {found['blocks_of_alone']:.2f} of the blocks."
    )


def figure(figures: dict[str, Any]) -> str:
    """Return the plot as SVG: measured marks on the lines of what distinct blocks cost."""
    from matplotlib.figure import Figure

    with settings():
        canvas = Figure(figsize=(10.0, 4.2), layout="constrained")
        left, right = canvas.subplots(1, 2)
        _draw(left, figures["points"], ("nested", "unrelated"), "plans", "number of plans")
        _draw(right, figures["points"], ("first blocks",), "distinct blocks", "number of blocks of one plan")
        left.set_xscale("log", base=2)
        left.set_yscale("log", base=2)
        for axis in (left.xaxis, left.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        right.set_ylim(0)
        right.set_xlim(0)
        return svg(canvas)


def _draw(axes: Any, found: Sequence[dict[str, Any]], kinds: Sequence[str], x: str, label: str) -> None:
    for kind, colour, marker in zip(kinds, COLOURS, MARKERS, strict=False):
        chosen = [f for f in found if f["kind"] == kind]
        places = [f[x] for f in chosen]
        axes.plot(places, [f["cost of distinct s"] for f in chosen], color=colour, linewidth=1.2, linestyle="--")
        axes.scatter(places, [f["s"] for f in chosen], color=colour, marker=marker, s=45, zorder=3, label=kind)
    axes.plot([], [], color="#777777", linestyle="--", label="cost of the distinct blocks")
    axes.set_xlabel(label)
    axes.set_ylabel("seconds of one sweep")
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"in all, in windows of {WINDOW}")
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="numbers of plans")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="the shortest time counts")
    return parser.parse_args()


def main() -> None:
    """Run the bench; with other than the usual numbers it is a trial, whose files go to runs/bench."""
    given = arguments()
    trial = vars(given) != {"tokens": TOKENS, "counts": list(COUNTS), "rounds": ROUNDS}
    figures = measure(given.tokens, given.counts, given.rounds)
    folder = TRIALS if trial else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(figures)
    (folder / "scaling.md").write_text(text, encoding="utf-8")
    (folder / "scaling.svg").write_text(figure(figures), encoding="utf-8")
    print(text)
    if trial:
        print(json.dumps({"trial": figures}))
    else:
        finish("scaling", figures)


if __name__ == "__main__":
    main()
