"""Log-probabilities where they are read: the head is applied to the positions that are asked about and no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flexi_plugins.data import PruningPlan
from flexi_plugins.execution.blocks import NOTHING, Blocks
from flexi_plugins.precision import widens
from flexi_plugins.rewrite import Tensors

HEAD_ROWS = 128  # positions per application of the head: 128 x 49,152 logits stay in the cache
WIDE_HEAD_ROWS = 512  # where each application makes a copy of the head in float32
SMALLEST = -80.0  # exp of less is no normal number, which would make it many times slower, and adds nothing

Read = tuple[int, Sequence[int], Sequence[int]]
Answer = tuple[float, bool]


@dataclass(frozen=True)
class Batch:
    """Token rows run together. ids: (rows, tokens), padded at the end. reads: where log-probabilities are wanted.

    A read is (row, columns, targets): the log-probabilities of ``targets``, each given what stands before it.
    A packed batch is one row that holds a trie of tokens: positions (1, tokens) are their depths, and each of the
    sequences is the indices of its tokens; without positions every row is one sequence.
    rounding: what log-probabilities, computed in float32, are rounded to before they are added up.
    """

    ids: Tensor
    reads: Sequence[Read] = ()
    positions: Tensor | None = None
    sequences: Sequence[Sequence[int]] = ()
    rounding: torch.dtype = torch.float32

    @cached_property
    def places(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows and columns of the distinct positions that are read; position and target of every token that is."""
        flat = [(row, c, t) for row, columns, targets in self.reads for c, t in zip(columns, targets, strict=True)]
        table = torch.tensor(flat, dtype=torch.long).view(-1, 3)
        distinct, inverse = torch.unique(table[:, :2], dim=0, return_inverse=True)
        return distinct[:, 0], distinct[:, 1], inverse, table[:, 2]


def head_rows(blocks: Blocks) -> int:
    """Return to how many positions the head is applied at once."""
    return WIDE_HEAD_ROWS if widens(blocks.dtype, blocks.device) else HEAD_ROWS


def read_out(
    blocks: Blocks, batch: Batch, states: Tensor, plan: PruningPlan | None = None, attached: Tensors = NOTHING
) -> list[Answer]:
    """Return for every read the summed log-probability of its targets, and whether each is the most probable token.

    states: (rows, tokens, hidden), the residual stream behind the last block of a plan's model (None: the original's).
    """
    if not batch.reads:
        return []
    rows, columns, place, targets = batch.places
    chosen = states[rows.to(states.device), columns.to(states.device)]
    scores, greedy = torch.empty(len(place)), torch.empty(len(place), dtype=torch.bool)
    rows_at_once = head_rows(blocks)
    for start in range(0, len(chosen), rows_at_once):
        logits = blocks.logits(chosen[start : start + rows_at_once], plan, attached)
        inside = (place >= start) & (place < start + rows_at_once)
        found = _scored(logits, (place[inside] - start).to(logits.device), targets[inside].to(logits.device))
        scores[inside], greedy[inside] = (x.cpu() for x in found)
    lengths = [len(targets) for _, _, targets in batch.reads]
    sums = [float(s.sum()) for s in scores.to(batch.rounding).split(lengths)]
    return list(zip(sums, (bool(g.all()) for g in greedy.split(lengths)), strict=True))


def _scored(logits: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probability (float32) and greediness of targets; of equal logits the first is the greedy one."""
    picked, best = logits[rows, targets], logits.amax(-1)
    relative = logits.to(torch.float32, copy=True).sub_(best[:, None]).clamp_min_(SMALLEST)
    normaliser = relative.exp_().sum(-1).log_().add_(best)
    greedy = picked == best[rows]
    greedy[greedy.clone()] = logits[rows[greedy]].argmax(-1) == targets[greedy]
    return picked.float() - normaliser[rows], greedy
