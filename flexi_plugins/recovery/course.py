"""What is said of a training afterwards, from what its plan says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STOPPED = "training was stopped after"  # stands in the note of a training that did not come to its end


def course_of(recovery: Mapping[str, Any]) -> str:
    """Return what a training was, of several the last one: its tokens, the held-out loss at its start and of what was kept."""
    facts, passed = recovery["facts"], recovery["training"]["tokens"]
    trained = facts.get("trained_tokens", passed)
    if not trained:
        return f"recovered by {recovery['method']} without training"
    kept, start = facts.get("kept_tokens", trained), facts.get("tokens_before_last", 0)
    times = f", {facts['trainings']} times one behind the other; the last time" if facts.get("trainings", 1) > 1 else ""
    said = f"trained by {recovery['method']} on {trained:,.0f} tokens{times}"
    kinds = {
        "held_out_loss": ("held-out loss", " nats a token"),
        "held_out_block_loss": ("held-out loss of blocks", ""),
    }
    for kind, (name, unit) in kinds.items():
        losses = {p["tokens"]: p[kind] for p in recovery["curve"] if kind in p and p["tokens"] >= start}
        if losses:
            first, *_ = losses.values()
            last = losses[max((tokens for tokens in losses if tokens <= kept), default=min(losses))]
            last = facts.get(f"kept_{kind}", last)
            said += f": {name} {first:.4f} -> {last:.4f}{unit}"
            said += "" if kept == trained else f", of the state after {kept - start:,.0f}"
    return said


def stops_of(recovery: Mapping[str, Any]) -> str:
    """Return what is said of where a training, or some of several, was stopped in front of its end; empty if none was."""
    return "; ".join(note for note in recovery["notes"] if STOPPED in note)


def reason_of(recovery: Mapping[str, Any]) -> str:
    """Return what a training says of why its model is no better on other text; causes that it does not know it leaves out."""
    if not recovery["curve"]:
        return "nothing was trained, so that what differs is how the weights are stored"
    if stops_of(recovery):
        return "the training was stopped"
    if recovery["facts"].get("kept_tokens") == 0:
        return "no state of the training was better on its held-out text than the start, which was kept"
    if "held_out_block_loss" in recovery["curve"][-1]:
        return "the training lowered the loss that it has, between blocks' states and the original's, which is not the model's"
    return "the training lowered the held-out loss on its own text, and what is measured is other text"
