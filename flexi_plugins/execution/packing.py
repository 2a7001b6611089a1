"""Requests packed as tries of token prefixes: a context is run once, each answer is a branch with its own positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch

from flexi_plugins.execution.branches import STEP, TILE
from flexi_plugins.execution.readout import Batch, Read
from flexi_plugins.hookspecs import Tokens

BATCH_TOKENS = 2048  # of a batch, padding included
MARK = 2**32  # more than any token
SHARED = 0.2  # of a sequence: documents that have less in common go to the batches of their own lengths

Request = tuple[Tokens, Tokens]


@dataclass
class _Trie:
    """Marked sequences of tokens, in order; what one has in common with the sequence before it stands there once."""

    ids: list[int] = field(default_factory=list)  # as ``_marked``
    depths: list[int] = field(default_factory=list)
    sequences: list[list[int]] = field(default_factory=list)  # indices of tokens; none is the beginning of another
    requests: list[tuple[Request, list[int]]] = field(default_factory=list)  # with the sequence of each

    def add(self, request: Request, sequence: Tokens, common: int) -> None:
        """Add the sequence of a request, which follows the last one in order and has its first tokens in common with it."""
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
    """Return the distinct (context, continuation) requests packed in batches of at most ``budget`` tokens (or one request).

    The longest come first, so that those that attend together are of about the same length.
    """
    packs: list[Pack] = []
    batch: list[_Trie] = []
    for trie in sorted(_tries(set(requests), budget), key=lambda t: -max(t.depths)):
        if batch and sum(len(t.ids) for t in (*batch, trie)) > budget:
            packs.append(_packed(batch))
            batch = []
        batch.append(trie)
    return [*packs, _packed(batch)] if batch else packs


def _tries(requests: Iterable[Request], budget: int) -> Iterator[_Trie]:
    """Put neighbours in order into one trie while they have enough in common, and it stays within the budget."""
    trie, last = _Trie(), Tokens()
    for sequence, request in sorted((_marked((*c, *t)[:-1]), (c, t)) for c, t in requests):
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(last, sequence, strict=False)))
        if trie.ids and (common < SHARED * len(sequence) or len(trie.ids) + len(sequence) - common > budget):
            yield trie
            trie, common = _Trie(), 0
        trie.add(request, sequence, common)
        last = sequence
    if trie.ids:
        yield trie


def _marked(sequence: Tokens) -> Tokens:
    """Return tokens, those of the last, partial tile as others than those that do not end there.

    Attention functions add up a partial tile in another order, so only sequences that end at the same step of it share
    its tokens: every sequence then gets what it gets alone, in low precision too.
    """
    whole, end = len(sequence) // TILE * TILE, len(sequence) // STEP + 1
    return (*sequence[:whole], *(token + end * MARK for token in sequence[whole:]))


def _packed(tries: Sequence[_Trie]) -> Pack:
    ids: list[int] = []
    depths: list[int] = []
    sequences: list[list[int]] = []
    reads: list[Read] = []
    for trie in tries:
        start = len(ids)
        ids += (token % MARK for token in trie.ids)
        depths += trie.depths
        sequences += [[start + i for i in path] for path in trie.sequences]
        for (context, continuation), path in trie.requests:
            reads.append((0, [start + i for i in path[len(context) - 1 :]], continuation))
    batch = Batch(torch.tensor([ids]), reads, torch.tensor([depths]), sequences)
    return Pack(batch, tuple(request for trie in tries for request, _ in trie.requests))
