"""What the checks of the kit run on: tiny models, their statistics, and changes whose effect is known beforehand."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from flexi_plugins.checkpoint import Checkpoint
from flexi_plugins.data import BlockRecipe, ModelShape, Part, PruningPlan, Scores
from flexi_plugins.errors import FlexiError, OutOfReach
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.hookspecs import Budget, ImportanceMetric, PruningRequest, ReplacementStrategy
from flexi_plugins.metrics.none import NoMetric
from flexi_plugins.plugins import Plugins
from flexi_plugins.pruner import Pruner
from flexi_plugins.rewrite import PlanWeights, unit_rows
from flexi_plugins.testing.models import KINDS, tiny_checkpoint, tiny_tokenizer, tiny_tokens

SCORES = ("block", "attention", "mlp")
WINDOWS, SAMPLES = (8, 24), (4, 16)  # rows, tokens


def expect(holds: object, message: str) -> None:
    """Raise an AssertionError with this message unless it holds (``assert`` would vanish under ``python -O``)."""
    if not holds:
        raise AssertionError(message)


class TinyPruner(Pruner):
    """A pruner that is calibrated on random token ids, and reads a token as a byte: it needs no files."""

    def __init__(self, checkpoint: Checkpoint, plugins: Plugins, dtype: str = "float32") -> None:
        super().__init__(checkpoint, plugins=plugins, dtype=dtype)
        self._made: dict[tuple[str, str, float], Planned] = {}

    @cached_property
    def tokenizer(self) -> Any:
        """A token a byte: for what compares written text."""
        return tiny_tokenizer()

    @cached_property
    def texts(self) -> tuple[Tensor, Tensor, str]:
        """Windows, gradient samples, and what they are."""
        return tiny_tokens(*WINDOWS, seed=1), tiny_tokens(*SAMPLES, seed=2), "random ids"

    def request(self, needs: frozenset[str], plan: PruningPlan | None = None, ratio: float = 0.5) -> PruningRequest:
        """Return what a metric is handed for the model of a plan; scores are left out."""
        plan = plan or PruningPlan.identity(self.checkpoint.shape)
        return PruningRequest(
            shape=plan.new_shape,
            plan=plan,
            budget=Budget(plan.shape.parameters, ratio),
            statistics=self.calibrator.statistics(Planned(plan), needs),
            weights=PlanWeights(plan, self.checkpoint, {}),
            quality=partial(self._quality, Planned(plan)),
        )

    def bounded_plan(self, metric: ImportanceMetric, strategy: ReplacementStrategy, ratio: float) -> PruningPlan:
        """Return the plan of a metric and a strategy, made once; raise if it takes more steps than the model has units."""
        return self.bounded(metric, strategy, ratio).plan

    def bounded(self, metric: ImportanceMetric, strategy: ReplacementStrategy, ratio: float) -> Planned:
        """Return the plan with its new tensors. A strategy that chooses without scores gets none."""
        key = repr(metric), repr(strategy), ratio
        steps, most = [], sum(1 + b.kv_heads + b.channels for b in self.checkpoint.shape.blocks)

        def count(text: str) -> None:
            steps.append(text)
            expect(len(steps) <= most, f"it is not finished after {most} steps; the last was {steps[-1]!r}")

        if key not in self._made:
            self._made[key] = self.make(metric if strategy.wants else NoMetric(), strategy, ratio, count)
        return self._made[key]


class Bench:
    """Tiny models with what was measured on them, shared by the checks of one object."""

    def __init__(self, plugins: Plugins) -> None:
        self.plugins = plugins
        self._pruners: dict[str, TinyPruner] = {}

    def pruner(self, kind: str = "llama-gqa-tied") -> TinyPruner:
        """Return the pruner of a tiny model; what it has measured is kept."""
        if kind not in self._pruners:
            self._pruners[kind] = self.fresh(kind)
        return self._pruners[kind]

    def pruners(self) -> list[TinyPruner]:
        """Return the pruners of all kinds of tiny models."""
        return [self.pruner(kind) for kind in KINDS]

    def fresh(self, kind: str = "llama-gqa-tied", seed: int = 0) -> TinyPruner:
        """Return a pruner that has measured nothing yet."""
        return TinyPruner(tiny_checkpoint(kind, seed), self.plugins)

    def changed(self, pruner: TinyPruner, tensors: Mapping[str, Tensor]) -> TinyPruner:
        """Return a pruner of the same model with some of its tensors replaced."""
        return TinyPruner(with_tensors(pruner.checkpoint, tensors), self.plugins)

    def in_bfloat16(self, kind: str = "llama-gqa-tied") -> TinyPruner:
        """Return the pruner of a model that is stored and run in bfloat16."""
        checkpoint = tiny_checkpoint(kind)
        half = {n: checkpoint.read(n).bfloat16() for n in checkpoint.tensor_names()}
        return TinyPruner(with_tensors(checkpoint, half), self.plugins, "bfloat16")


# ------------------------------------------------------------------------------------- changed models


def with_tensors(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """Return a checkpoint in memory with some of its tensors replaced."""

    def read(name: str) -> Tensor:
        return tensors[name] if name in tensors else checkpoint.read(name)

    return Checkpoint(checkpoint.name, checkpoint.config, checkpoint.family, read, None)


def permuted(checkpoint: Checkpoint, block: int, heads: Sequence[int], channels: Sequence[int]) -> dict[str, Tensor]:
    """Return the tensors of a block with its KV heads (and their query heads) and channels in another order.

    The model computes the same: only the names of the units change.
    """
    plan, family = PruningPlan.identity(checkpoint.shape), checkpoint.family
    prefix = family.block_prefix(block)
    changed = {}
    for role in checkpoint.shape.maps(checkpoint.shape.blocks[block]):
        order = channels if role in ("gate", "up", "down") else heads
        rows = unit_rows(plan, block, role, tuple(order))
        assert rows is not None
        name = f"{prefix}{family.ROLES[role]}"
        outgoing = role in ("attention_output", "down")
        changed[f"{name}.weight"] = checkpoint.read(f"{name}.weight").index_select(1 if outgoing else 0, rows)
        if checkpoint.shape.has_bias(role) and not outgoing:
            changed[f"{name}.bias"] = checkpoint.read(f"{name}.bias")[rows]
    return changed


def silenced(checkpoint: Checkpoint, block: int, head: int | None, channel: int | None) -> dict[str, Tensor]:
    """Return the outgoing maps of a block with the columns of one KV head and one channel (None: of all) at zero."""
    plan, family = PruningPlan.identity(checkpoint.shape), checkpoint.family
    changed = {}
    for role, unit in (("attention_output", head), ("down", channel)):
        name = f"{family.block_prefix(block)}{family.ROLES[role]}.weight"
        weight = checkpoint.read(name).clone()
        columns = unit_rows(plan, block, role, None if unit is None else (unit,))
        weight[:, slice(None) if columns is None else columns] = 0
        changed[name] = weight
    return changed


def uneven_plan(shape: ModelShape) -> PruningPlan:
    """Return a plan with what a later step of a progressive strategy may meet.

    A narrowed block, one without attention, one without MLP, one that shares weights, and one merged from two.
    """
    block = shape.blocks[0]
    some, rest = tuple(range(0, block.kv_heads, 2)), tuple(range(1, block.kv_heads, 2))
    half = block.channels // 2
    first, second = tuple(range(half)), tuple(range(half, block.channels))
    recipes = (
        BlockRecipe(parts=(Part(0, some, first),)),
        BlockRecipe(parts=(Part(1, (), None),)),
        BlockRecipe(parts=(Part(2, None, ()),)),
        BlockRecipe(parts=(Part(3),)),
        BlockRecipe(parts=(Part(4, some, first), Part(5, rest, second)), norms=((4, 0.5), (5, 0.5))),
        BlockRecipe(parts=(Part(5),), shares=3),
    )
    return PruningPlan(shape, recipes)


# --------------------------------------------------------------------------------------- known scores


@dataclass(frozen=True)
class KnownScores:
    """A metric whose scores are made up: every unit of the original model has one, and keeps it wherever it goes.

    In every block the unit ``BEST`` scores a hundred times what others do, and so does the block ``BEST``.
    """

    comparable: bool = True
    seed: int = 0

    name: ClassVar[str] = "known-scores"
    paper: ClassVar[str] = ""
    gives: ClassVar[frozenset[str]] = frozenset(SCORES)
    needs: ClassVar[frozenset[str]] = frozenset()

    def score(self, request: PruningRequest) -> Scores:
        """Return the scores of the original units that the current model is made of."""
        block, attention, mlp = self.original(request.plan.shape)
        recipes = request.plan.blocks
        return Scores(
            block=torch.stack([torch.stack([block[s] for s in r.sources]).mean() for r in recipes]),
            attention=tuple(_gathered(r, attention, "kv_heads") for r in recipes),
            mlp=tuple(_gathered(r, mlp, "channels") for r in recipes),
            comparable=self.comparable,
        )

    def original(self, shape: ModelShape) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the scores of the original model's blocks, KV heads and channels."""
        generator = torch.Generator().manual_seed(self.seed)

        def drawn(count: int) -> Tensor:
            scores = 0.5 + torch.rand(count, generator=generator)
            scores[BEST] *= 100
            return scores

        blocks = drawn(len(shape.blocks))
        return blocks, [drawn(b.kv_heads) for b in shape.blocks], [drawn(b.channels) for b in shape.blocks]


