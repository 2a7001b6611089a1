"""The contract: what a plugin contributes, and what it is handed. Read this first.

A plugin is a module (or object) with any of the hook functions below, each marked with ``flexi_plugins.hookimpl`` and
each returning a list of objects; an installed distribution names it under the entry-point group ``flexi_plugins``.
All these objects are frozen dataclasses; ``name`` and ``paper`` are class variables. The fields of metrics, strategies,
recovery methods and evaluators are their options, with defaults, and ``dataclasses.replace`` sets them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import pluggy

from flexi_plugins.data import Family, Measurement, ModelShape, PruningPlan, Scores, Statistics

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PROJECT = "flexi_plugins"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# --------------------------------------------------------------------------------------------- hooks


@hookspec
def importance_metrics() -> list[ImportanceMetric]:
    """Return metrics: what scores the blocks, KV heads and channels of a model."""


@hookspec
def replacement_strategies() -> list[ReplacementStrategy]:
    """Return strategies: what turns scores and a parameter budget into a plan."""


@hookspec
def recovery_methods() -> list[RecoveryMethod]:
    """Return recovery methods: what trains a pruned model."""


@hookspec
def evaluators() -> list[Evaluator]:
    """Return evaluators: what measures models."""


@hookspec
def statistics() -> list[Statistic]:
    """Return statistics: what calibration can measure for metrics and strategies that name it in ``needs``."""


@hookspec
def corpora() -> list[Corpus]:
    """Return corpora: where text comes from."""


@hookspec
def report_formats() -> list[ReportFormat]:
    """Return report formats: what turns finished records into a file."""


@hookspec(firstresult=True)
def model_family(config: Any) -> Family | None:
    """Return where the parts of this transformers configuration's models live, or None if it is not yours."""


# ------------------------------------------------------------------------------------ what hooks return


class ImportanceMetric(Protocol):
    """Scores the parts of a model. Higher means keep."""

    name: ClassVar[str]
    paper: ClassVar[str]

    @property
    def gives(self) -> frozenset[str]:
        """Kinds of scores it makes, of "block", "attention", "mlp"."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics it reads."""

    def score(self, request: PruningRequest) -> Scores:
        """Score the current model; see ``Scores`` for shapes and the meaning of comparable."""


class ReplacementStrategy(Protocol):
    """Turns scores into a plan. A progressive strategy plans one step at a time, with fresh statistics.

    A paper's own measure of how much goes may take the place of the ratio: an option, where it is not None, that a class
    variable ``knobs`` names (a tuple of names; a strategy without one always takes a ratio). One whose later steps merge
    again what earlier ones merged says so by ``remerges``, True (default: False).
    """

    name: ClassVar[str]
    paper: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics it reads itself."""

    @property
    def wants(self) -> frozenset[str]:
        """Kinds of scores it uses, of "block", "attention", "mlp"; none: it chooses by itself, and goes with metric none."""

    @property
    def progressive(self) -> bool:
        """Whether ``plan`` is called again, on the model of the plan so far, until ``finished``."""

    def reach(self, shape: ModelShape) -> float:
        """Return the largest ratio it can meet on a model of this shape."""

    def plan(self, request: PruningRequest) -> PruningPlan:
        """Return a plan of the *current* model (``request.shape``); the caller composes it with the plan so far.

        Raise ``OutOfReach`` with the reachable range for a ratio that cannot be met (``budget.check_reach``).
        """

    def finished(self, plan: PruningPlan, budget: Budget) -> bool:
        """Whether this plan of the original model needs no further step."""

    def tensors(self, request: TensorRequest) -> dict[str, Tensor]:
        """Make the new tensors of a plan (``blocks.POSITION.NAME`` -> tensor) that are not there yet; {} for none."""


class RecoveryMethod(Protocol):
    """Trains a pruned model. ``recovery.options.TrainingOptions`` has all of this but ``name``, ``paper``, ``recover``."""

    name: ClassVar[str]
    paper: ClassVar[str]

    @property
    def interleaved(self) -> bool:
        """Whether it trains behind every step of a progressive strategy, and the next step sees the trained model.

        ``recover`` is then called once a step, each time with an equal share of the text; else once, at the end.
        """

    def check(self) -> None:
        """Raise a FlexiError for options that cannot work; called before anything is loaded."""

    def refuses(self, plan: PruningPlan) -> str | None:
        """Return why it has nothing to train in a plan's model, and what to do; None where it has."""

    def recover(self, request: RecoveryRequest) -> Recovered:
        """Return the recovered model; train copies, since the request's model shares storage with the original.

        The model has the modules of the request's: adapters of its own are merged into the weights. What was not trained
        is the same tensor as before, so that it is known to be equal. Only asked about plans that it does not refuse.
        """


