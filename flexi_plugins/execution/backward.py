"""Gradients of one plan's model, block by block in reverse: block inputs are kept, blocks recomputed, nothing else held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.execution.layout import lay_out
from flexi_plugins.execution.schedule import Prefixes, build_trie
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.hookspecs import GradientTrace, LinearTrace


def backward_sweep(
    blocks: Blocks,
    planned: Planned,
    samples: Tensor,
    observe: Callable[[GradientTrace], None],
    advance: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """Visit the blocks of a plan in reverse with the gradients of every sample's mean next-token loss.

    samples: (samples, tokens) ids. advance(tokens) reports the tokens of each block passed, forward or backward. Returns
    the losses in nats per token, (samples,).
    """
    plan, attached, states = planned.plan, planned.attached, blocks.states
    count = len(plan.blocks)
    nodes = build_trie([plan], Prefixes())
    layout = lay_out(blocks, [plan], nodes, [samples.shape], True, True, training=True)
    states.limit = layout.state_bytes
    order = [*range(count), *reversed(range(count))]
    hidden = blocks.embed(samples, plan.embedding_gain)
    arguments = blocks.arguments(hidden)
    gradient = losses = torch.empty(0)
    try:
        for visit in blocks.stream([blocks.needs(plan, p) for p in order], layout.weight_bytes):
            position = order[visit]
            if visit < count:
                states.put(("backward", position), hidden)
                with torch.no_grad():
                    hidden = blocks.run(plan, position, attached, hidden, arguments)
            if visit == count - 1:
                losses, gradient = _loss(blocks, plan.final_norm_gain, hidden, samples)
            if visit >= count:
                entered = states.get(("backward", position), blocks.device)
                gradient = _through_block(blocks, planned, position, entered, gradient, arguments, observe)
                states.pop(("backward", position))
            if not layout.roomy:
                blocks.release(plan, position)
            advance(samples.numel())
    finally:
        states.drop(lambda key: key[0] == "backward")
    return losses


def _loss(blocks: Blocks, gain: float, hidden: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return the samples' mean losses and the gradient of their sum, sample by sample: logits are large."""
    states = hidden.detach().requires_grad_()
    losses = []
    for row, ids in zip(states, samples.to(states.device), strict=True):
        loss = F.cross_entropy(blocks.logits(row[:-1], gain).float(), ids[1:])
        loss.backward()
        losses.append(loss.detach())
    assert states.grad is not None
    return torch.stack(losses), states.grad


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