BEST = 1


def _gathered(recipe: BlockRecipe, scores: Sequence[Tensor], kind: str) -> Tensor:
    if recipe.mix:
        return torch.stack([scores[s] for s in recipe.sources]).mean(0)
    units = [(p.source, getattr(p, kind)) for p in recipe.parts]
    return torch.cat([scores[s] if u is None else scores[s][list(u)] for s, u in units])


# -------------------------------------------------------------------------------------------- compare


def snapshot(request: PruningRequest, pruner: TinyPruner) -> Callable[[], list[str]]:
    """Note what a request holds; the returned function names what has changed since."""
    tensors = {f"weight {n}": pruner.checkpoint.read(n) for n in pruner.checkpoint.tensor_names()}
    for name, quantities in request.statistics.values.items():
        tensors |= {f"statistic {name}/{q} of block {i}": t for q, ts in quantities.items() for i, t in enumerate(ts)}
    if request.scores is not None:
        tensors |= named_scores(request.scores)
    copies = {n: t.clone() for n, t in tensors.items()}
    return lambda: [n for n, t in tensors.items() if not torch.equal(t, copies[n])]


def named_scores(scores: Scores) -> dict[str, Tensor]:
    """Return scores as tensors by readable name."""
    found = {} if scores.block is None else {"block scores": scores.block}
    for kind in ("attention", "mlp"):
        values = getattr(scores, kind)
        found |= {f"{kind} scores of block {i}": v for i, v in enumerate(values or ())}
    return found


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference relative to the largest value; infinite for other shapes or one-sided NaN."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel() or torch.equal(a, b):
        return 0.0
    worst = float((a - b).abs().max() / torch.maximum(a.abs().max(), b.abs().max()))
    return worst if worst == worst else float("inf")


