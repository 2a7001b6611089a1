"""One sweep over token batches for any number of plans: equal prefixes are computed once, answers come batch by batch.

Plans are sequences of recipes, so a set of plans is a trie of blocks. A batch's hidden states flow down the trie depth
first; the only states alive are those of the branches still to be taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexi_plugins.data import PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.rewrite import Tensors

HEAD_ROWS = 512  # positions per application of the head: 512 x 49,152 float32 logits are 100 MB


@dataclass(frozen=True)
class Planned:
    """A plan with its attached tensors. The plan names them by digest, so that equal blocks are known to be equal."""

    plan: PruningPlan
    attached: Tensors = field(default_factory=dict)

    def __post_init__(self) -> None:
        unnamed = set(self.attached) - {name for name, _ in self.plan.tensors}
        if unnamed:
            raise FlexiError(f"plan: attached tensor {min(unnamed)!r} has no digest in the plan; see with_digests")


@dataclass(frozen=True)
class Batch:
    """Token rows run together. ids: (rows, tokens), padded at the end. reads: where log-probabilities are wanted.

    A read is (row, first, targets): the log-probabilities of ``targets`` given everything before them, the first of
    them predicted at position ``first`` of the row.
    """

    ids: Tensor
    reads: tuple[tuple[int, int, tuple[int, ...]], ...] = ()


@dataclass
class Node:
    """One block of the trie, the plan it was first seen in, the plans that end with it and the blocks that may follow."""

    prefix: int
    owner: int
    position: int
    children: dict[Any, Node] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)


Answers = dict[int, list[tuple[float, bool]]]
Hook = Callable[[int, int, Tensor, Mapping[str, Any]], Tensor]


class Prefixes:
    """Numbers every distinct sequence of blocks; equal sequences have equal numbers, also between sweeps."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def number(self, parent: int, key: Any) -> int:
        """Return the number of the sequence that is ``parent``'s followed by the block ``key``."""
        return self._numbers.setdefault((parent, key), len(self._numbers) + 1)

    def of(self, plan: PruningPlan) -> list[int]:
        """Return the number before every block of a plan, and after the last."""
        numbers = [self.number(0, plan.embedding_gain)]
        for position in range(len(plan.blocks)):
            numbers.append(self.number(numbers[-1], plan.key(position)))
        return numbers


def build_trie(plans: Sequence[PruningPlan], prefixes: Prefixes) -> list[Node]:
    """Return the roots (one per embedding gain) of the trie of plans; a root stands before the first block."""
    roots: dict[float, Node] = {}
    for index, plan in enumerate(plans):
        numbers = prefixes.of(plan)
        node = roots.setdefault(plan.embedding_gain, Node(numbers[0], index, -1))
        for position in range(len(plan.blocks)):
            fresh = Node(numbers[position + 1], index, position)
            node = node.children.setdefault(plan.key(position), fresh)
        node.ends.append(index)
    return list(roots.values())


def count_blocks(plans: Sequence[PruningPlan]) -> tuple[int, int]:
    """Return how many blocks a sweep of these plans runs, and how many they would run one by one."""
    stack, shared = build_trie(plans, Prefixes()), 0
    while stack:
        node = stack.pop()
        shared += len(node.children)
        stack += node.children.values()
    return shared, sum(len(p.blocks) for p in plans)


class Sweeper:
    """Runs sweeps over one checkpoint's blocks. ``keep``: residual states kept between sweeps by (batch, prefix)."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.prefixes = Prefixes()
        self.keep: dict[tuple[int, int], Tensor] = {}

    def sweep(
        self,
        planned: Sequence[Planned],
        batches: Sequence[Batch],
        hook: Hook | None = None,
        keep: bool = False,
        wanted: Callable[[int, int], bool] = lambda batch, plan: True,
        advance: Callable[[int], None] = lambda tokens: None,
    ) -> Iterator[tuple[int, Answers]]:
        """Yield (batch index, plan index -> one (log-probability, greedy) a read) batch by batch.

        wanted(batch, plan) leaves out what is answered already. hook(plan, position, states, arguments) runs a block in
        the place of the engine, to observe it. keep: store the states that leave every block, and take stored states
        instead of running a block where there are any. advance(tokens) reports the tokens of each block passed.
        """
        for index, batch in enumerate(batches):
            chosen = [i for i in range(len(planned)) if wanted(index, i)]
            if chosen:
                with torch.no_grad():
                    local = self._batch([planned[i] for i in chosen], index, batch, hook, keep, advance)
                yield index, {chosen[i]: answer for i, answer in local.items()}

    def _batch(
        self,
        planned: Sequence[Planned],
        index: int,
        batch: Batch,
        hook: Hook | None,
        keep: bool,
        advance: Callable[[int], None],
    ) -> Answers:
        stack: list[tuple[Node, Tensor]] = []
        for root in build_trie([p.plan for p in planned], self.prefixes):
            hidden = self.blocks.embed(batch.ids, planned[root.owner].plan.embedding_gain)
            stack += [(child, hidden) for child in root.children.values()]
        arguments = self.blocks.arguments(stack[0][1])
        answers: Answers = {}
        while stack:
            node, hidden = stack.pop()
            states = self.keep.get((index, node.prefix)) if keep else None
            if states is None:
                states = self._run(planned[node.owner], node, hidden, arguments, hook)
            if keep:
                self.keep[index, node.prefix] = states
            advance(batch.ids.numel())
            for plan_index in node.ends:
                answers[plan_index] = self._answer(planned[plan_index].plan, states, batch)
            stack += [(child, states) for child in node.children.values()]
        return answers

    def _run(
        self, planned: Planned, node: Node, hidden: Tensor, arguments: Mapping[str, Any], hook: Hook | None
    ) -> Tensor:
        if hook is not None:
            return hook(node.owner, node.position, hidden, arguments)
        return self.blocks.run(planned.plan, node.position, planned.attached, hidden, arguments)

    def _answer(self, plan: PruningPlan, hidden: Tensor, batch: Batch) -> list[tuple[float, bool]]:
        if not batch.reads:
            return []
        rows = [torch.full((len(t),), r) for r, _, t in batch.reads]
        columns = [torch.arange(f, f + len(t)) for _, f, t in batch.reads]
        states = hidden[torch.cat(rows), torch.cat(columns)]  # (reads, hidden)
        targets = torch.tensor([x for _, _, t in batch.reads for x in t], device=hidden.device)
        scores, greedy = [], []
        for start in range(0, len(targets), HEAD_ROWS):
            logits = self.blocks.logits(states[start : start + HEAD_ROWS], plan.final_norm_gain)
            wanted = targets[start : start + HEAD_ROWS]
            scores.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(-1))
            greedy.append(logits.argmax(-1) == wanted)
        lengths = [len(t) for _, _, t in batch.reads]
        sums = [float(s.sum()) for s in torch.cat(scores).split(lengths)]
        return list(zip(sums, (bool(g.all()) for g in torch.cat(greedy).split(lengths)), strict=True))
