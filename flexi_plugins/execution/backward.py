"""Gradients of one plan's model, block by block in reverse: block inputs are kept, blocks recomputed, nothing else held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.hookspecs import GradientTrace, LinearTrace


def backward_sweep(
    blocks: Blocks, planned: Planned, samples: Tensor, observe: Callable[[GradientTrace], None]
) -> Tensor:
    """Visit the blocks of a plan in reverse with the gradients of every sample's mean next-token loss.

    samples: (samples, tokens) ids. Returns the losses in nats per token, (samples,).
    """
    plan, attached = planned.plan, planned.attached
    inputs = []
    with torch.no_grad():
        hidden = blocks.embed(samples, plan.embedding_gain)
        arguments = blocks.arguments(hidden)
        for position in range(len(plan.blocks)):
            inputs.append(hidden)
            hidden = blocks.run(plan, position, attached, hidden, arguments)
    losses, gradient = _loss(blocks, plan.final_norm_gain, hidden, samples)
    for position in reversed(range(len(plan.blocks))):
        gradient = _through_block(blocks, planned, position, inputs.pop(), gradient, arguments, observe)
    return losses


def _loss(blocks: Blocks, gain: float, hidden: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    states = hidden.detach().requires_grad_()
    logits = blocks.logits(states[:, :-1], gain)
    token_losses = F.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten().to(logits.device), reduction="none")
    losses = token_losses.view(len(samples), -1).mean(1)
    losses.sum().backward()
    assert states.grad is not None
    return losses.detach(), states.grad


def _through_block(
    blocks: Blocks,
    planned: Planned,
    position: int,
    hidden: Tensor,
    gradient: Tensor,
    arguments: Any,
    observe: Callable[[GradientTrace], None],
) -> Tensor:
    plan = planned.plan
    shape = plan.block_shape(plan.blocks[position])
    block = blocks.block(plan, position, planned.attached)
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for role in plan.shape.maps(shape):
        module = block.get_submodule(blocks.checkpoint.family.ROLES[role])
        handles.append(module.register_forward_hook(_recorder(seen, role)))
    try:
        states = hidden.detach().requires_grad_()
        with torch.enable_grad():
            blocks.run(plan, position, planned.attached, states, arguments).backward(gradient)
    finally:
        for handle in handles:
            handle.remove()
    weights = {r: cast(Tensor, block.get_submodule(blocks.checkpoint.family.ROLES[r]).weight) for r in seen}
    maps = {r: LinearTrace(x.detach(), dy, weights[r]) for r, (x, dy) in seen.items()}
    observe(GradientTrace(position, shape.kv_heads, shape.group, shape.head_dim, maps))
    assert states.grad is not None
    return states.grad


def _recorder(seen: dict[str, list[Tensor]], role: str) -> Callable[..., None]:
    def record(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        entry = seen.setdefault(role, [inputs[0]])
        output.register_hook(entry.append)

    return record
