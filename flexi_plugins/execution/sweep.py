"""One sweep over token batches for any number of plans: equal prefixes are computed once, each weight is read once.

Plans are sequences of recipes, so a set of plans is a trie of blocks. Batches run in groups; a group passes the blocks
of the trie in source order, and the only states alive are those that a block still has to take. Answers come group by
group. How much memory weights and states get, and so how large a group is, is laid out before anything runs.
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
from flexi_plugins.execution.layout import Layout, lay_out
from flexi_plugins.execution.readout import Answer, Batch, read_out
from flexi_plugins.execution.schedule import Node, Prefixes, build_trie
from flexi_plugins.rewrite import Tensors

Answers = dict[int, list[Answer]]
Hook = Callable[[int, int, Tensor, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Planned:
    """A plan with its attached tensors. The plan names them by digest, so that equal blocks are known to be equal."""

    plan: PruningPlan
    attached: Tensors = field(default_factory=dict)

    def __post_init__(self) -> None:
        unnamed = set(self.attached) - {name for name, _ in self.plan.tensors}
        if unnamed:
            raise FlexiError(f"plan: attached tensor {min(unnamed)!r} has no digest in the plan; see with_digests")


class Sweeper:
    """Runs sweeps over one checkpoint's blocks; ``say`` is told what will be read where not everything fits in memory.

    broken: plan index -> position of the first block of the last sweep whose states were not finite. laid: how the last
    sweep used the memory. kept_states: (batch, prefix) of the states that outlive their sweep.
    """

    def __init__(self, blocks: Blocks, say: Callable[[str], None] = lambda text: None) -> None:
        self.blocks = blocks
        self.say = say
        self.prefixes = Prefixes()
        self.broken: dict[int, int] = {}
        self.laid: Layout | None = None
        self.kept_states: set[tuple[int, int]] = set()

    # -- states

    def stored(self, batch: int, prefix: int) -> Tensor:
        """Return the states behind a sequence of blocks that are stored."""
        return self.blocks.states.get((self, batch, prefix), self.blocks.device)

    def forget(self, unwanted: Callable[[int], bool]) -> None:
        """Forget kept states behind the sequences of blocks that are unwanted, and all states that are not kept."""
        self.kept_states = {k for k in self.kept_states if not unwanted(k[1])}
        self.blocks.states.drop(lambda key: key[0] is self and key[1:] not in self.kept_states)

    def can_keep(self, planned: Sequence[Planned], batches: Sequence[Batch]) -> bool:
        """Whether the states behind every block of these plans, beside all weights, leave half of the memory for states."""
        plans = [p.plan for p in planned]
        nodes = build_trie(plans, self.prefixes)
        layout = lay_out(self.blocks, plans, nodes, [b.ids.shape for b in batches], keep=True, observed=False)
        numbers = len(nodes) * sum(b.ids.numel() for b in batches) * self.blocks.checkpoint.shape.hidden
        return not layout.streamed and 2 * numbers * self.blocks.dtype.itemsize <= layout.state_bytes

    def check_finite(self, plan: PruningPlan, index: int = 0) -> None:
        """Raise if the states of a plan of the last sweep were not finite: say behind which block first."""
        if index in self.broken:
            first, dtype = self.broken[index], str(self.blocks.dtype).removeprefix("torch.")
            sources = ", ".join(map(str, plan.blocks[first].sources))
            raise FlexiError(
                f"calibration: block {first} (of old blocks {sources}) gives values that are not finite (NaN or infinity) "
                f"in {dtype}; try --dtype float32, or look at the weights"
            )

    # -- sweeping

    def work(self, planned: Sequence[Planned], batches: Sequence[Batch], wanted: Callable[[int, int], bool]) -> int:
        """Return the tokens of all blocks that a sweep runs for what is wanted, as ``advance`` reports them."""
        nodes = build_trie([p.plan for p in planned], self.prefixes)

        def runs(b: int) -> int:
            plans = {p for p in range(len(planned)) if wanted(b, p)}
            return sum((b, n.prefix) not in self.kept_states and not n.plans.isdisjoint(plans) for n in nodes)

        return sum(batch.ids.numel() * runs(b) for b, batch in enumerate(batches))

    def sweep(
        self,
        planned: Sequence[Planned],
        batches: Sequence[Batch],
        hook: Hook | None = None,
        keep: bool = False,
        wanted: Callable[[int, int], bool] = lambda batch, plan: True,
        advance: Callable[[int], None] = lambda tokens: None,
    ) -> Iterator[tuple[int, Answers]]:
        """Yield (batch index, plan index -> one (log-probability, greedy) a read), group of batches by group.

        wanted(batch, plan) leaves out what is answered already. hook(batch, position, states, arguments) runs a block in
        the place of the engine, to observe it. keep: the states behind every block outlive the sweep; kept states are
        taken instead of running a block wherever there are any, so batches of equal index must have equal tokens.
        advance(tokens) reports the tokens of each block passed.
        """
        self.broken = {}
        asked = {b: {p for p in range(len(planned)) if wanted(b, p)} for b in range(len(batches))}
        asked = {b: plans for b, plans in asked.items() if plans}
        if not asked:
            return
        used, plans = set().union(*asked.values()), [p.plan for p in planned]
        nodes = [n for n in build_trie(plans, self.prefixes) if not n.plans.isdisjoint(used)]
        running = [n for n in nodes if any((b, n.prefix) not in self.kept_states for b in asked)] or nodes
        order = list(asked)
        shapes = [batches[b].ids.shape for b in order]
        if self.blocks.memory is not None:
            self.blocks.keep_only(plans)
        reads = any(batches[b].reads for b in order)
        self.laid = layout = lay_out(self.blocks, plans, running, shapes, keep, hook is not None, reads=reads)
        if not layout.roomy:
            self.blocks.forget_copies()  # of a sweep that had more room
        if layout.streamed:
            self.say(str(layout))
        self.blocks.states.limit_to(layout.state_bytes)
        for indices in layout.groups:
            group = _Group(self, planned, nodes, {order[i]: batches[order[i]] for i in indices}, asked, keep)
            try:
                with torch.no_grad():
                    group.run(layout, hook, advance)
            finally:
                self.forget(lambda prefix: False)
            yield from group.answers.items()


class _Group:
    """One group of batches on its way through the trie. Batches go by their number, states by (batch, prefix)."""

    def __init__(
        self,
        sweeper: Sweeper,
        planned: Sequence[Planned],
        nodes: Sequence[Node],
        batches: Mapping[int, Batch],
        asked: Mapping[int, set[int]],
        keep: bool,
    ) -> None:
        self.sweeper, self.blocks, self.planned, self.keep = sweeper, sweeper.blocks, planned, keep
        self.batches, self.asked = batches, asked
        self.answers: dict[int, Answers] = {b: {} for b in batches}
        self._lost: set[tuple[int, int]] = set()  # states that are not finite
        self._arguments: dict[int, Mapping[str, Any]] = {}
        self._todo = {b: self._required(b, nodes) for b in batches}
        self._waiting = {
            (b, n.prefix): sum(c.prefix in todo for c in n.children) for b, todo in self._todo.items() for n in nodes
        }
        self.nodes = [n for n in nodes if any(self._visits(b, n) for b in batches)]

    def _required(self, batch: int, nodes: Sequence[Node]) -> set[int]:
        """Return the prefixes that have to be run: what leads to wanted answers or states, behind the kept states."""
        required: set[int] = set()
        for node in reversed(nodes):  # children come before their parents
            asked = not node.plans.isdisjoint(self.asked[batch])
            used = self.keep or bool(node.ends) or any(c.prefix in required for c in node.children)
            if asked and used and (batch, node.prefix) not in self.sweeper.kept_states:
                required.add(node.prefix)
        return required

    def _visits(self, batch: int, node: Node) -> bool:
        return node.prefix in self._todo[batch] or not self.asked[batch].isdisjoint(node.ends)

    def run(self, layout: Layout, hook: Hook | None, advance: Callable[[int], None]) -> None:
        """Visit the blocks in order, each with all batches; answers are read where plans end."""
        todo = set().union(*self._todo.values())
        places = [(self.planned[n.owner].plan, n.position) for n in self.nodes]
        needs = [self.blocks.needs(*p) if n.prefix in todo else () for n, p in zip(self.nodes, places, strict=True)]
        for index in self.blocks.stream(needs, layout.weight_bytes):
            node, following = self.nodes[index], self.nodes[index + 1 : index + 2]
            for number, batch in self.batches.items():
                if self._visits(number, node):
                    self._visit(node, number, batch, hook, advance)
            if not layout.roomy and all(n.kind != node.kind for n in following):
                self.blocks.release(*places[index])

    def _visit(self, node: Node, number: int, batch: Batch, hook: Hook | None, advance: Callable[[int], None]) -> None:
        place = number, node.prefix
        if node.prefix in self._todo[number]:
            states = self._run(node, number, batch, hook)
            advance(batch.ids.numel())
        else:
            states = self.sweeper.stored(*place)
        for index in node.ends:
            if index in self.asked[number]:
                self.answers[number][index] = self._answer(index, batch, states)
        if states is None:
            self._lost.add(place)
        elif node.prefix in self._todo[number] and (self.keep or self._waiting[place]):
            self.blocks.states.put((self.sweeper, *place), states)
            if self.keep:
                self.sweeper.kept_states.add(place)

    def _run(self, node: Node, number: int, batch: Batch, hook: Hook | None) -> Tensor | None:
        """Return the states behind a block; None where they are not finite, or were not in front of it."""
        if (number, node.before) in self._lost:
            return None
        hidden = self._entering(node, number, batch)
        if number not in self._arguments:
            self._arguments[number] = self.blocks.arguments(hidden, batch.positions, batch.sequences)
        arguments, owner = self._arguments[number], self.planned[node.owner]
        self.blocks.block(owner.plan, node.position, owner.attached)
        with self.blocks.timed("blocks"):
            if hook is not None:
                states = hook(number, node.position, hidden, arguments)
            else:
                states = self.blocks.run(owner.plan, node.position, owner.attached, hidden, arguments)
            finite = bool(states.sum(dtype=torch.float32).isfinite())
        if not finite:
            for index in node.plans:
                self.sweeper.broken[index] = min(node.position, self.sweeper.broken.get(index, node.position))
        return states if finite else None

    def _entering(self, node: Node, number: int, batch: Batch) -> Tensor:
        if node.parent is None:
            owner = self.planned[node.owner]
            return self.blocks.embed(batch.ids, owner.plan, owner.attached)
        place = number, node.before
        states = self.sweeper.stored(*place)
        self._waiting[place] -= 1
        if not self._waiting[place] and place not in self.sweeper.kept_states:
            self.blocks.states.pop((self.sweeper, *place))
        return states

    def _answer(self, index: int, batch: Batch, states: Tensor | None) -> list[Answer]:
        if states is None:
            return [(float("nan"), False)] * len(batch.reads)
        with self.blocks.timed("head"):
            return read_out(self.blocks, batch, states, self.planned[index].plan, self.planned[index].attached)
