"""FlexiGPT's extension (arXiv 2501.14713, section 3.5): a span of blocks runs again with the weights it has.

From the paper: a start and an end index choose the span; "block" repeats each of its blocks in place (4, 4', 5, 5', ...),
"sequential" the span as a whole (4, 5, ..., 4', 5', ...); every repetition after the first has adapters and output norms
of its own. TinyLlama-1.1B becomes 36 blocks of 22, with adapters of rank 256. The paper does not say which blocks those
are, how their adapters start, nor at which gain their output norms do, and no code of the authors was found. Our reading:
the blocks in the middle, 4..17 of TinyLlama's 22; where a replaced block starts at the SVD of W_i - W_j, W_i - W_i = 0
leaves A = 0 and for B any orthonormal rows, so they are drawn; and since at a gain close to 0 the model starts as the
unextended one and its adapters hardly learn, the gain is the largest at which the perplexity on calibration text is at
most 1 % higher.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from flexi_plugins.data import ModelShape, PruningPlan
from flexi_plugins.errors import FlexiError, unknown
from flexi_plugins.hookspecs import Budget, PruningRequest, ReplacementStrategy, TensorRequest, hookimpl
from flexi_plugins.strategies.share_lora import zero_adapter

if TYPE_CHECKING:
    from torch import Tensor

Order = Literal["block", "sequential"]
"""Whether each block of the span is repeated in place, or the span as a whole."""
GAINS = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)  # of which a calibrated gain is one
ADDED = "it adds parameters, and takes no ratio"


@dataclass(frozen=True)
class Extend:
    """Run a span of blocks again, with shared weights, and adapters and output norms of its own."""

    blocks: int | None = None  # how many the extended model has; without start and end they are made of the middle
    start: int | None = None  # first block of the span
    end: int | None = None  # last block of the span
    repetitions: int | None = None  # how often each block of the span runs; default what gives ``blocks``, or 2
    order: Order = "block"
    rank: int | None = None  # adapter rank; default hidden / 16, the paper's 256 at 4096
    output_gain: float | Literal["calibrated"] = "calibrated"  # start of gamma; calibrated: the largest near enough
    tolerance: float = 0.01  # by what share the perplexity may be higher at the start, where the gain is calibrated

    name: ClassVar[str] = "extend"
    paper: ClassVar[str] = "FlexiGPT, arXiv 2501.14713"
    needs: ClassVar[frozenset[str]] = frozenset()
    wants: ClassVar[frozenset[str]] = frozenset()
    progressive: ClassVar[bool] = False
    knobs: ClassVar[tuple[str, ...]] = ("order",)  # which is always set: an extension has no ratio
    excused: ClassVar[dict[str, str]] = {
        "meets-the-budget": ADDED,
        "reach-is-truthful": ADDED,
        "counts-without-weights": ADDED,
        "every-choice-works": ADDED,
    }

    def reach(self, shape: ModelShape) -> float:
        """Return 0: nothing goes."""
        return 0.0

    def plan(self, request: PruningRequest) -> PruningPlan:
        """Return the plan of the extended model, see ``extend``."""
        if self.output_gain != "calibrated" and self.output_gain <= 0:
            raise FlexiError(
                f"{self.name}: output_gain = {self.output_gain:g}, expected a positive number or 'calibrated'"
            )
        if self.tolerance <= 0:
            raise FlexiError(f"{self.name}: tolerance = {self.tolerance:g}, expected a positive share, such as 0.01")
        return extend(request.shape, self.start, self.end, self.repetitions, self.blocks, self.order, self.rank)

    def finished(self, plan: PruningPlan, budget: Budget) -> bool:
        """Return True: one step does it all."""
        return True

    def tensors(self, request: TensorRequest) -> dict[str, Tensor]:
        """Return adapters and output norms; raise where no gain of GAINS starts near enough to the unextended model."""
        if self.output_gain != "calibrated":
            return extension_tensors(request, self.output_gain)
        made = extension_tensors(request, GAINS[0])
        candidates = [_with_gain(made, gain) for gain in GAINS]
        plans = [request.before, *[request.plan] * len(GAINS)]
        unextended, *losses = request.quality(plans, "loss", [{}, *candidates])
        allowed = math.log1p(self.tolerance)  # perplexity is exp(loss)
        near = [i for i, loss in enumerate(losses) if loss - unextended <= allowed]
        if not near:
            raise FlexiError(
                f"{self.name}: at every output gain of {GAINS[0]:g}..{GAINS[-1]:g} the model starts at least "
                f"{min(losses) - unextended:.4g} nats per token above the unextended one's {unextended:.4g}, expected at "
                f"most {allowed:.4g} (tolerance = {self.tolerance:g}); repeat other blocks, or set output_gain or tolerance"
            )
        return candidates[near[-1]]


def extend(
    shape: ModelShape,
    start: int | None = None,
    end: int | None = None,
    repetitions: int | None = None,
    blocks: int | None = None,
    order: Order = "block",
    rank: int | None = None,
) -> PruningPlan:
    """Return the plan that runs the blocks ``start`` to ``end``, both included, ``repetitions`` times.

    blocks: how many blocks the extended model has. It gives the repetitions of a span, or else the span in the middle of
    the model; with neither, that is the share of TinyLlama's blocks that the paper repeats, 14 of 22. rank: of the
    adapters, default hidden / 16. Raise a FlexiError that lists what is possible.
    """
    if order not in get_args(Order):
        raise FlexiError(f"extend: {unknown('order', order, get_args(Order))}")
    if rank is not None and rank < 0:
        raise FlexiError(f"extend: rank = {rank}, expected at least 0 (no adapters)")
    span, times = repeated_span(len(shape.blocks), start, end, repetitions, blocks)
    whole = PruningPlan.identity(shape).blocks
    size = max(1, shape.hidden // 16) if rank is None else rank
    again = [replace(recipe, shares=i, rank=size, output_norm=True) for i, recipe in enumerate(whole)]
    if order == "block":
        middle = [recipe for i in span for recipe in (whole[i], *[again[i]] * (times - 1))]
    else:
        middle = [*whole[span.start : span.stop], *again[span.start : span.stop] * (times - 1)]
    return PruningPlan(shape, (*whole[: span.start], *middle, *whole[span.stop :]))


def repeated_span(
    count: int, start: int | None, end: int | None, repetitions: int | None, blocks: int | None
) -> tuple[range, int]:
    """Return which of a model's ``count`` blocks run how often, by the options of ``extend``."""
    if repetitions is not None and repetitions < 2:
        raise FlexiError(f"extend: repetitions = {repetitions}, expected at least 2, the first one included")
    if blocks is not None and blocks <= count:
        raise FlexiError(f"extend: blocks = {blocks}, expected more than the {count} of this model")
    times = repetitions or 2
    if start is not None and end is not None:
        if not 0 <= start <= end < count:
            raise FlexiError(
                f"extend: start = {start}, end = {end}, expected 0 <= start <= end <= {count - 1} on this model"
            )
        span = range(start, end + 1)
        if repetitions is None and blocks is not None:
            times = 1 + (blocks - count) // len(span)
    elif start is None and end is None:
        length = round(count * 14 / 22) if blocks is None else (blocks - count) // (times - 1)
        first = (count - length) // 2
        span = range(first, first + length)
    else:
        raise FlexiError(f"extend: start and end belong together, found start = {start}, end = {end}")
    if blocks is not None and (len(span) > count or count + len(span) * (times - 1) != blocks):
        possible = ", ".join(f"{length} x {n}" for length, n in spans_reaching(count, blocks))
        raise FlexiError(
            f"extend: no such span (start = {start}, end = {end}, repetitions = {repetitions}) makes {blocks} blocks of "
            f"{count}; possible are, blocks of the span x repetitions: {possible}"
        )
    return span, times