class Evaluator(Protocol):
    """Measures models: all candidates of a request at once, so that they can share a sweep."""

    name: ClassVar[str]

    def check(self) -> None:
        """Raise a FlexiError for options that cannot work; called before anything is loaded."""

    def inputs(self, data: Path | None, corpora: Mapping[str, Corpus]) -> str:
        """Return a digest of the text or tasks it would read, so that a record made on other data is not reused."""

    def evaluate(self, request: EvaluationRequest) -> Iterable[Outcome]:
        """Yield one outcome a candidate, in their order, as soon as it is known: what is yielded is kept after a kill."""


ALL_BLOCKS = sys.maxsize


class Statistic(Protocol):
    """Running sums over calibration tokens, per block.

    ``span`` is how many consecutive blocks, ending at the observed one, its value for a block depends on (1: the block
    alone; ALL_BLOCKS: all up to it). ``backward`` says that it reads gradients (``GradientTrace``) instead of activations
    (``BlockTrace``).
    """

    span: ClassVar[int]
    backward: ClassVar[bool]

    @property
    def name(self) -> str:
        """Its name in ``needs``."""

    def observe(self, trace: Any) -> dict[str, Tensor]:
        """Return what one batch (forward) or one set of samples (backward) adds to the block's sums, float32."""

    def finish(self, totals: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Turn the sums over all batches into the statistic's quantities."""


class Corpus(Protocol):
    """A source of text. Its attributes may be class variables, fields or properties.

    A corpus of instructions may have an attribute ``response`` beside them: the text in each document behind which the
    response begins; what is in front of it has no loss in training.
    """

    @property
    def name(self) -> str:
        """Its name in the catalogue."""

    @property
    def licence(self) -> str:
        """The licence of the text."""

    @property
    def provenance(self) -> str:
        """Where the text comes from, with its version."""

    @property
    def join(self) -> str:
        """What stands between two documents when they are read as one stream."""

    def texts(self, split: str, data: Path | None) -> Iterable[str]:
        """Yield the documents of a split ("calibration" or "held-out"); ``data`` is the user's local data folder."""


class ReportFormat(Protocol):
    """Turns the rows of a study into a file."""

    name: ClassVar[str]
    filename: ClassVar[str]

    def render(self, rows: Any, title: str) -> str:
        """Render the rows (a pandas DataFrame, see ``store.rows``) as text; empty: there is nothing to show, and no file."""


# ------------------------------------------------------------------------------------- what they are given


class Weights(Protocol):
    """Lazy access to the weights of a model: in a pruning request the current one's, in a tensor request the original's."""

    def block(self, index: int) -> Mapping[str, Tensor]:
        """Return the linear maps of a block by role: query, key, value, attention_output, gate, up, down."""

    def vectors(self, index: int) -> Mapping[str, Tensor]:
        """Return the norms and biases of a block by name, as in ``ModelShape.vectors``."""

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return ``make()``, computed once per model: for factorisations that several plans need."""


@dataclass(frozen=True)
class Budget:
    """How much may stay: stored parameters of the plan <= (1 - ratio) x parameters of the original."""

    parameters: int
    ratio: float

    @property
    def target(self) -> int:
        """Most parameters that may be stored."""
        return self.parameters - math.ceil(self.ratio * self.parameters - 1e-3)  # what a float is off is no parameter

    def met(self, plan: PruningPlan) -> bool:
        """Whether the plan stores few enough parameters."""
        return plan.stored_parameters <= self.target


def _no_quality(plans: Sequence[PruningPlan], measure: str = "loss") -> list[float]:
    raise RuntimeError("this request cannot run candidate plans")


def _no_statistics(names: Iterable[str]) -> Statistics:
    raise RuntimeError("this request cannot take statistics")


@contextmanager
def no_progress(title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show nothing, where a ``progress`` is asked for."""
    yield lambda n=1, note="": None


def _no_traces(*_: Any) -> Iterable[tuple[BlockTrace, Tensor]]:
    raise RuntimeError("this request cannot run blocks")


@dataclass(frozen=True)
class PruningRequest:
    """What a metric and a strategy are handed. ``plan`` is the plan so far, ``shape`` the shape of its model.

    ``scores`` is set for strategies. ``weights`` are the current model's, and None when only parameters are to be
    counted (``counting``): a strategy then makes any choice of the right size. ``quality(plans, measure)`` runs plans of
    the *original* model on the calibration tokens, in one sweep, and returns a number for each, lower is better; measure
    "loss": mean negative log-likelihood in nats per token; "turn": 1 - cosine of the last block's output and the original
    model's, mean over tokens; "chrf": minus chrF++ of what it generates as the second half of each calibration window;
    infinity where a model breaks down.
    Tensors that the plan so far has are known; others are made by the strategy that a plan's origin names.
    progress(title, total): for what takes long, a context manager that yields ``advance(n, note="")``.
    """

    shape: ModelShape
    plan: PruningPlan
    budget: Budget
    statistics: Statistics = field(default_factory=lambda: Statistics({}))
    weights: Weights | None = None
    scores: Scores | None = None
    seed: int = 0
    quality: Callable[..., list[float]] = _no_quality
    progress: Callable[..., Any] = no_progress

    @property
    def counting(self) -> bool:
        """Whether only sizes matter: no weights, statistics or meaningful scores are there."""
        return self.weights is None


@dataclass(frozen=True)
class TensorRequest:
    """What ``tensors`` is handed: a plan of the original model, and what its new tensors can be made of.

    before: the plan in front of this step (the identity for strategies that take one step). weights: the original's.
    attached: tensors that the plan has already, from earlier steps. statistics(names): of the model of ``before``.
    quality: as in ``PruningRequest``; ``quality(plans, measure, tensors)`` takes the new tensors of each plan.
    traces(position, (plan, end)): for every calibration batch what the block at a position of ``before``'s model does,
    and the residual stream (tokens, d) behind block ``end`` of another plan's model (``before`` itself, or the
    identity's) on the same tokens.
    """

    plan: PruningPlan
    before: PruningPlan
    weights: Weights
    attached: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    statistics: Callable[[Iterable[str]], Statistics] = _no_statistics
    quality: Callable[..., list[float]] = _no_quality
    traces: Callable[[int, tuple[PruningPlan, int]], Iterable[tuple[BlockTrace, Tensor]]] = _no_traces


@dataclass(frozen=True)
class BlockTrace:
    """What one block did to one batch, in the compute dtype unless said otherwise. d is the hidden size.

    input, output: (tokens, d), the residual stream before and after the block. before: the inputs of the preceding
    ``span - 1`` blocks, oldest first. attention_inner, mlp_inner: inputs of the attention output map (tokens, query
    heads x head_dim) and of the down map (tokens, channels); None where the sub-layer is absent. middle: (tokens, d),
    the residual stream after attention. attention_weight, mlp_weight: weights of those two maps, (d, columns).
    last: (tokens,) bool, True at the last token of each sequence; sequences are of equal length. sequences: their numbers
    among the ``total`` calibration sequences.
    """

    index: int
    kv_heads: int
    group: int
    input: Tensor
    middle: Tensor
    output: Tensor
    before: tuple[Tensor, ...]
    attention_inner: Tensor | None
    mlp_inner: Tensor | None
    attention_weight: Tensor | None
    mlp_weight: Tensor | None
    last: Tensor
    sequences: range = range(0)
    total: int = 0

    def among_all(self, values: Tensor) -> Tensor:
        """Return something of each sequence of this batch, (sequences, ...), in its place among all: (total, ...).

        Elsewhere it is zero, so that the sum over batches, which is what becomes of a statistic, has all sequences.
        """
        every = values.new_zeros(self.total, *values.shape[1:])
        every[self.sequences.start : self.sequences.stop] = values
        return every


@dataclass(frozen=True)
class LinearTrace:
    """Inputs and output gradients of one linear map for a set of samples.

    input: (samples, tokens, columns); output_gradient: (samples, tokens, rows); weight: (rows, columns). The loss of a
    sample is its mean next-token negative log-likelihood, so gradients are per sample.
    """

    input: Tensor
    output_gradient: Tensor
    weight: Tensor


@dataclass(frozen=True)
class GradientTrace:
    """Gradients of one block for the gradient samples: role -> LinearTrace."""

    index: int
    kv_heads: int
    group: int
    head_dim: int
    maps: Mapping[str, LinearTrace]


IGNORED = -100  # the label of a token without a loss, as in torch's cross entropy


@dataclass(frozen=True)
class TrainingText:
    """Text to train or to measure on, packed into windows of equal length.

    ids: (windows, tokens) token ids. labels: the same with ``IGNORED`` where no loss is taken (prompts of instruction data).
    """

    ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class RecoveryRequest:
    """What a recovery method is handed: a pruned model in memory, the plan it came from, and text to train on.

    text: at least as many windows as ``tokens`` asks for, in the order in which they are to be seen; held_out: what to
    measure the loss on during the training. tokens: the budget, the same for every method of a study: as many tokens of
    ``text`` pass a trained module forward and backward. folder: for checkpoints of the training; where one lies there
    that was made by the same call, training goes on from it. Files directly in it are kept beside the recovered model, its
    subfolders are not. teacher(ids, blocks): for a batch of windows of ids (rows, tokens) the original model's residual
    stream behind each of these blocks, (rows, tokens, hidden) in the compute dtype; -1 is in front of the first block.
    progress(title, total): a context manager that yields ``advance(n, note="")``; say(text). device, dtype: where and in
    what to compute; weights are trained in float32 where dtype is lower.
    """

    model: torch.nn.Module
    plan: PruningPlan
    text: TrainingText
    held_out: TrainingText
    tokens: int
    seed: int
    folder: Path
    teacher: Callable[[Tensor, Sequence[int]], Mapping[int, Tensor]]
    progress: Callable[..., Any]
    say: Callable[[str], None] = lambda text: None
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class Recovered:
    """What a recovery method gives back.

    curve: points of the training in order, mappings with ``tokens`` and any of ``loss`` (what the method minimises, in
    its unit, mean over the tokens since the last point), ``held_out_loss`` (next-token, nats per token) and, where the
    model does not run as a whole, ``held_out_block_loss`` (what the method minimises, on the held-out text). facts: what
    is to stand in the record (trained parameters, bits, stored bytes of packed weights). notes: for people (that
    training diverged and was stopped, for instance).
    """

    model: torch.nn.Module
    curve: tuple[Mapping[str, float], ...] = ()
    facts: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "curve", tuple(_plain(point) for point in self.curve))
        object.__setattr__(self, "facts", _plain(self.facts))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return numbers as Python's own: those of NumPy and torch are no JSON."""
    return {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}


