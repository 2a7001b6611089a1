"""FLAP's structures (arXiv 2312.11983, and the authors' prune_flap): in which order units go, and with which others.

Each is a sequence of steps: units that go together, and the fraction of the blocks' linear weights from which on they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

from flexi_plugins.data import ModelShape
from flexi_plugins.errors import FlexiError

if TYPE_CHECKING:
    from torch import Tensor

Unit = tuple[int, str, int]  # block, "attention" or "mlp", index of the KV head or channel
Step = tuple[float, Sequence[Unit]]
Ranked = Sequence[Sequence[tuple[float, Unit]]]


def ranked(values: Sequence[Tensor], kind: str) -> Ranked:
    """Return the units of each block with their values, lowest first; without the best, which stays."""
    found = []
    for block, scores in enumerate(values):
        order, numbers = scores.argsort(stable=True).tolist(), scores.tolist()
        found.append([(numbers[u], (block, kind, u)) for u in order[:-1]])
    return found


def unit_cost(shape: ModelShape, block: int, kind: str) -> int:
    """Return the parameters of one KV head with its query heads, or of one channel."""
    return shape.head_cost(shape.blocks[block]) if kind == "attention" else shape.channel_cost()


def linear_weights(shape: ModelShape) -> int:
    """Return the parameters of all units of all blocks."""
    return sum(b.kv_heads * shape.head_cost(b) + b.channels * shape.channel_cost() for b in shape.blocks)


def one_ranking(shape: ModelShape, heads: Ranked, channels: Ranked) -> Iterator[Step]:
    """AL-AM: the lowest unit of all goes first.

    The authors' threshold is the unit where the cost of what scores higher, its own included, is nearest to what may
    stay, and only what is above it stays: the last to go is the unit before which the cost that is gone is nearest to the
    fraction.
    """
    total, before, now = linear_weights(shape), 0, 0
    for _, unit in sorted(chain(*heads, *channels)):
        yield (before + now) / 2 / total, [unit]
        before, now = now, now + unit_cost(shape, unit[0], unit[1])


def same_share(shape: ModelShape, heads: Ranked, channels: Ranked) -> Iterator[Step]:
    """UL-UM: the lowest int(fraction x n) of the n units of every block and kind go."""
    found: dict[float, list[Unit]] = {}
    widths = [b.kv_heads for b in shape.blocks] + [b.channels for b in shape.blocks]
    for width, order in zip(widths, chain(heads, channels), strict=True):
        for count, (_, unit) in enumerate(order, 1):
            found.setdefault(count / width, []).append(unit)
    yield from sorted(found.items())


def same_numbers(shape: ModelShape, heads: Ranked, channels: Ranked, remove_heads: int, local: bool) -> Iterator[Step]:
    """AL-MM and UL-MM (``local``): first a number of heads, then as many channels as are left to go."""
    rounds: Iterator[list[Unit]]
    if local:
        share = remove_heads // len(heads)
        first, expected = [unit for order in heads for _, unit in order[:share]], share * len(heads)
        rounds = ([item[1] for item in one if item] for one in zip_longest(*channels))
    else:
        first, expected = [unit for _, unit in sorted(chain(*heads))[:remove_heads]], remove_heads
        rounds = ([unit] for _, unit in sorted(chain(*channels)))
    if len(first) != expected:
        most = sum(map(len, heads))
        raise FlexiError(f"flap: remove_heads = {remove_heads}, expected 0..{most}: every block keeps a KV head")
    total, removed = linear_weights(shape), sum(unit_cost(shape, block, kind) for block, kind, _ in first)
    yield 0.0, first
    for units in rounds:
        removed += sum(unit_cost(shape, block, kind) for block, kind, _ in units)
        yield removed / total, units


def most_heads(shape: ModelShape, structure: str, remove_heads: int) -> tuple[int, int]:
    """Return the parameters of the heads that surely can go, and of how many blocks those are at most."""
    blocks, spare = shape.blocks, [max(0, b.kv_heads - 1) for b in shape.blocks]
    if structure == "UL-MM":
        spare = [min(s, remove_heads // len(blocks)) for s in spare]
    touched = sum(s > 0 for s in spare)
    if structure == "AL-MM":
        cheapest = min((shape.head_cost(b) for b in blocks if b.kv_heads), default=0)
        return min(remove_heads, sum(spare)) * cheapest, min(remove_heads, touched)
    return sum(s * shape.head_cost(b) for s, b in zip(spare, blocks, strict=True)), touched
