"""How a sweep uses the memory it is given: what stays, what is read again, and which batches run together."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from flexi_plugins.data import BlockShape, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.execution.readout import head_rows
from flexi_plugins.execution.schedule import Node, most_alive, plan_reads
from flexi_plugins.precision import widens

GROUP_TOKENS = 16384  # a group has as many before its states are spilled: reading 2 bytes costs some 500 multiply-adds
OBSERVERS = 256 * 2**20  # bytes that statistics may take for what they form of a batch

Shape = Sequence[int]  # rows, tokens of a batch


@dataclass(frozen=True)
class Layout:
    """groups: indices of batches that run together. weight_bytes, state_bytes: what either may hold at once.

    roomy: built blocks may stay. blocks: distinct blocks; passes: how often the order of sources starts again, over all
    groups; reads: bytes read from the checkpoint as it is stored, beyond what is in memory already.
    """

    groups: tuple[Sequence[int], ...]
    weight_bytes: float
    state_bytes: float
    roomy: bool
    blocks: int
    passes: int
    reads: int
    streamed: bool

    def __str__(self) -> str:
        groups, passes = (f"{n} {what}" for n, what in ((len(self.groups), "group(s)"), (self.passes, "pass(es)")))
        return (
            f"sweep: {self.blocks} distinct blocks, {groups} of batches, {passes} over the checkpoint, reads "
            f"{gib(self.reads)}; {gib(self.weight_bytes)} for weights, {gib(self.state_bytes)} for hidden states"
        )


def gib(size: float) -> str:
    """Return a number of bytes for people, rounded up: what is at least needed is enough."""
    unit, name = (2**30, "GiB") if size >= 2**27 else (2**20, "MiB")
    return f"{math.ceil(100 * size / unit) / 100:.2f} {name}"


def lay_out(
    blocks: Blocks,
    plans: Sequence[PruningPlan],
    nodes: Sequence[Node],
    shapes: Sequence[Shape],
    keep: bool,
    observed: bool,
    training: bool = False,
    reads: bool = True,
) -> Layout:
    """Divide the memory of ``blocks``; raise with the least that works where it is too small for one block and one batch.

    shapes: (rows, tokens) of the batches. keep: all states outlive the sweep. observed: statistics are taken. training:
    what a block computes is kept for its gradients. reads: the head is applied; else only states are wanted.
    """
    places = [(plans[n.owner], n.position) for n in nodes]
    needs = [blocks.needs(*place) for place in places]
    states = [rows * tokens * blocks.checkpoint.shape.hidden * blocks.dtype.itemsize for rows, tokens in shapes]
    everything = _bytes(blocks, needs)
    single = tuple((i,) for i in range(len(shapes)))
    passes = 1 + max(n.stage[0] for n in nodes)

    def layout(groups: Sequence[Sequence[int]], weights: float, left: float, roomy: bool, streamed: bool) -> Layout:
        reads = _reads(blocks, needs, len(groups), weights)
        return Layout(tuple(groups), weights, left, roomy, len(nodes), passes * len(groups), reads, streamed)

    if blocks.memory is None:
        return layout(single, float("inf"), float("inf"), True, False)
    copies = {plan.key(position): blocks.copied_bytes(plan, position) for plan, position in places}
    donors = ((plan, plan.donor(position)) for plan, position in places)  # built beside the blocks that run with them
    lent = max((blocks.copied_bytes(plan, donor) for plan, donor in donors if donor is not None), default=0)
    work = max(_working_bytes(blocks, plans, nodes, shape, observed, reads) * (1 + training) for shape in shapes)
    work += _widened_bytes(blocks, plans, nodes, reads)
    outer = blocks.outer_bytes + blocks.own_outer_bytes(plans)
    free = blocks.memory - outer - work - max(copies.values()) - lent
    largest, alive = max(states), most_alive(nodes)
    visit = max(_bytes(blocks, [n]) for n in needs)
    least = visit + 2 * largest
    if least > free:
        sizes = blocks.memory, blocks.memory + least - free
        given, asked = (gib((size + blocks.taken) / blocks.share) for size in sizes)
        taken = f"{gib(blocks.taken)} are taken already, " * bool(blocks.taken)
        raise FlexiError(
            f"memory: {given} is too small for one block and one batch; expected at least {asked} ({taken}"
            f"{gib(outer)} go to embedding and head, {gib(visit)} to the weights of a block, "
            f"{gib(2 * largest)} to hidden states, the rest is to work in); give more (--memory)"
        )
    left = free - everything - (alive + 1) * largest
    if left >= 0:
        roomy = sum(copies.values()) <= left
        return layout(single, everything, free - everything - roomy * sum(copies.values()), roomy, False)
    wanted = (len(nodes) if keep else alive + 1) * sum(states)
    ahead = max((_bytes(blocks, pair) for pair in pairwise(needs)), default=visit)
    weights = max(ahead if ahead + 2 * largest <= free else visit, min(everything, free - wanted))
    groups = _grouped(states, shapes, (free - weights) / (alive + 1))
    return layout(groups, weights, free - weights, False, True)


def _bytes(blocks: Blocks, needs: Iterable[Collection[str]]) -> int:
    return sum(blocks.sizes[name] for name in set().union(*needs))


def _grouped(states: Sequence[int], shapes: Sequence[Shape], room: float) -> list[list[int]]:
    """Put successive batches together until their states fill the room; a group too small to pay its reading goes on."""
    groups: list[list[int]] = [[]]
    for index in range(len(states)):
        group = groups[-1]
        tokens = sum(shapes[i][0] * shapes[i][1] for i in group)
        if group and sum(states[i] for i in group) + states[index] > room and tokens >= GROUP_TOKENS:
            groups.append([])
        groups[-1].append(index)
    return groups


def _reads(blocks: Blocks, needs: Sequence[Collection[str]], groups: int, capacity: float) -> int:
    """Return the bytes that groups read from the checkpoint, by going through the same steps."""
    held, total = set(blocks.held), 0
    for _ in range(groups):
        for step in plan_reads(needs, held, blocks.sizes, capacity):
            held = (held - set(step.drop)) | set(step.load)
            total += blocks.checkpoint.bytes_of(step.load)
    return total


def _widths(plans: Sequence[PruningPlan], nodes: Sequence[Node]) -> list[BlockShape]:
    return [plans[n.owner].block_shape(plans[n.owner].blocks[n.position]) for n in nodes]


def _working_bytes(
    blocks: Blocks, plans: Sequence[PruningPlan], nodes: Sequence[Node], shape: Shape, observed: bool, reads: bool
) -> int:
    """Return an estimate from above of what running one batch through the widest block, and the head if need be, takes."""
    model, (rows, tokens) = blocks.checkpoint.shape, shape
    widths = _widths(plans, nodes)
    channels = max(w.channels for w in widths)
    heads = max(w.query_heads * w.head_dim for w in widths)
    inside = rows * tokens * (8 * model.hidden + 4 * channels + 12 * heads) + 2 * rows * tokens * tokens
    head = reads * min(head_rows(blocks), rows * tokens) * model.vocabulary * 12
    statistics = min(OBSERVERS, rows * tokens * channels * 16) if observed else 0
    width = torch.float32.itemsize if widens(blocks.dtype, blocks.device) else blocks.dtype.itemsize
    return max(inside * width + statistics, head)


def _widened_bytes(blocks: Blocks, plans: Sequence[PruningPlan], nodes: Sequence[Node], reads: bool = True) -> int:
    """Return what a copy of weights in float32 takes, where products are computed in it, and for gradients once more.

    It is that of the head, if it is applied, or of the largest map of a block.
    """
    if not widens(blocks.dtype, blocks.device):
        return 0
    shape = blocks.checkpoint.shape
    maps = [[rows * columns for rows, columns in shape.maps(w).values()] for w in _widths(plans, nodes)]
    inside = max(max(sizes, default=0) for sizes in maps)
    return torch.float32.itemsize * max(inside, reads * shape.vocabulary * shape.hidden)