def alternatives(value: Any) -> dict[str, list[Any]]:
    """Return, by option, the object once for every other choice of each of its Literal and bool options."""
    hints = typing.get_type_hints(type(value))
    found = {}
    for field in dataclasses.fields(value):
        hint = hints[field.name]
        choices: tuple[Any, ...] = (True, False) if hint is bool else ()
        if typing.get_origin(hint) is typing.Literal:
            choices = typing.get_args(hint)
        now = getattr(value, field.name)
        others = [replace(value, **{field.name: c}) for c in choices if field.init and c != now]
        if others:
            found[field.name] = others
    return found


def working_choices(value: Any, run: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
    """Yield (object, what ``run`` makes of it) for every other choice of an option that no FlexiError refuses.

    Raise an AssertionError if all other choices of an option are refused: then nothing shows that it does anything. A
    ratio within reach is not refused for a good reason.
    """
    for option, others in alternatives(value).items():
        refusals = []
        for other in others:
            try:
                made = run(other)
            except OutOfReach:
                raise
            except FlexiError as error:
                refusals.append(f"{getattr(other, option)!r}: {error}")
            else:
                yield other, made
        expect(
            len(refusals) < len(others),
            f"option {option!r}: expected a choice besides {getattr(value, option)!r} that works, found all refused; "
            f"{'; '.join(refusals)}",
        )
