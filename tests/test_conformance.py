"""The conformance kit: every built-in plugin passes it, and deliberately broken ones do not."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from flexi_plugins import hookimpl
from flexi_plugins.budget import lowest
from flexi_plugins.data import BlockRecipe, Measurement, ModelShape, Part, PruningPlan, Scores
from flexi_plugins.errors import FlexiError, OutOfReach
from flexi_plugins.evaluators.perplexity import Perplexity
from flexi_plugins.hookspecs import (
    BlockTrace,
    Budget,
    EvaluationRequest,
    Outcome,
    PruningRequest,
    Recovered,
    RecoveryRequest,
    TensorRequest,
)
from flexi_plugins.metrics.come import CoMe, Sensitivity
from flexi_plugins.metrics.flexigpt import BlockInfluence
from flexi_plugins.plugins import BUILT_IN, KINDS, Plugins
from flexi_plugins.progress import Advance, Progress
from flexi_plugins.recovery.none import NoRecovery
from flexi_plugins.reports import figures
from flexi_plugins.reports.curves import Curves
from flexi_plugins.reports.table import Csv, Markdown
from flexi_plugins.strategies.remove_blocks import RemoveBlocks
from flexi_plugins.strategies.share_lora import ShareLora
from flexi_plugins.testing import recovery_checks, strategy_checks
from flexi_plugins.testing.bench import Bench, expect, permuted, silenced, uneven_plan
from flexi_plugins.testing.conformance import check_all, checks_for, checks_of, problem_of
from flexi_plugins.testing.models import KINDS as TINY
from flexi_plugins.testing.models import tiny_checkpoint, tiny_config, tiny_model, tiny_tokenizer, tiny_tokens


@pytest.mark.flexi(*BUILT_IN)
def test_built_in_plugins_conform(flexi_check):
    flexi_check()


# ------------------------------------------------------------------------------------------ broken metrics


@dataclass(frozen=True)
class Tiled(CoMe):
    """Gives query head h to KV head h % kv_heads, as released code does that tiles the KV mask."""

    def score(self, request: PruningRequest) -> Scores:
        found = request.statistics["sensitivity"]["attention"]
        shapes = request.shape.blocks
        heads = [c.view(b.group, b.kv_heads, b.head_dim).sum((0, 2)) for c, b in zip(found, shapes, strict=True)]
        return replace(super().score(request), attention=tuple(heads))


@dataclass(frozen=True)
class NotANumber(CoMe):
    def score(self, request: PruningRequest) -> Scores:
        scores = super().score(request)
        assert scores.block is not None
        return replace(scores, block=scores.block / torch.zeros(1) * 0)


@dataclass(frozen=True)
class ByQueryHead(CoMe):
    """Scores query heads where KV heads are asked for."""

    def score(self, request: PruningRequest) -> Scores:
        found = request.statistics["sensitivity"]["attention"]
        heads = [c.view(max(1, b.query_heads), -1).sum(1) for c, b in zip(found, request.shape.blocks, strict=True)]
        return replace(super().score(request), attention=tuple(heads))


@dataclass(frozen=True)
class Centred(CoMe):
    """Says that its scores are comparable, and lets them be negative."""

    def score(self, request: PruningRequest) -> Scores:
        scores = super().score(request)
        assert scores.mlp is not None
        return replace(scores, mlp=tuple(m - m.mean() if m.numel() else m for m in scores.mlp))


@dataclass(frozen=True)
class Inverted(CoMe):
    """Higher means prune."""

    def score(self, request: PruningRequest) -> Scores:
        s = super().score(request)
        assert s.block is not None
        assert s.attention is not None
        assert s.mlp is not None
        return Scores(-s.block, tuple(-a for a in s.attention), tuple(-m for m in s.mlp))


@dataclass(frozen=True)
class Shaken(CoMe):
    """Adds noise from the global random state."""

    def score(self, request: PruningRequest) -> Scores:
        scores = super().score(request)
        assert scores.block is not None
        return replace(scores, block=scores.block * (1 + 1e-6 * torch.rand(len(scores.block))))


@dataclass(frozen=True)
class InPlace(CoMe):
    """Scales the statistics that it was handed."""

    def score(self, request: PruningRequest) -> Scores:
        for sums in request.statistics["sensitivity"]["mlp"]:
            sums.mul_(1.5)
        return super().score(request)


@dataclass(frozen=True)
class NoAttention(CoMe):
    """Declares attention scores and gives none."""

    def score(self, request: PruningRequest) -> Scores:
        return replace(super().score(request), attention=None)


@dataclass(frozen=True)
class WholeBlocksOnly(CoMe):
    """Takes it for granted that every block has attention."""

    def score(self, request: PruningRequest) -> Scores:
        found = request.statistics["sensitivity"]["attention"]
        heads = [c.view(b.kv_heads, -1).sum(1) for c, b in zip(found, request.shape.blocks, strict=True)]
        return replace(super().score(request), attention=tuple(heads))


@dataclass(frozen=True)
class HalfPrecision(CoMe):
    """Returns scores in the dtype of the weights."""

    def score(self, request: PruningRequest) -> Scores:
        scores = super().score(request)
        assert request.weights is not None
        assert scores.block is not None
        return replace(scores, block=scores.block.to(request.weights.block(0)["up"].dtype))


@dataclass(frozen=True)
class Undeclared(CoMe):
    """Reads a statistic that nobody offers."""

    needs: ClassVar[frozenset[str]] = frozenset({"sensitivity", "hessian"})


@dataclass
class NotFrozen:
    """An ordinary class with a mutable option."""

    weights: list[float] = field(default_factory=list)
    name: ClassVar[str] = "not frozen"
    paper: ClassVar[str] = ""
    gives = CoMe.gives
    needs = CoMe.needs

    def score(self, request: PruningRequest) -> Scores:
        return CoMe().score(request)


@dataclass(frozen=True)
class Unrecordable(CoMe):
    """Has an option that JSON cannot hold."""

    scale: complex = 1j


@dataclass(frozen=True)
class Unwilling(CoMe):
    """Has an option of which only the default works."""

    scale: Literal["as it is", "relative", "ranked"] = "as it is"

    def score(self, request: PruningRequest) -> Scores:
        if self.scale != "as it is":
            raise FlexiError(f"come: scale = {self.scale!r} needs more than this")
        return super().score(request)


# --------------------------------------------------------------------------------------- broken strategies


def kept(request: PruningRequest, gone: Iterable[int]) -> PruningPlan:
    lost = set(gone)
    return PruningPlan.keep(request.shape, (i for i in range(len(request.shape.blocks)) if i not in lost))


@dataclass(frozen=True)
class Generous(RemoveBlocks):
    """Removes a block too few."""

    def plan(self, request: PruningRequest) -> PruningPlan:
        plan = super().plan(request)
        gone = len(request.shape.blocks) - len(plan.blocks)
        assert request.scores is not None
        assert request.scores.block is not None
        return kept(request, lowest(request.scores.block, gone - 1, range(len(request.shape.blocks))))


@dataclass(frozen=True)
class Greedy(RemoveBlocks):
    """Removes everything that it may."""

    def plan(self, request: PruningRequest) -> PruningPlan:
        super().plan(request)
        assert request.scores is not None
        assert request.scores.block is not None
        return kept(request, lowest(request.scores.block, self._most(request.shape), range(len(request.shape.blocks))))


@dataclass(frozen=True)
class Backwards(RemoveBlocks):
    """Removes what scores highest."""

    def plan(self, request: PruningRequest) -> PruningPlan:
        assert request.scores is not None
        assert request.scores.block is not None
        scores = replace(request.scores, block=-request.scores.block)
        return super().plan(replace(request, scores=scores))


@dataclass(frozen=True)
class Sorting(RemoveBlocks):
    """Sorts the scores that it was handed in place."""

    def plan(self, request: PruningRequest) -> PruningPlan:
        plan = super().plan(request)
        assert request.scores is not None
        assert request.scores.block is not None
        request.scores.block.copy_(request.scores.block.sort().values)
        return plan


@dataclass(frozen=True)
class Boastful(RemoveBlocks):
    """Claims to reach more than it does."""

    def reach(self, shape: ModelShape) -> float:
        return super().reach(shape) + 0.1


@dataclass(frozen=True)
class Clamped(RemoveBlocks):
    """Takes the nearest ratio that it can meet, silently."""

    def plan(self, request: PruningRequest) -> PruningPlan:
        ratio = min(max(request.budget.ratio, 0.05), self.reach(request.plan.shape) - 1e-4)
        return super().plan(replace(request, budget=Budget(request.budget.parameters, ratio)))


@dataclass(frozen=True)
class Vague(RemoveBlocks):
    """Refuses a ratio without saying which ones it meets."""

    def plan(self, request: PruningRequest) -> PruningPlan:
        from flexi_plugins.errors import OutOfReach

        try:
            return super().plan(request)
        except OutOfReach:
            raise OutOfReach("this ratio is too high") from None


@dataclass(frozen=True)
class Endless(RemoveBlocks):
    """Is never finished, and does nothing."""

    progressive: bool = True

    def plan(self, request: PruningRequest) -> PruningPlan:
        return PruningPlan.identity(request.shape)

    def finished(self, plan: PruningPlan, budget: Budget) -> bool:
        return False


@dataclass(frozen=True)
class Whimsical(RemoveBlocks):
    """Draws the blocks from the global random state."""

    def plan(self, request: PruningRequest) -> PruningPlan:
        gone = len(request.shape.blocks) - len(super().plan(request).blocks)
        others = [i for i in range(len(request.shape.blocks)) if i != 1]
        return kept(request, [others[int(i)] for i in torch.randperm(len(others))[:gone]])


@dataclass(frozen=True)
class Peeking(RemoveBlocks):
    """Needs weights to count."""

    def plan(self, request: PruningRequest) -> PruningPlan:
        weights: Any = request.weights
        weights.block(0)
        return super().plan(request)


@dataclass(frozen=True)
class Unserialisable(RemoveBlocks):
    """Notes something in its plans that JSON cannot hold."""

    def plan(self, request: PruningRequest) -> PruningPlan:
        return replace(super().plan(request), origin={"scores": request.scores})


@dataclass(frozen=True)
class AtOnceOnly(RemoveBlocks):
    """Refuses the one other choice of its option."""

    def plan(self, request: PruningRequest) -> PruningPlan:
        if self.progressive:
            raise FlexiError("remove-blocks: progressive = true is not there yet")
        return super().plan(request)


@dataclass(frozen=True)
class Miscounted(RemoveBlocks):
    """One choice of its option refuses what it says is within reach; the other works."""

    counted: Literal["blocks", "parameters", "rows"] = "blocks"

    def plan(self, request: PruningRequest) -> PruningPlan:
        if self.counted == "rows":
            raise OutOfReach("remove-blocks: this ratio is out of reach")
        return super().plan(request)


@dataclass(frozen=True)
class Forgetful(ShareLora):
    """Makes one half of its adapters."""

    def tensors(self, request: TensorRequest) -> dict[str, Tensor]:
        return {n: t for n, t in super().tensors(request).items() if not n.endswith("lora_b")}


@dataclass(frozen=True)
class Transposed(ShareLora):
    """Makes one half of its adapters the wrong way round."""

    def tensors(self, request: TensorRequest) -> dict[str, Tensor]:
        made = super().tensors(request)
        return {n: t.T.contiguous() if n.endswith("lora_b") else t for n, t in made.items()}


# -------------------------------------------------------------------------------------- broken statistics


@dataclass(frozen=True)
class MeanOfMeans(BlockInfluence):
    """Adds up means over batches."""

    def observe(self, trace: BlockTrace) -> dict[str, Tensor]:
        return {name: total / len(trace.input) for name, total in super().observe(trace).items()}

    def finish(self, totals: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        return dict(totals)


@dataclass(frozen=True)
class Coarse(BlockInfluence):
    """Adds up in the dtype of the model."""

    def observe(self, trace: BlockTrace) -> dict[str, Tensor]:
        return {name: total.to(trace.input.dtype) for name, total in super().observe(trace).items()}


@dataclass(frozen=True)
class Careless(Sensitivity):
    """Takes absolute values in place."""

    def observe(self, trace: BlockTrace) -> dict[str, Tensor]:
        trace.output.abs_()
        return super().observe(trace)


@dataclass(frozen=True)
class Undefined(BlockInfluence):
    """Divides by what is zero in the first block."""

    def finish(self, totals: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        return {name: total / 0 for name, total in totals.items()}


# ------------------------------------------------------------------------------------- the other kinds, broken


@dataclass(frozen=True)
class TrainsInPlace(NoRecovery):
    """Updates weights that the pruned model shares with the original."""

    def recover(self, request: RecoveryRequest) -> Recovered:
        for parameter in request.model.parameters():
            parameter.data.mul_(1.01)
        return Recovered(request.model)


@dataclass(frozen=True)
class TrainsAtRandom(NoRecovery):
    """Draws from the global random state."""

    def recover(self, request: RecoveryRequest) -> Recovered:
        norm: Any = request.model.get_submodule("model.norm")
        norm.weight = torch.nn.Parameter(norm.weight + 0.1 * torch.randn_like(norm.weight), requires_grad=False)
        return Recovered(request.model)


@dataclass(frozen=True)
class ForgetsOne(Perplexity):
    """Skips a candidate that broke down."""

    def evaluate(self, request: EvaluationRequest) -> list[Outcome]:
        return [o for o in super().evaluate(request) if not o.failure]


@dataclass(frozen=True)
class GivesUp(Perplexity):
    """Ends the whole study for one candidate."""

    def evaluate(self, request: EvaluationRequest) -> list[Outcome]:
        found = list(super().evaluate(request))
        if any(o.failure for o in found):
            raise FlexiError("one of the models broke down")
        return found


@dataclass(frozen=True)
class ReportsNan(Perplexity):
    """Calls NaN a result."""

    def evaluate(self, request: EvaluationRequest) -> list[Outcome]:
        found = super().evaluate(request)
        return [Outcome((Measurement("ppl", float("nan"), False),)) if o.failure else o for o in found]


@dataclass(frozen=True)
class SameText:
    """Has one text for both splits."""

    name: ClassVar[str] = "same-text"
    licence: ClassVar[str] = "CC0"
    provenance: ClassVar[str] = "made up"
    join: ClassVar[str] = "\n"

    def texts(self, split: str, data: Path | None) -> Iterator[str]:
        yield "one and the same document, long enough to be noticed"


@dataclass(frozen=True)
class FinishedOnly(Csv):
    """Fails where no cell is finished."""

    def render(self, rows: Any, title: str) -> str:
        best = rows[rows["status"] == "complete"]["text_ppl@128"].min()
        return f"{super().render(rows, title)}{best}\n"


@dataclass(frozen=True)
class Dropping(Markdown):
    """Takes a column out of the table that it was handed."""

    def render(self, rows: Any, title: str) -> str:
        del rows["label"]
        return super().render(rows, title)


SCORING = {  # all that look at scores: none of them gets far with a metric whose scores fail their own check
    "scores-fit-every-model",
    "scores-fit-a-changed-model",
    "scores-are-finite-in-bfloat16",
    "scores-are-repeatable",
    "permuted-units-permute-scores",
    "dead-units-score-low",
    "dead-blocks-score-low",
}
PLANNING = {
    "meets-the-budget",
    "wastes-nothing",
    "is-finished-when-it-says-so",
    "reach-is-truthful",
    "plan-is-a-value",
    "plans-are-repeatable",
    "makes-its-tensors",
    "model-is-what-the-plan-says",
    "counts-without-weights",
    "keeps-what-scores-highest",
}
BROKEN: list[tuple[str, Any, set[str], str]] = [  # kind, object, the checks that fail, what the first of them says
    (
        "metric",
        Tiled(),
        {"permuted-units-permute-scores", "dead-units-score-low"},
        "attention scores of block 2 differ",
    ),
    ("metric", NotANumber(), SCORING, "not finite"),
    ("metric", ByQueryHead(), SCORING, r"expected shape \(3,\), found \(9,\)"),
    ("metric", Centred(), SCORING, "must not be negative"),
    ("metric", Inverted(), {"dead-units-score-low", "dead-blocks-score-low"}, "higher means keep"),
    ("metric", Shaken(), {"scores-are-repeatable"}, "two runs with the same seed differ in block scores"),
    (
        "metric",
        InPlace(),
        {"score-changes-nothing", "permuted-units-permute-scores"},
        "another statistic sensitivity/mlp",
    ),
    ("metric", NoAttention(), {"gives-what-it-declares"}, r"score returned \['block', 'mlp'\]"),
    ("metric", WholeBlocksOnly(), {"scores-fit-a-changed-model"}, "failed with RuntimeError: cannot reshape"),
    ("metric", HalfPrecision(), {"scores-are-finite-in-bfloat16"}, "expected float32 on the CPU, found torch.bfloat16"),
    (
        "metric",
        Undeclared(),
        {"needs-known-statistics", "gives-what-it-declares", "score-changes-nothing", *SCORING},
        r"found \['hessian'\]; there is block-influence",
    ),
    (
        "metric",
        NotFrozen(),
        {"is-what-its-contract-says", "has-a-name", "options-survive-a-record"},
        "instance of a frozen dataclass",
    ),
    (
        "metric",
        Unwilling(),
        {"every-choice-works"},
        "option 'scale': expected a choice besides 'as it is' that works, found all refused; 'relative': .*'ranked': ",
    ),
    ("metric", Unrecordable(), {"options-survive-a-record"}, "complex is not JSON serializable"),
    (
        "strategy",
        Generous(),  # which no pruner takes a plan of
        {c.__name__.replace("_", "-") for c in strategy_checks.CHECKS} - {"wants-and-needs-what-there-is"},
        "expected at most .* stored parameters",
    ),
    ("strategy", Greedy(), {"wastes-nothing", "counts-without-weights"}, "expected to be within one block"),
    ("strategy", Backwards(), {"keeps-what-scores-highest"}, "block 1 scores highest and is not kept whole"),
    ("strategy", Sorting(), {"plan-changes-nothing"}, "another block scores"),
    ("strategy", Boastful(), {"meets-the-budget", "wastes-nothing", "reach-is-truthful"}, "is out of reach"),
    ("strategy", Clamped(), {"reach-is-truthful"}, "expected OutOfReach"),
    ("strategy", Vague(), {"reach-is-truthful"}, "expected the error to name the reachable ratio"),
    (
        "strategy",
        Endless(),
        {*PLANNING, "plan-changes-nothing", "every-choice-works"},
        "changed nothing, and it says it is not finished",
    ),
    ("strategy", Whimsical(), {"plans-are-repeatable"}, "two runs with the same seed give different plans"),
    ("strategy", Peeking(), {"counts-without-weights"}, "failed with AttributeError: 'NoneType'"),
    ("strategy", Unserialisable(), {"plan-is-a-value"}, "Scores is not JSON serializable"),
    (
        "strategy",
        AtOnceOnly(),
        {"every-choice-works"},
        "option 'progressive': expected a choice besides False that works",
    ),
    ("strategy", Miscounted(), {"every-choice-works"}, "out of reach"),
    ("strategy", Forgetful(), {"makes-its-tensors", "model-is-what-the-plan-says"}, "tensors of the plan are missing"),
    ("strategy", Transposed(), {"makes-its-tensors", "model-is-what-the-plan-says"}, r"expected shape \(4, 72\)"),
    ("statistic", MeanOfMeans(), {"does-not-depend-on-batching"}, "finish divides by tokens"),
    ("statistic", Coarse(), {"sums-in-float32"}, "found 'influence' in torch.bfloat16"),
    ("statistic", Careless(), {"changes-nothing-it-observes"}, "found another output at block 0"),
    (
        "statistic",
        Undefined(),
        {
            "has-finite-quantities-on-every-model",
            "has-finite-quantities-on-a-changed-model",
            "sums-in-float32",
        },
        "'influence' of block 0 is not finite",
    ),
    (
        "recovery",
        TrainsInPlace(),
        {"leaves-the-original-alone"},
        "found another weight model.embed_tokens",
    ),
    ("recovery", TrainsAtRandom(), {"is-repeatable"}, "two runs with the same seed differ"),
    ("evaluator", ForgetsOne(), {"judges-every-candidate"}, "expected 3 outcomes, found 2"),
    ("evaluator", GivesUp(), {"judges-every-candidate"}, "found a FlexiError, which ends a study: one of the models"),
    ("evaluator", ReportsNan(), {"judges-every-candidate"}, "expected a failure, found none"),
    ("corpus", SameText(), {"splits-do-not-overlap"}, "in both splits, such as 'one and the same"),
    ("report", FinishedOnly(), {"renders-every-study"}, "KeyError"),
    ("report", Dropping(), {"renders-every-study", "changes-no-rows"}, "KeyError"),
]


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load()


def failing(kind: str, plugin: Any, plugins: Plugins) -> dict[str, str]:
    """Run all checks of an object; return the failing ones with what they say."""
    names, found = list(checks_of(kind)), {}
    for name, (_, run) in zip(names, checks_for(kind, plugin, plugins), strict=True):
        problem = problem_of(run)
        if problem:
            found[name] = problem
    return found


@pytest.mark.parametrize(("kind", "plugin", "checks", "said"), BROKEN, ids=[type(b[1]).__name__ for b in BROKEN])
def test_a_broken_plugin_is_caught(kind: str, plugin: Any, checks: set[str], said: str, plugins: Plugins) -> None:
    found = failing(kind, plugin, plugins)
    assert set(found) == checks, found
    assert re.search(said, next(iter(found.values())))


# ----------------------------------------------------------------------------------------------- the kit itself


def test_all_kinds_have_checks_and_every_check_says_what_it_is_for() -> None:
    for kind in KINDS:
        checks = checks_of(kind)
        assert len(checks) >= 4
        assert all(check.__doc__ for check in checks.values())


@dataclass(frozen=True)
class Control(CoMe):
    """Scores at random from the seed, as a control; it need not know which units are dead."""

    name: ClassVar[str] = "control"
    excused: ClassVar[dict[str, str]] = {
        "permuted-units-permute-scores": "a control",
        "dead-units-score-low": "a control",
        "dead-blocks-score-low": "a control",
    }

    def score(self, request: PruningRequest) -> Scores:
        generator = torch.Generator().manual_seed(request.seed)
        blocks = request.shape.blocks
        return Scores(
            torch.rand(len(blocks), generator=generator),
            tuple(torch.rand(b.kv_heads, generator=generator) for b in blocks),
            tuple(torch.rand(b.channels, generator=generator) for b in blocks),
        )


def test_an_excused_check_is_left_out_and_an_unknown_excuse_is_a_problem(plugins: Plugins) -> None:
    names = [name for name, _ in checks_for("metric", Control(), plugins)]
    assert not [n for n in names if "permuted" in n or "dead" in n]
    assert [p for p in (problem_of(run) for _, run in checks_for("metric", Control(), plugins)) if p] == []

    @dataclass(frozen=True)
    class Typo(Control):
        excused: ClassVar[dict[str, str]] = {"dead-unit-scores-low": "a control"}

    problems = [problem_of(run) for name, run in checks_for("metric", Typo(), plugins) if "excuses" in name]
    assert "'dead-unit-scores-low'; there is" in str(problems[0])


class Steps(Progress):
    """Progress that notes what it is told."""

    def __init__(self, told: list[str]) -> None:
        super().__init__(quiet=True)
        self.told = told

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        self.told.append(title)
        yield lambda n=1, note="": self.told.append(note)


def test_check_all_returns_one_line_a_problem_and_goes_on() -> None:
    small = Plugins.load(("flexi_plugins.families.llama", "flexi_plugins.metrics.come"))
    assert check_all(small) == []

    @dataclass(frozen=True)
    class Named(NoAttention):
        name: ClassVar[str] = "named"

    module = types.ModuleType("broken")
    vars(module)["importance_metrics"] = hookimpl(specname="importance_metrics")(lambda: [Named()])
    small.add(module)
    steps: list[str] = []
    [problem] = check_all(small, Steps(steps))
    assert steps[:3] == ["checking 4 plugins on tiny models", "metric come", "metric named"]
    assert len(steps) == 5, "CoMe's file has two statistics as well"
    assert problem.startswith("metric 'named' (broken unknown): gives-what-it-declares: gives says")
    assert "\n" not in problem


def test_check_all_names_both_sides_of_a_name_that_is_taken() -> None:
    small = Plugins.load(("flexi_plugins.families.llama", "flexi_plugins.metrics.come"))
    module = types.ModuleType("copy")
    vars(module)["importance_metrics"] = hookimpl(specname="importance_metrics")(lambda: [CoMe()])
    small.manager.register(module, "copy")
    assert [p for p in check_all(small) if "two metric plugins are called 'come'" in p and "from copy" in p]


# ------------------------------------------------------------------------------------------------- tiny models


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tiny_tokens(2, 20)).logits


@pytest.mark.parametrize("kind", TINY)
def test_renaming_units_computes_the_same_and_every_block_matters(kind: str, plugins: Plugins) -> None:
    pruner = Bench(plugins).pruner(kind)
    identity = PruningPlan.identity(pruner.checkpoint.shape)
    dense = logits(pruner.model(identity))
    block = pruner.checkpoint.shape.blocks[2]
    orders = [*range(1, block.kv_heads), 0], [*range(1, block.channels), 0]
    renamed = Bench(plugins).changed(pruner, permuted(pruner.checkpoint, 2, *orders))
    assert torch.allclose(logits(renamed.model(identity)), dense, atol=1e-4)
    for index in range(len(identity.blocks)):
        gone = [i for i in range(len(identity.blocks)) if i != index]
        assert (logits(pruner.model(PruningPlan.keep(pruner.checkpoint.shape, gone))) - dense).abs().max() > 0.1


def test_a_silenced_unit_is_a_removed_unit(plugins: Plugins) -> None:
    pruner = Bench(plugins).pruner()
    shape = pruner.checkpoint.shape
    silent = Bench(plugins).changed(pruner, silenced(pruner.checkpoint, 2, 1, 5))
    part = Part(2, (0, 2), tuple(c for c in range(96) if c != 5))
    whole = PruningPlan.identity(shape).blocks
    without = PruningPlan(shape, (*whole[:2], BlockRecipe(parts=(part,)), *whole[3:]))
    found = logits(silent.model(PruningPlan.identity(shape)))
    assert torch.allclose(found, logits(pruner.model(without)), atol=1e-4)


def test_tiny_models_are_reproducible_and_leave_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    first, second = (tiny_model(tiny_config("qwen3"), seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny_checkpoint("llama", num_hidden_layers=2).shape.parameters < tiny_checkpoint("llama").shape.parameters
    with pytest.raises(FlexiError, match="unknown tiny model 'lama': did you mean 'llama'"):
        tiny_config("lama")


def test_the_tiny_tokenizer_has_a_token_a_byte() -> None:
    tokenizer, text = tiny_tokenizer(), "naïve ÿ\n\n  two"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert max(ids) < tokenizer.eos_token_id < len(tokenizer) == 256


def test_a_plan_of_all_that_earlier_steps_do_runs(plugins: Plugins) -> None:
    pruner = Bench(plugins).pruner()
    assert logits(pruner.model(uneven_plan(pruner.checkpoint.shape))).isfinite().all()


def test_expect_raises_under_optimisation_too() -> None:
    with pytest.raises(AssertionError, match="expected more"):
        expect([], "expected more")


# -------------------------------------------------------------------------------- recoveries and reports, broken


@dataclass(frozen=True)
class LeavesAdapters(NoRecovery):
    """Gives back a model with a parameter that it did not have."""

    def recover(self, request: RecoveryRequest) -> Recovered:
        request.model.adapter = torch.nn.Parameter(torch.zeros(3))  # type: ignore[assignment]
        return Recovered(request.model)


@dataclass(frozen=True)
class Overflowing(NoRecovery):
    """Trains until a weight is infinite."""

    def recover(self, request: RecoveryRequest) -> Recovered:
        norm: Any = request.model.get_submodule("model.norm")
        norm.weight = torch.nn.Parameter(torch.full_like(norm.weight, torch.inf), requires_grad=False)
        return Recovered(request.model)


@dataclass(frozen=True)
class SharedOnly(NoRecovery):
    """Relies on being asked about no plan that it refuses."""

    def refuses(self, plan: PruningPlan) -> str | None:
        return None if any(recipe.shares is not None for recipe in plan.blocks) else "no block shares weights"

    def recover(self, request: RecoveryRequest) -> Recovered:
        assert any(recipe.shares is not None for recipe in request.plan.blocks)
        return super().recover(request)


@dataclass(frozen=True)
class Hooked(NoRecovery):
    """Learns something that is in no weight."""

    def recover(self, request: RecoveryRequest) -> Recovered:
        norm: Any = request.model.get_submodule("model.norm")
        norm.register_forward_hook(lambda module, inputs, output: output * 1.1)
        return Recovered(request.model)


@dataclass(frozen=True)
class TrainsOn(NoRecovery):
    """Sees twice the text that it may see."""

    def recover(self, request: RecoveryRequest) -> Recovered:
        return Recovered(request.model, ({"tokens": 0.0}, {"tokens": 2.0 * request.tokens}))


@dataclass(frozen=True)
class CountsAnew(NoRecovery):
    """Begins to count tokens again in the middle of its curve."""

    def recover(self, request: RecoveryRequest) -> Recovered:
        return Recovered(request.model, ({"tokens": 24.0}, {"tokens": 48.0}, {"tokens": 24.0}))


@dataclass(frozen=True)
class Halfway(NoRecovery):
    """Returns the model alone."""

    def recover(self, request: RecoveryRequest) -> Any:
        return request.model


@dataclass(frozen=True)
class Blank(Curves):
    """Draws a figure without a line."""

    def render(self, rows: Any, title: str) -> str:
        from matplotlib.figure import Figure

        with figures.settings():
            return figures.svg(Figure())


@dataclass(frozen=True)
class Silent(Markdown):
    """Has nothing to show of anything."""

    def render(self, rows: Any, title: str) -> str:
        return ""


RECOVERY = {
    "returns-a-model-that-runs",
    "comes-back-as-a-plan",
    "curve-is-in-order",
    "leaves-the-original-alone",
    "is-repeatable",
}
BROKEN_RECOVERIES: list[tuple[Any, set[str], str]] = [  # object, the checks that fail, what the first of them says
    (LeavesAdapters(), {"returns-a-model-that-runs", "comes-back-as-a-plan"}, "merge adapters into the weights"),
    (
        Overflowing(),
        {"returns-a-model-that-runs", "comes-back-as-a-plan", "is-repeatable"},
        "the logits of the recovered model are not finite",
    ),
    (Hooked(), {"comes-back-as-a-plan"}, "the plan of the recovered model gives other logits, by 0"),
    (TrainsOn(), {"curve-is-in-order"}, "a budget of 192 tokens, found 384"),
    (CountsAnew(), {"curve-is-in-order"}, r"expected tokens in ascending order, found \[24.0, 48.0, 24.0\]"),
    (Halfway(), RECOVERY, "expected recover to return Recovered, found "),
]


@pytest.mark.parametrize(
    ("plugin", "checks", "said"), BROKEN_RECOVERIES, ids=[type(b[0]).__name__ for b in BROKEN_RECOVERIES]
)
def test_a_broken_recovery_is_caught(plugin: Any, checks: set[str], said: str, plugins: Plugins) -> None:
    found = failing("recovery", plugin, plugins)
    assert set(found) == checks, found
    assert re.search(said, next(iter(found.values())))


def test_a_recovery_is_asked_about_no_plan_that_it_refuses(plugins: Plugins) -> None:
    assert failing("recovery", SharedOnly(), plugins) == {}


def test_every_check_of_recoveries_can_fail() -> None:
    caught = {check for _, checks, _ in BROKEN_RECOVERIES if len(checks) < len(RECOVERY) for check in checks}
    caught |= {check for kind, _, checks, _ in BROKEN if kind == "recovery" for check in checks}
    assert caught == {check.__name__.replace("_", "-") for check in recovery_checks.CHECKS}


@pytest.mark.parametrize(
    ("plugin", "checks", "said"),
    [
        (Blank(), {"shows-every-method"}, "expected the text to name first, second, cut"),
        (Silent(), {"renders-every-study", "shows-every-method"}, "a whole study: expected text, found ''"),
    ],
    ids=["Blank", "Silent"],
)
def test_a_report_that_shows_nothing_is_caught(plugin: Any, checks: set[str], said: str, plugins: Plugins) -> None:
    found = failing("report", plugin, plugins)
    assert set(found) == checks, found
    assert re.search(said, next(iter(found.values())))
