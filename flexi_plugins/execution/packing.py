"""Requests packed as tries of token prefixes: a context is run once, each answer is a branch with its own positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from flexi_plugins.execution.readout import Batch, Read
from flexi_plugins.hookspecs import Tokens

BATCH_TOKENS = 2048  # of a batch, padding included
ROW_TOKENS = 64  # rows are filled up to so many; attention costs a token the length of its row
EQUAL_LENGTH = 768  # tokens of a row at which attention costs a token as much as its linear maps (SmolLM2, measured)

Request = tuple[Tokens, Tokens]


@dataclass
class _Trie:
    """Sequences with a common beginning, in preorder: every token with its depth and the end of what follows it."""

    ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    path: list[int] = field(default_factory=list)  # indices of the tokens of the last sequence
    requests: list[tuple[Request, list[int]]] = field(default_factory=list)  # with the path of each

    def common(self, sequence: Tokens) -> int:
        """Return how many tokens a sequence has in common with the last one."""
        length = 0
        for index, token in zip(self.path, sequence, strict=False):
            if self.ids[index] != token:
                break
            length += 1
        return length

    def add(self, request: Request, sequence: Tokens, common: int) -> None:
        """Add a sequence that follows the last one in order, as a branch behind what they have in common."""
        self.path = self.path[:common]
        for token in sequence[common:]:
            self.path.append(len(self.ids))
            self.ids.append(token)
            self.depths.append(len(self.path) - 1)
            self.ends.append(0)
        for index in self.path:
            self.ends[index] = len(self.ids)
        self.requests.append((request, list(self.path)))


@dataclass(frozen=True)
class Pack:
    """A batch, and the request that each of its reads answers."""

    batch: Batch
    requests: tuple[Request, ...]


def pack(requests: Iterable[Request], budget: int = BATCH_TOKENS) -> list[Pack]:
    """Return the distinct (context, continuation) requests packed in batches of at most ``budget`` tokens (or one row)."""
    rows = _rows(_tries(set(requests)))
    packs: list[Pack] = []
    batch: list[list[_Trie]] = []
    for row in rows:  # widest first
        width = _width(batch[0]) if batch else 0
        if batch and (len(batch) + 1) * width > budget:
            packs.append(_packed(batch))
            batch = []
        batch.append(row)
    return [*packs, _packed(batch)] if batch else packs


def _tries(requests: Iterable[Request]) -> Iterator[_Trie]:
    """Put neighbours in order into one trie while that costs less than running what they have in common again."""
    trie = _Trie()
    for sequence, request in sorted(((*c, *t)[:-1], (c, t)) for c, t in requests):
        common = trie.common(sequence)
        new, before = len(sequence) - common, len(trie.ids)
        attention = (2 * before * new + new * new - len(sequence) ** 2) / EQUAL_LENGTH
        if trie.ids and common <= attention:
            yield trie
            trie, common = _Trie(), 0
        trie.add(request, sequence, common)
    if trie.ids:
        yield trie


def _width(row: Sequence[_Trie]) -> int:
    return sum(len(trie.ids) for trie in row)


def _rows(tries: Iterable[_Trie]) -> list[list[_Trie]]:
    """Fill rows first fit, longest trie first; a row is as long as its first trie, but at least ROW_TOKENS."""
    rows: list[list[_Trie]] = []
    open_rows: list[list[_Trie]] = []
    for trie in sorted(tries, key=lambda t: -len(t.ids)):
        size = len(trie.ids)
        fitting = next((r for r in open_rows if _width(r) + size <= max(ROW_TOKENS, len(r[0].ids))), None)
        if fitting is None:
            fitting = []
            rows.append(fitting)
            open_rows.append(fitting)
        fitting.append(trie)
        open_rows = [r for r in open_rows if _width(r) + 2 <= max(ROW_TOKENS, len(r[0].ids))]
    return sorted(rows, key=_width, reverse=True)


def _packed(rows: Sequence[Sequence[_Trie]]) -> Pack:
    width = max(map(_width, rows))
    ids, positions = torch.zeros(2, len(rows), width, dtype=torch.long)
    ends = torch.arange(1, width + 1).repeat(len(rows), 1)  # what pads a row sees and is seen by nothing else
    reads: list[Read] = []
    requests: list[Request] = []
    for number, row in enumerate(rows):
        start = 0
        for trie in row:
            stop = start + len(trie.ids)
            ids[number, start:stop] = torch.tensor(trie.ids)
            positions[number, start:stop] = torch.tensor(trie.depths)
            ends[number, start:stop] = torch.tensor(trie.ends) + start
            for (context, continuation), path in trie.requests:
                columns = tuple(start + index for index in path[len(context) - 1 :])
                reads.append((number, columns, continuation))
                requests.append((context, continuation))
            start = stop
    return Pack(Batch(ids, tuple(reads), positions, ends), tuple(requests))
