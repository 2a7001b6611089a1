"""What a sweep will do, decided beforehand: the trie of plans, the order of its blocks, and what is read when."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from flexi_plugins.data import PruningPlan


class Prefixes:
    """Numbers every distinct sequence of blocks; equal sequences have equal numbers, also between sweeps."""

    def __init__(self) -> None:
        self._numbers: defaultdict[Any, int] = defaultdict(count(1).__next__)

    def of(self, plan: PruningPlan) -> list[int]:
        """Return the number before every block of a plan, and after the last."""
        embedding = dict(plan.tensors).get("outer.embedding") if plan.own else None
        numbers = [self._numbers[0, (plan.embedding_gain, embedding)]]
        for position in range(len(plan.blocks)):
            numbers.append(self._numbers[numbers[-1], plan.key(position)])
        return numbers


@dataclass(eq=False)
class Node:
    """One block of the trie: its place in the plan it was first seen in, what follows it, and which plans pass it.

    stage is (pass over the checkpoint, last source, repetition): blocks run in its order, which visits the sources of
    ascending plans once and in order. before is the number of the sequence in front of the block, prefix that behind it;
    blocks of one trie that are made alike have one number as their kind.
    """

    before: int
    prefix: int
    owner: int
    position: int
    stage: tuple[int, int, int]
    kind: int
    parent: Node | None
    children: list[Node] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    plans: set[int] = field(default_factory=set)


def build_trie(plans: Sequence[PruningPlan], prefixes: Prefixes) -> list[Node]:
    """Return the blocks of the trie of plans in the order of a sweep; equal blocks of one stage stand together."""
    nodes: dict[int, Node] = {}
    kinds: dict[Any, int] = {}
    for index, plan in enumerate(plans):
        numbers = prefixes.of(plan)
        node = None
        for position in range(len(plan.blocks)):
            prefix = numbers[position + 1]
            if prefix not in nodes:
                stage = _stage(node, plan, position)
                kind = kinds.setdefault(plan.key(position), len(kinds))
                nodes[prefix] = Node(numbers[position], prefix, index, position, stage, kind, node)
                if node is not None:
                    node.children.append(nodes[prefix])
            node = nodes[prefix]
            node.plans.add(index)
        assert node is not None, "a plan has at least one block"
        node.ends.append(index)
    return sorted(nodes.values(), key=lambda n: (n.stage, n.kind))


def _stage(parent: Node | None, plan: PruningPlan, position: int) -> tuple[int, int, int]:
    recipe = plan.blocks[position]
    source = max(*recipe.sources, *(s for s, _ in (*recipe.norm_weights, *recipe.bias_weights)), 0)
    if parent is None:
        return 0, source, 0
    number, last, repetition = parent.stage
    if source == last:
        return number, source, repetition + 1
    return number + (source < last), source, 0


def count_blocks(plans: Sequence[PruningPlan]) -> tuple[int, int]:
    """Return how many blocks a sweep of these plans runs, and how many they would run one by one."""
    return len(build_trie(plans, Prefixes())), sum(len(p.blocks) for p in plans)


def most_alive(nodes: Iterable[Node]) -> int:
    """Return how many hidden states of one batch are alive at once when blocks run in this order."""
    alive = most = 0
    waiting: dict[int, int] = {}  # prefix -> children that have not run
    for node in nodes:
        most = max(most, alive + 1)
        waiting[node.prefix] = len(node.children)
        alive += bool(node.children)
        if node.parent is not None and node.parent.prefix in waiting:
            waiting[node.parent.prefix] -= 1
            alive -= waiting[node.parent.prefix] == 0
    return most


# ------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Step:
    """One visit of a block: tensors to forget and to read for it; ahead: while the block before it still runs."""

    drop: tuple[str, ...]
    load: tuple[str, ...]
    ahead: bool


def plan_reads(
    needs: Sequence[Collection[str]], held: Iterable[str], sizes: Mapping[str, int], capacity: float
) -> list[Step]:
    """Return what is read for each visit, with at most ``capacity`` bytes held: the tensor needed last goes first.

    After the last visit the first may follow again (the next group of batches), so that counts as a later need.
    """
    now = set(held)
    uses: defaultdict[str, list[int]] = defaultdict(list)
    for index, needed in enumerate((*needs, *needs)):
        for name in needed:
            uses[name].append(index)

    def next_use(name: str, index: int) -> float:
        later = uses.get(name)
        return later[bisect_right(later, index)] if later else float("inf")

    def room(index: int, pinned: set[str]) -> list[str] | None:
        excess, drop = sum(sizes[n] for n in now.union(needs[index])) - capacity, list[str]()
        for name in sorted(now - pinned, key=lambda n: (-next_use(n, index), n)) if excess > 0 else ():
            if excess <= 0:
                break
            drop.append(name)
            excess -= sizes[name]
        return drop if excess <= 0 else None

    steps = []
    for index, needed in enumerate(needs):
        early = room(index, {*needed, *needs[index - 1]}) if index else None
        drop = room(index, set(needed)) if early is None else early
        assert drop is not None, "the memory was found to hold every single visit"
        load = tuple(n for n in needed if n not in now)
        now = (now - set(drop)) | set(load)
        steps.append(Step(tuple(drop), load, early is not None))
    return steps
