"""Builds the blocks of plans over one checkpoint and drives them as transformers' own model would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import MODEL_MAPPING

from flexi_plugins.checkpoint import Checkpoint
from flexi_plugins.data import PruningPlan
from flexi_plugins.modeling import BlockSpec, build_block
from flexi_plugins.rewrite import Tensors, block_tensors, check_attached


class _Recorder(nn.Module):
    """Stands where a block was and notes what the model hands it."""

    def __init__(self) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.kwargs = kwargs
        return hidden_states


class Blocks:
    """The pieces of all plans of one checkpoint, built once each: embedding, blocks by recipe, final norm, head."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.checkpoint = checkpoint.resident()
        self.dtype = dtype
        self.device = torch.device(device)
        family, config = checkpoint.family, checkpoint.config
        with init_empty_weights(include_buffers=False):
            self._shell = MODEL_MAPPING[type(config)](config).eval()
        blocks = getattr(self._shell, family.blocks)
        self._block_class = type(blocks[0])
        norm = getattr(self._shell, family.final_norm)
        setattr(self._shell, family.blocks, nn.ModuleList(_Recorder() for _ in blocks))
        setattr(self._shell, family.final_norm, nn.Identity())
        self._shell.to_empty(device="meta", recurse=False)
        embedding, final, *head = (self._read(n) for n in checkpoint.outer_names())
        self.embedding, self.head = embedding, head[0] if head else embedding
        norm.load_state_dict({"weight": final}, assign=True)
        self.final_norm = norm.requires_grad_(False)
        self._built: dict[Any, nn.Module] = {}

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.read(name).to(self.device, self.dtype)

    def block(self, plan: PruningPlan, position: int, attached: Tensors) -> nn.Module:
        """Return the block at a position of a plan, built at its first use; equal recipes are one module."""
        key = plan.key(position)
        if key not in self._built:
            self._built[key] = self._build(plan, position, attached)
        return self._built[key]

    def _build(self, plan: PruningPlan, position: int, attached: Tensors) -> nn.Module:
        check_attached(plan, attached)
        spec = BlockSpec.of_plan(plan)[position]
        donor = None if spec.shares is None else self.block(plan, spec.shares, attached)
        with init_empty_weights(include_buffers=False):
            block = build_block(self._block_class, self._shell.config, self.checkpoint.family, spec, 0, donor)
        tensors = block_tensors(plan, position, self.checkpoint, attached)
        state = {n: t.to(self.device, self.dtype) for n, t in tensors.items()}
        block.load_state_dict(state, strict=True, assign=True)
        return block.eval().requires_grad_(False)

    def keep_only(self, plans: list[PruningPlan]) -> None:
        """Forget the built blocks that none of these plans uses."""
        wanted = {p.key(i) for p in plans for i in range(len(p.blocks))}
        self._built = {k: v for k, v in self._built.items() if k in wanted}

    def embed(self, ids: Tensor, gain: float = 1.0) -> Tensor:
        """Return the residual stream (sequences, tokens, hidden) that enters the first block."""
        hidden = nn.functional.embedding(ids.to(self.device), self.embedding)
        return hidden * gain if gain != 1.0 else hidden

    def arguments(self, hidden: Tensor) -> Mapping[str, Mapping[str, Any]]:
        """Return what the model hands its blocks for states of this shape (mask, positions, rotary): by attention type."""
        self._shell(inputs_embeds=hidden, use_cache=False)
        recorders = getattr(self._shell, self.checkpoint.family.blocks)
        shapes = self.checkpoint.shape.blocks
        return {s.attention_type: r.kwargs for s, r in zip(shapes, recorders, strict=True)}

    def run(
        self, plan: PruningPlan, position: int, attached: Tensors, hidden: Tensor, arguments: Mapping[str, Any]
    ) -> Tensor:
        """Return what the block at a position makes of the residual stream that enters it."""
        kind = plan.block_shape(plan.blocks[position]).attention_type
        return self.block(plan, position, attached)(hidden, **arguments[kind])

    def logits(self, hidden: Tensor, gain: float = 1.0) -> Tensor:
        """Return float32 logits (..., vocabulary) of final residual states (..., hidden)."""
        normed = self.final_norm(hidden)
        return nn.functional.linear(normed * gain if gain != 1.0 else normed, self.head).float()
