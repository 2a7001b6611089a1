"""What is said of a training afterwards, from what its plan says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
