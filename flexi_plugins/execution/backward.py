"""Gradients of one plan's model, block by block in reverse: block inputs come from a forward sweep, blocks are recomputed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.execution.layout import lay_out
from flexi_plugins.execution.readout import HEAD_ROWS, Batch
from flexi_plugins.execution.schedule import build_trie
from flexi_plugins.execution.sweep import Planned, Sweeper
from flexi_plugins.hookspecs import GradientTrace, LinearTrace


def backward_sweep(
    sweeper: Sweeper,
    planned: Planned,
    samples: Tensor,
    observe: Callable[[GradientTrace], None],
    batches: Sequence[Batch] | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """Visit the blocks of a plan in reverse with the gradients of every sample's mean next-token loss.

    samples: (samples, tokens) ids. batches: the sweeper's batches whose first rows begin with the samples (what follows a
    token does not change it), by default one of the samples themselves; states that an earlier sweep kept are not
    computed again. advance(tokens) reports the tokens of each block passed. Returns the losses in nats per token,
    (samples,).
    """
    plan, blocks = planned.plan, sweeper.blocks
    batches = batches or [Batch(samples)]
    for _ in sweeper.sweep([planned], batches, keep=True, advance=advance):
        pass
    sweeper.check_finite(plan)
    numbers = sweeper.prefixes.of(plan)
    count, length = samples.shape

    def behind(position: int) -> Tensor:
        if position < 0:
            return blocks.embed(samples, plan, planned.attached)
        stored = [sweeper.stored(b, numbers[position + 1])[:, :length] for b in range(len(batches))]
        return torch.cat(stored)[:count]

    layout = lay_out(blocks, [plan], build_trie([plan], sweeper.prefixes), [samples.shape], False, True, training=True)
    if not layout.roomy:
        blocks.forget_copies()
    blocks.states.limit_to(layout.state_bytes)
    arguments = blocks.arguments(behind(-1))
    losses, gradient = _loss(blocks, planned, behind(len(plan.blocks) - 1), samples)
    order = list(reversed(range(len(plan.blocks))))
    for visit in blocks.stream([blocks.needs(plan, p) for p in order], layout.weight_bytes):
        position = order[visit]
        gradient = _through_block(blocks, planned, position, behind(position - 1), gradient, arguments, observe)
        if not layout.roomy:
            blocks.release(plan, position)
        advance(samples.numel())
    return losses


def _loss(blocks: Blocks, planned: Planned, hidden: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return the samples' mean losses and the gradient of their sum, some positions at a time: logits are large."""
    states = hidden.detach().requires_grad_()
    losses = []
    for row, ids in zip(states, samples.to(states.device), strict=True):
        losses.append(states.new_zeros((), dtype=torch.float32))
        for part, targets in zip(row[:-1].split(HEAD_ROWS), ids[1:].split(HEAD_ROWS), strict=True):
            logits = blocks.logits(part, planned.plan, planned.attached).float()
            loss = F.cross_entropy(logits, targets, reduction="sum") / (len(ids) - 1)
            loss.backward()
            losses[-1] += loss.detach()
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
    modules = {r: block.get_submodule(blocks.checkpoint.family.ROLES[r]) for r in plan.shape.maps(shape)}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with ExitStack() as hooks, torch.enable_grad():
        for role, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(_record, seen, role)))
        states = hidden.detach().requires_grad_()
        output = blocks.run(plan, position, planned.attached, states, arguments)
    entering, *found = torch.autograd.grad(output, [states, *(y for _, y in seen.values())], gradient)
    maps = {
        role: LinearTrace(x.detach(), dy, cast(Tensor, modules[role].weight))
        for (role, (x, _)), dy in zip(seen.items(), found, strict=True)
    }
    observe(GradientTrace(position, shape.kv_heads, shape.group, shape.head_dim, maps))
    return entering


def _record(
    seen: dict[str, tuple[Tensor, Tensor]], role: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    seen[role] = inputs[0], output
