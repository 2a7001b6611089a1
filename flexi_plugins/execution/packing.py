"""Requests packed as tries of token prefixes: a context is run once, each answer is a branch with its own positions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from flexi_plugins.execution.readout import Batch, Read
from flexi_plugins.hookspecs import Tokens

BATCH_TOKENS = 2048  # of a batch, padding included

Request = tuple[Tokens, Tokens]


@dataclass
class _Trie:
    """Sequences of tokens, in order; what one has in common with the sequence before it stands there once."""

    ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    sequences: list[list[int]] = field(default_factory=list)  # indices of tokens; none is the beginning of another
    requests: list[tuple[Request, list[int]]] = field(default_factory=list)  # with the sequence of each

    def common(self, sequence: Tokens) -> int:
        """Return how many tokens a sequence has in common with the last one."""
        length = 0
        for index, token in zip(self.sequences[-1] if self.sequences else (), sequence, strict=False):
            if self.ids[index] != token:
                break
            length += 1
        return length

    def add(self, request: Request, sequence: Tokens) -> None:
        """Add the sequence of a request, which follows the last one in order."""
        common = self.common(sequence)
        new = range(len(self.ids), len(self.ids) + len(sequence) - common)
        path = [*(self.sequences[-1][:common] if common else ()), *new]
        self.ids += sequence[common:]
        self.depths += range(common, len(sequence))
        if self.sequences and common == len(self.sequences[-1]):
            self.sequences.pop()
        self.sequences.append(path)
        self.requests.append((request, path))


@dataclass(frozen=True)
class Pack:
    """A batch, and the request that each of its reads answers."""

    batch: Batch
    requests: tuple[Request, ...]


def pack(requests: Iterable[Request], budget: int = BATCH_TOKENS) -> list[Pack]:
    """Return the distinct (context, continuation) requests packed in batches of at most ``budget`` tokens (or one request)."""
    packs: list[Pack] = []
    trie = _Trie()
    for sequence, request in sorted(((*c, *t)[:-1], (c, t)) for c, t in set(requests)):
        if trie.ids and len(trie.ids) + len(sequence) - trie.common(sequence) > budget:
            packs.append(_packed(trie))
            trie = _Trie()
        trie.add(request, sequence)
    return [*packs, _packed(trie)] if trie.ids else packs


def _packed(trie: _Trie) -> Pack:
    reads: list[Read] = [(0, path[len(c) - 1 :], continuation) for (c, continuation), path in trie.requests]
    batch = Batch(torch.tensor([trie.ids]), reads, torch.tensor([trie.depths]), trie.sequences)
    return Pack(batch, tuple(request for request, _ in trie.requests))
