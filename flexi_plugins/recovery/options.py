"""How a recovery method trains, and for how long: options that all have, and the arithmetic of a budget of tokens."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from flexi_plugins.data import PruningPlan
from flexi_plugins.errors import FlexiError

Schedule = Literal["cosine", "linear", "constant"]
"""How the learning rate goes on behind its rise (see ``rate``)."""
DEVICES = ("cpu", "cuda", "cuda:0")


def unfit(device: str, dtype: str) -> Iterator[str]:
    """Yield why nothing can be trained on a device in a compute dtype."""
    if device not in DEVICES:
        yield f"device {device!r}, expected one of {', '.join(DEVICES)}: CUDA_VISIBLE_DEVICES chooses another GPU"
    if device == "cuda:0" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield "device 'cuda:0' for several processes, expected 'cuda', of which each has its own"
    if dtype == "float16" and device == "cpu":
        yield "float16 can be trained in on a GPU alone: take bfloat16 or float32"


@dataclass(frozen=True)
class TrainingOptions:
    """How to train: options that all training methods have, as fields that they inherit.

    learning_rate: AdamW's, at its peak. warm_up: share of the steps in which it rises. batch_tokens: tokens of a step, on
    all devices together, rounded to whole windows, of which each device has one at least; papers' batches are made for
    budgets of 10^7 tokens and more, of small ones they leave a handful of steps. micro_batch_tokens: most tokens that pass a
    device at once, but one window does; a step accumulates the gradients of several.
    gradient_clip: the largest norm of a gradient; 0: any. evaluate_every: tokens between two points of the curve, where
    the held-out loss is measured and a checkpoint written; None: a tenth of the budget. keep: the state with the lowest
    held-out loss, the start included, or the last one. divergence: training stops where the held-out loss is more than so
    many times its lowest value so far.
    """

    learning_rate: float = 1e-4
    schedule: Schedule = "cosine"
    warm_up: float = 0.0
    batch_tokens: int = 2048
    micro_batch_tokens: int = 2048
    gradient_clip: float = 1.0
    weight_decay: float = 0.0
    evaluate_every: int | None = None
    keep: Literal["best", "last"] = "best"
    divergence: float = 1.5

    name: ClassVar[str] = "training"

    @property
    def interleaved(self) -> bool:
        """Whether it trains behind every step of a progressive strategy (see ``RecoveryMethod``)."""
        return False

    def check(self) -> None:
        """Raise one FlexiError for all options that cannot work."""
        problems = list(self.problems())
        if problems:
            raise FlexiError(f"{self.name}: {'; '.join(problems)}")

    def refuses(self, plan: PruningPlan) -> str | None:
        """Return why there is nothing to train in a plan's model; None where there is."""
        return None

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with each option."""
        positive = ("learning_rate", "batch_tokens", "micro_batch_tokens")
        least = {**dict.fromkeys(positive, 0.0), "evaluate_every": 0.0, "divergence": 1.0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value > bound:
                yield f"{name} = {value}, expected more than {bound:g}"
        for name in ("gradient_clip", "weight_decay"):
            if not getattr(self, name) >= 0:
                yield f"{name} = {getattr(self, name)}, expected 0 or more"
        if not 0 <= self.warm_up < 1:
            yield f"warm_up = {self.warm_up}, expected a share of the steps, 0 <= warm_up < 1"


@dataclass(frozen=True)
class Steps:
    """A budget as steps. windows: of ``length`` tokens each, seen once. micro: windows that pass a device at once.

    A step is ``accumulation`` such micro-batches on each of ``processes`` devices; the last may be shorter. every: steps
    between two points of the curve. warm_up: steps in which the learning rate rises.
    """

    windows: int
    length: int
    micro: int
    accumulation: int
    processes: int
    every: int
    warm_up: int

    @classmethod
    def of(cls, tokens: int, length: int, options: TrainingOptions, processes: int) -> Steps:
        """Return the steps of a budget of tokens: as many whole windows as fit into it."""
        windows = tokens // length
        share = max(1, round(options.batch_tokens / (length * processes)))  # windows of a step on one device
        most = max(1, options.micro_batch_tokens // length)
        micro = max(n for n in range(1, min(share, most) + 1) if share % n == 0)
        step = share * processes * length
        every = max(1, round((options.evaluate_every or tokens / 10) / step))
        warm_up = int(options.warm_up * math.ceil(windows * length / step))
        return cls(windows, length, micro, share // micro, processes, every, warm_up)

    @property
    def batch(self) -> int:
        """Windows of a step, on all devices together."""
        return self.micro * self.accumulation * self.processes

    @property
    def total(self) -> int:
        """Number of steps."""
        return math.ceil(self.windows / self.batch)

    def tokens(self, step: int) -> int:
        """Return the tokens that have passed after so many steps."""
        return min(step * self.batch, self.windows) * self.length


def rate(step: int, schedule: str, warm_up: int, total: int) -> float:
    """Return what the peak learning rate is multiplied with in a step, counted from 0.

    It rises as (step + 1) / (warm_up + 1), and falls to 0 behind the last step as half a cosine, or as a line.
    transformers' schedules begin at 0, which would be one lost step of a short training.
    """
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    done = min(1.0, (step - warm_up) / (total - warm_up))
    return {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[schedule]