def spans_reaching(count: int, blocks: int) -> list[tuple[int, int]]:
    """Return every (blocks of the span, repetitions) that makes ``blocks`` blocks of ``count``, longest span first."""
    added = blocks - count
    return [(length, 1 + added // length) for length in range(min(count, added), 0, -1) if added % length == 0]


def extension_tensors(request: TensorRequest, gain: float) -> dict[str, Tensor]:
    """Return what the repetitions of ``request.plan`` run with beside old weights, where it is not attached yet.

    ``ROLE.lora_a`` and ``ROLE.lora_b``: see ``zero_adapter``, drawn with ``request.seed``. Output norms: ``gain``,
    (hidden,). All in the weights' dtype. A repetition is a block that shares its own weights.
    """
    import torch

    shape, generator = request.plan.shape, torch.Generator().manual_seed(request.seed)
    made: dict[str, Tensor] = {}
    for position, recipe in enumerate(request.plan.blocks):
        source = recipe.sources[0]
        if recipe.shares != source:
            continue
        weights, maps = request.weights.block(source), shape.maps(shape.blocks[source])
        dtype = weights[next(iter(maps))].dtype
        for role, (rows, columns) in maps.items():
            if recipe.rank:
                a, b = zero_adapter(rows, columns, recipe.rank, generator)
                made[f"blocks.{position}.{role}.lora_a"] = a.to(dtype)
                made[f"blocks.{position}.{role}.lora_b"] = b.to(dtype)
        for part, exit_map in (("attention", "attention_output"), ("mlp", "down")):
            if exit_map in maps:
                made[f"blocks.{position}.{part}.output_norm"] = torch.full((shape.hidden,), gain, dtype=dtype)
    return {name: tensor for name, tensor in made.items() if name not in request.attached}


def _with_gain(made: Mapping[str, Tensor], gain: float) -> dict[str, Tensor]:
    """Return the tensors with another gain of the output norms; adapters are the same ones."""
    import torch

    return {n: torch.full_like(t, gain) if n.endswith(".output_norm") else t for n, t in made.items()}


@hookimpl
def replacement_strategies() -> list[ReplacementStrategy]:
    """Return the extension."""
    return [Extend()]
