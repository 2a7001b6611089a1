"""What one training counts, says and stops for, and which state is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Recovered, RecoveryRequest
from flexi_plugins.recovery.copies import replaced, trainable
from flexi_plugins.recovery.course import STOPPED
from flexi_plugins.recovery.options import Steps, TrainingOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

NOISE = 1e-4  # nats: a loss that is lower than that cannot diverge from itself

Loss = Callable[["nn.Module", Mapping[str, "Tensor"]], "Tensor"]
"""(model, batch) -> mean over the batch's targets, (); the batch has input_ids and labels, both (rows, tokens).

Only the model's ``forward`` runs in the compute dtype; what the loss makes of its outputs is computed as written.
"""


@dataclass(frozen=True)
class Trained:
    """What a training says of itself (see ``Recovered``); the parameters were trained in place."""

    curve: tuple[Mapping[str, float], ...] = ()
    facts: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def recovered(self, request: RecoveryRequest, tensors: Mapping[str, Tensor]) -> Recovered:
        """Return what a method gives back: the request's model with these parameters in the place of its own.

        Trained in float32, they are rounded at random where the model is stored in less.
        """
        return Recovered(replaced(request.model, tensors, request.seed), self.curve, self.facts, self.notes)


def together(courses: Sequence[Trained]) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Return the curve and the facts of trainings one behind the other.

    Their tokens are summed, and those of the curve count on; all other facts are the last one's.
    """
    curve, done, before = list[dict[str, float]](), 0.0, 0.0
    for course in courses:
        before = done if course.curve else before
        curve += [{**point, "tokens": point["tokens"] + done} for point in course.curve]
        done = curve[-1]["tokens"] if curve else 0.0
    last = [course.facts for course in courses if course.facts][-1:]
    facts = dict(last[0]) if last else {}
    if len(courses) > 1:
        if "trained_tokens" in facts:
            facts["trained_tokens"] = sum(c.facts.get("trained_tokens", 0) for c in courses)
        if "kept_tokens" in facts:
            facts["kept_tokens"] += before
        facts |= {"trainings": sum(bool(c.curve) for c in courses), "tokens_before_last": before}
    return curve, facts


class Monitor:
    """What one training counts, says and stops for."""

    def __init__(
        self, request: RecoveryRequest, options: TrainingOptions, who: str, steps: Steps, loss: Loss, measure: Loss
    ) -> None:
        self.request, self.options, self.who, self.steps = request, options, who, steps
        self.loss, self.measure = loss, measure
        self.advance: Callable[..., None] = lambda tokens, note="": None
        self.sums: Any = 0.0  # (2,): summed loss, and targets, since the last point of the curve
        self.begun = (0.0, 0)  # clock, tokens
        self.stopped: tuple[int, str] | None = None  # step, reason

    def point(self, step: int, sums: Sequence[float], held_out: float) -> dict[str, float]:
        """Return a point of the curve, and say it."""
        tokens, total = self.steps.tokens(step), self.steps.tokens(self.steps.total)
        point: dict[str, float] = {"tokens": tokens}
        if sums[1]:
            point["loss"] = sums[0] / sums[1]
        point["held_out_loss"] = held_out
        clock, before = self.begun
        left = (time.monotonic() - clock) * (total - tokens) / (tokens - before) if tokens > before else None
        said = [f"{key.replace('_', ' ')} {value:.4f}" for key, value in point.items() if key != "tokens"]
        said += [] if left is None else [f"about {left:.0f} s left"]
        self.request.say(f"{self.who}: {tokens:,} of {total:,} tokens, {', '.join(said)}")
        return point

    def judge(self, control: Any, step: int, before: Sequence[Mapping[str, float]], held_out: float) -> None:
        """Stop a training whose held-out loss is not finite or far above its lowest value before."""
        lowest = min((point["held_out_loss"] for point in before), default=math.inf)
        if not before and not math.isfinite(held_out):
            raise FlexiError(
                f"{self.who}: the held-out loss is {held_out} before any training: the pruned model is broken; check its "
                "tensors, or compute in float32"
            )
        if before and not held_out <= self.options.divergence * max(lowest, NOISE):
            self.stop(control, step, f"the held-out loss went from {lowest:.4g} to {held_out:.4g}")

    def stop(self, control: Any, step: int, reason: str) -> None:
        """End the training behind this step, whose state is not to be kept."""
        self.stopped = step, reason
        control.should_training_stop = True
        control.should_evaluate = control.should_save = False

    def kept(self, history: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
        """Return the point whose state is kept: the best, or the last, of those before the training went wrong."""
        end = math.inf if self.stopped is None else self.stopped[0]
        good = [point for point in points(history) if point["step"] < end]
        return min(good, key=lambda point: point["held_out_loss"]) if self.options.keep == "best" else good[-1]

    def trained(self, state: Any, kept: Mapping[str, float], model: nn.Module) -> Trained:
        """Return what there is to say at the end."""
        notes: list[str] = []
        tokens, batch = self.steps.tokens(state.global_step), self.steps.batch * self.steps.length
        if not 0.75 < batch / self.options.batch_tokens < 1.34:
            notes.append(
                f"{self.who}: a step is of {batch:,} tokens in the place of {self.options.batch_tokens:,}, windows of "
                f"{self.steps.length} being whole on each of {self.steps.processes} devices"
            )
        if self.stopped:
            notes.append(
                f"{self.who}: {STOPPED} {tokens:,} of {self.steps.tokens(self.steps.total):,} tokens, where "
                f"{self.stopped[1]}; the state after {kept['tokens']:,} tokens is restored. Lower the learning rate"
            )
        elif not kept["step"]:
            notes.append(
                f"{self.who}: no state had a lower held-out loss than the start, {kept['held_out_loss']:.4f}, which is "
                "kept. Train on more tokens, or lower the learning rate"
            )
        for note in notes:
            self.request.say(note)
        keys = ("tokens", "loss", "held_out_loss")
        curve = tuple({k: point[k] for k in keys if k in point} for point in points(state.log_history))
        facts = {
            "trained_parameters": sum(p.numel() for p in trainable(model).values()),
            "trained_tokens": tokens,
            "batch_tokens": batch,
            "kept_tokens": kept["tokens"],
        }
        return Trained(curve, facts, tuple(notes))


def points(history: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Return the finite points of the curve in what Trainer has logged, which its checkpoints hold."""
    return [h for h in history if math.isfinite(h.get("held_out_loss", math.nan)) and math.isfinite(h.get("loss", 0.0))]