@dataclass(frozen=True)
class Candidate:
    """One model to be measured."""

    label: str
    plan: PruningPlan


Tokens = tuple[int, ...]


class Likelihoods(Protocol):
    """Answers (context, continuation) pairs of token ids for every candidate."""

    def __call__(
        self, requests: Sequence[tuple[Tokens, Tokens]], title: str, softmax_dtype: str = "float32"
    ) -> list[list[tuple[float, bool]]]:
        """Return the summed log-probability of each continuation, and whether it is the greedy one.

        softmax_dtype: what the log-probability of every token is rounded to before they are added up, as lm-eval's HFLM
        does by its option of that name; it is computed in float32 in any case.
        """


@dataclass(frozen=True)
class EvaluationRequest:
    """What an evaluator is handed.

    likelihoods(requests, title): for every candidate, for every (context, continuation) pair of token ids, the summed
    log-probability of the continuation (float) and whether it is the greedy one; one sweep for all candidates,
    journalled. A context may not be empty. NaN marks a model that broke down.
    model(index): the candidate as a transformers model in memory. folder(index): the candidate exported to a folder.
    progress(title, total): a context manager that yields ``advance(n)``.
    max_length: the most tokens the models take at once; None: what the tokenizer says.
    """

    candidates: tuple[Candidate, ...]
    tokenizer: Any
    likelihoods: Likelihoods
    model: Callable[[int], Any]
    folder: Callable[[int], Path]
    progress: Callable[..., Any]
    corpora: Mapping[str, Corpus]
    data: Path | None = None
    seed: int = 0
    dtype: str = "float32"
    max_length: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What an evaluator found about one candidate.

    documents: per-document outcomes, one flat mapping each; what has ``task``, ``doc_id`` and a number NAME is compared
    between methods as the measurement TASK_NAME (of a perplexity it is the document's loss, nats a token). failure says why
    there is no number, if there is none. versions: what the numbers depend on beside installed packages (task versions), for
    the record.
    """

    measurements: tuple[Measurement, ...] = ()
    documents: tuple[Mapping[str, Any], ...] = ()
    failure: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
