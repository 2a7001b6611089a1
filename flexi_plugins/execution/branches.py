"""Attention of a trie of tokens: each of its sequences attends as it would alone, in the model's own attention function.

Everything else in a block is done token by token, so it runs once for a token that many sequences begin with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from flexi_plugins.modeling import resized_config

TILE = 16  # tokens that an attention function adds up together: padding beyond the last one changes the order of sums
STEP = 4  # and, rarely, so does padding within it, beyond so many tokens


@dataclass(frozen=True)
class Chunk:
    """Sequences that attend together. tokens: (sequences, longest), which token of the trie stands where, 0 where padded.

    own, places: whose outputs are kept: positions in the flattened chunk, and the tokens of the trie that they belong to
    (every token has its place in one sequence). mask: what the model gives its attention for this shape, or None.
    """

    tokens: Tensor
    own: Tensor
    places: Tensor
    mask: Any = None


def chunks_of(sequences: Sequence[Sequence[int]], room: int, device: torch.device | str = "cpu") -> list[Chunk]:
    """Put sequences (of indices of tokens) that end in the same step of a tile together, the longest first.

    room: the most tokens of a chunk, padding included, unless one sequence has more. device: where its tensors are.
    """
    groups: list[list[Sequence[int]]] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        longest = len(groups[-1][0]) if groups else 0
        if not groups or (len(groups[-1]) + 1) * longest > room or len(sequence) // STEP != longest // STEP:
            groups.append([])
        groups[-1].append(sequence)
    placed: set[int] = set()
    return [_chunk(group, placed, device) for group in groups]


def _chunk(group: Sequence[Sequence[int]], placed: set[int], device: torch.device | str) -> Chunk:
    """Return the chunk of a group, the longest first, and add its tokens to those that are placed."""
    tokens = torch.zeros(len(group), len(group[0]), dtype=torch.long)
    own = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, sequence in enumerate(group):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
        own[row, : len(sequence)] = torch.tensor([token not in placed for token in sequence])
        placed.update(sequence)
    positions = own.flatten().nonzero()[:, 0]
    return Chunk(*(t.to(device) for t in (tokens, positions, tokens.flatten()[positions])))


def branching(config: PreTrainedConfig, block_class: type[nn.Module]) -> PreTrainedConfig:
    """Return a copy of a configuration whose blocks take the chunks of a trie as ``branches``; without, they run as ever."""
    implementation = config._attn_implementation
    eager = getattr(sys.modules[block_class.__module__], "eager_attention_forward", None)  # every model brings its own
    plain = AttentionInterface().get(implementation, eager)
    name = f"branches of {plain.__module__}.{plain.__qualname__}"
    AttentionInterface.register(name, partial(_attend, plain))
    copy = resized_config(config, config.num_hidden_layers)
    copy._attn_implementation = name
    return copy


def _attend(
    plain: Callable[..., tuple[Tensor, Any]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    branches: Sequence[Chunk] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attend as transformers' attention functions do: (rows, heads, tokens, width) in, (rows, tokens, heads, width) out."""
    if branches is None:
        return plain(module, query, key, value, attention_mask, **kwargs)
    kwargs.pop("position_ids", None)  # of the trie, not of its sequences
    flat = [states[0].transpose(0, 1) for states in (query, key, value)]  # (tokens, heads, width)
    found = torch.empty_like(flat[0], memory_format=torch.contiguous_format)
    for chunk in branches:
        inside = [states[chunk.tokens].transpose(1, 2) for states in flat]
        out, _ = plain(module, *inside, chunk.mask, **kwargs)
        found[chunk.places] = out.flatten(0, 1)[chunk.own]
    return found[None], None
