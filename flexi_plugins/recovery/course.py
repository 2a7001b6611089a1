"""What is said of a training afterwards, from what its plan says of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

STOPPED = "training was stopped after"  # stands in the note of a training that did not come to its end


KINDS = {
    "held_out_loss": ("held-out loss", " nats a token"),
    "held_out_block_loss": ("held-out loss of blocks", ""),
}


def course_of(recovery: Mapping[str, Any]) -> str:
    """Return what a training was, of several the last one: its tokens, the held-out loss at its start and of what was kept."""
    facts, passed = recovery["facts"], recovery["training"]["tokens"]
    trained = facts.get("trained_tokens", passed)
    if not trained:
        return f"recovered by {recovery['method']} without training"
    kept, start = facts.get("kept_tokens", trained), facts.get("tokens_before_last", 0)
    times = f", {facts['trainings']} times one behind the other; the last time" if facts.get("trainings", 1) > 1 else ""
    said = f"trained by {recovery['method']} on {trained:,.0f} tokens{times}"
    for kind, first, last in _losses(recovery):
        name, unit = KINDS[kind]
        said += f": {name} {first:.4f} -> {last:.4f}{unit}"
        said += "" if kept == trained else f", of the state after {kept - start:,.0f}"
    return said


def _losses(recovery: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Yield each kind of held-out loss of the last training, at its start and of what was kept."""
    facts = recovery["facts"]
    kept, start = facts.get("kept_tokens", math.inf), facts.get("tokens_before_last", 0)
    for kind in KINDS:
        losses = {p["tokens"]: p[kind] for p in recovery["curve"] if kind in p and p["tokens"] >= start}
        if losses:
            first, *_ = losses.values()
            last = losses[max((tokens for tokens in losses if tokens <= kept), default=min(losses))]
            yield kind, first, facts.get(f"kept_{kind}", last)


def shortfall_of(recovery: Mapping[str, Any]) -> str:
    """Return what is said of a training that did not have its whole budget; empty if it had, but for what fills no window."""
    stops = "; ".join(note for note in recovery["notes"] if STOPPED in note)
    budget, facts = recovery["training"], recovery["facts"]
    asked = budget["tokens"] - budget["tokens"] % budget.get("length", 1)
    trained = facts.get("trained_tokens", asked)
    parts = facts.get("trainings", 1)  # each has whole windows of its share
    if stops or not trained or trained > asked - parts * budget.get("length", 1):
        return stops
    return f"{trained:,.0f} of {asked:,} tokens" + "".join(f"; {note}" for note in recovery["notes"])


def reason_of(recovery: Mapping[str, Any]) -> str:
    """Return what a training says of why its model is no better on other text; causes that it does not know it leaves out."""
    if not recovery["curve"]:
        return "the method notes no training, so that all that differs is what it did to the weights"
    if any(STOPPED in note for note in recovery["notes"]):
        return "the training was stopped"
    losses = list(_losses(recovery))
    if any(last >= first for _, first, last in losses):
        return "the held-out loss of the training did not fall either"
    if any(kind == "held_out_block_loss" for kind, *_ in losses):
        return "the training lowered the loss that it has, between blocks' states and the original's, which is not the model's"
    return "the training lowered the held-out loss on its own text, and what is measured is other text"
